"""The trainer under `torch_compile`: the eager losses, and a few graphs for all shapes of batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from clha_fast.batching.batch import CandidateBatch
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER, trainer

pytestmark = pytest.mark.slow

STEPS = 10


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("normalizer", ["batch", "global"])
def test_ten_batches_take_few_graphs(tmp_path: Path, normalizer: str) -> None:
    found = {}
    for backend in (None, "aot_eager"):
        ours = trainer(
            tmp_path / str(backend),
            make_model(len(TOKENIZER), num_hidden_layers=1),
            make_rows(2 * STEPS, seed=3),
            max_steps=STEPS,
            logging_steps=1,
            normalizer=normalizer,
            torch_compile=backend is not None,
            torch_compile_backend=backend,
        )
        batches = [CandidateBatch.from_dict(batch) for batch in ours.get_train_dataloader()]
        assert len({(*batch.input_ids.shape, *batch.targets.shape) for batch in batches}) == STEPS
        ours.train()
        found[backend] = [line["loss"] for line in ours.state.log_history if "loss" in line]
    assert found["aot_eager"] == pytest.approx(found[None], rel=1e-5)
    # The first shape's own, and one or two as torch finds out which sizes change.
    assert 1 <= counters["stats"]["unique_graphs"] <= 3, dict(counters["stats"])
