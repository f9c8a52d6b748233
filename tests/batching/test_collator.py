"""From records to a model's batch with real tokenizers: alignment, EOS, truncation, templates and what is refused."""

import pickle

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.data import RankedRecord, RecordError, plain_template, render_prompt
from clha_fast.objectives.clha import PUBLISHED

TEXTS = [
    "Why is the sky blue on a clear day?",
    "Air scatters short wavelengths of sunlight most, so blue light reaches us from everywhere.",
    "Because it reflects the sea, I think. User: Assistant: System:",
    "Wie heißt das auf Deutsch? Ärger, Öl und Übermut.",
]
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(bos="<s>", eos="</s>", pad="<pad>", template="<s> $A", chat=None):
    """A byte-level BPE tokenizer trained on the spot; `template` is what it makes of one text."""
    special = [token for token in ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>") if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if template:
        pairs = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = chat
    return fast


@pytest.fixture(scope="module")
def with_bos():
    return build()


@pytest.fixture(scope="module")
def without_bos():
    return build(bos=None, pad=None, template=None)


@pytest.fixture(scope="module")
def chat():
    return build(bos=None, eos="<|im_end|>", template=None, chat=CHATML)


RECORDS = [
    RankedRecord(TEXTS[0], (TEXTS[1], TEXTS[2], "No idea."), (5.0, 4.0, -1.0), source="f:1"),
    RankedRecord(TEXTS[3], ("Übermut.", "Öl"), (-2.0, -1.0), source="f:2"),
]


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def candidates(batch):
    """(prompt ids, scored ids) of every row, from the tensors alone."""
    batch = CandidateBatch.from_dict(batch)
    width = batch.input_ids.shape[1]
    spans = zip(
        batch.targets.split(batch.candidate_lengths.tolist()),
        batch.row_index.split(batch.candidate_lengths.tolist()),
        strict=True,
    )
    rows = []
    for targets, index in spans:
        if len(targets):
            row, first = divmod(int(index[0]), width)
            rows.append((batch.input_ids[row, : first + 1].tolist(), targets.tolist()))
    return rows


def test_rows_decode_to_prompt_and_closed_response(with_bos):
    batch = RankedCollator(with_bos, drop_inert=False)(RECORDS)
    assert batch["candidates_per_prompt"].tolist() == [3, 2]
    torch.testing.assert_close(batch["rewards"], torch.tensor([5.0, 4.0, -1.0, -2.0, -1.0]))
    texts = [(decode(with_bos, prompt), decode(with_bos, scored)) for prompt, scored in candidates(batch)]
    assert texts == [
        (f"<s>{record.prompt}", f"{completion}</s>") for record in RECORDS for completion in record.completions
    ]


@pytest.mark.parametrize("limits", [{}, {"max_length": 20}, {"pad_to_multiple_of": 16}])
def test_row_t_predicts_the_token_after_it_and_nothing_else_is_scored(with_bos, limits):
    batch = RankedCollator(with_bos, drop_inert=False, **limits)(RECORDS)
    flat, index = batch["input_ids"].flatten(), batch["row_index"]
    assert torch.equal(flat[index + 1], batch["targets"])
    assert len(index) == len(index.unique())
    prompts = [len(prompt) for prompt, _ in candidates(batch)]
    assert int(batch["attention_mask"].sum()) == sum(prompts) + len(index)
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == with_bos.pad_token_id).all())
    # Padding is on the right: every mask is ones, then zeros.
    assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_inert_candidates_are_dropped_and_counted(with_bos):
    collator = RankedCollator(with_bos)
    batch = collator(RECORDS)  # the second prompt: rewards 1 apart, target below 0
    assert batch["num_inert"] == 2
    assert batch["input_ids"].shape[0] == 3
    assert batch["candidate_lengths"].tolist()[3:] == [0, 0]
    assert len(batch["rewards"]) == 5
    whole = RankedCollator(with_bos, options=PUBLISHED.replace(noise_rule="none"))(RECORDS)
    assert whole["num_inert"] == 0
    assert candidates(batch) == candidates(whole)[:3]
    assert collator(RECORDS[1:])["input_ids"].shape == (1, 1)


