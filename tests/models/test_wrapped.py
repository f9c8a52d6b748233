"""Wrappers that an attached model is inside of: seen through, or refused before anything is put on the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import clha_fast
from clha_fast.hf import score
from clha_fast.models.wrapped import unwrap
from tests.support.adapters import OPTIONS, base, collate, compare, eager_loss, stir


class Reading(nn.Module):
    """A wrapper whose missing attributes are those of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


class WritingBoth(Reading):
    """As Lightning Fabric's, under another name."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in ("inner", "training"):
            setattr(self.inner, name, value)


class WritingInside(Reading):
    def __setattr__(self, name: str, value: Any) -> None:
        if "inner" in self.__dict__.get("_modules", {}):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)


class Own(Reading):
    """One that looks at what it is given, and keeps it."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)


@pytest.mark.parametrize("kind", [WritingBoth, WritingInside])
def test_a_wrapper_that_hands_its_attributes_on_is_refused(kind: type[Reading]) -> None:
    model = base()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    wrapped, ids = kind(model), collate().input_ids
    for use in (clha_fast.attach, lambda given: score(given, ids, ids)):
        with pytest.raises(ValueError, match=rf"got {kind.__name__}, which hands them on to LlamaForCausalLM"):
            use(wrapped)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert wrapped(input_ids=ids).logits.shape[-1] == model.config.vocab_size
    assert compare(model).right


@pytest.mark.parametrize("kind", [Reading, Own])
def test_a_wrapper_that_keeps_its_own_attributes_is_taken(kind: type[Reading]) -> None:
    wrapped = kind(base())
    assert unwrap(wrapped) is wrapped
    assert not [name for module in wrapped.modules() for name in vars(module) if "clha" in name]
    assert compare(wrapped).right


def adaption_prompt(model: nn.Module) -> nn.Module:
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM")
    return stir(peft.get_peft_model(model, config)).train()


def kept(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    """LoRA whose tuner calls what `make` took from the model."""

    def wrap(model: nn.Module) -> nn.Module:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        wrapped.base_model.forward = make(model)
        return stir(wrapped)

    return wrap


KEEPING = {
    "AdaptionPrompt": adaption_prompt,
    "AdaptionPrompt, compiled": lambda model: torch.compile(adaption_prompt(model), backend="eager"),
    "a method": kept(lambda model: model.forward),
    "a partial": kept(lambda model: functools.partial(functools.partial(model.forward, use_cache=False))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "compiled" in name else ()) for name in KEEPING]
)
def test_a_wrapper_that_keeps_the_forward_before_is_refused_and_right_in_the_other_order(name: str) -> None:
    wrapped = KEEPING[name](base())
    with pytest.raises(ValueError, match=r"which keeps the one from when it was made; attach the model before"):
        clha_fast.attach(wrapped)
    model = unwrap(wrapped)
    assert "forward" not in vars(model)
    batch = collate()
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    logits = wrapped(**batch.model_inputs(), use_cache=False).logits.detach()
    # The head alone is replaced to score, so that which forward calls it is all the same.
    scores = score(wrapped, batch.input_ids, labels, attention_mask=batch.attention_mask)
    wanted = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(scores.logps[:, 1:], wanted.where(scores.scored[:, 1:], 0.0), atol=2e-6, rtol=1e-5)

    model = base()
    attached = clha_fast.attach(model, OPTIONS)
    wrapped = KEEPING[name](model)
    loss = wrapped(**batch.as_dict()).loss
    assert loss.item() == pytest.approx(eager_loss(wrapped, batch).item(), rel=2e-6)
    attached.detach()
    # What it has kept is ours, which goes on to whatever stands on the model: nothing, and another loss.
    assert wrapped(**batch.model_inputs()).logits.shape[-1] == len(logits[0, 0])
    with clha_fast.attach(wrapped, OPTIONS):
        assert wrapped(**batch.as_dict()).loss.item() == pytest.approx(loss.item(), rel=2e-6)
