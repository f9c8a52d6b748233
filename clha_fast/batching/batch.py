"""Candidates of several prompts as tensors: rows for the model, packed tokens for the loss."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from clha_fast.batching.segments import TOKEN_SEGMENTS, Segments, check_layout, counted_layout, joined_rows, padded_rows
from clha_fast.batching.signals import PER_CANDIDATE, Values, check_signals, pack_signal, signals_of, unmistakable
from clha_fast.layout import Layout
from clha_fast.objectives import Objective
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.objectives.pairs import pair_blocks
from clha_fast.types import SIGNALS


class _Known(TypedDict):
    prompt_ids: Sequence[int]
    completion_ids: Sequence[Sequence[int]]
    rewards: Sequence[float] | None
    sft_index: int
    source: str


class CandidateFeature(_Known, total=False):
    """One tokenised prompt with its candidates, best rank first.

    `prompt_ids` holds at least one token and every list of `completion_ids` too, the last being EOS unless
    the response was truncated. The signals may be left out: one number a candidate, or one list of numbers, one a
    token, as `old_logps` and `token_weights` always are. `completion_mask` has 1 for each token of `completion_ids`
    that is scored, 0 for one of a marker; only chains (`data.chains`) have one.
    """

    completion_mask: Sequence[Sequence[int]] | None

    reference_logps: Values | None
    old_logps: Values | None
    advantages: Values | None
    token_weights: Values | None


class HostSizes:
    """`candidate_lengths` and `candidates_per_prompt` as the host knows them, wherever the batch's tensors go.

    No tensor and no container: what moves a batch field by field (Trainer, accelerate) leaves it where it is.
    """

    def __init__(self, candidate_lengths: Tensor, candidates_per_prompt: Tensor) -> None:
        self.candidate_lengths, self.candidates_per_prompt = candidate_lengths, candidates_per_prompt

    @classmethod
    def of(cls, known: HostSizes | None, lengths: Tensor, per_prompt: Tensor) -> HostSizes | None:
        """A batch's own where they are on the CPU, for they are the truth; else those it came with, if they fit."""
        if lengths.device.type == per_prompt.device.type == "cpu":
            if known is None or known.candidate_lengths is not lengths or known.candidates_per_prompt is not per_prompt:
                return cls(lengths, per_prompt)
        elif known is not None and known._shapes() != (lengths.shape, per_prompt.shape):
            return None
        return known

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, HostSizes)
            and torch.equal(self.candidate_lengths, other.candidate_lengths)
            and torch.equal(self.candidates_per_prompt, other.candidates_per_prompt)
        )

    __hash__ = None  # type: ignore[assignment]

    def _shapes(self) -> tuple[torch.Size, torch.Size]:
        return self.candidate_lengths.shape, self.candidates_per_prompt.shape


