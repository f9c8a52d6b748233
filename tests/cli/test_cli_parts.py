"""The parts that the command line is made of: options, split, counts, scratch models, tables, measured memory."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clha_fast
from clha_fast.cli import main as cli
from clha_fast.cli import options as cli_options
from clha_fast.cli.options import OptionError, coerce, read_flags
from clha_fast.cli.text import size_text
from clha_fast.cli.train import measured, memory_text
from clha_fast.data import make_record
from clha_fast.data.split import shared_prompts, split_records
from clha_fast.evaluation import memory
from clha_fast.evaluation import tables as report
from clha_fast.models.loading import build_model, build_tokenizer
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.reports.data_summary import summarise
from tests.support import forked
from tests.support.command_line import SETTINGS
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.value_gpu import ValueGPU


def test_values_become_what_options_are() -> None:
    hints = cli_options.HINTS
    assert coerce("x", "1e-3", hints["learning_rate"]) == 1e-3
    assert coerce("x", 3, hints["margin"]) == 3.0
    assert coerce("x", None, hints["margin"]) is None
    assert coerce("x", False, hints["eval_strategy"]) == "no"  # YAML's reading of the word
    assert coerce("x", float("-inf"), hints["reward_floor"]) == float("-inf")
    for value, name in ((True, "max_steps"), ("x", "bf16"), (1, "bf16"), ([], "seed"), (None, "seed"), ({}, "model")):
        with pytest.raises(OptionError, match="x: expected "):
            coerce("x", value, hints[name])
    words = "--noise-rule=none --bf16 --model_config.hidden-size 64 --seed 3 --model 7 --margin=null"
    assert read_flags(words.split()) == {
        "noise_rule": "none",
        "bf16": True,
        "model_config": {"hidden_size": 64},
        "seed": 3,
        "model": "7",
        "margin": None,
    }
    base = {"model_config": {"a": 1, "b": 2}, "seed": 1}
    merged = cli_options.merge(base, {"model_config": {"b": 3}, "seed": 2})
    assert merged == {"model_config": {"a": 1, "b": 3}, "seed": 2}


def test_few_weights_are_counted_one_by_one() -> None:
    sizes = (1, 4096, 99_999, 100_000, 134_515_008, 7_000_000_000)
    assert [size_text(size) for size in sizes] == ["1", "4,096", "99,999", "0.10 M", "134.52 M", "7,000.00 M"]


def test_split_keeps_a_prompt_on_one_side() -> None:
    records = [make_record(f"prompt {k % 50} ", ["good", f"bad {k}"]) for k in range(200)]
    train, held_out = split_records(records, 0.3, seed=1)
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 100
    assert shared_prompts(train, held_out) == 0
    assert split_records(records, 0.3, seed=1) == (train, held_out)
    assert split_records(records, 0.3, seed=2) != (train, held_out)
    # Adding records moves none of the others.
    more = split_records([*records, make_record("new", ["a", "b"])], 0.3, seed=1)
    assert [r for r in more[1] if r.prompt != "new"] == held_out
    assert shared_prompts(train, train[:3]) == 3


def test_a_small_file_holds_one_prompt_out() -> None:
    for seed in range(20):
        records = [make_record(prompt, ["good", "bad"]) for prompt in ("a", "b", "a ", "c")]
        train, held_out = split_records(records, 0.01, seed)
        assert len({record.prompt.strip() for record in held_out}) == 1
        assert shared_prompts(train, held_out) == 0
        assert len(train) + len(held_out) == 4
        two = split_records(records[:2], 0.01, seed)
        assert [len(part) for part in two] == [1, 1]


def test_summary_counts_by_hand() -> None:
    records = [
        make_record("a", ["1", "2", "3"], rewards=[5.0, 4.0, 0.0]),  # kept: 1-3, 2-3
        make_record("b", ["1", "2"], rewards=[-1.0, -2.0]),  # none kept, gate closed: both inert
    ]
    got = summarise(records, PUBLISHED)
    assert (got.prompts, got.candidates, got.fewest, got.most) == (2, 5, 2, 3)
    assert (got.pairs, got.noise_pairs, got.inert, got.closed_gates) == (4, 2, 2, 1)
    plain = summarise([make_record("a", ["1", "2", "3"])], CLHAOptions())
    assert (plain.rewarded, plain.noise_pairs, plain.inert, plain.closed_gates) == (False, 0, 0, 0)


def test_scratch_models_are_repeatable_and_leave_the_random_state() -> None:
    tokenizer = build_tokenizer(["the cat sat on the mat"] * 3, 300)
    assert len(tokenizer) <= 300
    text = "Any text: 日本語 \n é"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    state = torch.get_rng_state()
    models = [build_model(SETTINGS["model_config"], tokenizer, seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    one, two, three = (m.lm_head.weight for m in models)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_tables() -> None:
    text = report.evaluation_result({"eval_loss": 2.0, "eval_kendall_tau": float("nan")}, {"eval_loss": 1.23456}).text
    rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()[2:]}
    assert rows["loss"] == ["2", "1.235"]
    assert rows["Kendall's tau (all ordered pairs)"] == ["-", "-"]
    assert len({len(line) for line in text.splitlines()[:2]}) == 1
    text = report.memory_table({"fused": 2**20, "eager_all": 3 * 2**20}, memory.VARIANTS)
    assert text.splitlines()[-1].split()[-4:] == ["3.0", "MiB", "3.0", "x"]


def test_memory_is_measured(request: pytest.FixtureRequest) -> None:
    # 512 scored tokens of 2048 rows, V 8192: eager holds [2048, 8192] float32 (64 MiB) several times over.
    shapes = memory.LossShapes(
        rows=2048,
        hidden_size=32,
        vocab_size=8192,
        candidate_lengths=[64] * 8,
        candidates_per_prompt=[4, 4],
        rewards=[6.0, 2.0, -2.0, -6.0] * 2,
        head=clha_fast.HeadOptions(workspace_bytes=4 << 20).encoded,
    )
    peaks = {"fused": memory.measure("fused", shapes)}
    request.getfixturevalue("forks")  # what starts a process of its own has been seen to
    peaks |= {variant: memory.measure(variant, shapes) for variant in ("eager_scored", "eager_all")}
    logits = 8192 * 4
    assert 512 * logits * 2 <= peaks["eager_scored"] <= 512 * logits * 8
    assert 2048 * logits * 2 <= peaks["eager_all"] <= 2048 * logits * 8
    assert peaks["fused"] < 512 * logits


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that measure are forks of one that has imported torch, which takes them longest."""

    def run(command: list[str], *, input: str, **settings: Any) -> forked.Done:
        assert command[:2] == [sys.executable, "-m"]
        return forked.run("bare", *command[2:], given=input)

    monkeypatch.setattr(memory.subprocess, "run", run)


