"""The trainer's `entropy` and `mean_token_accuracy`, beside those of the model's own full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clha_fast import ranking_loss
from clha_fast.batching.batch import CandidateBatch
from clha_fast.experiments.run import Run, RunOptions
from clha_fast.objectives import OBJECTIVES, CLHAOptions, decode
from clha_fast.training.validation import evaluation_metrics
from clha_fast.types import RankingInputs
from tests.support.helpers import random_signals
from tests.support.tiny import make_rows
from tests.support.trainers import EVAL_SEED, collate, trainer

NAMES = ("entropy", "mean_token_accuracy")


@torch.no_grad()
def eager(model: nn.Module, batch: CandidateBatch) -> tuple[float, float]:
    """Means over the scored tokens."""
    logits: Tensor = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index].double()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return float(entropy.mean()), float((logits.argmax(-1) == batch.targets).double().mean())


@pytest.mark.parametrize("objective", ["clha", "sft", {"name": "policy", "entropy_weight": 0.05}])
def test_evaluation_says_them(tmp_path: Path, objective: Any) -> None:
    """Over batches of three prompts; the loss and the other metrics are what they were."""
    plain, ours = (trainer(tmp_path, objective=objective, log_token_statistics=on) for on in (False, True))
    ours.model.load_state_dict(plain.model.state_dict())
    wanted, found = plain.evaluate(), ours.evaluate()
    more = {f"eval_{name}" for name in NAMES}
    assert found.keys() - wanted.keys() == more - wanted.keys()
    for name in [name for name in wanted if not name.endswith(("_time", "_runtime", "_per_second"))]:
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, nan_ok=True), name
    batch = collate(make_rows(8, seed=EVAL_SEED), CLHAOptions(), drop_inert=False)
    entropy, accuracy = eager(ours.model, batch)
    assert found["eval_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("on", [False, True])
def test_the_best_model_goes_by_what_is_logged(tmp_path: Path, on: bool) -> None:
    """Every name that an evaluation logs is one to choose by, and no other; the command line says so at once."""
    for objective in ("clha", "sft", "policy"):
        ours = trainer(tmp_path, objective=objective, log_token_statistics=on)
        found = {name.removeprefix("eval_") for name in ours.evaluate() if name.startswith("eval_")}
        known = evaluation_metrics(ours.args.measured_options().metric_names)
        assert set(known) == found - {"model_preparation_time"}, "which the first evaluation alone says"
    options = RunOptions(train_file="x", model="y")
    settings = {"output_dir": str(tmp_path / "run"), "metric_for_best_model": "entropy", "use_cpu": True}
    settings["greater_is_better"] = False
    if on:
        assert Run(options, {**settings, "log_token_statistics": True}).args.metric_for_best_model == "entropy"
        best = trainer(
            tmp_path,
            log_token_statistics=True,
            **{"metric_for_best_model": "entropy", "load_best_model_at_end": True, "greater_is_better": False},
            **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2},
        )
        best.train()
        assert best.state.best_metric == min(
            line["eval_entropy"] for line in best.state.log_history if "eval_loss" in line
        )
    else:
        with pytest.raises(ValueError, match=r"^metric_for_best_model: expected one of loss, .*, got 'entropy'$"):
            Run(options, settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_reports_them(name: str) -> None:
    """Beside what it reports without, whatever that is made of."""
    objective = OBJECTIVES[name]()
    lengths, sizes = torch.tensor([2, 1, 3, 2, 1]), torch.tensor([2, 3])
    generator = torch.Generator().manual_seed(0)
    logps = -torch.rand(9, generator=generator, dtype=torch.float64)
    given = RankingInputs(
        lengths, sizes, rewards=torch.tensor([1.0, 0.0, 5.0, 1.0, -4.0]), **random_signals(objective, 9)
    )
    seen = {"entropy": torch.rand(9, generator=generator, dtype=torch.float64), "is_top1": torch.ones(9).double()}
    _, plain = ranking_loss(logps, given, objective)
    _, watched = ranking_loss(logps, given, objective.watched(), statistics=seen)
    found, expected = watched.as_dict(), plain.as_dict()
    assert found.pop("mean_token_accuracy") == 1
    assert found.pop("entropy") == pytest.approx(float(seen["entropy"].mean()), rel=1e-6)
    assert found == pytest.approx(expected, nan_ok=True)


def test_training_logs_them(tmp_path: Path) -> None:
    """The same steps as without; the default says nothing of them."""
    losses = []
    for on in (False, True):
        torch.manual_seed(0)
        ours = trainer(tmp_path, log_token_statistics=on)
        ours.train()
        lines = [line for line in ours.state.log_history if "loss" in line]
        assert all((name in line) == on for line in lines for name in NAMES)
        losses.append([line["loss"] for line in lines])
        if on:
            assert all(0 < line["entropy"] < 10 and 0 <= line["mean_token_accuracy"] <= 1 for line in lines)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_watched_objective_passes_through_an_operator() -> None:
    watched = CLHAOptions(margin=0.25).watched()
    again = decode(watched.encoded)
    assert again == watched
    assert (again.is_watched, again.wanted, again.encoded) == (True, ("entropy", "is_top1"), watched.encoded)
    assert dict(again.metric_names) == dict.fromkeys(NAMES, "scored_tokens")
