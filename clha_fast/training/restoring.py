"""Weights of a checkpoint that transformers' Trainer does not find again: those it wrote under other names."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def load_renamed(model: nn.Module, folder: str | os.PathLike[str], missing: Sequence[str], option: str) -> bool:
    """Load `folder` as `from_pretrained` does where a model has weights under other names than its files.

    `save_pretrained` writes the experts of a mixture, say, one by one, as its checkpoints on the Hub have them, and
    `Trainer` then loads by the model's own names, passing over what it does not find.

    Args:
        model: has been loaded by its own names. missing: names of its weights that were not in the files.
        option: what has it loaded, which an error names.

    Returns:
        whether any was really missing: a head that shares the weight of the embedding is not.

    Raises:
        ValueError: weights that are not there under any name.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    own = model.state_dict()
    there = {tensor.data_ptr() for name, tensor in own.items() if name not in missing}
    left = [name for name in missing if name in own and own[name].data_ptr() not in there]
    if not left:
        return False
    widest = functools.reduce(torch.promote_types, {weight.dtype for weight in model.parameters()})
    found, told = type(model).from_pretrained(folder, dtype=widest, output_loading_info=True)
    weights = found.state_dict()
    gone = sorted({*told["missing_keys"], *(name for name in left if name not in weights)})
    if gone:
        raise ValueError(
            f"{option}: expected all weights of {type(model).__name__}, got {os.fspath(folder)!r} "
            f"without {len(gone)} of them ({gone[0]}, ...)"
        )
    model.load_state_dict(weights, strict=False)  # it may have modules that its class has not, loaded before
    return True
