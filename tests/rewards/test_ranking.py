"""Answers in order: scores in closed form and against the model's own logits, ties, odd input, and what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.data import RankedRecord, RecordError, read_records
from clha_fast.hf import rank
from clha_fast.models.segment_masks import UnsupportedLayoutError
from clha_fast.rewards.policy import Policy
from clha_fast.rewards.ranking import rank_file
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.scoring import score_records
from tests.support.adapters import BODY, lora_config, stir
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.reward_models import by_length, spread
from tests.support.tiny import make_model, make_rows, make_tokenizer, own_scores

TOKENIZER = make_tokenizer()
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_uniform_model_gives_every_answer_minus_log_v() -> None:
    model = make_model(len(TOKENIZER))
    nn.init.zeros_(model.lm_head.weight)
    order, scores = rank(model, TOKENIZER, "say", ["a cat", "a dog ran over it", "a"])
    assert scores == pytest.approx([-math.log(len(TOKENIZER))] * 3, abs=1e-6)
    assert order == [0, 1, 2], "equal scores stay in the order given"


def test_scores_are_those_of_the_models_own_logits() -> None:
    model = spread(make_model(len(TOKENIZER)))
    answers = ["the cat sat", "a dog ran over it with joy", "rain", "the cat sat"]
    found = rank(model, TOKENIZER, "say 3: on a mat", answers, batch_size=2)
    expected = own_scores(model, TOKENIZER, "say 3: on a mat", answers)
    assert found.scores == pytest.approx(expected, abs=1e-5)
    assert found.scores[0] == found.scores[3]
    assert found.order == sorted(range(4), key=lambda k: (-expected[k], k))


def test_messages_one_answer_and_a_model_in_training() -> None:
    model, tokenizer = spread(make_model(len(TOKENIZER), attention_dropout=0.5)), make_tokenizer()
    tokenizer.chat_template = CHAT
    model.train()
    model.lm_head.eval()
    prompt = [{"role": "user", "content": "a cat"}]
    found = rank(model, tokenizer, prompt, ["sat"])
    assert found.order == [0]
    assert model.training
    assert not model.lm_head.training
    assert found.scores == pytest.approx(own_scores(model.eval(), tokenizer, prompt, ["sat"]), abs=1e-5)


def test_attached_models_and_adapters() -> None:
    model = spread(make_model(len(TOKENIZER)))
    answers = ["the cat sat", "a dog ran over it"]
    plain = rank(model, TOKENIZER, "say", answers)
    with clha_fast.attach(model):
        assert rank(model, TOKENIZER, "say", answers) == plain
    adapted = peft.get_peft_model(model, lora_config([*BODY, "lm_head"]))
    stir(adapted)
    found = rank(adapted, TOKENIZER, "say", answers)
    assert found.scores == pytest.approx(own_scores(adapted.eval(), TOKENIZER, "say", answers), abs=1e-5)
    assert found.scores != pytest.approx(plain.scores, abs=1e-3)


def test_an_attached_model_says_the_same_scores() -> None:
    model = spread(make_model(len(TOKENIZER)))
    record = RankedRecord("say", ("the cat sat", "a dog ran over it", "rain"))
    batch = RankedCollator(TOKENIZER)([record])
    with clha_fast.attach(model):
        output = model(**batch)
    assert output.scores.dtype == torch.float32
    assert output.scores.shape == (3,)
    assert not output.scores.requires_grad
    assert output.scores.tolist() == pytest.approx(
        rank(model, TOKENIZER, record.prompt, record.completions).scores, abs=1e-5
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "completions: expected at least one response"),
        (["a", ""], "completions[1]: expected a response that is not empty"),
        (["</s>"], "completions[0]: expected a response with at least one token"),
        ("a cat", "completions: expected a list of texts"),
        (["a", 3], "completions[1]: expected a text"),
    ],
)
def test_bad_answers_are_named(answers: Any, message: str) -> None:
    with pytest.raises(RecordError, match=r"^rank: ") as error:
        rank(make_model(len(TOKENIZER)), TOKENIZER, "say", answers)
    assert message in str(error.value)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="max_length: expected rows of at most the 128 positions"):
        rank(make_model(len(TOKENIZER)), TOKENIZER, "say", ["a cat " * 100])


def test_a_file_is_written_best_first(tmp_path: Path) -> None:
    policy = Policy(spread(make_model(len(TOKENIZER))), TOKENIZER)
    rows = make_rows(7)
    rows[2] = {**rows[2], "sft_index": 1, "subset": "odd"}
    result = rank_file(rows, tmp_path / "out.jsonl", policy, batch_size=4, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    for line, row, ranking in zip(lines, rows, result.rankings, strict=True):
        assert line["order"] == ranking.order
        assert line["completions"] == [row["completions"][k] for k in ranking.order]
        assert line["rewards"] == [row["rewards"][k] for k in ranking.order]
        assert line["mean_logps"] == sorted(ranking.scores, reverse=True)
        expected = own_scores(policy.model, TOKENIZER, row["prompt"], row["completions"])
        assert ranking.scores == pytest.approx(expected, abs=1e-5)
    assert lines[2]["sft_index"] == lines[2]["order"].index(1) or "sft_index" not in lines[2]
    assert lines[2]["subset"] == "odd"
    assert "sft_index" not in lines[0]
    # It is a file of ranked responses again, in the new order.
    assert [list(r.completions) for r in read_records(tmp_path / "out.jsonl")] == [x["completions"] for x in lines]
    same, pairs = result.agreement()
    assert pairs == sum(len(row["completions"]) * (len(row["completions"]) - 1) // 2 for row in rows)
    assert 0 < same < pairs


def test_a_reward_model_orders_by_its_rewards(tmp_path: Path) -> None:
    judge = RewardModel(by_length(), TOKENIZER)
    rows = [{"prompt": "say", "completions": ["a", "a cat sat on a mat", "a cat"]}]
    result = rank_file(rows, tmp_path / "out.jsonl", judge, progress=False)
    (record,) = score_records([RankedRecord("say", tuple(rows[0]["completions"]))], judge, progress=False)
    assert result.rankings[0].order == [1, 2, 0]
    (line,) = read_records(tmp_path / "out.jsonl")
    assert list(line.rewards or ()) == sorted(record.rewards or (), reverse=True)
    assert tuple(result.rankings[0].scores) == record.rewards
    assert result.agreement() == (1, 3)
    # Equal scores are half right; equal rewards order nothing.
    equal = [{"prompt": "say", "completions": ["a cat", "a mat", "a"], "rewards": [1.0, 0.0, 0.0]}]
    tied = rank_file(equal, tmp_path / "tied.jsonl", judge, progress=False)
    assert tied.rankings[0].scores[0] == tied.rankings[0].scores[1] != tied.rankings[0].scores[2]
    assert tied.agreement() == (2.5, 3)
    assert tied.agreement(by_reward=True) == (1.5, 2)
    with pytest.raises(ValueError, match="max_prompt_length: expected none with a reward model"):
        rank_file(rows, tmp_path / "no.jsonl", judge, max_prompt_length=3, progress=False)


@pytest.mark.parametrize("layout", ["packed", "shared", "auto"])
def test_a_prompt_is_computed_once_for_all_answers(layout: str) -> None:
    model = spread(make_model(len(TOKENIZER)))
    prompt, answers = "say 3: on a mat and then a dog ran", ["the cat sat", "rain", "a dog ran over it with joy"]
    expected = rank(model, TOKENIZER, prompt, answers)
    ran: list[int] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda module, args: ran.append(args[0].numel()))
    found = rank(model, TOKENIZER, prompt, answers, layout=layout)
    handle.remove()
    assert found.order == expected.order
    assert found.scores == pytest.approx(expected.scores, abs=1e-5)
    feature = RankedCollator(TOKENIZER).tokenize_record(RankedRecord(prompt, tuple(answers)))
    own = sum(map(len, feature["completion_ids"]))
    assert ran[-1] == own + len(feature["prompt_ids"]) * (3 if layout == "packed" else 1)


def test_rows_that_a_model_does_not_compute_are_refused() -> None:
    model = build(shrink("bloom", False))
    tokenizer = make_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(UnsupportedLayoutError, match="BloomAttention"):
        rank(model, tokenizer, "say", ["a cat", "rain"], layout="shared")
    assert rank(model, tokenizer, "say", ["a cat", "rain"], layout="auto") == rank(
        model, tokenizer, "say", ["a cat", "rain"]
    )


@pytest.mark.parametrize("layout", ["shared", "auto"])
def test_a_file_in_shared_rows(tmp_path: Path, layout: str) -> None:
    model = spread(make_model(len(TOKENIZER)))
    records = [RankedRecord(row["prompt"], tuple(row["completions"]), source="test") for row in make_rows(6)]
    files = []
    for name in ("padded", layout):
        judge = Policy(model, TOKENIZER, name)
        files.append(rank_file(records, tmp_path / name, judge, batch_size=5, progress=False))
    for one, other in zip(files[0].rankings, files[1].rankings, strict=True):
        assert one.order == other.order
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
