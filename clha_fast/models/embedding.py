"""Which module of a model computes its logits, and whether it is one weight."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from clha_fast.models import switch
from clha_fast.models.adapters import active_module
from clha_fast.models.probe import is_linear

# Whose hooks shard, gather or move what the head reads and returns, and leave its values alone.
WRAPPERS = ("torch", "deepspeed", "accelerate", "transformers")

# The way out for what accelerate has offloaded.
ON_A_DEVICE = "load the model with a device_map that keeps its embeddings on a device (cpu, or a GPU)"


class UnsupportedHeadError(ValueError):
    """The model's output embedding, or what the model does to its result, is not understood; it is never guessed."""


def head_name(head: nn.Module) -> str:
    """A head's class as messages have it: "Linear" is torch's own, and others say whose they are."""
    kind = type(head)
    return f"{kind.__module__}.Linear" if kind.__name__ == "Linear" and kind is not nn.Linear else kind.__name__


def refuse(model: nn.Module, head: nn.Module | None, seen: str) -> UnsupportedHeadError:
    """The error that names the model, its head and what was seen of them."""
    name = "no output embedding" if head is None else f"output embedding {head_name(head)}"
    return UnsupportedHeadError(
        f"model: expected a head that can be fused, got {type(model).__name__} with {name}: {seen}"
    )


def library_of(hook: Any) -> str:
    """The package that a hook comes from."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0]


def is_wrappers(hook: Any) -> bool:
    """Whether a hook comes from one of the wrapping libraries; any other may change the head's values."""
    return library_of(hook) in WRAPPERS


def check_backward_hooks(model: nn.Module, head: nn.Module) -> None:
    """Refuses hooks on the head's backward that are no wrapper's: the loss has a backward of its own in its place."""
    everywhere = torch.nn.modules.module
    for hooks in (
        head._backward_hooks,
        head._backward_pre_hooks,
        everywhere._global_backward_hooks,
        everywhere._global_backward_pre_hooks,
    ):
        for hook in hooks.values():
            if not is_wrappers(hook):
                name = getattr(hook, "__qualname__", type(hook).__name__)
                raise refuse(
                    model,
                    head,
                    f"the backward hook {name} on it would be left out, for the loss takes its place; put it on the "
                    "module before the head, or on the head's parameters (weight.register_hook)",
                )


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is spread over processes; torch may have been built without the means."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, buffer or computed attribute of a module, None where it has none of that name."""
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def input_embedding_weight(model: nn.Module) -> Tensor:
    """[rows, H], the weight that token ids are looked up in."""
    getter: Any = model.get_input_embeddings
    weight: Tensor = getter().weight
    return weight


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that computes the logits; of peft's copies of it the active one."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return active_module(head) if isinstance(head, nn.Module) else None


def _accelerates(head: nn.Module) -> list[Any]:
    """The hooks that accelerate has put around a head's forward (`device_map`, `cpu_offload`)."""
    hook = vars(head).get("_hf_hook")
    if hook is None or "_old_forward" not in vars(head):
        return []
    return list(getattr(hook, "hooks", [hook]))


def forward_slot(head: nn.Module) -> str:
    """Where another forward can stand in: accelerate calls `_old_forward` once it has moved the input."""
    return "_old_forward" if _accelerates(head) else "forward"


def why_replaced(head: nn.Module) -> str | None:
    """What has replaced the forward on the instance by another than the class's; a move of its input is nothing."""
    hooks, forward = _accelerates(head), vars(head).get(forward_slot(head))
    weight = tensor_of(head, "weight")
    if hooks and weight is not None and weight.is_meta:
        return f"accelerate has offloaded its weight; {ON_A_DEVICE}"
    more = [type(h).__name__ for h in hooks if type(h).__name__ != "AlignDevicesHook" or h.offload or h.no_grad]
    if more:
        return (
            f"accelerate's {more[0]} stands around its forward, and may do more than move its input; "
            "accelerate.hooks.remove_hook_from_module(model.get_output_embeddings()) takes it away"
        )
    if forward is None or getattr(forward, "__func__", None) is switch.forward:
        return None
    own = getattr(forward, "__func__", None) is type(head).forward and forward.__self__ is head
    return None if own else "its forward has been replaced on the instance"


def head_of(model: nn.Module) -> nn.Module:
    """The one head, or UnsupportedHeadError."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise refuse(
            model,
            None,
            "it is an encoder-decoder, whose decoder wants decoder_input_ids, and a batch of candidates has one "
            "sequence for prompt and response; a causal language model is needed",
        )
    head = output_embedding(model)
    if head is None:
        raise refuse(model, None, "it returns no logits over a vocabulary")
    if isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        raise refuse(model, head, f"it holds {len(head)} heads, each with a vocabulary of its own")
    replaced = why_replaced(head)
    if replaced is not None:
        raise refuse(model, head, replaced)
    check_backward_hooks(model, head)
    return head


def why_not_linear(head: nn.Module) -> str | None:
    """The reason why `head` is not read as hidden . weight^T + bias, None where it is."""
    weight = tensor_of(head, "weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return "its weight is not a floating tensor [V, H]"
    # A quantised weight can be a tensor class of its own that looks like a floating tensor.
    if type(weight) not in (Tensor, nn.Parameter) and not is_dtensor(weight):
        return f"its weight is a {type(weight).__name__} (quantised weights are not read)"
    # A wrapper around the weight (LoRA, quantisation) has a forward of its own: its `.weight` is not what it computes.
    if type(head).forward is not nn.Linear.forward and not is_linear(head):
        return "its forward is not that of torch.nn.Linear, nor does it compute the same (an adapter? quantised?)"
    return None
