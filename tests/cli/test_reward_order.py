"""Rewards against the order of the responses, and margins that fit the rewards, in what a run and a scoring say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clha_fast.cli import main as cli
from clha_fast.cli.score import noise_table
from clha_fast.data import make_record
from clha_fast.data.records import RankedRecord
from clha_fast.evaluation.tables import margin_text
from clha_fast.objectives import Objective, RRHFOptions, SimPOOptions
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.objectives.pairs import gap_quartiles, keeps
from clha_fast.reports.data_summary import data_text, summarise
from clha_fast.rewards.noise import measure_noise
from tests.support.command_line import command
from tests.support.trainers import trainer


def records(orders: list[list[float]]) -> list[RankedRecord]:
    return [make_record(f"p{k}", [f"r{j}" for j in range(len(r))], rewards=r) for k, r in enumerate(orders)]


@pytest.mark.parametrize(
    ("orders", "kept", "reversed_pairs", "said"),
    [
        ([[9.0, 5.0, 1.0]], 3, 0, False),
        ([[1.0, 9.0], [9.0, 1.0], [9.0, 1.0]], 3, 1, True),
        ([[1.0, 9.0]] + [[9.0, 1.0]] * 4, 5, 1, False),  # a fifth, and not above it
        ([[2.0, 1.0], [1.0, 2.0]], 0, 0, False),  # noise contradicts nothing
        ([[0.0, 4.0, 8.0, 12.0]], 6, 6, True),
    ],
)
def test_kept_pairs_that_are_reversed(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    orders: list[list[float]],
    kept: int,
    reversed_pairs: int,
    said: bool,
) -> None:
    with caplog.at_level("WARNING"):
        trainer(tmp_path, rows=records(orders), reward_floor=-1.0)
    assert ("the rewards contradict the order" in caplog.text) is said
    found = summarise(records(orders), PUBLISHED)
    assert (found.kept_pairs, found.reversed_pairs) == (kept, reversed_pairs)


@pytest.mark.parametrize(
    ("orders", "objective", "said"),
    [
        ([[9.0, 5.0, 5.0], [1.0, 1.0]], SimPOOptions(), "of equal rewards, ranked by place 2 (50%)"),
        ([[9.0, 5.0, 5.0]], PUBLISHED.replace(noise_rule="none"), "of equal rewards, ranked by place 1 (33%)"),
        ([[9.0, 5.0, 5.0]], PUBLISHED, ""),  # noise
        ([[9.0, 5.0, 5.0]], RRHFOptions(), ""),  # by rewards, whatever the place
        ([[9.0, 5.0, 1.0]], SimPOOptions(), ""),
    ],
)
def test_pairs_that_rewards_do_not_tell_apart(orders: list[list[float]], objective: Objective, said: str) -> None:
    text = data_text(summarise(records(orders), objective), objective)
    assert said in text
    assert ("equal rewards" in text) == bool(said)


@pytest.mark.parametrize("count", [1, 2, 7, 40, 401])
def test_quartiles_are_margins(count: int) -> None:
    gaps = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 4
    found = gap_quartiles(gaps)
    for quarter, margin in enumerate(found, start=1):
        dropped = int((~keeps(gaps, "abs", margin)).sum())
        assert quarter * count / 4 <= dropped < quarter * count / 4 + 1
    assert gap_quartiles(gaps[:0]) == ()


@pytest.mark.parametrize("unit", [1 / 3, 1 / 7, 0.1, 0.7, 1.0, 123.456, 1e-4 / 3, 1999.9])
def test_printed_margins_drop_what_is_said(unit: float) -> None:
    """Rewards that are counts of a unit: many gaps are equal, and three digits lie above or below them."""
    counts = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(0))
    rewards = counts.to(torch.float32) * unit
    gaps = torch.cat([torch.pdist(each.unsqueeze(1), 1) for each in rewards.split(4)])
    text = margin_text(gap_quartiles(gaps), "a margin")
    shown = text.split("gaps ")[1].split(":")[0].split(", ")
    for quarter, (margin, exact) in enumerate(zip(shown, gap_quartiles(gaps), strict=True), start=1):
        dropped = ~keeps(gaps, "abs", float(margin))
        assert int(dropped.sum()) >= quarter * len(gaps) / 4
        assert float(margin) == pytest.approx(exact, rel=0.01)
        assert len(margin.split("e")[0].replace(".", "").strip("0")) <= 3
    assert margin_text((), "a margin") == ""


@pytest.mark.parametrize("wrong", [0, 12])
def test_a_run_says_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, wrong: int
) -> None:
    rows = [
        {"prompt": f"say {k}", "completions": ["a cat", "a dog"], "rewards": [1.0, 9.5] if k < wrong else [9.5, 1.0]}
        for k in range(24)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(command(tmp_path, max_steps=1)) == 0
    out = capsys.readouterr().out
    assert "quartiles of the reward gaps 8.5, 8.5, 8.5: a --reward_margin of these" in out
    assert ("the rewards contradict the order" in caplog.text) is (wrong > 0)
    caplog.clear()
    assert ("kept pairs reversed 0 (0%)" in out) is (wrong == 0)
    assert cli.main(command(tmp_path, "--rank-by-reward", "--overwrite", max_steps=1)) == 0
    assert "contradict" not in caplog.text


def test_a_scoring_suggests_margins() -> None:
    noise = measure_noise(records([[4.0, 3.0, 1.0], [0.0, 7.0]]))  # gaps 1, 3, 2, -7
    assert "quartiles of the reward gaps 1, 2, 3: a --reward-margin of these" in noise_table(noise, "rows")
