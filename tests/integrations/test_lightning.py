"""The recipe for Lightning in docs/integrations.md as it is written, against a bare loop; Fabric around a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clha_fast
from tests.support.adapters import OPTIONS, base, collate, eager_loss, gradients, measure
from tests.support.recipes import assert_same, bare_loop, run


@pytest.mark.filterwarnings("ignore")
def test_two_steps_are_those_of_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    names = run("lightning", tmp_path)
    assert names["trainer"].global_step == 2
    assert names["module"].model.training
    assert_same(names["module"].model, bare_loop(tmp_path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["set up, then attached", "attached, then set up"])
def test_fabric_in_either_order(compiled: bool, first: bool) -> None:
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    model, batch = base(), collate()
    wanted = eager_loss(model, batch)
    expected = gradients(model, wanted)
    if first:
        attached = clha_fast.attach(model, OPTIONS)
    wrapped = fabric.setup(torch.compile(model, backend="eager") if compiled else model)
    if not first:
        attached = clha_fast.attach(wrapped, OPTIONS)
    assert attached.model is model
    loss = wrapped(**batch.as_dict()).loss
    assert measure(wanted, expected, loss, gradients(model, loss), attached).right
    narrow = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed").setup(model)
    with pytest.raises(ValueError, match=r"^rewards: expected float32 or float64, got torch\.bfloat16"):
        narrow(**batch.as_dict())
    attached.detach()
    for part in (wrapped, model):
        assert part(**batch.model_inputs()).logits.shape[-1] == model.config.vocab_size
