"""Which way `metric_for_best_model` is better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clha_fast.hf import CLHAConfig, RewardConfig, RolloutConfig
from clha_fast.objectives import OBJECTIVES
from clha_fast.objectives.policy import PolicyOptions
from clha_fast.training import rollout
from clha_fast.training.reward_trainer import RewardTrainer
from clha_fast.training.trainer import CLHATrainer
from clha_fast.training.validation import DIRECTIONS, SPEEDS, evaluation_metrics
from tests.support.preferences import keyword_rows
from tests.support.reward_models import llama
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, trainer


def made(kind: type, tmp_path: Path, **given: Any) -> Any:
    return kind(output_dir=str(tmp_path), use_cpu=True, report_to="none", **given)


def test_every_metric_of_an_evaluation_has_a_direction_or_none() -> None:
    policy = PolicyOptions(kl_weight=0.1, entropy_weight=0.1)
    objectives = [policy, *(kind() for kind in OBJECTIVES.values())]
    names = {name for objective in objectives for name in evaluation_metrics(objective.watched().metric_names)}
    assert names | {*rollout.METRICS, *SPEEDS} == set(DIRECTIONS)


@pytest.mark.parametrize(
    ("kind", "given", "name", "better"),
    [
        (CLHAConfig, {"objective": "sft"}, "eval_target_nll", False),
        (CLHAConfig, {"objective": "coh"}, "good_nll", False),
        (CLHAConfig, {"objective": "dpo"}, "eval_implicit_rewards/margins", True),
        (CLHAConfig, {"objective": {"name": "policy", "kl_weight": 0.1}}, "reference_kl", False),
        (CLHAConfig, {}, "eval_sft_loss", False),
        (CLHAConfig, {}, "eval_mine_kendall_tau", True),
        (CLHAConfig, {}, "eval_mine_runtime", False),
        (RewardConfig, {}, "eval_samples_per_second", True),
        (RewardConfig, {}, "b_rewards/margins", True),
        (RewardConfig, {}, "runtime", False),
        (RolloutConfig, {}, "eval_unfinished_share", False),
        (RolloutConfig, {}, "reward", True),
    ],
)
def test_a_metric_is_better_as_it_means(
    tmp_path: Path, kind: type, given: dict[str, Any], name: str, better: bool
) -> None:
    if kind is RolloutConfig:
        given = {"objective": "policy", **given}
    assert made(kind, tmp_path, metric_for_best_model=name, **given).greater_is_better is better
    against = made(kind, tmp_path, metric_for_best_model=name, greater_is_better=not better, **given)
    assert against.greater_is_better is not better, "what was given is taken"


@pytest.mark.parametrize(
    ("kind", "given", "name"),
    [
        (CLHAConfig, {"log_token_statistics": True}, "entropy"),
        (CLHAConfig, {}, "eval_kept_pair_share"),
        (CLHAConfig, {}, "eval_mine_logps/rejected"),
        (CLHAConfig, {"objective": "policy"}, "clip_share"),
        (RolloutConfig, {"objective": "policy"}, "eval_answer_tokens"),
    ],
)
def test_one_that_means_neither_is_refused_without_a_direction(
    tmp_path: Path, kind: type, given: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^greater_is_better: expected True or False beside .*'{name}'.*, got None$"):
        made(kind, tmp_path, metric_for_best_model=name, **given)
    assert made(kind, tmp_path, metric_for_best_model=name, greater_is_better=True, **given).greater_is_better


@pytest.mark.parametrize(("name", "mode"), [("eval_rewards/accuracies", "max"), ("eval_target_nll", "min")])
def test_a_schedule_that_watches_it_goes_the_same_way(tmp_path: Path, name: str, mode: str) -> None:
    given = {"objective": "sft", "metric_for_best_model": name, "lr_scheduler_type": "reduce_lr_on_plateau"}
    given |= {"eval_strategy": "steps", "eval_steps": 1}
    other = "min" if mode == "max" else "max"
    with pytest.raises(ValueError, match=rf"^lr_scheduler_kwargs: expected a mode .*'mode': '{mode}'"):
        made(CLHAConfig, tmp_path, lr_scheduler_kwargs={"mode": other}, **given)
    made(CLHAConfig, tmp_path, lr_scheduler_kwargs={"mode": mode}, **given)


@pytest.mark.parametrize(("objective", "name"), [("sft", "target_nll"), ("coh", "eval_good_nll")])
def test_the_best_checkpoint_has_the_least_nll(tmp_path: Path, objective: str, name: str) -> None:
    ours = trainer(
        tmp_path,
        **{"objective": objective, "metric_for_best_model": name, "load_best_model_at_end": True},
        **{"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1},
    )
    ours.train()
    key = f"eval_{name.removeprefix('eval_')}"
    assert ours.state.best_metric == min(line[key] for line in ours.state.log_history if key in line)


@pytest.mark.parametrize(
    ("kind", "named", "best"),
    [("ranked", True, 1), ("reward", False, 1), ("reward", True, 1), ("reward", False, 2)],
)
def test_an_evaluation_names_the_step_of_its_weights(tmp_path: Path, kind: str, named: bool, best: int) -> None:
    """`best` is the step that is said to be it; of one set, and of one among several."""
    base: Any = RewardTrainer if kind == "reward" else CLHATrainer

    class Judged(base):  # type: ignore[misc]
        def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
            metrics[self.args.metric_for_best_model] = float(self.state.global_step != best)
            return bool(super()._determine_best_metric(metrics, trial))

    rows = keyword_rows(4, seed=1) if kind == "reward" else make_rows(4)
    config = RewardConfig if kind == "reward" else CLHAConfig
    name = "eval_near_loss" if named else "eval_loss"
    given: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    given |= {"metric_for_best_model": name, "load_best_model_at_end": True, "max_steps": 2, "disable_tqdm": True}
    ours = Judged(
        llama() if kind == "reward" else make_model(len(TOKENIZER)),
        made(config, tmp_path, dataloader_pin_memory=False, **given),
        train_dataset=rows,
        eval_dataset={"near": rows, "far": rows[:2]} if named else rows,
        processing_class=TOKENIZER,
    )
    key = name.replace("loss", "step")
    before = ours.evaluate()
    ours.train()
    assert ours.state.best_global_step == best
    expected = None if best == 2 else best
    assert (before.get(key), ours.evaluate().get(key)) == (None, expected)
    assert ours.predict(rows).metrics.get("test_step") == expected
