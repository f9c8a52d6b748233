"""`clha-fast rlhf`: from a model, a reward model and prompts to a folder."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from clha_fast.cli import main as cli
from clha_fast.cli import reward_model as cli_reward_model
from clha_fast.cli import rlhf as cli_rlhf
from clha_fast.data.prompts import PromptRecord
from clha_fast.evaluation.accuracy import mean_interval
from clha_fast.evaluation.plots import ROLLOUT_PANELS, can_plot
from clha_fast.experiments.rollout_run import RolloutRun, RolloutRunOptions
from clha_fast.experiments.run import RunOptions
from clha_fast.generation import trained_prefix
from tests.support.command_line import one_sentence
from tests.support.reward_models import TOKENIZER, save_llama, write
from tests.support.tiny import make_model

pytest.importorskip("scipy")


def command(folder: Path, *flags: str) -> list[str]:
    """`rlhf` over 12 prompts, 3 to 5 of them held out, with a reward model of random weights."""
    if not (folder / "policy").exists():
        make_model(len(TOKENIZER)).save_pretrained(folder / "policy")
        TOKENIZER.save_pretrained(folder / "policy")
        save_llama(folder / "judge")
        write(folder / "prompts.jsonl", [{"prompt": f"say {number}"} for number in range(12)])
    paths = {"train_file": "prompts.jsonl", "model": "policy", "reward_model": "judge", "output_dir": "run"}
    own = {name: str(folder / path) for name, path in paths.items()}
    own |= {"eval_fraction": "0.3", "max_steps": "4", "save_steps": "3", "logging_steps": "2", "rollout_steps": "2"}
    own |= {"per_device_train_batch_size": "2", "max_completion_length": "5", "learning_rate": "1e-2"}
    own = {f"--{name}": value for name, value in own.items()}
    return ["rlhf", "--use_cpu", *(word for flag in own if flag not in flags for word in (flag, own[flag])), *flags]


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "metrics.json").read_text())
    return found


@pytest.mark.drawn
def test_a_run_and_its_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, "--eval_samples", "2")) == 0
    out = capsys.readouterr().out
    assert "loss      policy: clipped at 0.8 and 1.2, token_mean\n" in out
    assert "rollout   4 answers a prompt, of at most 5 tokens, for 2 steps\n" in out
    assert "held out before training: mean reward " in out
    found = figures(tmp_path)
    before, after = found["before"], found["after"]
    assert len(before["rewards"]) == len(after["rewards"]) >= 2
    assert before["interval"][0] <= before["eval_reward"] <= before["interval"][1]
    assert before["eval_reward"] == pytest.approx(sum(before["rewards"]) / len(before["rewards"]))
    row = next(line for line in out.splitlines() if line.startswith("mean reward"))
    assert row.split()[2:] == [
        f"{value:.4g}"
        for value in (before["eval_reward"], after["eval_reward"], after["eval_reward"] - before["eval_reward"])
    ]
    assert [line["step"] for line in found["log"] if "reward" in line] == [2, 4]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"report          {tmp_path / 'run' / 'report.html'}\n" in out
    assert "let another one judge it" in page
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [*before["rewards"][:2], *after["rewards"][:2]]
    for line in lines:
        assert (
            f"after step {line['step']}{'' if line['finished'] else ', cut'}, reward {line['reward']:.4g}</p>" in page
        )
    assert f"\nquestion          {lines[0]['prompt']}\nanswer at step 0 " in out
    assert f"<td>{after['eval_reward']:.4g}</td>" in page
    if can_plot():
        for panel in ROLLOUT_PANELS:
            assert panel.title in page
        assert "no figures" not in page
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    assert not torch.equal(trained["lm_head.weight"], make_model(len(TOKENIZER)).state_dict()["lm_head.weight"])

    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # step 3 is the first of a rollout of two
    (tmp_path / "run" / "model.safetensors").unlink()
    assert cli.main(command(tmp_path, "--resume")) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    again = figures(tmp_path)
    assert (again["before"], again["after"]["rewards"]) == (before, after["rewards"])
    config = tmp_path / "judge" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    capsys.readouterr()
    assert cli.main(command(tmp_path, "--resume")) == 2
    assert "reward_model changed" in capsys.readouterr().err


@pytest.mark.parametrize("marker", ["A helpful answer:", "Good:"])
def test_a_model_of_coh_goes_on_behind_its_marker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], marker: str
) -> None:
    words = command(tmp_path, "--max_steps", "2", "--eval_fraction", "0")
    trained = {"objective": {"name": "coh", "good_marker": marker}}
    (tmp_path / "policy" / "run.json").write_text(json.dumps({"settings": trained, "data": {}}))
    assert cli.main(words) == 0
    assert f"answers   begin with {marker!r}, as in training\n" in capsys.readouterr().out
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        assert trained_prefix(folder) == marker
    options = RolloutRunOptions(
        train_file=str(tmp_path / "prompts.jsonl"),
        model=str(tmp_path / "run"),  # once more
        reward_model=str(tmp_path / "judge"),
        eval_fraction=0,
    )
    run = RolloutRun(options, {"output_dir": str(tmp_path / "again"), "use_cpu": True, "max_completion_length": 5})
    asked = run.prepare().trainer.train_dataset.prompts
    assert all(TOKENIZER.decode(prompt.ids).endswith(marker) for prompt in asked)


def test_what_is_measured_on_the_way_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Held-out rewards at each evaluation, and that the judge reads a part of the answers only."""
    words = command(tmp_path, "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1")
    judge = copy.deepcopy(TOKENIZER)
    judge.model_max_length = 6
    judge.save_pretrained(tmp_path / "judge")
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    held_out = [line for line in out.splitlines() if line.endswith("(held out)")]
    assert [line.split("  ")[0] for line in held_out] == ["step 2/4", "step 4/4"]
    assert all(re.search(r"  reward -?[\d.]+  tokens [\d.]+  \(held out\)", line) for line in held_out)
    assert ", which reads 6 tokens of a prompt and an answer\n" in out
    assert "of the answers were cut to what the reward model reads" in out
    lines = [line for line in figures(tmp_path)["log"] if "reward" in line]
    assert all(0 < line["judge_cut_share"] <= 1 for line in lines)
    assert {"reward_std", "equal_rewards_share", "judge_empty_share"} <= {*lines[0]}


