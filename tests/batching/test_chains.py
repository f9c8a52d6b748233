"""Chains as tokens: the answers alone are scored, whatever tokenizer and template; and where chains may not go."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import clha_fast
from clha_fast import CLHAOptions, CoHOptions, HeadOptions, RankingInputs, SFTOptions, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.totals import dataset_counts, local_counts
from clha_fast.data import RankedRecord, RecordError, render_prompt
from clha_fast.data.chains import ask
from clha_fast.training.samples import first_prompts
from tests.support.chat_templates import MESSAGES, SHAPES, blank_tokenizer, chat_tokenizer
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import trainer

COH = CoHOptions(good_marker="Kind:", bad_marker="Because not:")
BEST, WORST = "Because it reflects\n\nthe sea.", "Air scatters light"
# (markers, answers) of each chain in turn; "\n\n" belongs to a second marker.
CHAINS = [
    ["Kind:", " " + BEST],
    ["Because not:", " " + WORST],
    ["Kind:", " " + BEST, "\n\nBecause not:", " " + WORST],
    ["Because not:", " " + WORST, "\n\nKind:", " " + BEST],
]


def decode(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def parts_of(tokenizer: Any, feature: Any, number: int) -> list[str]:
    """Text of each run of tokens that are alike scored, the first unscored."""
    runs: list[tuple[int, list[int]]] = []
    for token, scored in zip(feature["completion_ids"][number], feature["completion_mask"][number], strict=True):
        if not runs or runs[-1][0] != scored:
            runs.append((scored, []))
        runs[-1][1].append(token)
    assert [scored for scored, _ in runs] == [place % 2 for place in range(len(runs))]
    return [decode(tokenizer, ids) for _, ids in runs]


def answers_of(batch: dict[str, Any], tokenizer: Any) -> list[str]:
    """Text of each candidate's scored tokens, from the tensors alone."""
    return [decode(tokenizer, ids) for ids in batch["targets"].split(batch["candidate_lengths"].tolist())]


def record(prompt: Any, **changes: Any) -> RankedRecord:
    return RankedRecord(prompt, (BEST, WORST), (3.0, -9.0), 1, source="f:7", **changes)


@pytest.mark.parametrize("name", SHAPES)
def test_a_chain_is_one_assistant_turn(name: str) -> None:
    shape = SHAPES[name]
    tokenizer = chat_tokenizer(shape)
    collator = RankedCollator(tokenizer, COH)
    feature = collator.tokenize_record(record(MESSAGES))
    assert decode(tokenizer, feature["prompt_ids"]) == shape.prompt
    for number, chain in enumerate(CHAINS):
        wanted = [shape.before + chain[0], *chain[1:-1], chain[-1] + shape.closing]
        assert parts_of(tokenizer, feature, number) == wanted
        message = {"role": "assistant", "content": "".join(chain)}
        whole = tokenizer.apply_chat_template([*MESSAGES, message], tokenize=False)
        found = decode(tokenizer, [*feature["prompt_ids"], *feature["completion_ids"][number]])
        assert whole.startswith(found if shape.closing in whole else found.removesuffix(shape.closing))
    assert (feature["rewards"], feature["sft_index"]) == (None, 0)
    # The answers of two batches of plain responses, each with its end: the scored tokens are theirs.
    assert answers_of(collator([record(MESSAGES)]), tokenizer) == [
        " " + BEST + shape.closing,
        " " + WORST + shape.closing,
        f" {BEST} {WORST}{shape.closing}",
        f" {WORST} {BEST}{shape.closing}",
    ]


