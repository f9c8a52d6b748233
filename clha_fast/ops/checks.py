"""Input checks. Those on shapes and dtypes are free; those on values run on CPU tensors only, never on a GPU's."""

from __future__ import annotations

import torch
from torch import Tensor

from clha_fast.options import CLHAOptions, HeadOptions
from clha_fast.types import HeadInputs, RankingInputs

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def _shape(tensor: Tensor | None) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def require_tensors(**tensors: Tensor | None) -> None:
    """Lists and numbers are refused by name, before their missing attributes are."""
    for name, tensor in tensors.items():
        _expect(tensor is None or isinstance(tensor, Tensor), name, "a tensor", tensor)


def settings(head: HeadOptions, options: CLHAOptions | None = None) -> None:
    """Names of presets and mappings are refused with what makes settings of them."""
    if not isinstance(head, HeadOptions):
        raise ValueError(f"head: expected HeadOptions(...), got {head!r}")
    if options is not None and not isinstance(options, CLHAOptions):
        raise ValueError(f"options: expected CLHAOptions, such as CLHAOptions.preset('paper'), got {options!r}")


def _expect(ok: bool, name: str, expected: str, tensor: Tensor | None) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {_shape(tensor)}")


def _index_tensor(name: str, tensor: Tensor, length: int | None, meaning: str, hint: str = "") -> None:
    ok = tensor.dim() == 1 and tensor.dtype in _INTEGERS and (length is None or tensor.shape[0] == length)
    size = "" if length is None else f" = {length}"
    _expect(ok, name, f"integers of shape [{meaning}{size}]{hint}", tensor)


def head_inputs(inputs: HeadInputs) -> None:
    """Shapes, dtypes and devices of what token log-probabilities are made from."""
    require_tensors(**inputs._asdict())
    hidden, weight, bias, targets, row_index = inputs
    _expect(hidden.dim() == 2 and hidden.dtype in _FLOATS, "hidden", "a floating tensor [M, H]", hidden)
    width, device, dtype = hidden.shape[1], hidden.device, hidden.dtype
    ok = weight.dim() == 2 and weight.shape[1] == width and weight.shape[0] > 0
    _expect(ok, "weight", f"[V, H = {width}] with V > 0", weight)
    _expect(
        weight.dtype == dtype,
        "weight",
        f"hidden's dtype {str(dtype).removeprefix('torch.')} (cast one, or use torch.autocast)",
        weight,
    )
    _expect(weight.device == device, "weight", f"hidden's device {device}", weight)
    if bias is not None:
        vocabulary = weight.shape[0]
        ok = bias.shape == (vocabulary,) and bias.dtype == dtype and bias.device == device
        _expect(ok, "bias", f"[V = {vocabulary}] of hidden's dtype and device", bias)
    _expect(targets.dtype == torch.int64, "targets", "int64", targets)
    size, hint = (hidden.shape[0], ", or a row_index") if row_index is None else (None, "")
    _index_tensor("targets", targets, size, "N", hint)
    _expect(targets.device == device, "targets", f"hidden's device {device}", targets)
    _expect(hidden.shape[0] > 0 or targets.shape[0] == 0, "hidden", "at least one row for the targets to read", hidden)
    if row_index is not None:
        _expect(row_index.dtype == torch.int64, "row_index", "int64", row_index)
        _index_tensor("row_index", row_index, targets.shape[0], "N")
        _expect(row_index.device == device, "row_index", f"hidden's device {device}", row_index)


def ranking_inputs(ranking: RankingInputs) -> None:
    """Shapes and dtypes of what ranks the candidates."""
    require_tensors(**ranking._asdict())
    candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, prompt_count = ranking
    _index_tensor("candidate_lengths", candidate_lengths, None, "C")
    _index_tensor("candidates_per_prompt", candidates_per_prompt, None, "P")
    if candidates_per_prompt.shape[0] == 0:
        raise ValueError("candidates_per_prompt: expected at least one prompt, got none")
    if rewards is not None:
        count = candidate_lengths.shape[0]
        ok = rewards.shape == (count,) and rewards.is_floating_point()
        _expect(ok, "rewards", f"floating [C = {count}]", rewards)
    if sft_index is not None:
        _index_tensor("sft_index", sft_index, candidates_per_prompt.shape[0], "P")
    if pair_counts is not None:
        _expect(pair_counts.dim() == 1, "pair_counts", "[D], one count a rank distance", pair_counts)
    if prompt_count is not None:
        _expect(prompt_count.dim() == 0, "prompt_count", "a scalar tensor", prompt_count)


def _cpu(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "cpu"


def target_values(inputs: HeadInputs, ignore_index: int, vocabulary: int | None = None) -> None:
    """Every target lies in [0, V) or is `ignore_index`, every row index in [0, M). CPU tensors only.

    `vocabulary` is V where the weight holds a part of its rows.
    """
    hidden, weight, _, targets, row_index = inputs
    rows = hidden.shape[0]
    if vocabulary is None:
        vocabulary = weight.shape[0]
    if _cpu(targets) and targets.numel():
        wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets: expected values in [0, V = {vocabulary}) or {ignore_index}, "
                f"got {int(targets[at])} at position {at}"
            )
    if row_index is not None and _cpu(row_index) and row_index.numel():
        wrong = (row_index < 0) | (row_index >= rows)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"row_index: expected values in [0, M = {rows}), got {int(row_index[at])} at position {at}"
            )


def ranking_values(num_tokens: int, ranking: RankingInputs) -> None:
    """Lengths and counts add up, rewards are finite, SFT targets exist. CPU tensors only."""
    candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts, _ = ranking
    count = candidate_lengths.shape[0]
    if _cpu(candidate_lengths):
        if count and int(candidate_lengths.min()) < 0:
            at = int(candidate_lengths.argmin())
            raise ValueError(
                f"candidate_lengths: expected no negative length, got {int(candidate_lengths[at])} at position {at}"
            )
        total = int(candidate_lengths.sum())
        if total != num_tokens:
            raise ValueError(f"candidate_lengths: expected a sum of N = {num_tokens} tokens, got {total}")
    if _cpu(candidates_per_prompt):
        fewest, total = int(candidates_per_prompt.min()), int(candidates_per_prompt.sum())
        if fewest < 1:
            at = int(candidates_per_prompt.argmin())
            raise ValueError(
                f"candidates_per_prompt: expected at least 1 candidate a prompt, got {fewest} at position {at}"
            )
        if total != count:
            raise ValueError(f"candidates_per_prompt: expected a sum of C = {count} candidates, got {total}")
        if pair_counts is not None:
            most = int(candidates_per_prompt.max())
            if pair_counts.numel() < most - 1:
                raise ValueError(f"pair_counts: expected at least {most - 1} rank distances, got {pair_counts.numel()}")
        if sft_index is not None and _cpu(sft_index):
            wrong = (sft_index < 0) | (sft_index >= candidates_per_prompt)
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                raise ValueError(
                    f"sft_index: expected a value in [0, {int(candidates_per_prompt[at])}) for prompt {at}, "
                    f"got {int(sft_index[at])}"
                )
    if rewards is not None and _cpu(rewards):
        finite = torch.isfinite(rewards)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise ValueError(f"rewards: expected finite values, got {float(rewards[at])} at position {at}")
