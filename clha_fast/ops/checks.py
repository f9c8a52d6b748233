"""Input checks. Those on shapes and dtypes are free; those on values run on CPU tensors only, never on a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.ops.derivatives import transforming
from clha_fast.options import HeadOptions
from clha_fast.types import COUNTS, SIGNALS, STATISTICS, HeadInputs, RankingInputs, VocabShard

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
        # By name: torch may have been built without the means.
        if type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"{name}: expected a plain tensor, got a DTensor; pass tensor.to_local(), with shard=VocabShard(...) "
                "where a weight's rows are spread, or use clha_fast.attach, which reads placements"
            )


def settings(head: HeadOptions, options: CLHAOptions | None = None) -> None:
    """Names of presets and mappings are refused with what makes settings of them."""
    if not isinstance(head, HeadOptions):
        raise ValueError(f"head: expected HeadOptions(...), got {head!r}")
    if options is not None and not isinstance(options, CLHAOptions):
        raise ValueError(f"options: expected CLHAOptions, such as CLHAOptions.preset('paper'), got {options!r}")


def _expect(ok: bool, name: str, expected: Callable[[], str] | str, tensor: Tensor | None) -> None:
    """ValueError unless `ok`. What names a size is a function: a graph that formats one is good for that size only."""
    if not ok:
        raise ValueError(
            f"{name}: expected {expected if isinstance(expected, str) else expected()}, got {_shape(tensor)}"
        )


def _index_tensor(name: str, tensor: Tensor, length: int | None, meaning: str, hint: str = "") -> None:
    ok = tensor.dim() == 1 and tensor.dtype in _INTEGERS and (length is None or tensor.shape[0] == length)
    other = tensor.dtype not in _INTEGERS and not tensor.is_floating_point()
    kind = "int64 or int32" if other else "integers"
    _expect(ok, name, lambda: f"{kind} of shape [{meaning}{'' if length is None else f' = {length}'}]{hint}", tensor)


def head_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, row_index: Tensor | None
) -> HeadInputs:
    """The head's inputs, checked; floating ones in autocast's dtype where that is on, as `F.linear` takes them.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    require_tensors(hidden=hidden, weight=weight, bias=bias)
    # Meta tensors have shapes alone, and no autocast that could be asked for.
    if hidden.device.type != "meta" and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)

        def cast(tensor: Tensor) -> Tensor:
            # Like autocast itself, float64 is left alone.
            return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

        hidden, weight, bias = cast(hidden), cast(weight), None if bias is None else cast(bias)
    inputs = HeadInputs(hidden, weight, bias, targets, row_index)
    _check_head(inputs)
    return inputs


def with_temperature(inputs: HeadInputs, temperature: Tensor | None, head: HeadOptions) -> HeadInputs:
    """The inputs with a temperature for each token, checked but for its values and in float32 or better."""
    if temperature is None:
        return inputs
    require_tensors(temperature=temperature)
    hidden, count = inputs.hidden, inputs.targets.shape[0]
    ok = temperature.shape == (count,) and temperature.is_floating_point() and temperature.device == hidden.device
    _expect(ok, "temperature", partial(_temperatures, count, hidden.device), temperature)
    if temperature.requires_grad:
        raise ValueError("temperature: expected values without a gradient, got a tensor that requires one; detach() it")
    if head.temperature != 1:
        raise ValueError(f"temperature: expected None beside HeadOptions(temperature={head.temperature}), got values")
    _no_routing(head, "a temperature for each token")
    return inputs._replace(temperature=temperature.to(torch.promote_types(hidden.dtype, torch.float32)))


def _temperatures(count: int, device: torch.device) -> str:
    return f"floating [N = {count}] on {device} (or HeadOptions(temperature=))"


def statistics(names: Sequence[str], head: HeadOptions) -> tuple[str, ...]:
    """Names of statistics, checked; each once."""
    if isinstance(names, str) or any(name not in STATISTICS for name in names):
        raise ValueError(f"statistics: expected a sequence of {', '.join(STATISTICS)}, got {names!r}")
    if names:
        _no_routing(head, "statistics")
    return tuple(dict.fromkeys(names))


def token_statistics(given: Mapping[str, Tensor], objective: Objective, logps: Tensor) -> dict[str, Tensor]:
    """The statistics of tokens that an objective names, which are all that it is given."""
    require_tensors(**given)
    for name in (*objective.wanted, *given):
        if name not in given:
            raise ValueError(
                f"statistics: expected {name!r}, which the objective {objective.label!r} reads, got {[*given]}; "
                f"token_logps(..., statistics=({name!r},)) gives it"
            )
        if name not in objective.wanted:
            raise ValueError(
                f"statistics: expected no {name!r}, for the objective {objective.label!r} does not read it, got values"
            )
        ok = given[name].shape == logps.shape and given[name].dtype == logps.dtype
        _expect(ok, f"statistics[{name!r}]", "the shape and dtype of logps", given[name])
    # Where nothing is recorded there is none to lose; levels of torch.func say not of all tensors who has one.
    recorded = torch.is_grad_enabled() and not transforming() and logps.requires_grad
    if objective.reads_entropy and recorded and not given["entropy"].requires_grad:
        raise ValueError(
            "statistics['entropy']: expected values with a graph, as logps have, for the loss of the objective "
            f"{objective.label!r} depends on both, got values without (made under no_grad or detached?); "
            "token_logps(..., statistics=('entropy',)) gives both"
        )
    return dict(given)


