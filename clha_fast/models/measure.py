"""A model's head measured for a loss: what stands around it set aside, and put back."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from clha_fast.models.embedding import ON_A_DEVICE, UnsupportedHeadError, input_embedding_weight, output_embedding
from clha_fast.models.heads import HeadInfo, inspect_head
from clha_fast.models.hooks import other_hooks, without_wrappers_hooks
from clha_fast.models.own_forward import check_backend
from clha_fast.models.sharding import reshard

logger = logging.getLogger("clha_fast")

# Types whose own logits of a masked, padded row are not those of the row alone, and types whose logits look ahead:
# measured by `python -m tests.support.padding`, tiny and random, with transformers 5.23 and, what is new there, 5.24.
PADDING_CHANGES = frozenset(
    (
        "axk2",
        "cpmant",
        "deepseek_v32",
        "dots3_note",
        "dots3_note_text",
        "glm_moe_dsa",
        "hy_v4",
        "prophetnet",
        "reformer",
    )
)
LOOKS_AHEAD = frozenset(("xlm", "xlnet"))


@contextlib.contextmanager
def _bare(head: nn.Module | None) -> Iterator[None]:
    """Inside, the head has neither wrappers' hooks nor a tensor-parallel forward: neither expects known values."""
    if head is None:
        yield
        return
    own: Any = vars(head).get("forward")
    # transformers' tensor parallelism replaces the head's forward by one that distributes the same linear layer.
    parallel = getattr(own, "__module__", None) == "transformers.distributed.tensor_parallel"
    if parallel:
        del head.forward
    try:
        with without_wrappers_hooks(head):
            yield
    finally:
        if parallel:
            head.forward = own


def measure_head(model: nn.Module, backend: str = "auto") -> HeadInfo:
    """`inspect_head` for a loss: wrappers' hooks set aside, a head that is more than one weight taken as a function.

    Raises:
        UnsupportedHeadError: as `inspect_head`. BackendError: `backend` reads a weight, and the head is more than one.
    """
    head = output_embedding(model)
    if head is not None and input_embedding_weight(model).is_meta:
        if any("_hf_hook" in vars(module) for module in model.modules()):
            raise UnsupportedHeadError(
                f"model: expected embeddings with values, got {type(model).__name__} with those that accelerate has "
                f"offloaded; {ON_A_DEVICE}"
            )
        raise UnsupportedHeadError(
            f"model: expected weights with values, got {type(model).__name__} on the meta device; load it first "
            "(from_pretrained, or to_empty and load_state_dict), then attach"
        )
    with _bare(head):
        info = inspect_head(model, own_forward=True)
    info = dataclasses.replace(info, hooks=other_hooks(info.module))
    reshard(model)
    _say_what_the_model_does(model)
    if info.own_forward is not None:
        check_backend(backend, info.own_forward)
    return info


def _say_what_the_model_does(model: nn.Module) -> None:
    """Warns of a model whose own log-probabilities are not what a loss on ranked responses takes them for."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in PADDING_CHANGES:
        logger.warning(
            f"model: padding changes the log-probabilities of {kind} models, by their own forward: responses of "
            "different lengths in a batch are not compared exactly (see docs/model-kinds.md); those of one length are"
        )
    elif kind in LOOKS_AHEAD:
        logger.warning(
            f"model: {kind} models look ahead as they are configured, so that a token's log-probability is not that of "
            "a model which generates it (see docs/model-kinds.md)"
        )
