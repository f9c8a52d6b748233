"""Reward scoring: batched scores are single ones, on the tokens of training; the noise found is the noise there."""

from __future__ import annotations

import json
import os
import random
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    CamembertConfig,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from clha_fast.data import RankedRecord, RecordError, read_records
from clha_fast.models.loading import is_classifier
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.reports.data_summary import summarise
from clha_fast.rewards.noise import measure_noise
from clha_fast.rewards.reward_model import ADAPTERS_NEED, HEADS_NEED, RewardModel, load_reward_model
from clha_fast.rewards.scoring import ScoringError, score_file, score_records
from tests.support.reward_models import SIZES, TOKENIZER, alone, bert, gpt2, llama, plain_ids, save_llama, spread, write
from tests.support.tiny import WORDS, make_model, make_rows, make_tokenizer
from tests.support.versions import older

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_padding(token: int) -> Any:
    model = llama()
    model.config.pad_token_id = token
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture
def reward_model(folder: str) -> RewardModel:
    return load_reward_model(folder)


def test_noise_by_hand() -> None:
    records = [
        RankedRecord("a", ("x", "y", "z"), (1.0, 5.0, -2.5)),  # gaps -4, 3.5, 7.5
        RankedRecord("b", ("x", "y", "z"), (0.0, -3.0, -2.0)),  # 3: at the margin, 2, -1; the gate is at the floor
        RankedRecord("c", ("x", "y"), (-1.0, 4.0), sft_index=1),  # -5
        RankedRecord("d", ("x",), (-0.5,)),
        RankedRecord("e", ("x", "y"), (2.0, 2.0)),  # equal rewards are no reversal
    ]
    report = measure_noise(records, reward_margin=3.0, reward_floor=0.0)
    values = [
        (c.size, c.prompts, c.pairs, c.reversed, c.inside_margin, c.reversed_outside, c.closed_gates)
        for c in (*report.by_size, report.total)
    ]
    assert values == [
        (1, 1, 0, 0, 0, 0, 1),
        (2, 2, 2, 1, 1, 1, 0),
        (3, 2, 6, 2, 3, 1, 1),
        (None, 5, 8, 3, 4, 2, 2),
    ]
    assert sorted(report.gaps.tolist()) == [-5.0, -4.0, -1.0, 0.0, 2.0, 3.0, 3.5, 7.5]


@pytest.mark.parametrize(("margin", "floor"), [(0.0, -1.0), (0.7, 0.0), (3.0, 2.5)])
def test_noise_is_what_the_loss_drops(margin: float, floor: float) -> None:
    rng = random.Random(int(10 * margin))
    records = []
    for number in range(60):
        size = rng.randint(1, 6)
        rewards = tuple(round(rng.uniform(-5, 5), 1) for _ in range(size))
        records.append(RankedRecord(f"p{number}", ("x",) * size, rewards, rng.randrange(size)))
    total = measure_noise(records, margin, floor).total
    by_rule = {
        rule: summarise(records, CLHAOptions(reward_margin=margin, reward_floor=floor, noise_rule=rule))
        for rule in ("abs", "signed")
    }
    assert total.pairs == by_rule["abs"].pairs
    assert total.inside_margin == by_rule["abs"].noise_pairs
    assert total.inside_margin + total.reversed_outside == by_rule["signed"].noise_pairs
    assert total.closed_gates == by_rule["abs"].closed_gates > 0


def test_noise_refuses() -> None:
    with pytest.raises(RecordError, match=r"f:3: rewards: expected rewards to compare .*, got None"):
        measure_noise([RankedRecord("a", ("x", "y"), source="f:3")])
    with pytest.raises(RecordError, match="at least one"):
        measure_noise([])
    with pytest.raises(ValueError, match="reward_margin: expected"):
        measure_noise([RankedRecord("a", ("x",), (1.0,))], reward_margin=-1.0)


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: llama(pad_token_id=1),  # padding is EOS: the model then reads the token before the closing EOS
        lambda: llama(pad_token_id=2),
        lambda: with_padding(-1),  # no row of the embedding: as good as none
        gpt2,
        bert,
    ],
    ids=["no-padding", "padding-is-eos", "padding", "padding-outside", "gpt2", "bert"],
)
def test_batched_is_alone(make: Any) -> None:
    model = make()
    before = model.config.to_json_string()
    generator = torch.Generator().manual_seed(0)
    rows = [[*torch.randint(3, 300, (size,), generator=generator).tolist(), 1] for size in (30, 17, 2, 25, 0)]
    rows.append([9, 0])  # what is easily taken for padding at the end
    expected = torch.tensor([alone(model, row) for row in rows])
    scores = RewardModel(model.train(), TOKENIZER).score_tokens(rows)  # and no dropout
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05
    assert model.config.to_json_string() == before


