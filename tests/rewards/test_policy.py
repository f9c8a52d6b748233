"""Reference log-probabilities by `score --policy`: what training would compute, on the same tokens, or refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from clha_fast.batching.collator import RankedCollator
from clha_fast.cli import main as cli
from clha_fast.data import RankedRecord, read_records
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.rewards.policy import Policy, load_policy, score_policy
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.rewards.run import Row, ScoringError
from clha_fast.rewards.scoring import score_file
from tests.support.adapters import BODY, HEAD, lora_config, stir
from tests.support.comparing import add_to_table
from tests.support.power_cuts import dropout_model
from tests.support.reward_models import llama, save_llama, write
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("policy")
    make_model(len(TOKENIZER)).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


@pytest.fixture
def policy(folder: str) -> Policy:
    return load_policy(folder)


def alone(model: nn.Module, prompt: list[int], response: list[int]) -> float:
    """By way of the model's own logits of one sequence, without padding or mask."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *response]])).logits[0, -len(response) - 1 : -1]
    chosen: Tensor = logits.double().log_softmax(-1).gather(1, torch.tensor(response)[:, None])
    return float(chosen.sum())


def sums_of(record: RankedRecord, model: nn.Module, tokenizer: Any = TOKENIZER, **limits: Any) -> list[float]:
    feature = RankedCollator(tokenizer, **limits).tokenize_record(
        RankedRecord(record.prompt, record.completions, source=record.source)
    )
    return [alone(model, list(feature["prompt_ids"]), list(ids)) for ids in feature["completion_ids"]]


@pytest.mark.parametrize("limits", [{}, {"max_length": 12}, {"max_prompt_length": 5, "max_completion_length": 3}])
def test_sums_are_those_of_single_sequences(tmp_path: Path, policy: Policy, limits: dict[str, int]) -> None:
    rows = make_rows(9)
    rows[2]["completions"][1] = rows[2]["completions"][0]  # the same twice
    rows[3]["advantages"] = [0.5] * len(rows[3]["completions"])
    source = write(tmp_path / "in.jsonl", rows)
    result = score_policy(source, tmp_path / "out.jsonl", policy, batch_size=4, progress=False, **limits)
    written = read_records(tmp_path / "out.jsonl")
    assert written == result.records
    for record, row in zip(written, rows, strict=True):
        assert record.rewards == tuple(row["rewards"])
        assert list(record.signals["reference_logps"]) == pytest.approx(
            sums_of(record, policy.model, **limits), abs=1e-5
        )
    assert written[2].signals["reference_logps"][0] == written[2].signals["reference_logps"][1]
    assert written[3].signals["advantages"] == (0.5,) * len(rows[3]["completions"])
    assert (result.truncated > 0) == bool(limits)
    assert result.candidates == sum(len(row["completions"]) for row in rows)
    lines = [record.signals["reference_logps"] for record in written]
    assert result.mean_logp == pytest.approx(sum(map(sum, lines)) / result.tokens)