@pytest.mark.usefixtures("forks")
def test_failed_measurement_is_named() -> None:
    shapes = memory.LossShapes(8, 8, 32, [2, 2], [2], backend="none")
    with pytest.raises(memory.MemoryReportError, match=r"measuring clha-fast failed: ValueError: backend: expected"):
        memory.measure("fused", shapes)


class SmallGPU(ValueGPU):
    """A device that holds no tensor of more numbers than `most`."""

    most = 2**12

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        made = super()._compute(func, args, kwargs)
        if isinstance(made, torch.Tensor) and made.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 15.66 GiB.\nSee the documentation.")
        return made


@pytest.mark.parametrize(
    ("rows", "vocabulary", "lengths", "fitting"),
    [
        (8, 32, (2, 2), ["fused", "eager_scored", "eager_all"]),
        (64, 128, (4, 4), ["fused", "eager_scored"]),
        (2048, 4, (9, 3), []),  # the hidden states alone
    ],
)
def test_what_does_not_fit_a_gpu_is_said(
    rows: int, vocabulary: int, lengths: tuple[int, ...], fitting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators are real; a backward on a device that is not there is the engine's to refuse, and left out."""
    devices = []
    numbers = {"reset_peak_memory_stats": None, "synchronize": None, "memory_allocated": 7, "max_memory_allocated": 18}
    for name, number in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, number=number: (devices.append(device), number)[1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    shapes = memory.LossShapes(rows, 8, vocabulary, lengths, [2], backend="torch", device="cuda:0")
    with SmallGPU().here(90):
        peaks = measured(shapes)
        with pytest.raises(memory.MemoryReportError, match=r"^measuring clha-fast failed: backend: expected one of"):
            memory.measure("fused", dataclasses.replace(shapes, rows=8, backend="none"))
    assert peaks == {name: 11 if name in fitting else None for name in memory.VARIANTS}
    assert set(devices) <= {"cuda:0"}
    said = memory_text(peaks).splitlines()
    missing = [f"{text}: does not fit the memory" for name, text in memory.VARIANTS.items() if name not in fitting]
    assert [line for line in said if "does not fit" in line] == missing
    assert len(said) == len(missing) + (2 + len(fitting) if fitting else 0)


@pytest.mark.usefixtures("forks")
def test_what_does_not_fit_a_cpu_is_told_apart() -> None:
    with pytest.raises(memory.DoesNotFitError, match=r"^measuring eager, logits of scored tokens failed: "):
        memory.measure("eager_scored", memory.LossShapes(8, 8, 2**42, [2, 2], [2]))


def test_example_for_one_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    """examples/one_gpu.yaml as it is, but for the device, the number of steps and the distance between evaluations."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(40)))
    words = ["train", "--config", str(ROOT / "examples" / "one_gpu.yaml")]
    words += ["--model", str(tmp_path / "model"), "--train_file", str(tmp_path / "train.jsonl")]
    words += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--max_steps", "2", "--eval_steps", "1"]
    words += ["--save_steps", "1", "--eval_sample_tokens", "3", "--logging_steps", "1", "--plot", "false"]
    assert cli.main(words) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["after"]["eval_rewards/accuracies"] >= metrics["before"]["eval_rewards/accuracies"]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    card = (tmp_path / "run" / "README.md").read_text()
    assert "train.jsonl" in card
    assert "base_model" not in card, "a folder has no name on the Hub"
