"""The check that an objective of somebody else's adds up over prompts; the library's own are held to it by tests."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clha_fast.objectives import BUILT_IN, FromFunction
from clha_fast.objectives.base import Group, Objective, Terms
from clha_fast.objectives.metrics import METRIC_NAMES, as_logged
from clha_fast.objectives.ranked import RankedBatch, recording
from clha_fast.types import COUNTS, SIGNALS, RankingInputs

_LENGTHS, _SIZES = ((2, 3, 1), (4,), (2, 0), (1, 3, 2, 2)), (3, 1, 2, 4)
_CHECKED: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def check_adds_up(objective: Objective) -> Objective:
    """The objective, once its loss of a small random batch was the sum of its losses of the single prompts.

    Raises:
        ValueError: it was not.
    """
    if type(objective) in BUILT_IN:
        return objective
    if torch.compiler.is_compiling():
        # It runs eagerly; under fullgraph=True the compiler gives this reason.
        why = "is none of the library's own and runs eagerly only"
        torch._dynamo.graph_break(msg=f"objective {objective.label!r} {why}")
    subject: Any = objective.function if isinstance(objective, FromFunction) else objective
    if _CHECKED.get(id(subject)) is not subject:
        compare(objective)
        with contextlib.suppress(TypeError):  # what cannot be referred to weakly is checked every time
            _CHECKED[id(subject)] = subject
    return objective


def compare(objective: Objective) -> None:
    """Tries an objective on a batch and prompt by prompt, with those of the batch's counts that it `divides_by`.

    Raises:
        ValueError: it fails, returns anything but scalars with a graph, its inert candidates have a slope, or the
            losses or slopes of the prompts are not the batch's.
    """
    for attribute, known in (("needs", RankingInputs._fields), ("divides_by", COUNTS)):
        for name in getattr(objective, attribute):
            if name not in known:
                expected = "fields of RankingInputs" if attribute == "needs" else f"some of {', '.join(COUNTS)}"
                raise ValueError(f"objective {objective.label!r}: {attribute}: expected {expected}, got {name!r}")
    draw = torch.Generator().manual_seed(0)
    lengths = [length for part in _LENGTHS for length in part]
    logps = -torch.rand(sum(lengths), generator=draw, dtype=torch.float64) - 0.1
    given = RankingInputs(
        torch.tensor(lengths),
        torch.tensor(_SIZES),
        rewards=torch.tensor([4.0, 1.0, -3.0, 2.0, 5.0, 1.0, 9.0, 4.0, 2.0, -6.0], dtype=torch.float32),
        **{
            name: torch.rand(len(logps), generator=draw, dtype=torch.float64)
            for name in SIGNALS
            if name in (*objective.reads, *objective.needs)
        },
    )
    whole = _batch(objective, given, len(logps))
    seen = {name: torch.rand(len(logps), generator=draw, dtype=torch.float64) for name in objective.wanted}
    _check_terms(objective, whole, logps, seen)
    counts = dict(zip(COUNTS[1:], whole.plan.totals, strict=True))
    counts["pair_counts"] = whole.plan.pairs.at_distances(whole.plan.kept, max(_SIZES))
    # No others: a step that is split has none.
    given = given._replace(**{name: counts[name] for name in objective.divides_by})
    parts = [_prompt(given, p) for p in range(len(_SIZES))]
    edges = whole.layout.prompt_edges
    one = _evaluate(objective, [(given, logps, seen)])
    spans = [slice(*edges[p : p + 2]) for p in range(len(parts))]
    many = _evaluate(
        objective,
        [
            (part, logps[span], {name: value[span] for name, value in seen.items()})
            for part, span in zip(parts, spans, strict=True)
        ],
    )
    for what, a, b in (("loss", one[0], many[0]), ("slope", one[1], many[1])):
        if not torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True):
            at = int((a - b).abs().argmax())
            raise ValueError(
                f"objective {objective.label!r}: expected a loss that adds up over prompts (what it divides by comes "
                "from group.totals or from within one prompt, never from a mean over prompts; `divides_by` names each "
                f"of the totals, here {', '.join(objective.divides_by) or 'none'}; in float64, as group.scores is), "
                f"got a {what} of {float(a.flatten()[at]):.9g} for a batch and "
                f"{float(b.flatten()[at]):.9g} for its prompts one by one; a loss that mixes prompts takes token_logps"
            )
    inert = objective.inert(whole.layout, given.rewards, given.sft_index)
    for k in inert.nonzero().flatten().tolist():
        if one[1][..., whole.layout.owner == k].any():
            raise ValueError(
                f"objective {objective.label!r}: expected no slope for candidates that `inert` lets drop, got one for "
                f"candidate {k} of prompts of {', '.join(map(str, _SIZES))}"
            )


def _check_terms(objective: Objective, whole: RankedBatch, logps: Tensor, seen: Mapping[str, Tensor]) -> None:
    """What the objective makes of a batch is two scalars with a graph to its log-probabilities."""
    named = f"objective {objective.label!r}"
    with recording():
        group = Group(whole.plan, 0, len(_SIZES), logps.requires_grad_(), seen)
        try:
            terms = objective.terms(group)
        except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{named}: failed on a trial of prompts of {', '.join(map(str, _SIZES))} candidates "
                f"({type(error).__name__}: {' '.join(str(error).split())}); it must take any number"
            ) from error
        if not isinstance(terms, Terms):
            raise ValueError(f"{named}: expected Terms(rank, sft), got a {type(terms).__name__}")
        for term in terms:
            if not isinstance(term, Tensor) or term.dim() or not term.is_floating_point():
                got = f"{list(term.shape)} {term.dtype}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
                raise ValueError(f"{named}: expected a scalar tensor in nats, got {got}")
        if not (terms.rank + terms.sft).requires_grad:
            raise ValueError(
                f"{named}: expected a loss with a graph to group.logps, got one without (a detach, an item() or a "
                "no_grad?)"
            )
    logps.requires_grad_(False)
    _check_graph(objective, whole, logps, seen)
    written = objective.slopes(Group(whole.plan, 0, len(_SIZES), logps, seen))
    if written is not None:
        leaf = logps.detach().requires_grad_()
        with recording():
            again = objective.terms(Group(whole.plan, 0, len(_SIZES), leaf, seen))
            (slope,) = torch.autograd.grad(again.rank + again.sft, leaf)
        if not torch.allclose(written, slope, rtol=1e-9, atol=1e-12, equal_nan=True):
            raise ValueError(f"{named}: slopes: expected the gradient of its own terms, got another one")
    taken = set(objective.metric_names) & {*METRIC_NAMES, *as_logged()}
    if taken:
        raise ValueError(f"{named}: metric_names: expected names of its own, got {', '.join(sorted(taken))}")
    if isinstance(objective.metric_names, Mapping):
        unknown = set(objective.metric_names.values()) - set(METRIC_NAMES)
        if unknown:
            expected, got = "divisors of METRIC_NAMES", ", ".join(sorted(unknown))
            raise ValueError(f"{named}: metric_names: expected {expected}, got {got}")
    missing = set(objective.metric_names) - set(objective.report(Group(whole.plan, 0, len(_SIZES), logps, seen)))
    if missing:
        raise ValueError(f"{named}: report: expected the sums {', '.join(sorted(missing))}, got none")


def _check_graph(objective: Objective, whole: RankedBatch, logps: Tensor, seen: Mapping[str, Tensor]) -> None:
    """The loss leads to log-probabilities and a declared entropy, and to nothing else: that would get no gradient."""

    def leads_on(statistics: Mapping[str, Tensor]) -> bool:
        with recording():
            terms = objective.terms(Group(whole.plan, 0, len(_SIZES), logps, statistics))
            return bool((terms.rank + terms.sft).requires_grad)

    if leads_on(seen):
        raise ValueError(
            f"objective {objective.label!r}: expected a loss whose graph leads to group.logps alone, got one that also "
            "leads to a tensor of its own (a parameter?), which would get no gradient; detach() that, or write the "
            "loss in plain torch on token_logps"
        )
    declared = objective.reads_entropy or "entropy" not in seen
    if not declared and leads_on({**seen, "entropy": seen["entropy"].clone().requires_grad_()}):
        raise ValueError(
            f"objective {objective.label!r}: reads_entropy: expected True, for its loss depends on the entropy, got "
            "False; or detach() it"
        )


def _batch(objective: Objective, given: RankingInputs, tokens: int) -> RankedBatch:
    return RankedBatch(objective, given, torch.ones(tokens, dtype=torch.bool), torch.float64)


def _evaluate(
    objective: Objective, parts: Sequence[tuple[RankingInputs, Tensor, Mapping[str, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """(loss, slopes) over some batches."""
    losses, slopes = [], []
    for given, logps, seen in parts:
        batch = _batch(objective, given, len(logps))
        slopes.append(batch.rank(0, batch.layout.num_prompts, logps, seen))
        losses.append(batch.finish(logps, seen)[0])
    return torch.stack(losses).sum(), torch.cat(slopes, -1)


def _prompt(given: RankingInputs, p: int) -> RankingInputs:
    """Prompt p alone, with the totals of all."""
    candidates = slice(sum(_SIZES[:p]), sum(_SIZES[: p + 1]))
    before = int(given.candidate_lengths[: candidates.start].sum())
    tokens = slice(before, before + int(given.candidate_lengths[candidates].sum()))
    cut: dict[str, Any] = {"candidates_per_prompt": given.candidates_per_prompt[p : p + 1]}
    for name in ("candidate_lengths", "rewards"):
        cut[name] = getattr(given, name)[candidates]
    for name in SIGNALS:
        value = getattr(given, name)
        cut[name] = None if value is None else value[tokens]
    return given._replace(**cut)
