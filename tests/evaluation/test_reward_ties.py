"""Rewards that only float64 keeps apart: a tie wherever rewards are sorted, counted, paired or compared."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from clha_fast.data import RankedRecord, make_record, records
from clha_fast.data.notes import Notes
from clha_fast.evaluation import rewards as evaluation_rewards
from clha_fast.evaluation.comparison import compare
from clha_fast.evaluation.report import TOTAL, Evaluation
from clha_fast.objectives.pairs import COMPARED
from clha_fast.rewards import ranking, scoring
from clha_fast.rewards.reward_model import RewardModel
from clha_fast.training.reward_data import PairedDataset
from clha_fast.training.reward_trainer import RewardConfig, RewardTrainer, prompt_results
from tests.support.preferences import keyword_rows
from tests.support.reward_models import TOKENIZER, by_length, llama

# The first is the lesser one, in float64 alone; the last is far below.
TIES = [
    (16777216.0, 16777217.0, -1.0),
    (1.0, 1.0 + 1e-12, -1.0),
    (0.1, 0.1 + 1e-10, 0.0),
    (-3.0000000001, -3.0, -8.5),
    (1e-300, 2e-300, -1e-3),
    (0.0, 1e-60, -2.0),
]
every_tie = pytest.mark.parametrize("rewards", TIES)


def record(rewards: tuple[float, ...] | None, responses: tuple[str, ...] = ("a cat sat", "a dog", "x")) -> RankedRecord:
    return RankedRecord("say", responses, rewards)


def test_rounded_as_tensors_are() -> None:
    values = [value for tie in TIES for value in tie] + [math.pi, -0.0, 3.4e38, -math.inf, math.inf, 1e-42, 1 / 3]
    assert records.as_compared(values) == torch.tensor(values, dtype=COMPARED).tolist()
    assert records.as_compared([]) == []


@every_tie
def test_a_reward_model_is_not_measured_on_a_tie(rewards: tuple[float, ...]) -> None:
    model = RewardModel(by_length(), TOKENIZER)
    tied = [RankedRecord(f"say {k}", ("a cat sat", "a dog"), rewards[:2]) for k in range(3)]
    check = evaluation_rewards.check_reward_model("rm", tied, model)
    assert "there is no ranked pair" in check.refused
    assert evaluation_rewards._better(record(rewards), record((3.0, 2.0, 1.0))) == (2.0, 2.0)
    assert evaluation_rewards._better(record(None), record(rewards)) == (2.5, 3.0), "equal scores are half right"


@every_tie
def test_agreement_of_a_ranking(rewards: tuple[float, ...]) -> None:
    scores = ranking.Ranking([0, 1, 2], [-1.0, -2.0, -3.0])
    found = ranking.RankResult([record(rewards)], [scores], 3, 0, 0)
    assert found.agreement(by_reward=True) == (2.0, 2)
    assert found.agreement() == (3.0, 3)


@every_tie
def test_a_reward_model_s_order(tmp_path: Path, rewards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring.RewardRun, "forward", lambda self, rows: torch.tensor(rewards, dtype=torch.float64))
    model = RewardModel(by_length(), TOKENIZER)
    same_length = record(None, ("a cat", "a dog", "a mat"))
    found = ranking.rank_file([same_length], tmp_path / "ranked.jsonl", model, progress=False)
    assert found.rankings[0].order == [0, 1, 2]
    assert found.agreement() == (2.5, 3)
    scored = scoring.score_file(
        [same_length], tmp_path / "scored.jsonl", model, rank_by_reward=True, progress=False
    ).written
    assert scored[0].completions == same_length.completions


@every_tie
def test_ties_stay_in_the_order_given(rewards: tuple[float, ...]) -> None:
    own = make_record("say", ("a cat sat", "a dog", "x"), rewards=rewards, rank_by_reward=True)
    assert own.completions == ("a cat sat", "a dog", "x")
    back = make_record("say", ("x", "a cat sat", "a dog"), rewards=(rewards[2], *rewards[:2]), rank_by_reward=True)
    assert back.completions == ("a cat sat", "a dog", "x")


@every_tie
def test_ties_are_counted_as_such(rewards: tuple[float, ...]) -> None:
    notes = Notes("f")
    notes.see(record(rewards))
    assert (notes.pairs, notes.reversed) == (2, 0)


@every_tie
def test_ties_train_no_reward_model(rewards: tuple[float, ...]) -> None:
    data = PairedDataset([record(rewards)], TOKENIZER)
    assert (data.pairs, data.equal_rewards, data.reversed_pairs) == (2, 1, 0)


@every_tie
def test_nobody_wins_a_tie(rewards: tuple[float, ...]) -> None:
    checks = {"rm": {"fingerprint": "f", "accuracy": None, "refused": ""}}
    sides = [
        Evaluation(["p", "q"], ["", ""], ["x", "y"], {"raw reward: rm": [value, None]}, checks=checks)
        for value in rewards[:2]
    ]
    wins = compare(*sides).wins[TOTAL]["rm"]
    assert (wins.wins, wins.ties, wins.losses) == (0, 2, 0)


@every_tie
def test_a_trainer_s_accuracy(tmp_path: Path, rewards: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    rows = [{"prompt": "say", "completions": ["a cat", "a dog", "a mat"]}]
    ours = RewardTrainer(llama(), args, train_dataset=keyword_rows(3), eval_dataset=rows, processing_class=TOKENIZER)
    monkeypatch.setattr(ours, "_rewards", lambda model, inputs: torch.tensor(rewards, dtype=torch.float64))
    correct, pairs = prompt_results(np.asarray(ours.predict(ours.eval_dataset).predictions))
    assert (correct, pairs) == ([2.5], [3])
