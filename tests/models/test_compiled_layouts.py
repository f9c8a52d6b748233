"""Packed and shared rows under `torch.compile`: as many graphs as padded rows, and the same refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import clha_fast
from clha_fast.batching.collator import RankedCollator
from clha_fast.models.layouts import RowLayouts
from clha_fast.models.measure import measure_head
from clha_fast.models.positions import RowLimit
from clha_fast.models.segment_masks import UnsupportedLayoutError
from tests.support.layouts import forward_of
from tests.support.tiny import make_model, make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


def llama() -> nn.Module:
    return make_model(len(TOKENIZER)).eval()


def collate(layout: str, count: int = 3, start: int = 0, **settings) -> dict:
    return RankedCollator(TOKENIZER, layout=layout, **settings)(make_rows(start + count)[start:])


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_what_is_looked_at_before_a_batch_runs_is_one_graph(layout: str) -> None:
    """Of any sizes and numbers of candidates, which a graph must not be told."""
    model = llama()
    info = measure_head(model)
    layouts, limit = RowLayouts(model, forward_of(model, info), model), RowLimit(model)
    layouts.settle(layout)

    def look(batch: dict) -> torch.Tensor:
        limit.check_rows(batch.get("segments"), batch["input_ids"].shape[1])
        return layouts.fitted(batch, {}, {})[0]["input_ids"] + 1

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(look, backend=counter, fullgraph=True, dynamic=True)
    for start in (0, 3, 6, 9):
        batch = collate(layout, start=start, drop_inert=False)
        assert torch.equal(compiled(batch), batch["input_ids"] + 1)
    torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_in_as_many_graphs_as_padded_rows() -> None:
    model = llama()
    clha_fast.attach(model, layout="shared")
    counts = []
    for layout in ("padded", "packed", "shared"):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for start in (0, 3, 6, 9):
            batch = collate(layout, start=start, drop_inert=False)
            output = compiled(**batch)
            torch.testing.assert_close(output.loss, model(**batch).loss)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert max(counts) <= counts[0]


@pytest.mark.parametrize("more", [{}, {"pixel_values": torch.zeros(1, 3, 2, 2)}])
def test_refused_when_compiled_as_well(more: dict[str, torch.Tensor]) -> None:
    """What needs no look at the batch's values: rows of another layout, and what stands beside the tokens."""
    model = llama()
    clha_fast.attach(model, layout="shared" if more else "padded")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(UnsupportedLayoutError, match="pixel_values: expected" if more else "expected padded rows"):
        compiled(**collate("shared"), **more)
    torch._dynamo.reset()
