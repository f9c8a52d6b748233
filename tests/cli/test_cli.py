"""The command line: runs from files, its messages, its exit status. In this process unless marked slow."""

from __future__ import annotations

import builtins
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import clha_fast
from clha_fast.cli import env as cli_env
from clha_fast.cli import main as cli
from clha_fast.cli import options as cli_options
from clha_fast.cli import runs as cli_runs
from clha_fast.cli.devices import backend_text
from clha_fast.cli.options import OptionError
from clha_fast.evaluation import plots
from clha_fast.evaluation import tables as report
from clha_fast.experiments import run
from clha_fast.models.loading import build_model, build_tokenizer
from tests.support.command_line import command, one_sentence, write_rows
from tests.support.no_gpu import told


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "run").state_dict()


def test_bad_records_are_skipped_and_counted_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(tmp_path, "--max_steps", "1")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "p", "completions": ["a", ""], "rewards": [1.0, 0.0]}\n')
        # A record like any other until it is tokenised: nothing but the end of a response.
        file.write('{"prompt": "p", "completions": ["a", "</s>"], "rewards": [1.0, 0.0]}\n')
    assert cli.main(words) == 2
    said = one_sentence(capsys)
    assert "completions[1]" in said
    assert said.endswith("; where others are good, --skip_bad_records leaves it out\n")
    assert cli.main([*words, "--skip_bad_records"]) == 0
    assert "skipped   2 bad records, the first: " in capsys.readouterr().out


@pytest.mark.drawn
def test_train_from_scratch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # users train without the interpreter
    assert cli.main(command(tmp_path)) == 0
    out, folder = capsys.readouterr().out, tmp_path / "run"
    for words in ("LlamaForCausalLM", "torch (auto; triton cannot run", "pairs dropped as noise", "SFT gates closed"):
        assert words in out
    assert "step 8/8" in out
    assert "ranking accuracy (kept pairs)" in out
    assert "Kendall's tau" in out

    found = json.loads((folder / "metrics.json").read_text())
    assert found["before"].keys() >= report.EVALUATION_ROWS.keys()
    assert found["after"].keys() >= report.EVALUATION_ROWS.keys()
    assert [line["step"] for line in found["log"] if "loss" in line] == [2, 4, 6, 8]
    assert report.number(found["after"]["eval_loss"]) in out
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {"model.safetensors", "checkpoint-6", "checkpoint-8"} <= set(os.listdir(folder))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the cat sat").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat sat"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id

    # A trained folder is a model and a tokenizer for the next run.
    again = command(tmp_path, "--model", str(folder), "--max_steps", "1", model_config=None, build_tokenizer=None)
    again[again.index("--output_dir") + 1] = str(tmp_path / "next")
    assert cli.main(again) == 0


def test_ctrl_c_and_resume_end_where_one_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    assert cli.main(command(tmp_path / "whole")) == 0
    before = signal.getsignal(signal.SIGINT)

    class PressCtrlC(cli_runs.Progress):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(cli_runs, "Progress", PressCtrlC)
        assert cli.main(command(tmp_path / "parts")) == 130
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr().err
    assert "interrupted after step 4, which is saved; the same command with --resume continues" in said
    assert "checkpoint-4" in os.listdir(tmp_path / "parts" / "run")
    assert cli.main(command(tmp_path / "parts", "--resume")) == 0
    assert "resumed from" in capsys.readouterr().out
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "parts").items():
        assert torch.equal(tensor, expected[name]), name
    one, two = (json.loads((tmp_path / part / "run" / "metrics.json").read_text()) for part in ("whole", "parts"))
    keys = report.EVALUATION_ROWS
    assert [one["before"][k] for k in keys] == [two["before"][k] for k in keys]
    assert [one["after"][k] for k in keys] == [two["after"][k] for k in keys]


def test_second_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class PressTwice(cli_runs.Progress):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli_runs, "Progress", PressTwice)
    assert cli.main(command(tmp_path)) == 130
    last = tmp_path / "run" / "checkpoint-3"
    assert f"interrupted; {last} is complete and intact, resume from it" in capsys.readouterr().err