def test_settings_of_the_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--objective.clip_high",
        "0.28",
        "--objective.kl_weight",
        "0.1",
        "--objective.entropy_weight",
        "0.02",
        "--eval_fraction",
        "0",
        "--max_steps",
        "2",
    ]
    assert cli.main(command(tmp_path, *flags)) == 0
    out = capsys.readouterr().out
    assert "policy: clipped at 0.8 and 1.28, token_mean, divergence x 0.1 from a frozen copy of the model" in out
    assert ", entropy x 0.02\n" in out
    (line,) = [line for line in figures(tmp_path)["log"] if "loss" in line]
    assert 0 < line["entropy"] < math.log(len(TOKENIZER))
    assert "no held-out set: not evaluated" in out


@pytest.mark.parametrize("times", [1, 4])
def test_a_prompt_that_is_repeated_makes_nothing_surer(times: int) -> None:
    """Five prompts are five draws, each written once or four times."""
    records = [PromptRecord(f"say {number}", "a file") for number in range(5) for _ in range(times)]
    values = [float(number) for number in range(5) for _ in range(times)]
    run = RolloutRun.__new__(RolloutRun)
    run.held_out = records
    run.before, run.after = {"rewards": [0.0] * len(values)}, {"rewards": values}
    assert run.gain() == (2.0, mean_interval([0.0, 1.0, 2.0, 3.0, 4.0]))


