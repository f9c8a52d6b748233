"""Settings that would not reach what they are for are refused by name, or said."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.stream import RankedStream
from clha_fast.cli import main as cli
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.objectives import CoHOptions
from clha_fast.training.config import CLHAConfig
from clha_fast.training.reward_data import PairedDataset
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer
from clha_fast.training.rollout import RolloutConfig
from clha_fast.training.trainer import CLHATrainer
from tests.support.command_line import command, one_sentence
from tests.support.reward_models import llama
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, Features, config, trainer

peft = pytest.importorskip("peft")
datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(make_rows(4))


def given(folder: Path, collator: Any = None, rows: Any = None, **changes: Any) -> CLHATrainer:
    tokenizer = None if collator is not None else TOKENIZER
    rows = make_rows(4) if rows is None else rows
    args = config(folder, **changes)
    return CLHATrainer(
        make_model(len(TOKENIZER)), args, train_dataset=rows, data_collator=collator, processing_class=tokenizer
    )


def reward_config(folder: Path, **changes: Any) -> RewardConfig:
    settings = {"use_cpu": True, "max_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return RewardConfig(output_dir=str(folder), **settings, **changes)


def reward_trainer(folder: Path, **changes: Any) -> RewardTrainer:
    rows = [{**row, "rewards": list(range(len(row["completions"]), 0, -1))} for row in make_rows(4)]
    return RewardTrainer(llama(), reward_config(folder, **changes), rows, rows, processing_class=TOKENIZER)


@pytest.mark.parametrize(
    ("name", "asked", "own"),
    [
        ("max_length", 12, None),
        ("max_length", 12, 40),
        ("max_prompt_length", 5, None),
        ("max_completion_length", 4, 9),
        ("pad_to_multiple_of", 32, None),
        ("drop_inert", False, True),
        ("eval_drop_inert", True, False),
    ],
)
def test_a_collator_of_ones_own(tmp_path: Path, name: str, asked: Any, own: Any) -> None:
    attribute = name.removeprefix("eval_")
    with pytest.raises(ValueError, match=rf"^{name}: expected {own}, as the data_collator has it, got {asked}"):
        given(tmp_path, RankedCollator(TOKENIZER, **{attribute: own}), **{name: asked})
    given(tmp_path, RankedCollator(TOKENIZER, **{attribute: own}))
    given(tmp_path, RankedCollator(TOKENIZER, **{attribute: asked}), **{name: asked})
    inner = RankedCollator(TOKENIZER)
    rows: Any = [inner.tokenize_record(row) for row in make_rows(4)]
    with pytest.raises(ValueError, match=rf"^{name}: expected \S+ beside a data_collator that is no RankedCollator"):
        given(tmp_path, lambda features: inner(features), rows, **{name: asked})


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length", "max_completion_length"])
def test_features_are_held_to_limits(tmp_path: Path, name: str) -> None:
    """However they come: a table, a part of a dataset, a dataset of one's own, or one that was pickled long ago."""
    collator = RankedCollator(TOKENIZER)
    features = [collator.tokenize_record(row) for row in make_rows(4)]
    old = RankedDataset(make_rows(4), collator)
    del old.limits
    table = datasets.Dataset.from_list(make_rows(4)).map(collator.tokenize_record)
    mine: Any = Features(features)
    mine.limits = {"rows": 10}
    for dataset in (Features(features), mine, torch.utils.data.Subset(old, range(4)), old, table):
        with pytest.raises(ValueError, match=rf"^{name}: expected at least the \d+ tokens of a row of train_dataset"):
            given(tmp_path, rows=dataset, **{name: 3})
        given(tmp_path, rows=dataset, **{name: 500})
        given(tmp_path, rows=dataset)
    with pytest.raises(ValueError, match=rf"^{name}: expected at least"):
        given(tmp_path, **{name: 5}).evaluate(Features(features))