def test_folder_with_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, max_steps=1)) == 0
    assert cli.main(command(tmp_path, max_steps=1)) == 2
    assert "holds a run already; give --resume, --overwrite or another folder" in capsys.readouterr().err
    assert cli.main(command(tmp_path, "--resume", "--margin", "1", max_steps=1)) == 2
    assert "margin was the default, is 1.0" in capsys.readouterr().err
    write_rows(tmp_path / "train.jsonl", seed=9)
    assert cli.main(command(tmp_path, "--resume", max_steps=1)) == 2
    assert "train_file changed" in capsys.readouterr().err
    assert cli.main(command(tmp_path, "--overwrite", max_steps=1)) == 0
    capsys.readouterr()
    nothing = {"model_config": None, "build_tokenizer": None, "max_steps": 1}
    for own in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert cli.main(command(tmp_path, "--overwrite", "--model", str(own), **nothing)) == 2
        assert f"expected another folder than that of model, {own}, which the run would" in one_sentence(capsys)
        assert (own / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--learning_rat", "1"], {}, "unknown option 'learning_rat'; did you mean 'learning_rate'?"),
        (["--no-such-thing-at-all", "1"], {}, "unknown option 'no_such_thing_at_all'\n"),
        ([], {"reward_margins": 2}, "run.yaml: unknown option 'reward_margins'; did you mean 'reward_margin'?"),
        ([], {"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
        (["--max_steps", "3.5"], {}, "--max_steps: expected a whole number, got 3.5"),
        (["--max_steps"], {}, "--max_steps: expected a value, got none"),
        (["--margin", "--resume"], {}, "--margin: expected a value, got none"),
        (["stray"], {}, "expected an option that begins with --, got 'stray'"),
        (["--seed.x", "1"], {}, "seed is no mapping"),
        (
            ["--model_config.hidden_sizes", "64"],
            {},
            "unknown key 'hidden_sizes'; did you mean 'hidden_size'?",
        ),
        ([], {"build_tokenizer": {"vocab": 300}}, "build_tokenizer: unknown key 'vocab'; did you mean 'vocab_size'?"),
        ([], {"build_tokenizer": {"vocab_size": 100}}, "build_tokenizer.vocab_size: expected at least 259"),
        (["--model_config.model_type", "lama"], {}, "got 'lama'; did you mean 'llama'?"),
        (["--model_config.vocab_size", "5"], {}, "model_config.vocab_size: expected at least the tokenizer's"),
        (["--model", "x"], {}, "expected either model (a path or name) or model_config, got both"),
        ([], {"build_tokenizer": None}, "expected tokenizer or build_tokenizer with model_config, got neither"),
        (["--tokenizer", "x"], {}, "expected either tokenizer or build_tokenizer, got both"),
        (
            ["--model", "/nowhere/at-all"],
            {"model_config": None, "build_tokenizer": None},
            "model: expected a folder that holds one, or a name on the Hub, got '/nowhere/at-all', and there is no",
        ),
        (
            ["--model", str(Path(__file__).parent)],
            {"model_config": None, "build_tokenizer": None},
            f"model: expected a folder that holds one, or a name on the Hub, got {str(Path(__file__).parent)!r} (",
        ),
        (["--preset", "best"], {}, "preset: expected one of published, paper, sft_only, got 'best'"),
        (["--backend", "triton"], {}, "backend 'triton' cannot run: "),
        (["--dtype", "int8"], {}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        (["--eval_fraction", "1.5"], {}, "eval_fraction: expected a number between 0 and 1, got 1.5"),
        (["--eval_fraction", "0.9999"], {}, "leaves none for training"),
        (["--eval_fraction", "0", "--eval_strategy", "steps"], {}, "eval_strategy: expected 'no' with eval_fraction 0"),
        (["--resume", "--overwrite"], {}, "expected either resume or overwrite, got both"),
        (["--format", "xml"], {}, "format: expected auto or one of"),
        (["--train_file", "nowhere.jsonl"], {}, "nowhere.jsonl"),
        (["--use_liger_kernel", "true"], {}, "use_liger_kernel: expected False"),
    ],
)
def test_user_errors_are_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(command(tmp_path, *flags, **changes)) == 2
    error = one_sentence(capsys)
    assert error.startswith("clha-fast train: ")
    assert message in error
    assert not (tmp_path / "run").exists(), "a run that never began leaves nothing"


def test_bad_files_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = command(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"], "rew')
    assert cli.main(config) == 2
    assert "train.jsonl:1: column" in one_sentence(capsys)
    (tmp_path / "run.yaml").write_text("max_steps: [1\n")
    assert cli.main(config) == 2
    assert "run.yaml: malformed YAML: " in one_sentence(capsys)
    (tmp_path / "run.yaml").write_text("- 1\n")
    assert cli.main(config) == 2
    assert "expected options as `name: value`, got list" in one_sentence(capsys)
    assert cli.main(["train", "--config"]) == 2
    assert "--config: expected the path" in one_sentence(capsys)
    assert cli.main(["train", "--output_dir", "x"]) == 2
    assert "train_file: expected the path" in one_sentence(capsys)
    write_rows(tmp_path / "train.jsonl")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("")
    assert cli.main(command(tmp_path, "--output_dir", str(tmp_path / "thesis"))) == 2
    assert "1 entries (a.tex) that are no run of this program" in one_sentence(capsys)


def test_tokenizer_without_eos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = build_tokenizer(["some text"], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer", str(tmp_path / "tokenizer")]
    assert cli.main(command(tmp_path, *flags, build_tokenizer=None)) == 2
    assert "tokenizer: expected one with an EOS token" in one_sentence(capsys)


def cube(model: torch.nn.Module, args: Any, output: Any) -> Any:
    output.logits = output.logits**3
    return output


def test_model_with_a_head_that_is_not_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*arguments: Any) -> torch.nn.Module:
        model = build_model(*arguments)
        model.register_forward_hook(cube)
        return model

    monkeypatch.setattr(run, "build_model", build)
    assert cli.main(command(tmp_path)) == 2
    expected = "model: expected a head that can be fused, got LlamaForCausalLM with output embedding Linear: "
    assert expected in one_sentence(capsys)


def test_commands_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out.count("usage: clha-fast COMMAND") == 2
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"clha-fast {clha_fast.__version__}\n"
    known = f"clha-fast: expected a command ({', '.join(cli.COMMANDS)}), got "
    for given, hint in {"trian": "train", "Score": "score", "converts": "convert", "--config": None, "x": None}.items():
        assert cli.main([given, "--config", "run.yaml"]) == 2
        said = f"; did you mean {hint!r}?" if hint else ""
        assert capsys.readouterr().err == f"{known}{given!r}{said}\n"
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    named = set(re.findall(r"--(\w+)", text)) - {"OPTION", "config", "policy"}  # `score --policy`
    assert len(named) > 30
    assert named <= set(cli_options.HINTS), "help names an option that does not exist"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rank", "m", "a.jsonl", "b.jsonl", "--batchsize", "3"], "--batchsize 3; did you mean '--batch-size'?"),
        (["score", "a.jsonl", "b.jsonl", "--reward_modell=x"], "--reward-modell=x; did you mean '--reward-model'?"),
        (["prepare", "ranked", "a.jsonl", "out", "--pasre", "x"], "--pasre x; did you mean '--parse'?"),
        (["merge", "a", "b", "--overwrit", "--qqq"], "--qqq"),
        (["generate", "m", "a.jsonl", "b.jsonl", "--top_pp", "3"], "--top-pp 3; did you mean '--top-p'?"),
        (["eval", "a.jsonl", "--bogus"], "unrecognized arguments: --bogus ("),
        (["table2"], "the following arguments are required: --config ("),
    ],
)
def test_misspelled_flags_of_the_other_commands(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and nothing is read before."""
    try:
        status: Any = cli.main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    line = capsys.readouterr().err
    assert line.startswith(f"clha-fast {words[0]}: ")
    assert said in line
    assert line.count("\n") == 1


def test_traceback_on_request(tmp_path: Path) -> None:
    with pytest.raises(OptionError):
        cli.main(command(tmp_path, "--learning_rat", "1", "--traceback"))


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["clha-fast"] == clha_fast.__version__
    assert lines["torch"] == torch.__version__
    assert "auto" in lines["backend"]
    assert {"triton", "transformers", "flash-attn", "device"} <= lines.keys()


def test_env_of_a_model_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head decides: V 151936 and H 2048 on 16 GiB; a classifier's loss has no backend."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = LlamaConfig(hidden_size=2048, num_hidden_layers=1, vocab_size=151936, num_attention_heads=8)
    config.save_pretrained(tmp_path)
    head = cli_env._head(str(tmp_path))
    assert head == {"vocabulary": 151936, "width": 2048, "trains": True}
    with told(90, 132, memory=16 * 2**30):
        text = backend_text("auto", torch.device("cuda"), torch.bfloat16, **head)
        routed = backend_text("auto", torch.device("cuda"), torch.bfloat16, **head, routed=True)
        unknown = backend_text("auto", torch.device("cuda"), torch.bfloat16)
    why = "gradients are wanted and its memory is there"
    assert text == f"workspace up to 1,247 tokens in a call, triton beyond (auto: {why})"
    assert routed == unknown == "triton (auto: a GPU and triton are there)"
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^--model: expected a language model, got .*, a classifier, whose loss has"):
        cli.main(["env", "--model", str(tmp_path), "--traceback"])


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"query": "q", "responses": ["a", "b"], "scores": [1.0, 2.0]}]
    source.write_text(json.dumps(rows[0]) + "\n")
    assert cli.main(["convert", str(source), str(target)]) == 0
    assert "1 records, 2 responses, 1 records with rewards" in capsys.readouterr().out
    assert json.loads(target.read_text()) == {"prompt": "q", "completions": ["b", "a"], "rewards": [2.0, 1.0]}
    assert cli.main(["convert", str(source), str(target)]) == 2
    assert "exists already; expected a new file, or --overwrite" in one_sentence(capsys)
    assert cli.main(["convert", str(source), str(tmp_path / "no" / "out.jsonl")]) == 2
    said = one_sentence(capsys)
    assert f"out.jsonl: expected a file in a folder that exists, there is no {tmp_path / 'no'}" in said
    assert "partial" not in said
    assert cli.main(["convert", str(source), str(target), "--overwrite", "--format", "rrhf"]) == 0
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "no.jsonl"), str(target), "--overwrite"]) == 2
    assert "no.jsonl" in one_sentence(capsys)


@pytest.mark.drawn
def test_curve_without_points_and_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "curve.png"
    plots.loss_curve([], {}, {}, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    plain = builtins.__import__

    def blocked(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    assert cli.main(command(tmp_path, max_steps=1)) == 0
    assert "not drawn: the plot extra (matplotlib) is not installed" in capsys.readouterr().out
    assert not (tmp_path / "run" / "loss_curve.png").exists()


def test_metrics_file_is_json_whatever_the_numbers(tmp_path: Path) -> None:
    # Without a kept pair accuracies are means over nothing.
    rows = [{"prompt": f"p {k}", "completions": ["a cat", "a dog"], "rewards": [1.0, 0.5]} for k in range(12)]
    words = command(tmp_path, max_steps=2, eval_fraction=0.5)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(words) == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=refuse)
    assert found["before"]["eval_rewards/accuracies"] is None
    assert found["before"]["eval_kendall_tau"] is not None


@pytest.mark.slow
def test_killed_process_resumes(tmp_path: Path) -> None:
    """SIGKILL in a real process after a checkpoint; the same command with --resume ends where one run ends."""
    environment = {**os.environ, "PYTHONPATH": str(Path(clha_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()

    def arguments(folder: Path, *flags: str) -> list[str]:
        words = command(folder, *flags, max_steps=60, save_steps=10, logging_steps=1)
        return [sys.executable, "-m", "clha_fast", *words]

    subprocess.run(arguments(tmp_path / "whole"), env=environment, check=True, capture_output=True, timeout=300)
    process = subprocess.Popen(arguments(tmp_path / "killed"), env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "run" / "checkpoint-10").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    resumed = arguments(tmp_path / "killed", "--resume")
    done = subprocess.run(resumed, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert "resumed from" in done.stdout
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "killed").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("command", ["eval", "compare", "convert", "prepare", "table2", "ablate", "noise", "rlhf"])
def test_commands_that_processes_do_not_share_are_refused_under_a_launcher(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main([command, "anything"]) == 2
    assert f"{command}: expected one process, got 2 (WORLD_SIZE)" in capsys.readouterr().err