def test_no_token_crosses_the_boundary(without_bos):
    # "Because" is made of several merges; whole it has fewer tokens than in two parts.
    record = RankedRecord("Bec", ("ause", "x"))
    prompt, scored = candidates(RankedCollator(without_bos)([record]))[0]
    assert decode(without_bos, prompt) == "Bec"
    assert decode(without_bos, scored) == "ause</s>"
    assert len(prompt) + len(scored) - 1 > len(without_bos("Because")["input_ids"])


def test_eos_is_scored_only_when_the_response_is_whole(with_bos):
    eos = with_bos.eos_token_id
    whole = with_bos(TEXTS[1], add_special_tokens=False)["input_ids"]
    for limit in (1, len(whole) - 1, len(whole), len(whole) + 1, len(whole) + 9):
        collator = RankedCollator(with_bos, max_completion_length=limit)
        scored = collator.tokenize_record(RECORDS[0])["completion_ids"][0]
        assert scored == [*whole, eos][:limit]
        assert (eos in scored) == (limit > len(whole))


def test_an_eos_in_the_text_is_not_doubled(with_bos):
    ids = RankedCollator(with_bos).tokenize_record(RankedRecord("p", ("Öl</s>", "Öl")))["completion_ids"]
    assert ids[0] == ids[1]
    assert ids[0].count(with_bos.eos_token_id) == 1


def test_prompt_is_cut_from_the_left_behind_its_bos(with_bos, without_bos):
    own = without_bos(TEXTS[0], add_special_tokens=False)["input_ids"]
    for limit in range(2, len(own) + 3):
        kept = RankedCollator(with_bos, max_prompt_length=limit).tokenize_record(RECORDS[0])["prompt_ids"]
        assert kept == [with_bos.bos_token_id, *own[-(limit - 1) :]]
        kept = RankedCollator(without_bos, max_prompt_length=limit).tokenize_record(RECORDS[0])["prompt_ids"]
        assert kept == own[-limit:]