def test_a_default_of_ones_own(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Mine(CLHAConfig):
        max_length: int | None = 12

    for own, refused in ((40, True), (12, False)):
        collator = RankedCollator(TOKENIZER, max_length=own)
        args = Mine(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
        with pytest.raises(ValueError, match=r"^max_length: expected 40") if refused else contextlib.nullcontext():
            CLHATrainer(make_model(len(TOKENIZER)), args, train_dataset=make_rows(4), data_collator=collator)


@pytest.mark.parametrize("name", ["max_length", "max_prompt_length", "max_completion_length"])
@pytest.mark.parametrize("own", [None, 9])
def test_rows_that_are_tokenised(tmp_path: Path, name: str, own: int | None) -> None:
    """A stream is held to what its collator says, a dataset to its lengths."""
    collator = RankedCollator(TOKENIZER, **{name: own})
    for dataset, expected in (
        (RankedDataset(make_rows(4), collator), r"at least the \d+ tokens of a row of train_dataset"),
        (RankedStream(Rows(), collator, repeat=True), f"{own}, with which the RankedStream is tokenised, got 3"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected {expected}"):
            given(tmp_path, rows=dataset, **{name: 3})
        given(tmp_path, rows=dataset)
        with pytest.raises(ValueError, match=rf"^{name}: expected {expected}"):
            given(tmp_path, RankedCollator(TOKENIZER, **{name: 3}), rows=dataset)
        if own is not None or isinstance(dataset, RankedDataset):
            given(tmp_path, rows=dataset, **{name: 500})
            given(tmp_path, rows=dataset, **{name: own})


def test_every_row_of_a_dataset_is_held_to_a_limit(tmp_path: Path) -> None:
    rows = [{"prompt": "say: ", "completions": ["a cat", "a dog"]}] * 2100
    rows += [{"prompt": "say: ", "completions": ["a cat " * 30, "a dog"]}]
    dataset = RankedDataset(rows, RankedCollator(TOKENIZER), progress=False)
    with pytest.raises(ValueError, match=r"^max_length: expected at least the \d+ tokens of a row of train_dataset"):
        given(tmp_path, rows=dataset, max_length=max(dataset.lengths) - 1)
    given(tmp_path, rows=dataset, max_length=max(dataset.lengths))


def test_what_a_trainer_tokenises_has_limits(tmp_path: Path) -> None:
    """In every form that docs/data.md names, to train on and to evaluate."""
    rows = make_rows(4)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    table = datasets.Dataset.from_list(rows)
    for form in (pd.DataFrame(rows), columns, table, datasets.DatasetDict(train=table), table.data.table, rows, Rows()):
        for place in ("train_dataset", "eval_dataset"):
            args = config(tmp_path, max_steps=1, max_length=12)
            forms = {"train_dataset": rows, place: form}
            if place == "eval_dataset" and isinstance(form, dict):
                continue  # several datasets, by name
            made = CLHATrainer(make_model(len(TOKENIZER)), args, processing_class=TOKENIZER, **forms)
            found = getattr(made, place)
            assert isinstance(found, RankedStream) or max(found.lengths) == 12


def test_limits_of_chains(tmp_path: Path) -> None:
    """An answer's length is not seen in a chain: what is as strict holds, else it is refused."""
    objective: Any = {"objective": "coh"}
    for own in (None, 5):
        inner = RankedCollator(TOKENIZER, options=CoHOptions(), max_completion_length=own)
        dataset = RankedDataset(make_rows(4), inner)
        with pytest.raises(ValueError, match=f"^max_completion_length: expected {own}, with which the RankedDataset"):
            given(tmp_path, rows=dataset, max_completion_length=4, **objective)
        if own is not None:
            given(tmp_path, rows=dataset, max_completion_length=6, **objective)
            given(tmp_path, rows=dataset, max_completion_length=5, **objective)


def test_a_stream_has_no_lengths_to_group_by(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_sampling_strategy: expected random or sequential for a stream"):
        given(tmp_path, rows=Rows(), train_sampling_strategy="group_by_length")
    stream = RankedStream(Rows(), RankedCollator(TOKENIZER), repeat=True)
    with pytest.raises(ValueError, match="train_sampling_strategy: expected random or sequential for a stream"):
        given(tmp_path, rows=stream, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match="max_tokens_per_batch: expected None for a stream"):
        given(tmp_path, rows=stream, max_tokens_per_batch=99)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_noise_that_goes_by_the_length_of_a_row(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    refused = rf"^neftune_noise_alpha: expected None with layout='{layout}' .*; layout='padded' takes it"
    with pytest.raises(ValueError, match=refused):
        given(tmp_path, layout=layout, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match=refused.replace("with layout", "with the data_collator's layout")):
        given(tmp_path, RankedCollator(TOKENIZER, layout=layout), neftune_noise_alpha=5.0)
    assert given(tmp_path, layout=layout, neftune_noise_alpha=0.0).layout == layout
    caplog.clear()
    assert given(tmp_path, layout="auto", neftune_noise_alpha=5.0).layout == "padded"
    assert "padded, since NEFTune's noise" in caplog.text
    assert given(tmp_path, neftune_noise_alpha=5.0).layout == "padded"


@pytest.mark.parametrize(("name", "dtype"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_an_evaluation_that_casts_weights(
    tmp_path: Path, name: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    rewarding = reward_trainer(tmp_path, **{name: True})
    for ours in (trainer(tmp_path, max_steps=1, **{name: True}), rewarding):
        ours.train()
        assert ours.model.dtype == torch.float32
        ours.evaluate()
        assert ours.model.dtype == dtype
        with pytest.raises(ValueError, match=f"^{name}: expected False where a model trains after it was evaluated"):
            ours.train()
    with pytest.raises(ValueError, match=f"^{name}: expected False where answers are sampled, got True"):
        RolloutConfig(output_dir=str(tmp_path), use_cpu=True, **{name: True})
    capsys.readouterr()
    words = command(tmp_path, f"--{name}", "true")
    rewards = ["reward-model", "train", "--train_file", words[words.index("--train_file") + 1], "--model", "absent"]
    for run in (words, [*rewards, "--output_dir", str(tmp_path / "reward"), "--use_cpu", "true", f"--{name}", "true"]):
        assert cli.main(run) == 2
        assert f"{name}: expected False where a run evaluates before it trains" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("name", "more", "refused"),
    [
        ("bf16_full_eval", {"dtype": "bfloat16"}, False),
        ("fp16_full_eval", {"dtype": "float16"}, False),
        ("bf16_full_eval", {"eval_fraction": 0}, False),
        ("fp16_full_eval", {"eval_fraction": 0}, False),
        ("fp16_full_eval", {"dtype": "bfloat16"}, True),
        ("bf16_full_eval", {"eval_fraction": 0, "eval_file": "some.jsonl"}, True),
    ],
)
def test_a_run_that_casts_nothing(tmp_path: Path, name: str, more: dict[str, Any], refused: bool) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", name: True}
    with pytest.raises(ValueError, match=f"^{name}: expected False") if refused else contextlib.nullcontext():
        Run(RunOptions(train_file="absent.jsonl", model="absent", **more), settings)


def test_a_model_in_the_dtype_of_its_evaluation_trains_on(tmp_path: Path) -> None:
    ours = trainer(tmp_path, make_model(len(TOKENIZER)).bfloat16(), max_steps=1, bf16_full_eval=True)
    ours.evaluate()
    ours.train()
    assert ours.state.global_step == 1


def test_pairs_are_held_to_a_limit(tmp_path: Path) -> None:
    pairs = PairedDataset(make_rows(4), TOKENIZER)
    for limit in (None, 96):
        RewardTrainer(llama(), reward_config(tmp_path, max_length=limit), pairs, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match=r"^max_length: expected at least the \d+ tokens of the longest row of train_"):
        RewardTrainer(llama(), reward_config(tmp_path, max_length=5), pairs, processing_class=TOKENIZER)


def test_noise_in_rows_of_a_reward_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^neftune_noise_alpha: expected None with layout='packed'"):
        reward_trainer(tmp_path, layout="packed", neftune_noise_alpha=5.0)
    assert reward_trainer(tmp_path, layout="auto", neftune_noise_alpha=5.0).layout == "padded"


@pytest.mark.parametrize(("weight", "said"), [(0.5, True), (0.0, False)])
def test_a_regulariser_that_no_loss_here_has(
    tmp_path: Path, weight: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"], "orth_reg_weight": weight}
    adapter = peft.AdaLoraConfig(task_type="CAUSAL_LM", **settings)
    args, rows = config(tmp_path), make_rows(4)
    CLHATrainer(make_model(len(TOKENIZER)), args, rows, processing_class=TOKENIZER, peft_config=adapter)
    given = peft.get_peft_model(make_model(len(TOKENIZER)), adapter)
    CLHATrainer(given, args, rows, processing_class=TOKENIZER)
    assert caplog.text.count(f"AdaLoRA's regulariser (orth_reg_weight={weight}") == 2 * said
