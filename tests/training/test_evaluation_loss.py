"""The loss of an evaluation is that of the whole set as one batch: for any batch size, kind of dataset and options."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from clha_fast.batching.batch import CandidateBatch
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.totals import dataset_counts, local_counts
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.objectives.pro import PROOptions
from clha_fast.objectives.sft import SFTOptions
from tests.support.tiny import make_rows
from tests.support.trainers import TOKENIZER, collate, eager_loss, trainer

SIZES = (1, 3, 8)


class Stream(torch.utils.data.IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


class Features(torch.utils.data.Dataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.features = [RankedCollator(TOKENIZER).tokenize_record(row) for row in rows]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Any:
        return self.features[index]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (list, {}),
        (Stream, {"reduction": "pair_mean", "noise_rule": "signed"}),
        *((kind, {"preset": "paper", "eval_drop_inert": True}) for kind in (list, Features)),
    ],
)
def test_any_batch_size(tmp_path: Path, kind: Any, changes: dict[str, Any]) -> None:
    rows = make_rows(11, seed=12)
    found = []
    for size in SIZES:
        ours = trainer(tmp_path, per_device_eval_batch_size=size, **changes)
        found.append(ours.evaluate(kind(rows)))
    whole = collate(rows, ours.loss_options, drop_inert=False)
    with torch.no_grad():
        expected, _ = eager_loss(ours.model.eval(), whole, ours.loss_options)
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)
    assert math.isfinite(found[0]["eval_rank_loss"])


@pytest.mark.parametrize("size", [3, 8, 20])
@pytest.mark.parametrize("kind", [list, Features])
def test_no_prompt_is_left_out(tmp_path: Path, kind: Any, size: int) -> None:
    """`dataloader_drop_last` is of training: the last prompts of an evaluation count, and a set below one batch."""
    rows = make_rows(11, seed=12)
    changes = {"per_device_eval_batch_size": size, "preset": "paper"}
    found = trainer(tmp_path, dataloader_drop_last=True, **changes).evaluate(kind(rows))
    expected = trainer(tmp_path, **changes).evaluate(kind(rows))
    figures = [name for name in expected if not name.endswith(("time", "per_second"))]
    assert {name: found[name] for name in figures} == {name: expected[name] for name in figures}
    assert expected["eval_num_tokens"] > 0


def test_persistent_workers_measure_the_set_that_is_given(tmp_path: Path) -> None:
    ours = trainer(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, preset="paper")
    own, other = ours.evaluate(), ours.evaluate(make_rows(11, seed=12))
    again = ours.evaluate()
    expected = trainer(tmp_path, preset="paper").evaluate(make_rows(11, seed=12))
    assert other["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert other["eval_num_tokens"] == expected["eval_num_tokens"] != own["eval_num_tokens"]
    assert again["eval_loss"] == own["eval_loss"]


@pytest.mark.parametrize("objective", [PUBLISHED, PROOptions(), SFTOptions("token_mean")])
@pytest.mark.parametrize("drop_inert", [True, False])
def test_counts_of_a_dataset_are_those_of_its_batches(objective: Any, drop_inert: bool) -> None:
    rows = make_rows(300, seed=3)  # more than are counted at a time
    collator = RankedCollator(TOKENIZER, objective, drop_inert=drop_inert)
    features = Features(rows)
    batches = [CandidateBatch.from_dict(collator(features.features[k : k + 50])) for k in range(0, 300, 50)]
    assert torch.equal(dataset_counts(features, objective, drop_inert), local_counts(batches, objective, most=5))
