"""What no loss can be made of, and other people's hooks on the head: a sentence, or the right number."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import clha_fast
from clha_fast.models.heads import HeadInfo, UnsupportedHeadError
from clha_fast.models.hooks import is_wrappers, other_hooks, through_hooks
from tests.support.adapters import OPTIONS, TOKENIZER, attach, base, collate, compare


def test_models_without_an_output_embedding() -> None:
    model = base()
    for other in (AutoModelForSequenceClassification.from_config(model.config), model.model, nn.Linear(2, 2)):
        kind = type(other).__name__
        with pytest.raises(UnsupportedHeadError, match=f"got {kind} with no output embedding: it returns no logits"):
            clha_fast.attach(other, OPTIONS)
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedHeadError, match="LlamaForCausalLM with no output embedding"):
        clha_fast.attach(model, OPTIONS)


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (float("nan"), "a finite number of at least 0, got nan"),
        (torch.tensor(float("nan")), "a finite number of at least 0, got nan"),
        (torch.tensor(float("inf")), "a finite number of at least 0, got inf"),
        (torch.tensor(-1), "a finite number of at least 0, got -1.0"),
        (-0.5, "a finite number of at least 0, got -0.5"),
        (torch.ones(2), r"one number, as Attached.counts gives it, got shape \(2,\)"),
        (torch.ones(1), r"one number, as Attached.counts gives it, got shape \(1,\)"),
        ("2", "one number, as Attached.counts gives it, got '2'"),
        (True, "one number, as Attached.counts gives it, got True"),
        ([2.0], r"one number, as Attached.counts gives it, got \[2.0\]"),
    ],
)
def test_a_loss_scale_that_is_none(scale: Any, said: str) -> None:
    with clha_fast.attach(model := base(), OPTIONS), pytest.raises(ValueError, match=f"^loss_scale: expected {said}$"):
        model(**collate().as_dict(), loss_scale=scale)


@pytest.mark.parametrize("scale", [0, 3, 2.5, torch.tensor(0.0), torch.tensor(3), torch.tensor(2.5)])
def test_a_loss_scale_multiplies_the_loss(scale: Any) -> None:
    with clha_fast.attach(model := base(), OPTIONS):
        plain, scaled = model(**collate().as_dict()), model(**collate().as_dict(), loss_scale=scale)
    assert plain.loss.item() > 0
    assert scaled.loss.item() == pytest.approx(float(scale) * plain.loss.item(), rel=1e-6)
    assert scaled.metrics.rank_loss.item() == pytest.approx(float(scale) * plain.metrics.rank_loss.item(), rel=1e-6)
    assert scaled.metrics.kendall_tau.item() == plain.metrics.kendall_tau.item()


def test_a_tokenizer_larger_than_the_model() -> None:
    batch = collate().as_dict()
    largest = int(batch["input_ids"].max())
    small = base()
    small.resize_token_embeddings(largest)
    few = base()
    few.lm_head = nn.Linear(32, largest, bias=False)
    for model, name, where in ((small, "input_ids", "input"), (few, "targets", "output")):
        said = (
            rf"{name}: expected tokens below the {largest} rows of the model's {where} embedding, got {largest}; "
            r"is the tokenizer larger than the model\? \(model.resize_token_embeddings"
        )
        with attach(model), pytest.raises(ValueError, match=said):
            model(**batch)
    small.resize_token_embeddings(len(TOKENIZER))
    assert compare(small).right


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def cubed(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output**3


def halved(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


def test_other_peoples_hooks_on_the_head_are_measured() -> None:
    model = base().train()
    handles = [model.lm_head.register_forward_hook(doubled), model.lm_head.register_forward_pre_hook(halved)]
    with attach(model) as attached:
        assert attached.info.scale == 2.0
    assert compare(model).right
    for handle in handles:
        handle.remove()
    model.lm_head.register_forward_hook(cubed)
    with pytest.raises(UnsupportedHeadError, match="no scale, softcap or added bias"):
        attach(model)


def test_a_hook_that_nobody_measured_is_refused() -> None:
    """Added or removed behind attach: the loss would go on as if nothing had changed."""
    model, batch = base().train(), collate().as_dict()
    kept = model.lm_head.register_forward_hook(doubled)
    with attach(model):
        before = model(**batch).loss
        added = model.lm_head.register_forward_pre_hook(halved)
        with pytest.raises(UnsupportedHeadError, match=r"the 1 forward hook.* got 2 or others"):
            model(**batch)
        added.remove()
        assert model(**batch).loss == before
        kept.remove()
        with pytest.raises(UnsupportedHeadError, match=r"the 1 forward hook.* got 0 or others"):
            model(**batch)


class Doubling:
    """A hook that is an object, of gradients that come or go."""

    def __call__(self, module: nn.Module, *grads: Any) -> Any:
        return tuple(None if grad is None else 2 * grad for grad in grads[0])


def globally(name: str) -> Any:
    register = getattr(nn.modules.module, name)
    return lambda head, hook: register(hook)


BACKWARD_HOOKS = {
    "full": nn.Module.register_full_backward_hook,
    "full pre": nn.Module.register_full_backward_pre_hook,
    "old": nn.Module.register_backward_hook,
    "everywhere": globally("register_module_full_backward_hook"),
    "pre, everywhere": globally("register_module_full_backward_pre_hook"),
}


@pytest.mark.parametrize("register", BACKWARD_HOOKS.values(), ids=BACKWARD_HOOKS)
def test_backward_hooks_on_the_head_are_refused(register: Any) -> None:
    model, batch = base().train(), collate().as_dict()
    hook = Doubling()
    said = r"LlamaForCausalLM with output embedding Linear: the backward hook Doubling .* \(weight.register_hook\)"
    handle = register(model.lm_head, hook)
    try:
        with pytest.raises(UnsupportedHeadError, match=said):
            attach(model)
    finally:
        handle.remove()
    with attach(model):
        wanted = model(**batch).loss
        handle = register(model.lm_head, functools.partial(hook))
        try:
            with torch.no_grad():
                assert torch.equal(model(**batch).loss, wanted)  # no backward, nothing left out
            with pytest.raises(UnsupportedHeadError, match="the backward hook partial"):
                model(**batch)
        finally:
            handle.remove()


def test_backward_hooks_elsewhere_run() -> None:
    """Before the head and on its parameters, as the refusal says."""
    model, batch = base().train(), collate().as_dict()
    seen: list[str] = []
    model.model.norm.register_full_backward_hook(lambda *_: seen.append("norm"))
    model.lm_head.weight.register_hook(lambda grad: seen.append("weight"))
    with attach(model):
        model(**batch).loss.backward()
    assert sorted(seen) == ["norm", "weight"]


class Fused:
    """What `through_hooks` reads of a fused head."""

    result: tuple[Tensor, ...] = (torch.tensor(3.0), torch.tensor(0.5))


def test_the_loss_passes_wrappers_hooks_alone() -> None:
    head, seen, fused = nn.Linear(2, 2), [], Fused()

    def wrapper(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output + 1

    wrapper.__module__ = "torch.distributed.fsdp"
    head.register_forward_hook(doubled)
    head.register_forward_hook(wrapper)
    hooks = list(head._forward_hooks)
    assert [is_wrappers(hook) for hook in head._forward_hooks.values()] == [False, True]
    head.forward = lambda hidden: torch.tensor(7.0)
    with through_hooks(HeadInfo(head, vocab_size=2, hooks=other_hooks(head)), fused):
        assert head(torch.zeros(1, 2)) == 14  # the model gets its constant, which other people's hooks have seen
    assert seen == [3.0]
    assert fused.result[0] == 4
    assert list(head._forward_hooks) == hooks