def _no_routing(head: HeadOptions, beside: str) -> None:
    if head.max_dropped_mass is not None:
        raise ValueError(f"max_dropped_mass: expected None beside {beside}, got {head.max_dropped_mass}")


def _check_head(inputs: HeadInputs) -> None:
    """Shapes, dtypes and devices of what token log-probabilities are made from."""
    require_tensors(**inputs._asdict())
    hidden, weight, bias, targets, row_index = inputs[:5]
    flat = " (hidden.flatten(0, -2), with targets to match)" if hidden.dim() > 2 else ""
    _expect(hidden.dim() == 2 and hidden.dtype in _FLOATS, "hidden", f"a floating tensor [M, H]{flat}", hidden)
    width, device, dtype = hidden.shape[1], hidden.device, hidden.dtype
    ok = weight.dim() == 2 and weight.shape[1] == width and weight.shape[0] > 0
    _expect(ok, "weight", lambda: f"[V, H = {width}] with V > 0", weight)
    _expect(
        weight.dtype == dtype,
        "weight",
        lambda: f"hidden's dtype {str(dtype).removeprefix('torch.')} (cast one, or use torch.autocast)",
        weight,
    )
    _expect(weight.device == device, "weight", lambda: f"hidden's device {device}", weight)
    if bias is not None:
        vocabulary = weight.shape[0]
        ok = bias.shape == (vocabulary,) and bias.dtype == dtype and bias.device == device
        _expect(ok, "bias", lambda: f"[V = {vocabulary}] of hidden's dtype and device", bias)
    _expect(targets.dtype == torch.int64, "targets", "int64", targets)
    size, hint = (hidden.shape[0], ", or a row_index") if row_index is None else (None, "")
    _index_tensor("targets", targets, size, "N", hint)
    _expect(targets.device == device, "targets", lambda: f"hidden's device {device}", targets)
    _expect(hidden.shape[0] > 0 or targets.shape[0] == 0, "hidden", "at least one row for the targets to read", hidden)
    if row_index is not None:
        _expect(row_index.dtype == torch.int64, "row_index", "int64", row_index)
        _index_tensor("row_index", row_index, targets.shape[0], "N")
        _expect(row_index.device == device, "row_index", lambda: f"hidden's device {device}", row_index)


def has_values(hidden: Tensor) -> None:
    """The reference's loss reads values; the operators give shapes for meta tensors."""
    said = "values for the loss of backend 'reference' (backend 'torch' gives the shapes of meta tensors)"
    _expect(hidden.device.type != "meta", "hidden", said, hidden)


def sharded_head(inputs: HeadInputs, head: HeadOptions, shard: VocabShard, backend: str) -> None:
    """What a head that is spread over processes takes, and its values where they lie on the CPU."""
    if not isinstance(shard, VocabShard):
        raise ValueError(f"shard: expected VocabShard(start, size), got {shard!r}")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend: expected auto or torch for a head sharded over processes, got {backend!r}")
    input_values(inputs, head.ignore_index, vocabulary=shard.size)
    rows = inputs.weight.shape[0]
    if not 0 <= shard.start <= shard.size - rows:
        raise ValueError(
            f"shard: expected rows {shard.start} to {shard.start + rows} within a vocabulary of {shard.size}, "
            f"got a weight of {rows} rows"
        )
    if head.max_dropped_mass is not None:
        raise ValueError(
            f"max_dropped_mass: expected None for a head sharded over processes, got {head.max_dropped_mass}"
        )


