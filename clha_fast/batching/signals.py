"""What is known of tokens and candidates beside ranks and rewards, on its way from features into a batch."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clha_fast.objectives import Objective
from clha_fast.types import SIGNALS

Values = Sequence[float] | Sequence[Sequence[float]]

# The others are one number a token, always.
PER_CANDIDATE = ("reference_logps", "advantages")
_LARGEST = torch.finfo(torch.float32).max


def signals_of(objective: Objective) -> tuple[str, ...]:
    """Those of `SIGNALS` that the objective looks at."""
    return tuple(name for name in SIGNALS if name in (*objective.reads, *objective.needs))


def token_checksum(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> int:
    """A number of 32 bits that another tokenizer, template or limit changes: what `reference_tokens` holds."""
    parts = (struct.pack(f"<{len(ids)}i", *ids) for ids in (prompt_ids, completion_ids))
    return zlib.crc32(struct.pack("<i", len(prompt_ids)) + b"".join(parts))


def _check_ranking(feature: Mapping[str, Any]) -> None:
    """ValueError, which names the record, for a reward that is not finite, or an SFT target that is not there.

    Nobody looks at the values once they are on a GPU, and a NaN would drop its pairs as noise.
    """
    source, size = feature["source"], len(feature["completion_ids"])
    for value in feature["rewards"] or ():
        if not abs(value) <= _LARGEST:
            raise ValueError(f"{source}: rewards: expected finite numbers (float32), got {value}")
    if not 0 <= feature["sft_index"] < size:
        raise ValueError(f"{source}: sft_index: expected a position from 0 to {size - 1}, got {feature['sft_index']}")


def check_signals(
    feature: Mapping[str, Any], lengths: Sequence[int], first: Mapping[str, Any], signals: Sequence[str]
) -> None:
    """Whether a feature's `signals` have the right sizes, and the kind of those of `first`, the batch's first.

    Its rewards are to be finite, its SFT target to be there, whatever the signals.

    Args:
        lengths: scored tokens of its candidates.

    Raises:
        ValueError: they do not; the message names the record.
    """
    _check_ranking(feature)
    source = feature["source"]
    for name in signals:
        values, others = feature.get(name), first.get(name)
        if (values is None) != (others is None):
            here, there = ("none", "has them") if values is None else ("some", "has none")
            raise ValueError(
                f"{source}: {name}: expected all records of a batch to have them or none to, got {here} while "
                f"{first['source']} {there}"
            )
        if values is None:
            continue
        if len(values) != len(lengths):
            raise ValueError(f"{source}: {name}: expected {len(lengths)} entries, one a completion, got {len(values)}")
        by_token = _by_token(values)
        if by_token != _by_token(others):
            raise ValueError(
                f"{source}: {name}: expected a {'number' if by_token else 'list'} a completion, as {first['source']} "
                f"has, got a {'list' if by_token else 'number'}"
            )
        if not by_token and name not in PER_CANDIDATE:
            raise ValueError(f"{source}: {name}: expected a list a completion, one number a token, got a number")
        for number, length in enumerate(lengths):
            if by_token and len(values[number]) != length:
                raise ValueError(
                    f"{source}: {name}[{number}]: expected {length} numbers, one a token of the completion, got "
                    f"{len(values[number])}"
                )


def _by_token(values: Any) -> bool:
    return hasattr(values[0], "__len__")


def pack_signal(name: str, features: Sequence[Mapping[str, Any]], lengths: Tensor) -> Tensor:
    """A signal of checked features, float32: [N] of the tokens that run where it is one a token, else [C].

    Args:
        lengths: int64 [C], 0 for a candidate that was dropped.

    Raises:
        ValueError: a value is not finite; the message names the record.
    """
    entries = [(feature["source"], entry) for feature in features for entry in feature[name]]
    by_token = _by_token(features[0][name])
    if by_token:
        entries = [entry for entry, length in zip(entries, lengths.tolist(), strict=True) if length]
    values = [value for _, entry in entries for value in (entry if by_token else (entry,))]
    packed = torch.tensor(values, dtype=torch.float32)
    if not packed.isfinite().all():
        for source, entry in entries:
            wrong = [value for value in (entry if by_token else (entry,)) if not abs(value) < float("inf")]
            if wrong:
                raise ValueError(f"{source}: {name}: expected finite numbers (float32), got {wrong[0]}")
        raise ValueError(f"{name}: expected finite numbers, got one beyond float32")
    return packed if by_token else unmistakable(name, packed, lengths, int(lengths.sum()))


def unmistakable(name: str, values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Values [C] as they are; as [N] where N == C, which would be taken for one number a token.

    A candidate's `reference_logps` is then spread over its tokens, whose sum it is; anything else is repeated.
    """
    if values.shape[0] != tokens or bool((lengths == 1).all()):
        return values
    owner = torch.repeat_interleave(torch.arange(len(lengths), device=values.device), lengths, output_size=tokens)
    return values[owner] / lengths[owner] if name == "reference_logps" else values[owner]