@pytest.mark.parametrize("make", [make_tokenizer, blank_tokenizer, lambda: chat_tokenizer(SHAPES["no end of turn"])])
def test_text_prompts(make: Any) -> None:
    """With a BOS in front, with a blank in front of every text, with neither: markers and answers are the same."""
    tokenizer = make()
    feature = RankedCollator(tokenizer, COH).tokenize_record(record("Why? "))
    for number, chain in enumerate(CHAINS):
        assert parts_of(tokenizer, feature, number) == [*chain[:-1], f"{chain[-1]}</s>"]
    plain = RankedCollator(tokenizer).tokenize_record(record("Why? "))
    assert feature["prompt_ids"] == plain["prompt_ids"]
    # A part's tokens do not depend on what stands beside it.
    alone = [
        ids[mask.index(1) :] for ids, mask in zip(feature["completion_ids"], feature["completion_mask"], strict=True)
    ]
    assert alone[2][-len(alone[1]) :] == alone[1]
    assert alone[3][-len(alone[0]) :] == alone[0]


def test_messages_without_a_template() -> None:
    tokenizer = make_tokenizer()
    feature = RankedCollator(tokenizer, COH).tokenize_record(record(MESSAGES))
    assert decode(tokenizer, feature["prompt_ids"]).endswith("User: Why?\n\nAssistant: ")
    assert parts_of(tokenizer, feature, 3) == [*CHAINS[3][:-1], f" {BEST}</s>"]


def test_rows_and_targets_of_a_batch() -> None:
    tokenizer = make_tokenizer()
    collator = RankedCollator(tokenizer, COH)
    records = [record("Why? "), RankedRecord("Who?", ("a dog",), source="f:8")]
    batch = collator(records)
    features = [collator.tokenize_record(item) for item in records]
    assert batch["candidates_per_prompt"].tolist() == [4, 1]
    assert batch["input_ids"].shape[0] == 5
    masks = [mask for feature in features for mask in feature["completion_mask"] or ()]
    assert batch["candidate_lengths"].tolist() == [sum(mask) for mask in masks]
    flat, index = batch["input_ids"].flatten(), batch["row_index"]
    assert torch.equal(flat[index + 1], batch["targets"])
    width, row = batch["input_ids"].shape[1], 0
    places = []
    for feature in features:
        for ids, mask in zip(feature["completion_ids"], feature["completion_mask"], strict=True):
            start = row * width + len(feature["prompt_ids"]) - 1
            places += [start + k for k, scored in enumerate(mask) if scored]
            assert batch["input_ids"][row, len(feature["prompt_ids"]) :][: len(ids)].tolist() == ids
            row += 1
    assert index.tolist() == places
    assert (batch["num_inert"], "rewards" in batch, batch["sft_index"].tolist()) == (0, False, [0, 0])
    assert answers_of(batch, tokenizer)[4] == " a dog</s>"