def ranking_inputs(given: RankingInputs, num_tokens: int, objective: Objective, device: torch.device) -> None:
    """Shapes, dtypes and places of what is known of the candidates; that the objective has and reads what there is.

    Args:
        device: of the hidden states or log-probabilities; the CPU will do as well.
    """
    if not isinstance(given, RankingInputs):
        raise ValueError(f"given: expected RankingInputs(candidate_lengths, ...), got a {type(given).__name__}")
    require_tensors(**given._asdict())
    for name, value in given._asdict().items():
        ok = value is None or value.device.type == "cpu" or value.device == device
        _expect(ok, name, lambda: f"a tensor on the CPU or on the device of the loss, {device}", value)
    count, prompts = given.candidate_lengths.shape[:1], given.candidates_per_prompt.shape[:1]
    _index_tensor("candidate_lengths", given.candidate_lengths, None, "C")
    _index_tensor("candidates_per_prompt", given.candidates_per_prompt, None, "P")
    if prompts[0] == 0:
        raise ValueError(
            "candidates_per_prompt: expected at least one prompt, got none; where a process has none left, [1] beside "
            "candidate_lengths [0] gives a loss of 0 and gradients of zeros"
        )
    if given.rewards is not None:
        ok = given.rewards.shape == count and given.rewards.is_floating_point()
        _expect(ok, "rewards", lambda: f"floating [C = {count[0]}]", given.rewards)
    if given.sft_index is not None:
        _index_tensor("sft_index", given.sft_index, prompts[0], "P")
    if given.pair_counts is not None:
        _expect(given.pair_counts.dim() == 1, "pair_counts", "[D], one count a rank distance", given.pair_counts)
    for name in COUNTS[1:]:
        value = getattr(given, name)
        _expect(value is None or value.dim() == 0, name, "a scalar tensor", value)
    for name in COUNTS:
        value = getattr(given, name)
        ok = value is None or (value.dtype != torch.bool and not value.is_complex())
        _expect(ok, name, "integers or floating numbers", value)
    for name in SIGNALS:
        value = getattr(given, name)
        if value is not None:
            a_candidate = name in ("reference_logps", "advantages")
            ok = value.shape == (num_tokens,) or (a_candidate and value.shape == count)
            _expect(
                ok and value.is_floating_point(),
                name,
                partial(_signal_shapes, num_tokens, count[0] if a_candidate else None),
                value,
            )
    objective.check(given)


def _signal_shapes(tokens: int, candidates: int | None) -> str:
    return f"floating [N = {tokens}]" + ("" if candidates is None else f" or [C = {candidates}]")


def log_probabilities(logps: Tensor, scored: Tensor | None) -> None:
    """What a loss of log-probabilities is given in the head's place."""
    require_tensors(logps=logps, scored=scored)
    ok = logps.dim() == 1 and logps.dtype in (torch.float32, torch.float64)
    _expect(ok, "logps", "float32 or float64 of shape [N]", logps)
    if scored is not None:
        ok = scored.shape == logps.shape and scored.dtype == torch.bool and scored.device == logps.device
        _expect(ok, "scored", lambda: f"booleans of shape [N = {logps.shape[0]}] on {logps.device}", scored)
    _expect(logps.device.type != "meta", "logps", "values (token_logps and linear_loss take meta tensors)", logps)


def _cpu(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "cpu"


def input_values(inputs: HeadInputs, ignore_index: int, vocabulary: int | None = None) -> None:
    """Every target is in [0, V) or `ignore_index`, every row index in [0, M), temperatures are positive. CPU only.

    For operators' bodies: values are not there yet where a call is traced, or taken apart by torch.func.

    Args:
        vocabulary: V where the weight holds a part of its rows.
    """
    hidden, weight, _, targets, row_index, temperature = inputs
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
    if temperature is not None and _cpu(temperature) and temperature.numel():
        wrong = ~(torch.isfinite(temperature) & (temperature > 0))
        if bool(wrong.any()):
            at, dtype = int(wrong.nonzero()[0]), str(temperature.dtype).removeprefix("torch.")
            raise ValueError(
                f"temperature: expected positive finite numbers in {dtype}, got {float(temperature[at])} "
                f"at position {at}"
            )


def _count_values(name: str, counts: Tensor | None) -> None:
    if counts is None or not _cpu(counts) or not counts.numel():
        return
    wrong = ~torch.isfinite(counts) | (counts < 0)
    if bool(wrong.any()):
        value = counts[wrong].flatten()[0].item()
        raise ValueError(f"{name}: expected finite counts that are not negative, got {value}")


def ranking_values(num_tokens: int, ranking: RankingInputs, scored: Callable[[], Tensor]) -> None:
    """Lengths and counts add up, rewards are finite, SFT targets exist. CPU tensors only.

    Args:
        scored: gives bool [N], looked at where a step is said to have nothing.
    """
    candidate_lengths, candidates_per_prompt, rewards, sft_index, pair_counts = ranking[:5]
    count = candidate_lengths.shape[0]
    for name in COUNTS:
        _count_values(name, getattr(ranking, name))
    for name in ("prompt_count", "candidate_count", "token_count"):
        if _cpu(value := getattr(ranking, name)) and not bool(value) and _cpu(here := scored()) and bool(here.any()):
            raise ValueError(f"{name}: expected what the whole step has, got 0 for a batch with scored tokens")
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
        finite = torch.isfinite(rewards.float())  # they are compared so
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise ValueError(f"rewards: expected finite values, got {float(rewards[at])} at position {at}")