def test_max_length_cuts_the_prompt_to_a_quarter_then_the_responses(with_bos):
    record = RECORDS[0]
    whole = RankedCollator(with_bos).tokenize_record(record)
    prompt, completions = whole["prompt_ids"], whole["completion_ids"]
    longest = max(map(len, completions))
    for limit in range(3, len(prompt) + longest + 2):
        cut = RankedCollator(with_bos, max_length=limit).tokenize_record(record)
        room = min(len(prompt), max(2, limit // 4, limit - longest))
        assert cut["prompt_ids"] == ([prompt[0], *prompt[len(prompt) - room + 1 :]])
        assert cut["completion_ids"] == [ids[: limit - room] for ids in completions]
        assert max(map(len, cut["completion_ids"])) + room <= limit


@pytest.mark.parametrize("lengths", [(40, (400, 3, 5)), (400, (2, 390)), (90, (90, 90)), (5, (300,))])
@pytest.mark.parametrize("limit", [32, 100, 333])
def test_one_long_response_leaves_a_prompt_to_all(without_bos, lengths, limit):
    prompt, sizes = lengths
    record = RankedRecord("a" * prompt, tuple("b" * size for size in sizes), source="f:1")
    whole = RankedCollator(without_bos).tokenize_record(record)
    cut = RankedCollator(without_bos, max_length=limit).tokenize_record(record)
    kept, longest = len(cut["prompt_ids"]), max(map(len, cut["completion_ids"]))
    assert kept >= min(len(whole["prompt_ids"]), limit // 4)
    assert kept + longest == min(limit, len(whole["prompt_ids"]) + max(map(len, whole["completion_ids"])))
    assert cut["prompt_ids"] == whole["prompt_ids"][-kept:]


def test_max_completion_length_protects_the_prompt(with_bos):
    whole = RankedCollator(with_bos).tokenize_record(RECORDS[0])
    limit = len(whole["prompt_ids"]) + 4
    cut = RankedCollator(with_bos, max_length=limit, max_completion_length=4).tokenize_record(RECORDS[0])
    assert cut["prompt_ids"] == whole["prompt_ids"]
    assert cut["completion_ids"] == [ids[:4] for ids in whole["completion_ids"]]


def test_truncation_does_not_depend_on_dropping(with_bos):
    # The inert third response is the longest: what it takes from the prompt must not change when it goes.
    record = RankedRecord(TEXTS[0], ("a", "b", TEXTS[1] * 2), (4.0, 0.0, 2.0), source="f:1")
    batches = [RankedCollator(with_bos, max_length=30, drop_inert=drop)([record]) for drop in (True, False)]
    assert [batch["num_inert"] for batch in batches] == [1, 0]
    assert candidates(batches[0]) == candidates(batches[1])[:2]


def test_what_a_tokenizer_puts_behind_a_text_does_not_end_the_prompt():
    both = build(template="<s> $A </s>")
    feature = RankedCollator(both).tokenize_record(RECORDS[0])
    assert decode(both, feature["prompt_ids"]) == f"<s>{TEXTS[0]}"
    assert feature["completion_ids"][2].count(both.eos_token_id) == 1
    assert RankedCollator(both).tokenize_record(RankedRecord("", ("a",)))["prompt_ids"] == [both.bos_token_id]


MESSAGES = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why?"},
)


def test_chat_template_writes_the_prompt(chat):
    batch = RankedCollator(chat)([RankedRecord(MESSAGES, ("a", "b"))])
    prompt, scored = candidates(batch)[0]
    start, end = "<|im_start|>", "<|im_end|>\n"
    dialogue = f"{start}user\nHi{end}{start}assistant\nYes?{end}{start}user\nWhy?{end}{start}assistant\n"
    assert decode(chat, prompt) == dialogue
    assert decode(chat, scored) == "a<|im_end|>"


def test_a_final_assistant_message_is_continued(chat):
    text, complete = render_prompt((*MESSAGES, {"role": "assistant", "content": "Well,"}), chat)
    assert complete
    assert text.endswith("<|im_start|>assistant\nWell,")


def test_a_template_s_bos_is_neither_doubled_nor_cut():
    tokenizer = build(chat="{{ bos_token }}" + CHATML)
    ids = RankedCollator(tokenizer).tokenize_record(RankedRecord(MESSAGES, ("a",)))["prompt_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    cut = RankedCollator(tokenizer, max_prompt_length=5).tokenize_record(RankedRecord(MESSAGES, ("a",)))["prompt_ids"]
    assert cut == [ids[0], *ids[-4:]]


def test_plain_template_without_a_chat_template(with_bos):
    system = {"role": "system", "content": "Be kind."}
    expected = "System: Be kind.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: Why?\n\nAssistant: "
    assert plain_template((system, *MESSAGES)) == expected
    ids = RankedCollator(with_bos).tokenize_record(RankedRecord((system, *MESSAGES), ("a",)))["prompt_ids"]
    assert decode(with_bos, ids) == f"<s>{expected}"
    assert plain_template(MESSAGES[:2]) == "User: Hi\n\nAssistant: Yes?"


def test_text_is_taken_as_it_is_despite_a_chat_template(chat):
    assert render_prompt("Why?", chat) == ("Why?", False)


def test_eos_pads_where_there_is_no_pad_token(without_bos):
    batch = RankedCollator(without_bos, drop_inert=False)(RECORDS)
    assert bool((batch["input_ids"][batch["attention_mask"] == 0] == without_bos.eos_token_id).all())


def test_refusals(with_bos, without_bos, chat):
    with pytest.raises(ValueError, match="tokenizer: expected one with an EOS token"):
        RankedCollator(build(eos=None))
    for name in ("max_length", "max_prompt_length", "max_completion_length", "pad_to_multiple_of"):
        for value in (0, -1, 2.0, True):
            with pytest.raises(ValueError, match=rf"{name}: expected a positive integer or None, got {value}"):
                RankedCollator(with_bos, **{name: value})
    cases = [
        (with_bos, {}, RankedRecord("p", ("a", "</s>"), source="f:9"), r"f:9: completions\[1\]: expected a response"),
        (without_bos, {}, RankedRecord("", ("a",), source="f:9"), r"f:9: prompt: expected at least one token"),
        (chat, {}, RankedRecord(({"role": "tool", "content": "x"},), ("a",), source="f:9"), r"f:9: prompt: .*no tools"),
        (with_bos, {"max_length": 2}, RECORDS[0], r"f:1: max_length: expected at least 3 tokens .* got 2"),
        (with_bos, {"max_prompt_length": 1}, RECORDS[0], r"f:1: max_prompt_length: expected at least 2 tokens"),
    ]
    for tokenizer, settings, record, message in cases:
        with pytest.raises(RecordError, match=message):
            RankedCollator(tokenizer, **settings)([record])


def test_an_empty_prompt_is_bos_alone(with_bos):
    assert candidates(RankedCollator(with_bos)([RankedRecord("", ("a", "b"))]))[0][0] == [with_bos.bos_token_id]


def test_mixed_rewards_name_the_record(with_bos):
    mixed = [RECORDS[0], RankedRecord("p", ("a", "b"), source="f:3")]
    message = r"f:3: rewards: expected all records of a batch .* got none while f:1 has them"
    with pytest.raises(ValueError, match=message):
        RankedCollator(with_bos)(mixed)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]


def test_records_rows_and_features_give_the_same_batch(with_bos):
    collator = RankedCollator(with_bos, max_length=24)
    expected = collator(RECORDS)
    assert_same(collator([collator.tokenize_record(record) for record in RECORDS]), expected)
    assert_same(collator([record.as_dict() for record in RECORDS]), expected)


def test_a_table_tokenised_by_map_gives_the_same_batch(with_bos):
    datasets = pytest.importorskip("datasets")
    collator = RankedCollator(with_bos)
    for records in (RECORDS, [RankedRecord("p", ("a", "b")), RankedRecord("q", ("c",))]):
        table = datasets.Dataset.from_list([record.as_dict() for record in records])
        table = table.map(collator.tokenize_record, remove_columns=table.column_names)
        assert_same(collator(list(table)), collator(records))


def test_dataset_tokenises_once_and_feeds_a_loader(with_bos):
    collator = RankedCollator(with_bos)
    dataset = RankedDataset(RECORDS * 3, collator)
    features = [collator.tokenize_record(record) for record in RECORDS]
    assert len(dataset) == 6
    assert dataset.lengths == [len(f["prompt_ids"]) + max(map(len, f["completion_ids"])) for f in features] * 3
    assert list(dataset[1]["prompt_ids"]) == features[1]["prompt_ids"]
    for batch in DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=1):
        assert_same(batch, collator(RECORDS))
    assert_same(pickle.loads(pickle.dumps(collator))(RECORDS), collator(RECORDS))
    with pytest.raises(ValueError, match="records: expected at least one, got none"):
        RankedDataset([], collator)


def test_progress_is_shown_when_asked_for(with_bos, capsys):
    RankedDataset(RECORDS, RankedCollator(with_bos))
    assert "Tokenising" not in capsys.readouterr().err
    RankedDataset(RECORDS, RankedCollator(with_bos), progress=True)
    assert "Tokenising" in capsys.readouterr().err


def test_limits_of_the_tokenizer_itself_play_no_part(with_bos):
    tokenizer = build()
    tokenizer.model_max_length = 4
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert_same(RankedCollator(tokenizer)(RECORDS), RankedCollator(with_bos)(RECORDS))


def test_bad_rows_are_named_by_their_place(with_bos):
    rows = [record.as_dict() for record in RECORDS]
    rows[1]["rewards"] = [1.0]
    collator = RankedCollator(with_bos)
    with pytest.raises(RecordError, match=r"^record 1: rewards: expected 2 numbers"):
        RankedDataset(rows, collator)
    with pytest.raises(RecordError, match=r"^record 1 of the batch: rewards: expected 2 numbers"):
        collator(rows)
    with pytest.raises(RecordError, match=r"^record: rewards: expected 2 numbers"):
        collator.tokenize_record(rows[1])
