"""The one way from a batch through a model to a loss: every objective, in a loop and in the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clha_fast
from clha_fast import (
    CLHAOptions,
    CoHOptions,
    CPOOptions,
    DPOOptions,
    HeadOptions,
    HingeOptions,
    IPOOptions,
    Objective,
    ORPOOptions,
    PolicyOptions,
    PROOptions,
    RankingInputs,
    RRHFOptions,
    SFTOptions,
    SimPOOptions,
    reference,
)
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.attach import empty_batch
from clha_fast.models.heads import UnsupportedHeadError
from clha_fast.objectives import Group
from tests.support.helpers import random_signals
from tests.support.tiny import make_model, make_rows, make_tokenizer
from tests.support.trainers import trainer

TOKENIZER = make_tokenizer()
OBJECTIVES = [
    CLHAOptions(margin=0.5),
    PROOptions(),
    PROOptions(form="paper"),
    SFTOptions(),
    SFTOptions(form="token_mean"),
    RRHFOptions(),
    DPOOptions(),
    SimPOOptions(),
    IPOOptions(),
    HingeOptions(),
    ORPOOptions(),
    CPOOptions(),
    PolicyOptions(reduction="sequence_mean"),
    PolicyOptions(advantages="given", kl_weight=0.1),
    PolicyOptions(entropy_weight=0.1),
    CoHOptions(),
]
every_objective = pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=[f"{o.name}-{n}" for n, o in enumerate(OBJECTIVES)]
)


def collate(rows: list[dict[str, Any]], objective: Objective) -> CandidateBatch:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, objective)(rows))


def eager(model: nn.Module, batch: CandidateBatch, objective: Objective, **signals: Tensor) -> Tensor:
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index]
    whole = logits.log_softmax(-1)
    logps, entropies = whole.gather(1, batch.targets[:, None])[:, 0], -(whole.exp() * whole).sum(-1)
    given = RankingInputs(batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, batch.sft_index)
    given = given._replace(**signals)
    return reference.loss(logps, batch.targets, given, HeadOptions(), objective, entropies)[0]


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


@every_objective
def test_an_attached_model_has_the_eager_loss(objective: Objective) -> None:
    model, batch = make_model(len(TOKENIZER)).train(), collate(make_rows(4, seed=2), objective)
    signals = random_signals(objective, len(batch.targets))
    wanted = eager(model, batch, objective, **signals)
    expected = gradients(model, wanted)
    clha_fast.attach(model, objective)
    output = model(**batch.as_dict(), **signals)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = gradients(model, output.loss)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert set(objective.metric_names) <= output.metrics.as_dict().keys()


@every_objective
def test_counts_make_the_split_invisible(objective: Objective) -> None:
    model, rows = make_model(len(TOKENIZER)).train(), make_rows(5, seed=7)
    parts = [collate(rows[:1], objective), collate(rows[1:4], objective), collate(rows[4:], objective)]
    tokens = [len(part.targets) for part in parts]
    signals = random_signals(objective, sum(tokens))
    wanted = eager(model, collate(rows, objective), objective, **signals)
    expected = gradients(model, wanted)
    attached = clha_fast.attach(model, objective)
    counts = attached.counts([*parts, empty_batch()])
    assert counts.keys() == {*objective.divides_by, "loss_scale"}
    losses = [model(**empty_batch().as_dict(), **counts).loss]
    for number, part in enumerate(parts):
        own = {name: value.split(tokens)[number] for name, value in signals.items()}
        losses.append(model(**part.as_dict(), **own, **counts).loss)
    total = torch.stack(losses).sum() / 4
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    found = gradients(model, total)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_a_function_of_whole_prompts_is_attached() -> None:
    def best_answers(group: Group) -> Tensor:
        return -group.of_targets(group.scores).sum() / group.totals.prompts

    model, batch = make_model(len(TOKENIZER)), collate(make_rows(3), PROOptions())
    wanted = eager(model, batch, SFTOptions())
    clha_fast.attach(model, best_answers)
    assert model(**batch.as_dict()).loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_is_no_objective_is_refused_before_the_model_changes() -> None:
    model = make_model(len(TOKENIZER))
    for wrong in ("pro", PROOptions, lambda group: group.scores.mean()):
        with pytest.raises(ValueError, match="objective"):
            clha_fast.attach(model, wrong)
        assert "forward" not in vars(model)


def test_candidates_dropped_for_another_objective_are_refused_where_they_are_needed() -> None:
    """`RankedCollator`'s default is CLHA's rule; PRO needs all candidates, and SFT fewer than CLHA."""
    rows = [{"prompt": "say: ", "completions": ["a cat", "a dog", "a hat"], "rewards": [2.0, 1.0, 0.5]}]
    for_clha = RankedCollator(TOKENIZER)(rows)
    assert for_clha["num_inert"] == 2
    model = make_model(len(TOKENIZER))
    attached = clha_fast.attach(model, PROOptions())
    with pytest.raises(ValueError, match=r"objective 'pro' does not depend on, got candidate 1 .*dropped for 'clha'"):
        model(**for_clha)
    assert model(**RankedCollator(TOKENIZER, drop_inert=False)(rows)).loss.isfinite()
    attached.detach()
    clha_fast.attach(model, SFTOptions())
    assert model(**for_clha).loss.isfinite()


def loop(folder: Path, model: nn.Module) -> Any:
    clha_fast.attach(model)
    return lambda batch: model(**batch).loss


def in_a_trainer(folder: Path, model: nn.Module) -> Any:
    ours = trainer(folder, model)
    return lambda batch: ours.compute_loss(model, batch)


@pytest.mark.parametrize("make", [loop, in_a_trainer])
def test_a_swapped_head_is_refused(tmp_path: Path, make: Any) -> None:
    model = make_model(len(TOKENIZER), tie_word_embeddings=False)
    loss = make(tmp_path, model)
    batch = collate(make_rows(2), CLHAOptions()).as_dict()
    assert loss(batch).isfinite()
    model.lm_head = nn.Linear(32, len(TOKENIZER), bias=False)
    with pytest.raises(UnsupportedHeadError, match="expected the output embedding that was there"):
        loss(batch)


@pytest.mark.parametrize("make", [loop, in_a_trainer])
@pytest.mark.parametrize("name", ["input_ids", "targets"])
def test_tokens_beyond_the_model_are_refused(tmp_path: Path, make: Any, name: str) -> None:
    model = make_model(len(TOKENIZER))
    loss = make(tmp_path, model)
    batch = collate(make_rows(2), CLHAOptions()).as_dict()
    batch[name].view(-1)[1] = len(TOKENIZER) + 5
    with pytest.raises(ValueError, match=f"{name}: expected tokens below the {len(TOKENIZER)} rows of the model's"):
        loss(batch)


@pytest.mark.parametrize("make", [loop, in_a_trainer])
def test_a_batch_without_a_prompt_is_zero(tmp_path: Path, make: Any) -> None:
    model = make_model(len(TOKENIZER)).train()
    loss = make(tmp_path, model)(empty_batch().as_dict())
    assert loss.item() == 0
    assert not gradients(model, loss).any()
