"""Options, entries and keys that are given twice: refused with both values, in flags and in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clha_fast.cli import experiments, prepare
from clha_fast.cli import main as cli
from clha_fast.cli.columns import take_columns
from clha_fast.cli.options import merge, read_flags
from clha_fast.cli.values import OptionError, read_mapping, read_value
from tests.support.command_line import one_sentence

GLOB = "; a glob takes several files ('data/*.jsonl')"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --config a.yaml --config b.yaml", "--config: expected once, got a.yaml and b.yaml"),
        ("train --config=a.yaml --seed 1 --config b.yaml", "--config: expected once, got a.yaml and b.yaml"),
        ("demo --config a.yaml --seed 1 --config=a.yaml", "--config: expected once, got a.yaml and a.yaml"),
        ("reward-model train --config x --config y", "--config: expected once, got x and y"),
        ("rlhf --config x --model m --config=y", "--config: expected once, got x and y"),
        ("table2 --config a.yaml --config b.yaml", "--config: expected once, got a.yaml and b.yaml"),
        ("train --config --seed 1", "--config: expected the path of a YAML file, got none"),
        ("train --train_file a --train_file b", f"--train_file: expected once, got a and b{GLOB}"),
        ("train --eval-file=a --eval_file b", f"--eval_file: expected once, got a and b{GLOB}"),
        ("train --output_dir a --output-dir=b", "--output-dir: expected once, got a and b"),
        ("train --seed 1 --margin 2 --seed 1", "--seed: expected once, got 1 and 1"),
        ("train --bf16 --bf16 false", "--bf16: expected once, got true and false"),
        ("train --columns.prompt q --columns.prompt=r", "--columns.prompt: expected once, got q and r"),
        ("train --columns {prompt:\tq} --columns.prompt r", "--columns.prompt: expected once, got q and r"),
        ("train --columns.prompt r --columns {prompt:\tq}", "--columns.prompt: expected once, got r and q"),
        ("train --columns {prompt:\tq,prompt:\tr}", "--columns: prompt: expected once, got q and r"),
        ("train --columns null --columns null", "--columns: expected once, got null and null"),
        ("train --peft_config.r 8 --peft-config.r 4", "--peft-config.r: expected once, got 8 and 4"),
        ("train --objective dpo --objective simpo", "--objective: expected once, got dpo and simpo"),
        ("train --objective dpo --objective.name ipo", "--objective.name: expected once, got dpo and ipo"),
        ("reward-model train --half 0 --half 1", "--half: expected once, got 0 and 1"),
        ("rlhf --reward_model a --reward_model b", "--reward_model: expected once, got a and b"),
        ("generate m a b --max-new-tokens 4 --max_new_tokens 8", "--max-new-tokens: expected once, got 4 and 8"),
        ("generate m a b --max-new 4 --max-new-tokens 8", "--max-new-tokens: expected once, got 4 and 8"),
        ("eval a --references=x --references y", f"--references: expected once, got x and y{GLOB}"),
        ("eval a --out x --model y --out z", "--out: expected once, got x and z"),
        ("compare a b --device cpu --device cuda", "--device: expected once, got cpu and cuda"),
        ("score a b --policy x --layout padded --layout shared", "--layout: expected once, got padded and shared"),
        ("rank m a b --label 0 --label 1", "--label: expected once, got 0 and 1"),
        ("inspect a --columns.prompt q --columns.prompt r", "--columns.prompt: expected once, got q and r"),
        ("convert a b --columns {prompt:\tq} --columns.prompt r", "--columns.prompt: expected once, got q and r"),
        ("prepare ranked a b --columns.q r --columns={q:\tq}", "--columns.q: expected once, got r and q"),
        ("score a b --columns {prompt:\tq,prompt:\tr}", "--columns: prompt: expected once, got q and r"),
        ("convert a b --overwrite --overwrite", "--overwrite: expected once, got --overwrite and --overwrite"),
        ("prepare ranked a b --dev 0.1 c --dev 0.2", "--dev: expected once, got 0.1 and 0.2"),
        ("merge a b --dtype auto --dtype float32", "--dtype: expected once, got auto and float32"),
        ("plan --model m --prompt 3 --max-prompt-length 4", "--max-prompt-length: expected once, got 3 and 4"),
        (
            "plan --model m --checkpointing --no-checkpointing",
            "--no-checkpointing: expected once, got true and --no-checkpointing",
        ),
        ("plan --model m --peft_config.r 3 --peft-config.r 4", "--peft_config.r: expected once, got 3 and 4"),
        ("ablate --config a.yaml --output-dir x --output_dir y", "--output-dir: expected once, got x and y"),
    ],
)
def test_options(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, *rest = (word.replace("\t", " ") for word in words.split(" "))
    assert cli.main([first, *rest]) == 2
    assert one_sentence(capsys) == f"clha-fast {first}: {said}\n"


def test_what_may_be_given_several_times() -> None:
    words = ["ranked", "a", "out", "--extra-candidate", "x", "--extra-candidate", "y"]
    assert prepare._parser().parse_intermixed_args(words).extra_candidate == ["x", "y"]
    flags = ["--columns", "{prompt: q}", "--columns.group_by", "id", "--objective", "dpo", "--objective.beta", "1"]
    assert read_flags(flags) == {
        "columns": {"prompt": "q", "group_by": "id"},
        "objective": {"name": "dpo", "beta": 1},
    }
    assert take_columns(["--columns.prompt", "q", "a", "--columns.group_by=id"]) == (
        ["a"],
        {"prompt": "q", "group_by": "id"},
    )


def test_changes_of_a_configuration(tmp_path: Path) -> None:
    path = str(tmp_path / "table.yaml")
    Path(path).write_text("seeds: [0]\nsettings: {max_steps: 1, seed: 2}\n")
    changes = ["settings={max_steps: 3}", "seeds=[1]", "settings.margin=2"]
    assert experiments.read(path, changes, None) == {
        "seeds": [1],
        "settings": {"max_steps": 3, "seed": 2, "margin": 2},
    }
    for more, said in {
        "seeds=[2]": r"--set seeds: expected once, got \[1\] and \[2\]",
        "settings.max_steps=4": "--set settings.max_steps: expected once, got 3 and 4",
        "settings=none": "--set settings: expected once, got .* and none",
        "data={2: a, 2: b}": "--set data: 2: expected once, got a and b",
    }.items():
        with pytest.raises(OptionError, match=said):
            experiments.read(path, [*changes, more], None)
    with pytest.raises(OptionError, match="--output-dir: expected once, got x and y"):
        experiments.read(path, ["output_dir=x"], "y")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["reward_models={}"], {"reward_models": {}}),
        (["run.peft_config={}"], {"run": {"peft_config": {}, "dtype": "float32"}}),
        (["settings={}"], {"settings": {}}),
        (["run={dtype: bfloat16}"], {"run": {"peft_config": {"r": 8}, "dtype": "bfloat16"}}),
        (["run.peft_config.r=4"], {"run": {"peft_config": {"r": 4}, "dtype": "float32"}}),
        (["generation={}"], {"generation": {}}),
    ],
)
def test_an_empty_mapping_takes_the_files_place(tmp_path: Path, changes: list[str], expected: dict[str, Any]) -> None:
    file = "reward_models: {label: a}\nrun: {peft_config: {r: 8}, dtype: float32}\nsettings: {margin: 1}\n"
    (tmp_path / "table.yaml").write_text(file)
    path = str(tmp_path / "table.yaml")
    before = experiments.read(path, [], None)
    assert experiments.read(path, changes, None) == {**before, **expected}


@pytest.mark.parametrize("changes", [["settings={}", "settings.margin=2"], ["settings.margin=2", "settings={}"]])
def test_an_empty_mapping_beside_an_entry(tmp_path: Path, changes: list[str]) -> None:
    (tmp_path / "table.yaml").write_text("seeds: [0]\n")
    with pytest.raises(OptionError, match="--set settings: expected once, got"):
        experiments.read(str(tmp_path / "table.yaml"), changes, None)


@pytest.mark.parametrize("name", ["columns", "model_init_kwargs", "peft_config", "lr_scheduler_kwargs"])
def test_an_empty_mapping_of_a_flag_takes_the_files_place(name: str) -> None:
    flags = read_flags([f"--{name}", "{}"])
    assert merge({name: {"a": 1}, "seed": 3}, flags) == {name: {}, "seed": 3}
    assert merge({name: {"a": 1}}, {name: {"b": 2}}) == {name: {"a": 1, "b": 2}}


@pytest.mark.parametrize("text", ["2024-13-45", "2024-02-30", "2001-01-01 25:00:00", "!!int abc"])
def test_what_yaml_cannot_make_a_value_of(tmp_path: Path, text: str) -> None:
    assert read_value(text, "--system") == text
    assert read_flags(["--run_name", text]) == {"run_name": text}
    path = tmp_path / "run.yaml"
    path.write_text(f"run_name: {text}\n")
    with pytest.raises(OptionError, match=f"^{path}: malformed YAML: "):
        read_mapping(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train_file: a\nseed: 1\ntrain_file: b\n", f"train_file: expected once, got a (line 1) and b (line 3){GLOB}"),
        ('model_config:\n  x: 3\n  "x": [4]\n', "x: expected once, got 3 (line 2) and a list (line 3)"),
        ("data:\n  2: {train: a}\n  4: b\n  2: c\n", "2: expected once, got a mapping (line 2) and c (line 4)"),
        ("methods: [clha, {name: dpo, name: ipo}]", "name: expected once, got dpo (line 1) and ipo (line 1)"),
    ],
)
def test_keys_of_a_file(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    for command in ("train", "reward-model train", "table2"):
        assert cli.main([*command.split(), "--config", str(path)]) == 2
        assert one_sentence(capsys) == f"clha-fast {command.split()[0]}: {path}: {said}\n"


def test_merged_mappings_are_overridden(tmp_path: Path) -> None:
    """`<<` is YAML's own way to give a default, wherever the anchor stands."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "one: {base: &base {rank: 1, seed: 1}, next: &next {<<: *base, rank: 2}}\n"
        "two: {<<: *next, seed: 3}\n"
        "three: {rank: 4, <<: [*next, *base]}\n"
    )
    found: dict[str, Any] = read_mapping(str(path))
    assert found["one"]["next"] == {"rank": 2, "seed": 1}
    assert found["two"] == {"rank": 2, "seed": 3}
    assert found["three"] == {"rank": 4, "seed": 1}
