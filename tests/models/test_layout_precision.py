"""Shared rows in bfloat16: their error against float64, beside that of padded rows done eagerly."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.segment_masks import IN_TWO_CALLS
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()
IMPLEMENTATIONS = ("sdpa", "eager")
DRAWS = 6
BAR = 1.05  # times the error of the same loss done eagerly in that dtype


def values(model: nn.Module, layout: str, rows: list[dict[str, Any]], backend: Any = "auto") -> list[Tensor]:
    """Log-probabilities, and the gradient of all parameters; float64."""
    batch = RankedCollator(TOKENIZER, layout=layout, drop_inert=False)(rows)
    with clha_fast.attach(model, backend=backend, layout=layout) as attached:
        logps = attached.token_logps(batch)
        model(**batch).loss.backward()
    gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return [logps.double(), torch.cat(gradients)]


def test_bfloat16() -> None:
    """In two calls and through masks; squared errors over several draws of weights and records, for one is chance."""
    errors = {way: [0.0, 0.0] for way in ("padded", *IMPLEMENTATIONS)}
    for seed in range(DRAWS):
        base = make_model(len(TOKENIZER), hidden_size=64, intermediate_size=96)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5, generator=draw)
        base = base.bfloat16()
        rows = make_rows(4, seed=seed)
        exact = values(copy.deepcopy(base).double(), "padded", rows, "reference")
        eager = copy.deepcopy(base)
        eager.set_attn_implementation("eager")
        found = {"padded": values(eager, "padded", rows, "reference")}
        for implementation in IMPLEMENTATIONS:
            shared = copy.deepcopy(base)
            shared.set_attn_implementation(implementation)
            found[implementation] = values(shared, "shared", rows)
            assert (shared in IN_TWO_CALLS) == (implementation == "sdpa")
        for way, own in found.items():
            for number, (value, truth) in enumerate(zip(own, exact, strict=True)):
                errors[way][number] += float((value - truth).norm() / truth.norm()) ** 2
    for number, budget in enumerate(errors["padded"]):
        for implementation in IMPLEMENTATIONS:
            assert errors[implementation][number] ** 0.5 <= BAR * budget**0.5
        assert 1e-3 < (budget / DRAWS) ** 0.5 < 0.1  # rounding is there, and no more than that