def test_the_loss_is_that_of_the_answers_tokens_by_hand() -> None:
    """Full logits of the model, the marker's tokens skipped by their text."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), max_position_embeddings=512)
    batch = RankedCollator(tokenizer, COH)([record("Why? ")])
    feature = RankedCollator(tokenizer, COH).tokenize_record(record("Why? "))
    total, count = 0.0, 0
    for number, chain in enumerate(CHAINS):
        ids = [*feature["prompt_ids"], *feature["completion_ids"][number]]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = len(feature["prompt_ids"])
        for place, part in enumerate([*chain[:-1], chain[-1] + "</s>"]):
            text = ""
            while text != part:
                if place % 2:
                    total -= float(logps[at - 1, ids[at]])
                    count += 1
                text = text + decode(tokenizer, ids[at : at + 1])
                at += 1
        assert at == len(ids)
    clha_fast.attach(model, COH)
    assert model(**batch).loss.item() == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "name", ["chatml", "llama 3", "gemma", "zephyr", "mistral", "empty thoughts", "no end of turn"]
)
def test_asking_begins_with_the_tokens_of_training(name: str) -> None:
    tokenizer = chat_tokenizer(SHAPES[name])
    feature = RankedCollator(tokenizer, COH).tokenize_record(record(MESSAGES))
    marker = feature["completion_ids"][0][: feature["completion_mask"][0].index(1)]
    text, _ = render_prompt(ask(MESSAGES, COH.good_marker), tokenizer)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [*feature["prompt_ids"], *marker]
    (example,) = first_prompts([feature], 1, None)
    assert example["prompt_ids"] == [*feature["prompt_ids"], *marker]


def test_a_begun_answer_is_continued_by_the_chain() -> None:
    tokenizer = chat_tokenizer(SHAPES["chatml"])
    begun = (*MESSAGES, {"role": "assistant", "content": "Well. "})
    feature = RankedCollator(tokenizer, COH).tokenize_record(record(begun))
    assert decode(tokenizer, feature["prompt_ids"]) == SHAPES["chatml"].prompt + "Well. "
    assert parts_of(tokenizer, feature, 2) == [*CHAINS[2][:-1], CHAINS[2][-1] + "<|im_end|>"]


def test_an_end_of_turn_stands_at_the_end_of_a_chain_alone() -> None:
    for name, end in (("chatml", "<|im_end|>"), ("zephyr", "</s>")):
        tokenizer = chat_tokenizer(SHAPES[name])
        closed = RankedRecord(MESSAGES, (f"{BEST}{end}\n", f"{WORST}{end}"))
        found = RankedCollator(tokenizer, COH).tokenize_record(closed)
        assert (
            found["completion_ids"]
            == RankedCollator(tokenizer, COH).tokenize_record(record(MESSAGES))["completion_ids"]
        )
    tokenizer = make_tokenizer()
    found = RankedCollator(tokenizer, COH).tokenize_record(RankedRecord("p", ("a dog</s>\n", "a cat</s>")))
    assert all(ids.count(1) == 1 and ids[-1] == 1 for ids in found["completion_ids"])
    for texts, number in ((("</s>", "a"), 0), (("a", "</s></s>"), 1), (("a", " "), 1)):
        with pytest.raises(RecordError, match=rf"f:7: completions\[{number}\]: expected a response with at least one"):
            RankedCollator(tokenizer, COH).tokenize_record(RankedRecord("p", texts, source="f:7"))


def test_a_template_that_trims_takes_the_last_answer_s_blanks() -> None:
    tokenizer = chat_tokenizer(SHAPES["llama 3"])
    feature = RankedCollator(tokenizer, COH).tokenize_record(RankedRecord(MESSAGES, ("Yes \n", "\n No")))
    assert parts_of(tokenizer, feature, 2) == ["Kind:", " Yes \n", "\n\nBecause not:", "\n No<|eot_id|>"]
    assert parts_of(tokenizer, feature, 3) == ["Because not:", "\n No", "\n\nKind:", " Yes<|eot_id|>"]


def test_a_template_that_changes_the_text_is_refused() -> None:
    template = SHAPES["chatml"].template.replace("m['content'] }", "m['content'] | replace('\\n\\n', '\\n') }")
    tokenizer = chat_tokenizer(dataclasses.replace(SHAPES["chatml"], template=template))
    with pytest.raises(RecordError, match=r"^f:7: chains\[2\]: expected a chat template that writes it as it is, got"):
        RankedCollator(tokenizer, COH).tokenize_record(record(MESSAGES))
    leading = CoHOptions(good_marker=" Kind:")
    assert RankedCollator(chat_tokenizer(SHAPES["chatml"]), leading).tokenize_record(record(MESSAGES))
    with pytest.raises(RecordError, match=r"^f:7: chains\[0\]: expected a chat template that writes it as it is"):
        RankedCollator(chat_tokenizer(SHAPES["llama 3"]), leading).tokenize_record(record(MESSAGES))


def test_truncation_is_that_of_candidates() -> None:
    tokenizer = make_tokenizer()
    whole = RankedCollator(tokenizer, COH).tokenize_record(record("Why? Why? Why? "))
    markers = [mask.index(1) for mask in whole["completion_mask"]]
    message = rf"^f:7: max_length: expected room for the {markers[0]} tokens of a chain's marker and an answer"
    with pytest.raises(RecordError, match=f"{message}, got {markers[0]}$"):
        RankedCollator(tokenizer, COH, max_length=markers[0]).tokenize_record(record("Why? "))
    cut = RankedCollator(tokenizer, COH, max_length=60).tokenize_record(record("Why? " * 40))
    assert max(map(len, cut["completion_ids"])) + len(cut["prompt_ids"]) == 60
    assert [len(ids) for ids in cut["completion_ids"]] == [len(mask) for mask in cut["completion_mask"] or ()]


@pytest.mark.parametrize("name", ["chatml", "gemma", "no end of turn", "text"])
def test_each_answer_of_a_chain_has_the_limit_to_itself(name: str) -> None:
    """Parts of a chain are those of the whole one, each answer cut, so both answers of an order chain are there."""
    tokenizer = make_tokenizer() if name == "text" else chat_tokenizer(SHAPES[name])
    row = record("Why? " if name == "text" else MESSAGES)

    def parts(feature: Any, number: int) -> list[list[int]]:
        pairs = zip(feature["completion_mask"][number], feature["completion_ids"][number], strict=True)
        return [[token for _, token in run] for _, run in itertools.groupby(pairs, key=lambda pair: pair[0])]

    plain = RankedCollator(tokenizer, COH)
    whole = [parts(plain.tokenize_record(row), number) for number in range(4)]
    lengths = [len(answer) for chain in whole for answer in chain[1::2]]
    assert len(set(lengths)) > 2
    for limit in (1, 2, min(lengths) - 1, *sorted(set(lengths))):
        collator = RankedCollator(tokenizer, COH, max_completion_length=limit)
        feature, _, cut = collator.tokenize_counted(row)
        wanted = [[part[:limit] if place % 2 else part for place, part in enumerate(chain)] for chain in whole]
        assert [parts(feature, number) for number in range(4)] == wanted
        # EOS or the end of turn stands behind a last answer that was not cut, and there alone.
        assert [len(chain[-1]) <= limit for chain in whole] == [
            ours[-1] == theirs[-1] for ours, theirs in zip(wanted, whole, strict=True)
        ]
        assert cut == sum(any(len(answer) > limit for answer in chain[1::2]) for chain in whole)
        # What is too long for max_length is cut from the end of the chain, as of a response.
        both = RankedCollator(tokenizer, COH, max_completion_length=limit, max_length=len(feature["prompt_ids"]) + 40)
        for short, long in zip(both.tokenize_record(row)["completion_ids"], feature["completion_ids"], strict=True):
            assert short == long[: len(short)]
    assert cut == 0


def test_two_long_answers_both_train() -> None:
    tokenizer = make_tokenizer()
    row = RankedRecord("Why? ", ("the cat sat " * 30, "a dog ran " * 30))
    feature, _, cut = RankedCollator(tokenizer, COH, max_completion_length=9).tokenize_counted(row)
    assert [sum(mask) for mask in feature["completion_mask"]] == [9, 9, 18, 18]
    assert cut == 4
    assert all(ids[-1] != tokenizer.eos_token_id for ids in feature["completion_ids"])
    dataset = RankedDataset([row, RankedRecord("Who?", ("a", "b"))], RankedCollator(tokenizer, COH, None, None, 9))
    assert dataset.cut_completions == 4


def test_datasets_workers_and_tables() -> None:
    datasets = pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    collator = RankedCollator(tokenizer, COH)
    rows = make_rows(70)
    wanted = collator(rows[:6])
    table = datasets.Dataset.from_list(rows)
    made = [RankedDataset(rows, collator), RankedDataset(rows, collator, num_proc=2), RankedDataset(table, collator)]
    for dataset in made:
        loader = DataLoader(dataset, batch_size=6, collate_fn=collator)
        batch = next(iter(loader))
        assert batch.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(batch[name], value) if isinstance(value, torch.Tensor) else batch[name] == value
        counts = dataset_counts(dataset, COH, True)
        batches = [CandidateBatch.from_dict(part) for part in loader]
        assert torch.equal(counts, local_counts(batches, COH, 4))
    mapped = table.map(lambda row: dict(collator.tokenize_record(row)), remove_columns=table.column_names)
    assert torch.equal(collator(list(mapped)[:6])["targets"], wanted["targets"])
    plain = RankedDataset(table, RankedCollator(tokenizer))
    assert plain[0].get("completion_mask") is None
    assert torch.equal(RankedCollator(tokenizer)([plain[0]])["targets"], RankedCollator(tokenizer)(rows[:1])["targets"])
    assert torch.equal(pickle.loads(pickle.dumps(collator))(rows[:6])["targets"], wanted["targets"])


def test_answers_in_the_middle_are_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # transformers puts it there
    collator = RankedCollator(make_tokenizer(), COH)
    with caplog.at_level("WARNING"):
        collator([RankedRecord("p", ("a", "b"))])
        assert "chains" not in caplog.text
        collator([RankedRecord("p", ("a", "b", "c"), source=f"f:{k}") for k in (3, 4)])
    assert caplog.text.count("coh: chains are made of the best and the worst answer of a record; the ones between") == 1


def test_chains_and_answers_are_told_apart(tmp_path: Path) -> None:
    tokenizer, rows = make_tokenizer(), make_rows(3)
    chains, plain = RankedCollator(tokenizer, COH), RankedCollator(tokenizer, drop_inert=False)
    with pytest.raises(
        ValueError, match=r"completion_mask: expected answers for the objective 'clha', got chains; tok"
    ):
        plain([chains.tokenize_record(rows[0])])
    with pytest.raises(ValueError, match=r"completion_mask: expected chains for the objective 'coh', got answers; tok"):
        chains([plain.tokenize_record(rows[0])])
    model = make_model(len(tokenizer))
    for objective, batch, message in (
        (COH, plain(rows), r"expected chains with the markers \[\"Kind:\", .*\] for the objective 'coh', got answers"),
        (CoHOptions(), chains(rows), r"markers \[\"A helpful answer:\", .* got chains with the markers \[\"Kind"),
        (SFTOptions(), chains(rows), r"expected answers for the objective 'sft', got chains with the markers"),
    ):
        with clha_fast.attach(model, objective), pytest.raises(ValueError, match=message):
            model(**batch)
    ours = trainer(tmp_path, model)
    with pytest.raises(ValueError, match="expected answers for the objective 'clha', got chains"):
        ours.compute_loss(model, chains(rows))
    feature = chains.tokenize_record(rows[0])
    for masks, message in (
        ([[1]] * len(feature["completion_ids"]), "completion_mask: expected a number for each token"),
        (
            [[0] * len(ids) for ids in feature["completion_ids"]],
            r"completion_mask\[0\]: expected a scored token, got none",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            chains([{**feature, "completion_mask": masks}])
    assert CLHAOptions().markers is None


def test_it_learns_to_answer_by_the_marker() -> None:
    """A few steps: asked with the good marker the model prefers the good answer, with the bad one the other."""
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer)).train()
    rows = [{"prompt": f"say {k}: ", "completions": ["the cat sat", "a dog ran"]} for k in range(2)]
    objective = CoHOptions(good_marker="good:", bad_marker="bad:")
    batch = RankedCollator(tokenizer, objective)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    with clha_fast.attach(model, objective):
        losses = []
        for _ in range(12):
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    model.eval()
    for marker, first in (("good:", batch["targets"][0]), ("bad:", batch["targets"][batch["candidate_lengths"][0]])):
        ids = tokenizer(ask("say 9: ", marker), return_tensors="pt").input_ids
        with torch.no_grad():
            assert model(ids).logits[0, -1].argmax() == first


def test_metrics_of_a_batch_are_the_reference_s() -> None:
    tokenizer = make_tokenizer()
    model, batch = make_model(len(tokenizer)), CandidateBatch.from_dict(RankedCollator(tokenizer, COH)(make_rows(3)))
    with torch.no_grad():
        logits = model(**batch.model_inputs()).logits.flatten(0, 1)[batch.row_index]
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    given = RankingInputs(batch.candidate_lengths, batch.candidates_per_prompt, None, batch.sft_index)
    _, values, _ = reference.loss(logps, batch.targets, given, HeadOptions(), COH)
    clha_fast.attach(model, COH)
    torch.testing.assert_close(model(**batch.as_dict()).metrics.values, values, rtol=1e-4, atol=1e-4)
