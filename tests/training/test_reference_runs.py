"""Runs that compare with a frozen model: what they save, how they resume, and kinds of data that bring its numbers."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from clha_fast.files import last_checkpoint
from clha_fast.training.reference import REFERENCE_FILE
from tests.support.comparing import add_to_table, with_reference
from tests.support.comparing import comparing_trainer as trainer
from tests.support.power_cuts import CutAfter, PowerCut, dropout_model, weights
from tests.support.tiny import make_model, make_rows
from tests.support.trainers import TOKENIZER


@pytest.fixture(autouse=True)
def _one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    add_to_table(monkeypatch)


def test_the_frozen_model_is_neither_trained_nor_saved(tmp_path: Path) -> None:
    ours = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    assert ours.reference.own_model is not None
    frozen = list(ours.reference.own_model.parameters())
    before = [parameter.clone() for parameter in frozen]
    ours.train()
    assert all(map(torch.equal, frozen, before))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)
    optimised = {id(p) for group in ours.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(parameter) for parameter in frozen}
    assert {id(p) for p in ours.model.parameters()} == optimised
    ours.save_model()
    plain = trainer(tmp_path / "plain", objective="sft", max_steps=2, save_strategy="steps", save_steps=1)
    plain.train()
    plain.save_model()
    for folder in ("", "checkpoint-2"):
        found = sorted(os.listdir(tmp_path / folder)) if folder else ["model.safetensors"]
        expected = sorted(os.listdir(tmp_path / "plain" / folder)) if folder else ["model.safetensors"]
        assert sorted({*expected, *([REFERENCE_FILE] if folder else [])}) == found
        sizes = [(tmp_path / part / folder / "model.safetensors").stat().st_size for part in ("", "plain")]
        assert sizes[0] == sizes[1]


def test_a_resumed_run_compares_with_what_it_started_from(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    whole = trainer(tmp_path / "whole", dropout_model(), **settings)
    whole.train()
    half = trainer(tmp_path / "half", dropout_model(), callbacks=[CutAfter(6)], **settings)
    with pytest.raises(PowerCut):
        half.train()
    torch.manual_seed(99)
    rest = trainer(tmp_path / "half", dropout_model(), **settings)
    rest.train(resume_from_checkpoint=True)
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(rest.model).items())
    assert not all(torch.equal(value, expected[name]) for name, value in weights(half.model).items())
    found, wanted = (
        {k: v for k, v in run.evaluate(make_rows(3)).items() if "per_second" not in k and "runtime" not in k}
        for run in (rest, whole)
    )
    assert found == wanted


def test_resuming_with_the_checkpoints_weights_as_reference_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **settings).train()
    checkpoint = last_checkpoint(str(tmp_path))
    assert checkpoint is not None
    moved = type(make_model(8)).from_pretrained(checkpoint)
    for changes in ({}, {"ref_model": copy.deepcopy(moved)}):
        again = trainer(tmp_path, moved, **settings, **changes)
        with pytest.raises(
            ValueError, match=r"^resume_from_checkpoint: expected the reference that .* got another one;"
        ):
            again.train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="give the trainer the "):
            again.train(checkpoint)
    assert json.loads((Path(checkpoint) / REFERENCE_FILE).read_text())["kind"] == "copy"
    trainer(tmp_path, **settings).train(resume_from_checkpoint=checkpoint)


class Rows(IterableDataset[Any]):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_streams_and_tables_bring_theirs(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    scored = with_reference(make_rows(4), make_model(len(TOKENIZER)))
    losses = []
    table = datasets.Dataset.from_list(scored)
    for data in (scored, Rows(scored), table, table.to_iterable_dataset(), {k: table[k] for k in table.column_names}):
        ours = trainer(tmp_path, rows=data, train_sampling_strategy="sequential", max_steps=2)
        assert ours.reference.kind == "file"
        ours.train()
        losses.append(ours.state.log_history[-1]["train_loss"])
    assert losses == losses[:1] * 5