def test_one_prompt_has_no_interval() -> None:
    side = {"eval_reward": 1.0, "interval": None, "rewards": [1.0], "eval_answer_tokens": 2.0}
    side |= {"eval_unfinished_share": 0.0, "eval_empty_share": 0.0}
    run: Any = SimpleNamespace(held_out=["prompt"], before=side, after=side, gain=lambda: (0.0, None))
    notes = cli_rlhf.results(run).notes
    assert notes[-1] == "One prompt gives no interval: hold out more."
    run.gain = lambda: (0.0, (-1.0, 1.0))
    assert cli_rlhf.results(run).notes[-1] == "The interval of the difference includes 0."


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str) -> str:
        assert cli.main(command(tmp_path, *flags)) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()[-1]

    assert "rank_by_reward: expected False where a model answers prompts, got True" in refused("--rank_by_reward")
    assert "build_tokenizer: expected None" in refused("--build_tokenizer.vocab_size", "300")
    assert "max_length: expected None where answers are sampled, got 9" in refused("--max_length", "9")
    assert "metric_for_best_model: expected one of reward, answer_tokens" in refused("--metric_for_best_model", "loss")
    assert "reward_model: expected" in refused("--reward_model", str(tmp_path / "nothing"))
    capsys.readouterr()
    assert cli.main(["rlhf", "--train_file", "x", "--model", "y", "--output_dir", "z"]) == 2
    assert "reward_model: expected a folder or name of a reward model, got nothing" in one_sentence(capsys)
    assert cli.main(["rlhf", "--train_file", "x", "--reward_model", "y", "--output_dir", "z"]) == 2
    assert "model: expected a folder or name of the language model to go on with" in one_sentence(capsys)
    assert cli.main(["rlhf", "--help"]) == 0


def test_every_option_of_a_run_is_used_or_refused() -> None:
    """A new field of `RunOptions` becomes an option here, too: decide what a rollout does with it."""
    own = set(RolloutRunOptions.__dataclass_fields__) - set(RunOptions.__dataclass_fields__)
    assert own == {"reward_model", "label", "lead"}
    known = """train_file eval_file eval_fraction format columns rank_by_reward skip_bad_records model model_config
    tokenizer build_tokenizer peft_config dtype attn_implementation resume overwrite"""
    assert set(RunOptions.__dataclass_fields__) == set(known.split())


@pytest.mark.parametrize("module", [cli_rlhf, cli_reward_model])
def test_options_named_in_the_help_exist(module: Any) -> None:
    text = module.HELP if module is cli_rlhf else module.TRAIN_HELP
    named = set(re.findall(r"--(\w+)", text)) - {"OPTION", "config", "reward"}  # `score --reward-model`
    assert named <= {*module.RUN_HINTS, *module.CONFIG_HINTS}
    assert {"train_file", "output_dir", "resume", "learning_rate"} <= named


@pytest.mark.parametrize("flags", [["--max_prompt_length", "2"], ["--max_prompt_length", "3"]])
def test_cut_prompts_are_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, flags: list[str]
) -> None:
    assert cli.main(command(tmp_path, *flags, "--max_steps", "1")) == 0
    found = capsys.readouterr()
    assert found.out.count(f"cut to {flags[1]} tokens") == 2, "of both sets, in the header"
    assert "were cut" not in found.out + found.err + caplog.text


REFUSING = "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('no word') }}{% endif %}\
{{ m['content'] }}{% endfor %}"
BAD: dict[str, Any] = {"unreadable": '{"prompt": ', "empty": {"prompt": None}}


@pytest.mark.parametrize("bad", [*BAD, "refused by the template", "refused by the judge's"])
def test_bad_prompts_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str) -> None:
    words = command(tmp_path, "--max_steps", "1", "--eval_file", str(tmp_path / "held_out.jsonl"))
    place = words.index("--eval_fraction")
    del words[place : place + 2]
    for name in ("prompts", "held_out"):
        rows: list[Any] = [{"prompt": [{"role": "user", "content": f"say {number}"}]} for number in range(4)]
        rows.insert(1, BAD.get(bad, {"prompt": [{"role": "user", "content": "no"}]}))
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = REFUSING
    tokenizer.save_pretrained(tmp_path / ("judge" if "judge" in bad else "policy"))
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "; where others are good, --skip_bad_records leaves it out" in said, said
    assert cli.main([*words, "--skip_bad_records"]) == 0
    out = capsys.readouterr().out
    assert "training  4 prompts\n" in out
    assert "held out  4 prompts" in out
    assert "skipped   2 bad records, the first: " in out
    assert len(figures(tmp_path)["after"]["rewards"]) == 4