def test_no_token_is_left_for_padding() -> None:
    model = llama(vocab_size=300, max_position_embeddings=400)
    rows = [[*range(300)], [5, 6, 1], [7]]
    expected = torch.tensor([alone(model, row) for row in rows])
    torch.testing.assert_close(RewardModel(model, TOKENIZER).score_tokens(rows), expected, rtol=1e-5, atol=1e-5)


def test_padding_that_is_read_as_text(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(4))
    fnet = spread(FNetForSequenceClassification(FNetConfig(**SIZES, pad_token_id=2)))
    size = {"vocab_size": len(TOKENIZER), "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 1}
    for model in (fnet, spread(XLNetForSequenceClassification(XLNetConfig(**size)))):
        out = tmp_path / f"{type(model).__name__}.jsonl"
        reward_model = RewardModel(model, TOKENIZER)
        with pytest.raises(ScoringError, match=r"batch_size: expected 1 for .*, got 4"):
            score_file(source, out, reward_model, batch_size=4, progress=False)
        assert not list(tmp_path.glob(f"{out.name}*"))
        first = score_file(source, out, reward_model, batch_size=1, progress=False).records[0]
        assert first.rewards is not None
        assert first.rewards[0] == pytest.approx(alone(model, plain_ids(first.prompt, first.completions[0])), abs=1e-5)


def test_every_response_gets_its_own_score(tmp_path: Path, reward_model: RewardModel) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(12, rewards=False))
    result = score_file(source, tmp_path / "out.jsonl", reward_model, batch_size=5, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    given = [json.loads(line) for line in source.read_text().splitlines()]
    for row, before in zip(rows, given, strict=True):
        rewards = row.pop("rewards")
        assert row == before
        expected = [alone(reward_model.model, plain_ids(row["prompt"], text)) for text in row["completions"]]
        assert rewards == pytest.approx(expected, abs=1e-5)
    single = score_file(source, tmp_path / "single.jsonl", reward_model, batch_size=1, progress=False)
    for record in single.records:
        rows_of = [plain_ids(record.prompt, text) for text in record.completions]
        exact = torch.cat([reward_model.score_tokens([ids]) for ids in rows_of])
        assert torch.equal(torch.tensor(record.rewards), exact)  # the file keeps the last bit
    assert result.candidates == sum(len(row["completions"]) for row in given)
    assert (result.resumed, result.replaced, result.truncated) == (0, 0, 0)
    assert read_records(tmp_path / "out.jsonl") == result.records == result.written
    assert os.listdir(tmp_path).count("out.jsonl.partial") == 0


def test_rendered_as_training_renders(tmp_path: Path) -> None:
    """Messages go through the chat template, or the plain one; a prompt that is a text does not."""
    turns = ["<|prompter|>say it", "<|assistant|>what", "<|prompter|>the cat", "<|assistant|>"]
    row = {"prefix": [turns, turns], "suffix": ["sat on a mat", "ran"], "reward": [9.0, 8.0], "sft_index": 0}
    source = write(tmp_path / "pro.jsonl", [row])
    chat = make_tokenizer()
    chat.chat_template = CHAT
    model = llama()
    texts = {
        "chat": (chat, "<user>say it\n<assistant>what\n<user>the cat\n<assistant>", False),
        "plain": (TOKENIZER, "User: say it\n\nAssistant: what\n\nUser: the cat\n\nAssistant: ", True),
    }
    for name, (tokenizer, prompt, special) in texts.items():
        result = score_file(source, tmp_path / f"{name}.jsonl", RewardModel(model, tokenizer), progress=False)
        ids = tokenizer(prompt, add_special_tokens=special)["input_ids"]
        expected = [
            alone(model, [*ids, *tokenizer(text, add_special_tokens=False)["input_ids"], 1]) for text in row["suffix"]
        ]
        assert result.records[0].rewards == pytest.approx(expected, abs=1e-5)
        assert result.replaced == 1
    text = write(tmp_path / "text.jsonl", [{"prompt": "the cat", "completions": ["sat"]}])
    result = score_file(text, tmp_path / "text_out.jsonl", RewardModel(model, chat), progress=False)
    assert result.records[0].rewards == pytest.approx([alone(model, plain_ids("the cat", "sat"))], abs=1e-5)


def test_ranked_by_reward(tmp_path: Path, reward_model: RewardModel) -> None:
    rows = make_rows(10)
    for row in rows[:5]:
        row["sft_index"] = 1
    rows[9]["completions"] = ["rain fell", "a dog", "rain fell"]  # twice the same: the same reward, in the order given
    rows[9].update(rewards=[1.0, 2.0, 3.0], sft_index=2)
    source = write(tmp_path / "in.jsonl", rows)
    passes: list[int] = []
    reward_model.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    result = score_file(source, tmp_path / "out.jsonl", reward_model, batch_size=3, rank_by_reward=True, progress=False)
    assert sum(passes) == 3 + sum(len(set(row["completions"])) for row in rows)  # 3: is padding read as text?
    assert read_records(tmp_path / "out.jsonl") == result.written
    moved = 0
    for row, given, record in zip(rows, result.records, result.written, strict=True):
        assert given.completions == tuple(row["completions"])
        assert given.rewards is not None
        order = sorted(range(len(given.rewards)), key=lambda k: (-given.rewards[k], k))
        assert record.completions == tuple(given.completions[k] for k in order)
        assert record.rewards == tuple(sorted(given.rewards, reverse=True))
        assert record.sft_index == (order.index(row["sft_index"]) if row.get("sft_index") else 0)
        moved += order != sorted(order)
    assert moved > 2
    twice = result.records[9].rewards
    assert twice is not None
    assert twice[0] == twice[2]
    assert measure_noise(result.written).total.reversed == 0


def test_what_else_a_record_has_stays_with_it(tmp_path: Path) -> None:
    """Tools were lost where the responses were ordered."""
    tools = [{"type": "function", "function": {"name": "ring"}}]
    rows = [
        {"prompt": [{"role": "user", "content": f"say {k}"}], "completions": ["a cat", "the dog ran"], "tools": tools}
        for k in range(4)
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools | length }}{% endif %}" + CHAT
    source = write(tmp_path / "in.jsonl", [{**row, "subset": "s"} for row in rows])
    result = score_file(source, tmp_path / "out.jsonl", RewardModel(llama(), tokenizer), rank_by_reward=True)
    assert [(record.template, record.subset) for record in result.written] == [({"tools": tools}, "s")] * 4
    assert read_records(tmp_path / "out.jsonl") == result.written


