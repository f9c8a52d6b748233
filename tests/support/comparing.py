"""An objective that compares with a frozen model, the table of objectives with it, and trainers of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clha_fast import Objective, RankingInputs, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.objectives import OBJECTIVES, Group, Terms
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.options import HeadOptions
from clha_fast.training.trainer import CLHATrainer
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, config

COMPARING = {"name": "comparing", "beta": 0.5}


@dataclass(frozen=True)
class Comparing(Objective):
    """DPO of all pairs: mean over prompts of the sum of -log sigmoid(x_i - x_j), x = beta (S - S_ref)."""

    beta: float = 0.1
    must: bool = True

    name: ClassVar[str] = "comparing"
    reads: ClassVar[tuple[str, ...]] = ("reference_logps",)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("reference_logps",) if self.must else ()

    def terms(self, group: Group) -> Terms:
        given = group.plan.given.reference_logps
        sums = torch.zeros_like(group.sums)
        if given is not None and given.shape[0] == group.plan.layout.num_candidates != len(group.plan.layout.owner):
            sums = given[group.candidates].to(group.sums)
        elif given is not None:
            sums = sums.index_add(0, group.owner, given[group.tokens].to(sums))
        x = self.beta * (group.sums - sums)
        each = torch.where(group.kept, -F.logsigmoid(x[group.i] - x[group.j]), 0.0)
        rank = each.sum() / group.totals.prompts
        return Terms(rank, torch.zeros_like(rank))


def comparing_loss(
    logps: Tensor, targets: Tensor, given: RankingInputs, head: HeadOptions, options: Comparing
) -> tuple[Tensor, Tensor, Tensor]:
    """In plain loops, without metrics."""
    own = [part.sum() for part in logps.split(given.candidate_lengths.tolist())]
    assert given.reference_logps is not None
    frozen = given.reference_logps
    if len(frozen) == len(logps):
        frozen = torch.stack([part.sum() for part in frozen.split(given.candidate_lengths.tolist())])
    loss, start = logps.sum() * 0, 0
    sizes = given.candidates_per_prompt.tolist()
    for size in sizes:
        for i in range(start, start + size):
            for j in range(i + 1, start + size):
                lead = (own[i] - frozen[i]) - (own[j] - frozen[j])
                loss = loss + torch.log1p(torch.exp(-options.beta * lead)) / len(sizes)
        start += size
    return loss, torch.zeros(len(METRIC_NAMES)), torch.stack(own)


def add_to_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a test `Comparing` is an objective of the library's."""
    monkeypatch.setitem(OBJECTIVES, "comparing", Comparing)
    monkeypatch.setitem(reference.LOSSES, "comparing", comparing_loss)


def comparing_trainer(folder: Path, model: nn.Module | None = None, rows: Any = None, **changes: Any) -> CLHATrainer:
    given = {name: changes.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in changes}
    callbacks = changes.pop("callbacks", None)
    return CLHATrainer(
        make_model(len(TOKENIZER)) if model is None else model,
        config(folder, **{"objective": COMPARING, **changes}),
        train_dataset=make_rows(6) if rows is None else rows,
        processing_class=TOKENIZER,
        callbacks=callbacks,
        **given,
    )


def exact(model: nn.Module, batch: CandidateBatch) -> Tensor:
    """[N] by way of the model's own full logits, in evaluation mode."""
    with torch.no_grad():
        logits = model.eval()(**batch.model_inputs(), use_cache=False).logits.double()
    logits = logits[:, -batch.input_ids.shape[1] :].flatten(0, 1)[batch.row_index]
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def with_reference(rows: list[Any], model: nn.Module) -> list[Any]:
    """The rows with the model's own summed log-probabilities, as a file would hold them."""
    collator = RankedCollator(TOKENIZER, drop_inert=False)
    found = []
    for row in rows:
        batch = CandidateBatch.from_dict(collator([row]))
        sums = [float(part.sum()) for part in exact(model, batch).split(batch.candidate_lengths.tolist())]
        found.append({**row, "reference_logps": sums})
    return found