@dataclass
class CandidateBatch:
    """What a model and the loss need for one step.

    Attributes:
        input_ids: int64 [B, T], prompt and response, padded on the right; one row for each candidate that was
            not dropped (one row in any case: a model must run).
        attention_mask: int64 [B, T], 1 on tokens.
        targets: int64 [N], the scored tokens, candidate after candidate.
        row_index: int64 [N], token t is predicted by `hidden.reshape(B * T, H)[row_index[t]]`.
        candidate_lengths: int64 [C], scored tokens of each candidate; 0 for a dropped one, which keeps its
            place.
        candidates_per_prompt: int64 [P].
        rewards: float32 [C] or None.
        sft_index: int64 [P], position of the SFT target within its prompt.
        num_inert: how many candidates were dropped because neither loss nor gradients depend on them.
        inert_for: the objective (its `encoded`) that does not depend on them; "" where none was dropped.
        reference_logps, advantages: float32 [C], or [N] one a token, or None. old_logps, token_weights: float32 [N] or
            None. See `RankingInputs`: where N == C, one number a token.
        chains: `chains_of` the objective whose chains the candidates are; "" where they are answers.
        segments: where prompts and candidates stand in rows that hold several of them (the layouts `packed` and
            `shared`, B = 1 there, inert candidates have none); None where each row is one candidate.
        position_ids, segment_ids, group_ids: int64 [B, T], `segments` by token, see `segments.TokenSegments`; None
            without.
        host_sizes: the two sizes on the CPU, taken from CPU tensors and kept by `to` and `as_dict`. With them a batch
            on a GPU goes in chunks of whole prompts, and nothing waits; None where the batch was made on a GPU. Who
            gives a batch on a GPU other sizes of the same shapes sets it to None.

    Raises:
        ValueError: shapes or dtypes that do not fit together (values are not read: that would synchronise).
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    row_index: Tensor
    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    rewards: Tensor | None
    sft_index: Tensor
    num_inert: int = 0
    inert_for: str = ""
    reference_logps: Tensor | None = None
    old_logps: Tensor | None = None
    advantages: Tensor | None = None
    token_weights: Tensor | None = None
    chains: str = ""
    segments: Segments | None = None
    position_ids: Tensor | None = None
    segment_ids: Tensor | None = None
    group_ids: Tensor | None = None
    host_sizes: HostSizes | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, tensor in self._tensors().items():
            dims = 2 if name in ("input_ids", "attention_mask", *TOKEN_SEGMENTS) else 1
            dtype = torch.float32 if name in ("rewards", *SIGNALS) else torch.int64
            if tensor.dim() != dims or tensor.dtype != dtype:
                got = f"{tensor.dtype} with shape {tuple(tensor.shape)}"
                raise ValueError(f"{name}: expected {dtype} with {dims} dimension(s), got {got}")
        for name, other in _SAME_SHAPE.items():
            tensor, like = getattr(self, name), getattr(self, other)
            if tensor is not None and tensor.shape != like.shape:
                shape = tuple(tensor.shape)
                raise ValueError(f"{name}: expected the shape {tuple(like.shape)} of {other}, got {shape}")
        for name in TOKEN_SEGMENTS:
            if (self.segments is None) != (getattr(self, name) is None):
                there = "some" if self.segments is None else "none"
                raise ValueError(f"{name}: expected beside segments, and only there, got {there}")
        for name, tensor in self.signals().items():
            allowed = [self.targets.shape, *([self.candidate_lengths.shape] if name in PER_CANDIDATE else [])]
            if tensor.shape not in allowed:
                shapes = " or ".join(str(tuple(shape)) for shape in allowed)
                raise ValueError(f"{name}: expected the shape {shapes}, got {tuple(tensor.shape)}")
        self.host_sizes = HostSizes.of(self.host_sizes, self.candidate_lengths, self.candidates_per_prompt)

    def signals(self) -> dict[str, Tensor]:
        """Those of `types.SIGNALS` that there are."""
        return {name: value for name in SIGNALS if (value := getattr(self, name)) is not None}

    def _tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, without those that are None: what a collator hands to a Trainer."""
        others = {name: getattr(self, name) for name in _NO_TENSORS}
        return {**self._tensors(), **{name: value for name, value in others.items() if value is not None}}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CandidateBatch:
        """The inverse of `as_dict`; other keys are ignored.

        Raises:
            ValueError: a field is missing.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        given = {
            "rewards": None,
            **_NO_TENSORS,
            **dict.fromkeys((*SIGNALS, *TOKEN_SEGMENTS)),
            **{name: fields[name] for name in names if name in fields},
        }
        for name in names:
            if name not in given:
                raise ValueError(f"{name}: expected in a batch, got the keys {', '.join(sorted(fields))}")
        return cls(**given)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CandidateBatch:
        """The same batch on `device`."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()
        }
        return dataclasses.replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of a causal language model's forward; with `segments` all that says which tokens see which.

        `models.forward` hands them to the model.
        """
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.segments is None:
            return found
        return {**found, **{name: getattr(self, name) for name in ("segments", *TOKEN_SEGMENTS)}}

    def loss_inputs(self) -> dict[str, Tensor | None]:
        """Keyword arguments of `linear_clha_loss`, beside hidden states and weight; and the signals that there are.

        The two sizes are on the CPU where the host has them.
        """
        sizes = self.host_sizes or self
        return {
            "targets": self.targets,
            "candidate_lengths": sizes.candidate_lengths,
            "candidates_per_prompt": sizes.candidates_per_prompt,
            "rewards": self.rewards,
            "sft_index": self.sft_index,
            "row_index": self.row_index,
            **self.signals(),
        }


_NO_TENSORS: dict[str, Any] = {"num_inert": 0, "inert_for": "", "chains": "", "segments": None, "host_sizes": None}

_SAME_SHAPE = {
    "attention_mask": "input_ids",
    **dict.fromkeys(TOKEN_SEGMENTS, "input_ids"),
    "row_index": "targets",
    "rewards": "candidate_lengths",
    "sft_index": "candidates_per_prompt",
}


def inert_mask(
    rewards: Tensor | None,
    candidates_per_prompt: Tensor,
    sft_index: Tensor | None = None,
    objective: Objective = PUBLISHED,
) -> Tensor:
    """Which candidates neither the loss nor its gradients depend on, whatever the model says.

    The objective's own rule. CLHA's: a candidate is inert when it is in no kept pair (or `rank_weight` is 0) and is not
    an open SFT target whose weight and factor are positive.

    Args:
        rewards: [C] or None. candidates_per_prompt: [P] int64. sft_index: [P] int64 or None (0).

    Returns:
        bool [C].

    Raises:
        ValueError: the counts do not sum to the number of rewards, or an sft_index is outside its prompt.
    """
    total = int(candidates_per_prompt.sum())
    if rewards is not None and rewards.numel() != total:
        got = f"rewards for {rewards.numel()}"
        raise ValueError(f"candidates_per_prompt: expected counts of {total} candidates in all, got {got}")
    if sft_index is not None:
        outside = ((sft_index < 0) | (sft_index >= candidates_per_prompt)).nonzero()
        if outside.numel():
            size, position = int(candidates_per_prompt[outside[0]]), int(sft_index[outside[0]])
            raise ValueError(f"sft_index: expected a position from 0 to {size - 1}, got {position}")
    device = candidates_per_prompt.device if rewards is None else rewards.device
    found, start = [torch.zeros(0, dtype=torch.bool, device=device)], 0
    first = 0
    # All pairs of a block of prompts exist at a time, not those of a whole data set.
    for sizes in pair_blocks(candidates_per_prompt.tolist(), int):
        span, part = slice(start, start + sum(sizes)), slice(first, first + len(sizes))
        start, first = span.stop, part.stop
        given, targets = (None if all_ is None else all_[cut] for all_, cut in ((rewards, span), (sft_index, part)))
        found.append(objective.inert(Layout.whole(torch.tensor(sizes), device), given, targets))
    return torch.cat(found)


def chains_of(objective: Objective) -> str:
    """What tells the chains of one objective from those of another, and from answers: its markers; "" for none."""
    return "" if objective.markers is None else json.dumps(objective.markers)


def check_chains(chains: str, objective: Objective) -> None:
    """Whether a batch's candidates, `CandidateBatch.chains` of them, are what the objective trains on.

    Raises:
        ValueError: answers for one that trains on chains, or the other way round; chains with other markers.
    """
    wanted = chains_of(objective)
    if chains != wanted:
        kinds = [f"chains with the markers {text}" if text else "answers" for text in (wanted, chains)]
        raise ValueError(
            f"batch: expected {kinds[0]} for the objective {objective.label!r}, got {kinds[1]}; give RankedCollator "
            "the objective that the model is trained with"
        )


def pack_candidates(
    features: Sequence[CandidateFeature],
    *,
    pad_token_id: int,
    objective: Objective = PUBLISHED,
    drop_inert: bool = True,
    pad_to_multiple_of: int | None = None,
    signals: Sequence[str] | None = None,
    layout: str = "padded",
) -> CandidateBatch:
    """A `CandidateBatch` of tokenised prompts, in order.

    Args:
        objective: decides which candidates are inert, which signals are read, and whether they are chains; give the
            loss's own.
        drop_inert: leave inert candidates out of `input_ids` (their `candidate_lengths` become 0). When all
            are inert, one row of one token remains.
        pad_to_multiple_of: T is rounded up to a multiple of it.
        signals: those of the features that the batch carries; None is those that the objective reads.
        layout: `padded`, a row a candidate; `packed`, one row of all candidates, each behind its prompt; `shared`, one
            row in which a prompt stands once, before all of its candidates; or `auto`: see `segments.counted_layout`.

    Raises:
        ValueError: no feature; an unknown layout; a mixture of prompts with and without rewards or a signal; a prompt
            or response without tokens; features that were tokenised for an objective of another kind (the message names
            the record).
    """
    if not features:
        raise ValueError("features: expected at least one prompt, got none")
    check_layout(layout, "auto")
    carried = signals_of(objective) if signals is None else signals
    check_features(features, carried)
    for feature in features:
        if (feature.get("completion_mask") is None) != (objective.markers is None):
            kinds = ("answers", "chains") if objective.markers is None else ("chains", "answers")
            raise ValueError(
                f"{feature['source']}: completion_mask: expected {kinds[0]} for the objective {objective.label!r}, got "
                f"{kinds[1]}; tokenise the records with a RankedCollator of that objective"
            )
    sizes = torch.tensor([len(f["completion_ids"]) for f in features])
    sft_index = torch.tensor([int(f["sft_index"]) for f in features])
    rewards = None
    if features[0]["rewards"] is not None:
        rewards = torch.tensor([r for f in features for r in f["rewards"] or ()], dtype=torch.float32)
    inert = inert_mask(rewards, sizes, sft_index, objective) if drop_inert else torch.zeros(int(sizes.sum())).bool()

    dropped = iter(inert.tolist())
    families = [
        [(f["prompt_ids"], *scored) for scored in zip(*_scored(f), strict=True) if not next(dropped)] for f in features
    ]
    families = [own for own in families if own] or [[(features[0]["prompt_ids"][:1], [], torch.arange(0))]]
    rows = [row for own in families for row in own]
    step = pad_to_multiple_of or 1
    if layout == "auto":
        layout = counted_layout((len(own[0][0]), [len(ids) for _, ids, _ in own]) for own in families)
    if layout == "padded":
        input_ids, attention_mask, index, targets = padded_rows(rows, pad_token_id, step)
        places: dict[str, Any] = {}
    else:
        families = [[row] for row in rows] if layout == "packed" else families
        segments, input_ids, index, targets = joined_rows(families, pad_token_id, step)
        by_token = segments.tokens()
        attention_mask = (by_token.group_ids >= 0).long()
        places = {"segments": segments, **by_token._asdict()}
    lengths = torch.tensor([size for f in features for size in scored_lengths(f)]).masked_fill(inert, 0)
    places |= {name: pack_signal(name, features, lengths) for name in carried if features[0].get(name) is not None}
    return CandidateBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        targets=targets,
        row_index=index,
        candidate_lengths=lengths,
        candidates_per_prompt=sizes,
        rewards=rewards,
        sft_index=sft_index,
        num_inert=int(inert.sum()),
        inert_for=objective.encoded if inert.any() else "",
        chains=chains_of(objective),
        **places,
    )


def _scored(feature: CandidateFeature) -> tuple[Sequence[Sequence[int]], list[Tensor]]:
    """A prompt's candidates, and the places of their scored tokens."""
    completions, masks = feature["completion_ids"], feature.get("completion_mask")
    if masks is None:
        return completions, [torch.arange(len(ids)) for ids in completions]
    return completions, [torch.tensor(list(mask)).nonzero().flatten() for mask in masks]