def test_truncated_as_training_truncates(tmp_path: Path, reward_model: RewardModel) -> None:
    """Here to what the model has positions for; the prompt loses its beginning, behind BOS."""
    prompt = " ".join(WORDS * 5)
    source = write(tmp_path / "in.jsonl", [{"prompt": prompt, "completions": ["sat on", "ran"]}])
    result = score_file(source, tmp_path / "out.jsonl", reward_model, progress=False)
    longest, shorter = (TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in ("sat on", "ran"))
    own = TOKENIZER(prompt, add_special_tokens=False)["input_ids"]
    assert len(own) > 96
    kept = [0, *own[-(96 - 2 - len(longest)) :]]
    expected = [alone(reward_model.model, [*kept, *ids, 1]) for ids in (longest, shorter)]
    assert result.records[0].rewards == pytest.approx(expected, abs=1e-5)
    assert (result.truncated, result.max_length) == (1, 96)
    with pytest.raises(ValueError, match=r"max_length: expected at most the reward model's 96 positions, got 97"):
        score_file(source, tmp_path / "o2.jsonl", reward_model, max_length=97, progress=False)


def test_half_precision(tmp_path: Path, folder: str) -> None:
    reward_model = load_reward_model(folder, dtype="bfloat16")
    source = write(tmp_path / "in.jsonl", make_rows(3))
    records = score_file(source, tmp_path / "out.jsonl", reward_model, batch_size=4, progress=False).records
    for record in records:
        expected = [alone(reward_model.model, plain_ids(record.prompt, text)) for text in record.completions]
        assert record.rewards == pytest.approx(expected, abs=0.05)  # bfloat16 has 8 bits


def test_several_labels(tmp_path: Path) -> None:
    model = llama(num_labels=3, id2label={0: "bad", 1: "fair", 2: "good"})
    with pytest.raises(ValueError, match=r"label: .* the reward model's 3 labels \(0 = bad, 1 = fair, 2 = good\)"):
        RewardModel(model, TOKENIZER)
    with pytest.raises(ValueError, match=r"label: expected an index from 0 to 2, got 3"):
        RewardModel(model, TOKENIZER, label=3)
    scores = RewardModel(model, TOKENIZER, label=2).score_tokens([[5, 6, 1], [7, 1]])
    with torch.inference_mode():
        expected = [float(model(input_ids=torch.tensor([ids])).logits[0, 2]) for ids in ([5, 6, 1], [7, 1])]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_models_that_are_refused(tmp_path: Path, folder: str) -> None:
    bart = BartConfig(vocab_size=len(TOKENIZER), d_model=16, encoder_layers=1, decoder_layers=1, num_labels=1)
    with pytest.raises(ValueError, match="an encoder-decoder model"):
        RewardModel(BartForSequenceClassification(bart), TOKENIZER)
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's 20 tokens"):
        RewardModel(llama(vocab_size=20), TOKENIZER)

    plain = tmp_path / "language_model"
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES)).save_pretrained(plain)
    TOKENIZER.save_pretrained(plain)
    with pytest.raises(ValueError, match=r"without weights for score\.weight; its scores would be random"):
        load_reward_model(str(plain))
    (plain / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_reward_model(str(plain))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a configuration"):
        load_reward_model(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="expected a folder with a model, or a name on the Hub"):
        load_reward_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"device: .*, got 'tomorrow'"):
        load_reward_model(folder, device="tomorrow")
    with pytest.raises(ValueError, match=r"dtype: .*, got 'int3'"):
        load_reward_model(folder, dtype="int3")


