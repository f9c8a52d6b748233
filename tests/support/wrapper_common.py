"""What the cases of `wrapper_cases.py` share: batches, the eager loss to compare with, and the comparison."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import clha_fast
from clha_fast import CLHAOptions, reference
from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.attach import Attached
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
OPTIONS = CLHAOptions(margin=0.5, sft_weight=0.1)
ROWS = make_rows(4, seed=3)
# No pair is kept and no gate is open.
INERT = [{"prompt": "say: ", "completions": ["a cat", "a dog"], "rewards": [-1.0, -2.0]}]
# float32 by another order of additions; bfloat16 rounds by up to 0.4 % at every step of the way.
EXACT, ROUNDED = 1e-5, 3e-2


@dataclasses.dataclass
class Measured:
    """Relative errors of the mean loss and of all gradients (largest of any parameter over the norm of all)."""

    loss: float
    gradients: float
    tolerance: float = EXACT


def collate(rows: Sequence[Any], drop_inert: bool = True) -> CandidateBatch:
    return CandidateBatch.from_dict(RankedCollator(TOKENIZER, OPTIONS, drop_inert=drop_inert)(rows))


def eager_loss(model: nn.Module, batch: CandidateBatch) -> Tensor:
    """The loss by way of the model's own logits."""
    logits = model(**batch.model_inputs(), use_cache=False).logits.flatten(0, 1)[batch.row_index].float()
    logps = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, batch.sft_index, None, None)
    return reference.clha_loss(logps, batch.targets, *ranking, clha_fast.HeadOptions(), OPTIONS)[0]


def expect(
    model: nn.Module, parts: Sequence[CandidateBatch], autocast: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """The mean of the parts' eager losses and its gradients, on a copy."""
    model = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = torch.stack([eager_loss(model, part) for part in parts]).mean()
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_name(name: str) -> str:
    return name.replace("module.", "").replace("_orig_mod.", "")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): whole(p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}


def compare(
    wanted: tuple[float, Mapping[str, Tensor]], loss: Tensor, got: Mapping[str, Tensor], tolerance: float = EXACT
) -> Measured:
    """Of losses whose mean over processes is meant, and of whole gradients."""
    mean = whole(loss.detach()).float().clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    assert got.keys() == wanted[1].keys(), sorted(got.keys() ^ wanted[1].keys())
    size = sum(float(g.double().norm()) ** 2 for g in wanted[1].values()) ** 0.5
    worst = max(float((got[name].double() - g.double()).norm()) / size for name, g in wanted[1].items())
    errors = torch.tensor([abs(float(mean) - wanted[0]) / abs(wanted[0]), worst])
    errors = torch.where(errors.isnan(), torch.inf, errors)  # a maximum may lose a NaN
    dist.all_reduce(errors, dist.ReduceOp.MAX)
    return Measured(*errors.tolist(), tolerance)


def mine(rows: Sequence[Any]) -> list[Any]:
    size = len(rows) // dist.get_world_size()
    return list(rows[dist.get_rank() * size : (dist.get_rank() + 1) * size])


def step(model: nn.Module, attached: Attached, parts: Sequence[CandidateBatch]) -> Tensor:
    """One optimiser step's gradients as a loop forms them that divides by the accumulation steps; their mean loss."""
    counts = attached.counts(parts)
    total = torch.zeros(())
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        waits = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        with waits:
            loss = model(**part.as_dict(), **counts).loss / len(parts)
            loss.backward()
        total += loss.detach().float()
    return total


def untied(more_tokens: int = 0, bias: bool = False) -> nn.Module:
    model = make_model(len(TOKENIZER) + more_tokens, tie_word_embeddings=False).train()
    if bias:
        model.lm_head = nn.Linear(*reversed(model.lm_head.weight.shape))
    return model


def tied() -> nn.Module:
    return make_model(len(TOKENIZER)).train()