def scored_lengths(feature: CandidateFeature) -> list[int]:
    """How many tokens of each candidate are scored."""
    masks = feature.get("completion_mask")
    return [len(ids) for ids in feature["completion_ids"]] if masks is None else [sum(mask) for mask in masks]


def check_features(features: Sequence[CandidateFeature], signals: Sequence[str] = SIGNALS) -> None:
    """Whether these prompts can share a batch with these signals; ValueError, as `pack_candidates`, if they cannot."""
    first = features[0]
    for feature in features:
        source = feature["source"]
        size = len(feature["completion_ids"])
        if not len(feature["prompt_ids"]):
            raise ValueError(f"{source}: prompt_ids: expected at least one token, got none")
        if not size:
            raise ValueError(f"{source}: completion_ids: expected at least one response, got none")
        for number, ids in enumerate(feature["completion_ids"]):
            if not len(ids):
                raise ValueError(f"{source}: completion_ids[{number}]: expected at least one token, got none")
        masks = feature.get("completion_mask")
        if masks is not None:
            if list(map(len, masks)) != list(map(len, feature["completion_ids"])):
                raise ValueError(f"{source}: completion_mask: expected a number for each token of completion_ids")
            for number, mask in enumerate(masks):
                if not any(mask):
                    raise ValueError(f"{source}: completion_mask[{number}]: expected a scored token, got none")
        rewards = feature["rewards"]
        if (rewards is None) != (first["rewards"] is None):
            here, there = ("none", "has them") if rewards is None else ("some", "has none")
            raise ValueError(
                f"{source}: rewards: expected all records of a batch to have rewards or none to, "
                f"got {here} while {first['source']} {there}; give all of them rewards, or none"
            )
        if rewards is not None and len(rewards) != size:
            raise ValueError(f"{source}: rewards: expected {size} numbers, one a completion, got {len(rewards)}")
        check_signals(feature, scored_lengths(feature), first, signals)


def first_prompts(batch: CandidateBatch, count: int) -> CandidateBatch:
    """The batch without the prompts after the first `count`; the model's rows stay as they are."""
    candidates = int(batch.candidates_per_prompt[:count].sum())
    lengths = batch.candidate_lengths[:candidates]
    tokens = int(lengths.sum())
    # By the whole batch's shape: what is cut off may leave as many tokens as candidates.
    signals: dict[str, Any] = {
        name: value[:tokens]
        if value.shape == batch.targets.shape
        else unmistakable(name, value[:candidates], lengths, tokens)
        for name, value in batch.signals().items()
    }
    return dataclasses.replace(
        batch,
        targets=batch.targets[:tokens],
        row_index=batch.row_index[:tokens],
        candidate_lengths=lengths,
        candidates_per_prompt=batch.candidates_per_prompt[:count],
        rewards=None if batch.rewards is None else batch.rewards[:candidates],
        sft_index=batch.sft_index[:count],
        num_inert=int((lengths == 0).sum()) if batch.num_inert else 0,
        **signals,
    )
