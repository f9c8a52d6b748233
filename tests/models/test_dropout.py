"""Dropout turned off: models of many kinds then say the same in training, at each call."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clha_fast.models.dropout import without_dropout
from tests.support.architecture_configs import shrink
from tests.support.architectures import build
from tests.support.versions import needs

peft = pytest.importorskip("peft")
# They draw in modules, by numbers beside them (some called dropout alone), by the configuration, of whole layers.
KINDS = ["llama", "gpt2", "bloom", "opt", "falcon", "persimmon", "big_bird", "biogpt", "gpt_bigcode", "xglm", "dbrx"]


def outputs(model: nn.Module) -> list[Tensor]:
    ids = torch.arange(5, 21).view(2, 8)
    with torch.no_grad():
        return [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for _ in range(4)]


@pytest.mark.parametrize("kind", KINDS)
def test_no_draws_are_left(kind: str) -> None:
    if kind == "dbrx":
        needs("transformers", "5.20", "refuses settings of every model in the configuration of DBRX's experts")
    config = shrink(kind, False)
    found = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, (int, float))]
    found = [name for name in found if not isinstance(getattr(config, name), bool)]
    assert found
    for name in found:
        setattr(config, name, 0.3)
    torch.manual_seed(0)
    model = build(config).train()
    if kind == "llama":
        settings = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, settings).train()
    first, *others = outputs(model)
    assert not all(torch.equal(first, other) for other in others)
    without_dropout(model)
    first, *others = outputs(model)
    assert all(torch.equal(first, other) for other in others)
    assert {getattr(config, name) for name in found} == {0.3}  # as it came, for whoever trains it next
    assert model.config is config
    assert all(torch.equal(first, other) for other in outputs(copy.deepcopy(model)))


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "LoHaConfig", "rank_dropout": 0.5, "module_dropout": 0.5},
        {"kind": "LoKrConfig", "rank_dropout": 0.5},
        {"kind": "BOFTConfig", "boft_dropout": 0.5, "boft_block_size": 4},
        {"kind": "LoraConfig", "lora_dropout": 0.5},
    ],
)
def test_adapters_with_dropout_of_their_own(adapter: dict[str, Any]) -> None:
    settings = dict(adapter)
    kind = getattr(peft, settings.pop("kind"))
    first_weights = "init_lora_weights" if "lora_dropout" in settings else "init_weights"
    config = kind(target_modules=["q_proj", "v_proj"], **{first_weights: False}, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(build(shrink("llama", False)), config).train()
    first, *others = outputs(model)
    assert not all(torch.equal(first, other) for other in others)
    without_dropout(model)
    first, *others = outputs(model)
    assert all(torch.equal(first, other) for other in others)


def test_what_is_no_layer_keeps_its_configuration() -> None:
    config = shrink("falcon", False)
    config.hidden_dropout = 0.3

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(config)
            self.config = self.inner.config

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(dropout=0.1)
            self.part = nn.Dropout(0.1)

    around, own = Around(), Own()
    without_dropout(around)
    without_dropout(own)
    assert around.config is around.inner.config is config
    assert isinstance(own.config, SimpleNamespace)
    assert own.part.p == 0