def test_a_score_that_is_no_number(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER("joy", add_special_tokens=False)["input_ids"][0]] = torch.nan
    rows = [
        {"prompt": "a dog", "completions": ["ran over it and fell", "sat"]},
        {"prompt": "a", "completions": ["joy"]},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ScoringError, match=r"in\.jsonl:2: completions\[0\]: expected a finite score, got nan; 2 of 3"):
        score_file(source, out, RewardModel(model, TOKENIZER), batch_size=2, progress=False)
    assert not out.exists()


def test_a_bad_record_is_found_before_scoring(tmp_path: Path, reward_model: RewardModel) -> None:
    source = write(tmp_path / "in.jsonl", [*make_rows(2), {"prompt": "a", "completions": ["x", ""]}])
    with pytest.raises(RecordError, match=r"in\.jsonl:3: completions\[1\]"):
        score_file(source, tmp_path / "out.jsonl", reward_model, progress=False)
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("kind", [RobertaConfig, XLMRobertaConfig, MPNetConfig, CamembertConfig, BertConfig])
@pytest.mark.parametrize("padding", [1, 2])
def test_positions_that_begin_behind_the_padding_tokens(kind: type[Any], padding: int) -> None:
    """The longest row that a model is said to have positions for is one that it runs, and one more is not."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = kind(vocab_size=len(TOKENIZER), max_position_embeddings=20, pad_token_id=padding, num_labels=1, **small)
    model = RewardModel(AutoModelForSequenceClassification.from_config(config), TOKENIZER)
    limit = model.max_positions
    # MPNet's padding is always 1.
    assert limit == (20 if kind is BertConfig else 18 if kind is MPNetConfig else 20 - padding - 1)
    assert model.default_max_length == limit
    assert model.score_tokens([[7] * limit]).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model.score_tokens([[7] * (limit + 1)])
    records = [RankedRecord("the cat " * 20, (" ran", " sat"))]
    assert score_records(records, model, progress=False)[0].rewards is not None


@pytest.mark.parametrize("base", ["language model", "classifier", "classifier with its own head"])
@pytest.mark.parametrize("labels", [1, 3])
def test_an_adapter_of_peft_brings_its_head(tmp_path: Path, base: str, labels: int) -> None:
    """As TRL saves a reward model that was trained with LoRA, beside a base that knows of no head; or for the body."""
    peft = pytest.importorskip("peft")
    place, path = tmp_path / "base", str(tmp_path / "adapter")
    whole = make_model(len(TOKENIZER)) if base == "language model" else llama(pad_token_id=2, num_labels=labels)
    whole.save_pretrained(place)
    TOKENIZER.save_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=labels)
    kind = None if base.endswith("head") else "SEQ_CLS"
    config = peft.LoraConfig(task_type=kind, r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    assert kind is None or is_classifier(path)
    needed = ADAPTERS_NEED if kind is None else HEADS_NEED
    lacking = [package for package, oldest in needed.items() if older(package, oldest)]
    if lacking:
        said = rf"^reward_model: expected {lacking[0]} .* for the adapter in .*, got {version(lacking[0])}; pip install"
        with pytest.raises(ImportError, match=said):
            load_reward_model(path, label=labels - 1, device="cpu")
        return
    found = load_reward_model(path, label=labels - 1, device="cpu")
    with torch.no_grad():
        expected = adapted(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0, labels - 1]
    assert found.score_tokens([[5, 6, 7, 8]]).item() == pytest.approx(float(expected), rel=1e-4)


def _other_merges(tokenizer: Any) -> None:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(rules))


@pytest.mark.parametrize(
    "change",
    [
        _other_merges,
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<pad>"),
        lambda tokenizer: setattr(tokenizer, "model_max_length", 20),
    ],
)
def test_judges_that_read_otherwise_are_two(tmp_path: Path, change: Any) -> None:
    model = llama()
    first = RewardModel(model, make_tokenizer()).fingerprint()
    used = make_tokenizer()
    used(["a cat", "a"], padding=True, truncation=True, max_length=3)
    used.save_pretrained(tmp_path)
    for same in (used, AutoTokenizer.from_pretrained(tmp_path)):
        assert RewardModel(model, same).fingerprint() == first
    change(used)
    assert RewardModel(model, used).fingerprint() != first
