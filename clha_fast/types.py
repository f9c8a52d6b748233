"""What travels between rooms, from the public face to the backends: a head, what is known of candidates, a result.

The schemas of operators are made from the fields: a tensor more is one line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class HeadInputs(NamedTuple):
    """hidden [M, H], weight [V, H], bias [V] or None, targets [N] int64, row_index [N] int64 or None.

    temperature: [N] float32 (float64 for float64 hidden), the divisor of each token's logits in the place of
    `HeadOptions.temperature`, which is 1 then; None for one for all.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    row_index: Tensor | None
    temperature: Tensor | None = None


# What a pass over a token's logits can say beside its log-probability; `functional.token_logps` says what each is.
STATISTICS = ("entropy", "sum_sq_probs", "mean_logit", "is_top1")


class VocabShard(NamedTuple):
    """Which rows of the vocabulary this process holds: `start` on, of `size` in all, spread over `group`.

    `reduce_hidden` adds the gradients of the hidden states up over the group. False leaves each process its own part,
    for callers whose own machinery (a DTensor's placement) adds them up.
    """

    start: int
    size: int
    group: ProcessGroup | None = None
    reduce_hidden: bool = True


class RankingInputs(NamedTuple):
    """What is known of packed candidates before a model has run: whose tokens are whose, signals, and denominators.

    Everything floating is data: no gradient flows into it.

    Attributes:
        candidate_lengths: [C] integers, tokens of each candidate, sum N. 0 stands for a candidate that was not run.
        candidates_per_prompt: [P] integers >= 1, sum C; best rank first within a prompt.
        rewards: [C] floating, a reward model's scores; compared in float32, in which they are finite.
        sft_index: [P] integers, position of each prompt's SFT target; None is 0, the best.
        pair_counts: [D] kept pairs at rank distance 1..D of the whole step. prompt_count, candidate_count, token_count,
            target_token_count: [] prompts, candidates with a scored token (`PolicyOptions`: all of them), scored
            tokens, and those of the SFT targets. Denominators: None counts this batch's own. Given, they make the loss
            independent of how a step is split.
        reference_logps: [N] or [C] nats, of a frozen model. old_logps: [N] nats, of the model that sampled.
        advantages: [N] or [C]. token_weights: [N]. Where N == C, one number a token.
    """

    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    rewards: Tensor | None = None
    sft_index: Tensor | None = None
    pair_counts: Tensor | None = None
    prompt_count: Tensor | None = None
    candidate_count: Tensor | None = None
    token_count: Tensor | None = None
    target_token_count: Tensor | None = None
    reference_logps: Tensor | None = None
    old_logps: Tensor | None = None
    advantages: Tensor | None = None
    token_weights: Tensor | None = None


# What an objective reads only if it says so; the other fields mean the same to all of them.
SIGNALS = ("reference_logps", "old_logps", "advantages", "token_weights")
COUNTS = ("pair_counts", "prompt_count", "candidate_count", "token_count", "target_token_count")


class Needs(NamedTuple):
    """Which gradients are wanted; nothing is computed or allocated for the others."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """dhidden [M, H], dweight [V, H], dbias [V]; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Factors(NamedTuple):
    """A weight's gradient [V, H] that is still a product: unit * left[:, :V]^T . right.

    left [N, at least V] and right [N, H] in the inputs' 16 bits, unit [] in float32.
    """

    left: Tensor
    right: Tensor
    unit: Tensor


class SweptGradients(NamedTuple):
    """`Gradients` before the upstream gradient has been multiplied in."""

    hidden: Tensor | None
    weight: Tensor | Factors | None
    bias: Tensor | None


class HeadResult(NamedTuple):
    """logps [N], lse [N], and `route`: what a routed backward needs of the forward, of size 0 where that is nothing."""

    logps: Tensor
    lse: Tensor
    route: Tensor


class StatisticsResult(NamedTuple):
    """logps [N], lse [N] float64, and the values [N] of those of `STATISTICS` that were asked for, 0 where ignored."""

    logps: Tensor
    lse: Tensor
    values: dict[str, Tensor]


class EntropySlopes(NamedTuple):
    """dL/dentropy [N] of each token, and its entropy [N], of which the gradient is made."""

    grad: Tensor
    entropy: Tensor


class LossResult(NamedTuple):
    """loss [], scores [C] and slopes dL/dlogp [N] in float32 (float64 for float64 hidden); metrics float32, the common
    ones and the objective's own; lse [N] and `route` as above.
    """

    loss: Tensor
    metrics: Tensor
    scores: Tensor
    slopes: Tensor
    lse: Tensor
    route: Tensor