def test_messages_and_half_precision(tmp_path: Path, folder: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    policy = Policy(make_model(len(TOKENIZER)), tokenizer)
    prompt = [{"role": "user", "content": "a cat"}]
    rows = [{"prompt": prompt, "completions": ["sat", "ran over it"]}]
    (record,) = score_policy(rows, tmp_path / "out.jsonl", policy, progress=False).records
    expected = sums_of(record, policy.model, tokenizer)
    assert list(record.signals["reference_logps"]) == pytest.approx(expected, abs=1e-5)
    half = load_policy(folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    found = score_policy(rows, tmp_path / "half.jsonl", half, progress=False).records[0].signals["reference_logps"]
    assert list(found) == pytest.approx(sums_of(record, make_model(len(TOKENIZER))), rel=0.05)


@pytest.mark.parametrize("targets", [BODY, HEAD])
def test_an_adapter_is_part_of_the_policy(tmp_path: Path, folder: str, targets: list[str]) -> None:
    model = stir(peft.get_peft_model(LlamaForCausalLM.from_pretrained(folder), lora_config(targets)))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": folder}))
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    policy = load_policy(str(tmp_path / "adapter"))
    (record, *_) = score_policy(make_rows(2), tmp_path / "out.jsonl", policy, progress=False).records
    assert list(record.signals["reference_logps"]) == pytest.approx(sums_of(record, model), abs=1e-5)


def trained(folder: Path, data: Path, model: str, **settings: Any) -> list[float]:
    """The losses of four steps of a run from files."""
    options = RunOptions(train_file=str(data), eval_fraction=0.0, model=model, overwrite=True)
    given: dict[str, Any] = {"output_dir": str(folder), "use_cpu": True, "max_steps": 4, "logging_steps": 1}
    given |= {"objective": {"name": "comparing", "beta": 0.5}, "learning_rate": 1e-3, "save_strategy": "no", **settings}
    run = Run(options, given).prepare()
    run.train()
    return [line["loss"] for line in run.trainer.state.log_history if "loss" in line]


def test_training_with_the_file_is_training_with_a_copy(
    tmp_path: Path, policy: Policy, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_to_table(monkeypatch)
    source = write(tmp_path / "in.jsonl", make_rows(8))
    scored = tmp_path / "scored.jsonl"
    limits = {"max_length": 14}
    score_policy(source, scored, policy, progress=False, **limits)
    copy = trained(tmp_path / "copy", source, folder, reference="copy", **limits)
    found = trained(tmp_path / "file", scored, folder, **limits)
    assert copy[0] != copy[-1]
    torch.testing.assert_close(found, copy, rtol=1e-5, atol=0)
    for other in ({}, {"max_length": 13}, {"max_length": 14, "max_completion_length": 3}):
        with pytest.raises(ValueError, match=r"scored\.jsonl:\d+: reference_logps\[\d\]: expected the sum over"):
            trained(tmp_path / "other", scored, folder, **other)
    # Limits that cut nothing more are none.
    assert trained(tmp_path / "same", scored, folder, **limits, max_prompt_length=500) == found


def test_scoring_again_replaces_what_was_there(tmp_path: Path, policy: Policy) -> None:
    first = score_policy(make_rows(3), tmp_path / "a.jsonl", policy, max_length=9, progress=False)
    again = score_policy(tmp_path / "a.jsonl", tmp_path / "b.jsonl", policy, progress=False)
    assert (first.replaced, again.replaced) == (0, 3)
    plain = score_policy(make_rows(3), tmp_path / "c.jsonl", policy, progress=False)
    assert again.records == plain.records
    assert first.records != plain.records


def test_rewards_and_reference_log_probabilities_stay_with_their_responses(tmp_path: Path, policy: Policy) -> None:
    """Whichever comes first, and ordered by reward."""
    rows = make_rows(5, rewards=False)
    reward_model = RewardModel(llama(), TOKENIZER)
    both = []
    for number, first in enumerate((score_policy, score_file)):
        middle, out = tmp_path / f"{number}-middle.jsonl", tmp_path / f"{number}.jsonl"
        judge, judges = (policy, reward_model) if first is score_policy else (reward_model, policy)
        first(rows, middle, judge, progress=False)
        second = score_file if first is score_policy else score_policy
        second(middle, out, judges, progress=False)
        both.append(read_records(out))
    assert both[0] == both[1]
    ranked = score_file(tmp_path / "0.jsonl", tmp_path / "ranked.jsonl", reward_model, rank_by_reward=True).written
    for record, before in zip(ranked, both[0], strict=True):
        known = set(zip(before.completions, before.signals["reference_logps"], before.rewards, strict=True))
        assert list(record.rewards) == sorted(before.rewards, reverse=True)
        assert set(zip(record.completions, record.signals["reference_logps"], record.rewards, strict=True)) == known


def command(*words: object) -> int:
    return cli.main(["score", *map(str, words)])


def test_interrupted_and_resumed(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(10))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    sizes = ["--batch-size", 4, "--max-length", 12]
    options = ["--policy", folder, *sizes]
    assert command(source, whole, *options) == 0
    said = capsys.readouterr().out
    assert "prompts were cut to the limits, which training needs as well" in said
    assert " nats a token" in said
    passes = []

    def interrupt(module: nn.Module, *_: object) -> None:
        passes.append(module)
        if sum(isinstance(one, LlamaForCausalLM) for one in passes) == 7:
            signal.raise_signal(signal.SIGINT)

    hook = torch.nn.modules.module.register_module_forward_hook(interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert command(source, out, *options) == 130
    finally:
        signal.signal(signal.SIGINT, before)
        hook.remove()
    assert "responses are scored and kept in" in capsys.readouterr().err
    assert not out.exists()
    kept = (tmp_path / "out.jsonl.partial").read_bytes()
    assert b'"reference_logps": [' in kept
    longer = ["--policy", folder, "--batch-size", 4, "--max-length", 13]
    for changed in (longer, [*options, "--max-prompt-length", 3], [*options, "--dtype", "bfloat16"]):
        assert command(source, out, *changed, "--resume") == 2
        assert "expected the run that" in capsys.readouterr().err
    assert command(source, out, "--reward-model", save_llama(tmp_path / "reward"), "--resume") == 2
    capsys.readouterr()
    assert (tmp_path / "out.jsonl.partial").read_bytes() == kept
    assert command(source, out, *sizes, "--resume", "--policy", shutil.copytree(folder, tmp_path / "moved")) == 0
    assert "responses had been scored before" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--reward-model: expected either --reward-model or --policy, got neither"),
        (["--policy", "FOLDER", "--reward-model", "x"], "--reward-model: expected either .* or --policy, got both"),
        (["--policy", "FOLDER", "--rank-by-reward"], "--rank-by-reward: expected none beside --policy, got True"),
        (["--policy", "FOLDER", "--reward-floor", "0"], "--reward-floor: expected none beside --policy, got 0.0"),
        (["--policy", "FOLDER", "--label", "0"], "--label: expected none beside --policy, got 0"),
        (
            ["--reward-model", "x", "--max-prompt-length", "3"],
            "--max-prompt-length: expected none beside --reward-model",
        ),
        (
            ["--policy", "FOLDER", "--max-completion-length", "0"],
            "--max-completion-length: expected a positive whole nu",
        ),
        (["--policy", "./gone"], "policy: expected a folder that holds one, .* got './gone'"),
        (["--policy", "FOLDER", "--dtype", "int3"], "dtype: expected one of auto, float32, .*, got 'int3'"),
        (["--policy", "FOLDER", "--device", "tomorrow"], "device: .*, got 'tomorrow'"),
        (
            ["--policy", "REWARD"],
            "policy: expected a causal language model, got .*, a reward model",
        ),
    ],
)
def test_one_sentence_for_what_is_wrong(
    tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(2))
    places = {"FOLDER": folder, "REWARD": str(tmp_path / "reward")}
    if "REWARD" in words:
        save_llama(tmp_path / "reward")
    assert command(source, tmp_path / "out.jsonl", *(places.get(word, word) for word in words)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clha-fast score: ")]
    assert len(error) == 1
    assert re.search(message, error[0])
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_a_model_has_no_positions_for(tmp_path: Path) -> None:
    policy = Policy(dropout_model(), TOKENIZER)
    rows = [{"prompt": "a", "completions": ["b", "c" * 80]}]
    with pytest.raises(ValueError, match=r"^max_length: expected rows of at most the 64 positions of GPT2LMHeadModel"):
        score_policy(rows, tmp_path / "out.jsonl", policy, progress=False)
    found = score_policy(rows, tmp_path / "out.jsonl", policy, max_length=64, progress=False).records[0]
    expected = sums_of(found, policy.model, max_length=64)  # and no dropout
    assert list(found.signals["reference_logps"]) == pytest.approx(expected, abs=1e-4)


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = make_model(len(TOKENIZER))
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER("joy", add_special_tokens=False)["input_ids"][0]] = torch.nan
    rows = [{"prompt": "a", "completions": ["joy fell", "sat"]}]
    with pytest.raises(ScoringError, match=r"completions\[\d\]: expected a finite score, got nan"):
        score_policy(rows, tmp_path / "out.jsonl", Policy(model, TOKENIZER), progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_batch_of_rows(policy: Policy) -> None:
    rows = [Row([5, 6], [7, 8, 1]), Row([9], [1])]
    expected = [alone(policy.model, row.prompt, row.response) for row in rows]
    assert policy.sums(rows).tolist() == pytest.approx(expected, abs=1e-5)
    assert policy.max_positions == 128
    with pytest.raises(ValueError, match=r"^tokenizer: expected at most the model's 20 tokens"):
        Policy(make_model(20), TOKENIZER)


@pytest.mark.parametrize("layout", ["packed", "shared", "auto"])
def test_layouts(tmp_path: Path, folder: str, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.jsonl", make_rows(7))
    plain = [*map(str, ("score", "--policy", folder, source))]
    assert cli.main([*plain, str(tmp_path / "padded.jsonl")]) == 0
    assert " rows" not in capsys.readouterr().out.splitlines()[0]
    assert cli.main([*plain, str(tmp_path / "other.jsonl"), "--layout", layout, "--batch-size", "5"]) == 0
    said = "shared or padded rows, as counted" if layout == "auto" else f"{layout} rows"
    assert capsys.readouterr().out.splitlines()[0].endswith(said)
    padded, other = (read_records(tmp_path / f"{name}.jsonl") for name in ("padded", "other"))
    for one, two in zip(padded, other, strict=True):
        assert two.signals["reference_logps"] == pytest.approx(one.signals["reference_logps"], abs=1e-4)
        assert two.signals["reference_tokens"] == one.signals["reference_tokens"]


def test_rows_of_a_record_stand_side_by_side(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(folder, layout="shared")
    seen: list[list[Row]] = []
    own = policy.sums
    monkeypatch.setattr(policy, "sums", lambda rows: seen.append(list(rows)) or own(rows))
    rows = make_rows(6)
    score_policy(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", policy, batch_size=6, progress=False)
    prompts = [tuple(row.prompt) for batch in seen for row in batch if len(batch) > 2]
    changes = sum(one != other for one, other in itertools.pairwise(prompts))
    assert changes < len(rows) + 2
