"""Data and settings under which no weight would move are refused before training, with the reason and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import IterableDataset

from clha_fast import CLHAOptions, DPOOptions, Objective, PolicyOptions, RRHFOptions
from clha_fast.batching.collator import RankedCollator
from clha_fast.cli import main as cli
from clha_fast.training.config import CLHAConfig
from clha_fast.training.datasets import check_trains
from clha_fast.training.trainer import CLHATrainer
from tests.support.command_line import command, one_sentence
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, Features, config, trainer


def rows_of(sizes: list[int], rewards: list[float] | None) -> list[dict[str, Any]]:
    rows = []
    for number, size in enumerate(sizes):
        row: dict[str, Any] = {"prompt": f"say {number}: ", "completions": [f"a cat {k}" for k in range(size)]}
        rows.append(row if rewards is None else {**row, "rewards": rewards[:size]})
    return rows


REFUSED: list[tuple[list[int], list[float] | None, dict[str, Any], str]] = [
    ([1, 1, 1], None, {}, "preset='sft_only' or sft_factor='one' trains on them$"),
    ([1, 1], [4.0], {"preset": "paper"}, "every prompt has one response: no pair is ranked and sft_factor='squared'"),
    ([1, 1, 1], [-2.0], {"sft_factor": "one"}, "no SFT target's reward is above reward_floor=0;"),
    ([2, 3], [-1.0, -1.5, -2.0], {}, "reward_margin=3 drops every pair and no SFT target's .* above reward_floor=0;"),
    ([3, 4], [9.0, 8.5, 8.0, 7.0], {"reward_floor": 20.0}, "noise_rule='none'"),
    ([2, 2], [1.0, 0.0], {"sft_weight": 0.0}, "reward_margin=3 drops every pair and sft_weight=0 turns SFT off"),
    ([2, 4], None, {"rank_weight": 0.0, "sft_weight": 0.0}, "rank_weight=0 turns ranking off and sft_weight=0"),
]


@pytest.mark.parametrize(("sizes", "rewards", "changes", "words"), REFUSED)
@pytest.mark.parametrize("tokenised", [False, True])
def test_a_loss_that_depends_on_no_response(
    tmp_path: Path, sizes: list[int], rewards: list[float] | None, changes: dict[str, Any], words: str, tokenised: bool
) -> None:
    rows: Any = rows_of(sizes, rewards)
    if tokenised:  # by the user, in a dataset that is left as it is
        rows = Features([RankedCollator(TOKENIZER).tokenize_record(row) for row in rows])
    with pytest.raises(ValueError, match=rf"^train_dataset: expected responses on which the loss depends, .*{words}"):
        trainer(tmp_path, rows=rows, **changes)


@pytest.mark.parametrize(
    ("sizes", "rewards", "changes", "ranked"),
    [
        ([1] * 300 + [2], None, {}, True),  # one in a later chunk is enough
        ([1, 1], None, {"preset": "sft_only"}, None),
        ([1, 1], [1.0], {"sft_factor": "one"}, False),
        ([3, 3], [2.0, 1.5, 1.0], {}, False),
        ([3, 3], [-2.0, -3.0, -9.0], {}, True),
    ],
)
def test_what_counts_trains(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    sizes: list[int],
    rewards: list[float] | None,
    changes: dict[str, Any],
    ranked: bool | None,
) -> None:
    with caplog.at_level("WARNING"):
        trainer(tmp_path, rows=rows_of(sizes, rewards), **changes)
    assert ("the SFT term alone trains" in caplog.text) is (ranked is False)


@pytest.mark.parametrize(("rows", "batch"), [(1, 2), (5, 6), (7, 64)])
def test_no_full_batch(tmp_path: Path, rows: int, batch: int) -> None:
    changes = {"per_device_train_batch_size": batch}
    with pytest.raises(
        ValueError, match=rf"^dataloader_drop_last: .* at least the {batch} prompts .* got True and {rows}"
    ):
        trainer(tmp_path, rows=make_rows(rows), dataloader_drop_last=True, **changes)
    trainer(tmp_path, rows=make_rows(rows), **changes)
    trainer(tmp_path, rows=make_rows(batch), dataloader_drop_last=True, **changes)


def test_no_full_batch_beside_a_budget_of_tokens(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^dataloader_drop_last: expected False with max_tokens_per_batch"):
        trainer(tmp_path, dataloader_drop_last=True, max_tokens_per_batch=64)


def test_a_stream_without_effect_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Rows(IterableDataset[Any]):
        def __init__(self, rows: list[dict[str, Any]]) -> None:
            self.rows = rows

        def __iter__(self) -> Any:
            return iter(self.rows)

    silent, loud = rows_of([2, 2], [-1.0, -2.0]), rows_of([2, 2], None)
    for rows, said in ((silent, 1), (loud, 0)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            trainer(tmp_path, rows=Rows(rows), max_steps=4, logging_steps=1).train()
        assert caplog.text.count("the loss has depended on no response so far") == said


def test_the_command_line_refuses_before_the_folder_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = command(tmp_path, "--dataloader_drop_last", "true", "--per_device_train_batch_size", "99")
    assert cli.main(words) == 2
    assert "dataloader_drop_last: " in one_sentence(capsys)
    assert not list((tmp_path / "run").iterdir())  # Trainer makes it, empty


@pytest.mark.parametrize(
    ("objective", "said"),
    [(CLHAOptions(noise_rule="none"), True), (DPOOptions(), True), (RRHFOptions(), False), (PolicyOptions(), False)],
)
def test_rewards_contradict_an_order_that_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, objective: Objective, said: bool
) -> None:
    """RRHF and the policy gradient go by rewards alone; nothing else is said of them either."""
    features = Features([RankedCollator(TOKENIZER).tokenize_record(row) for row in rows_of([2, 3], [0.0, 4.0, 8.0])])
    with caplog.at_level("WARNING"):
        check_trains(features, objective, CLHAConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[]), 1)
    assert ("the rewards contradict the order" in caplog.text) is said
    assert said or not caplog.text


def test_a_policy_learns_nothing_from_equal_rewards(tmp_path: Path) -> None:
    features = Features([RankedCollator(TOKENIZER).tokenize_record(row) for row in rows_of([2, 3], [1.0, 1.0, 1.0])])
    args = CLHAConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="the rewards of each prompt are all equal, so that every advantage is 0"):
        check_trains(features, PolicyOptions(reduction="sequence_mean"), args, 1)


@pytest.mark.parametrize("rewarded", [True, False])
@pytest.mark.parametrize(
    ("held_out", "named"),
    [
        ([True], []),
        ([False], ["eval_dataset"]),
        ([False, True, False], ["first", "third"]),
        ([True, True], []),
    ],
)
def test_held_out_records_without_the_rewards_of_training_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rewarded: bool, held_out: list[bool], named: list[str]
) -> None:
    sets: Any = [make_rows(3, rewards=alike == rewarded) for alike in held_out]
    sets = dict(zip(("first", "second", "third"), sets, strict=False)) if len(sets) > 1 else sets[0]
    CLHATrainer(make_model(len(TOKENIZER)), config(tmp_path), make_rows(4, rewards=rewarded), sets, TOKENIZER)
    said = [record.getMessage() for record in caplog.records if "as train_dataset has them" in record.getMessage()]
    assert [line.partition(":")[0] for line in said] == named
    rule = "all of its pairs count, in the order" if rewarded else "its pairs count by rewards"
    assert all(rule in line for line in said)
