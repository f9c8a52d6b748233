"""The CLHA kernels' launches, for all prompts at once or for chunks of whole prompts; nothing is read back."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clha_fast.backends.triton.head import Head
from clha_fast.objectives import CLHAOptions
from clha_fast.objectives.metrics import METRIC_NAMES
from clha_fast.objectives.ranked import Statistics
from clha_fast.types import RankingInputs
from csrc_triton import clha as ranking

_NOISE = {"none": ranking.NOISE_NONE, "abs": ranking.NOISE_ABS, "signed": ranking.NOISE_SIGNED}
_REDUCE = {
    "sum": ranking.REDUCE_SUM,
    "distance_mean": ranking.REDUCE_DISTANCE_MEAN,
    "pair_mean": ranking.REDUCE_PAIR_MEAN,
}


class CLHARanking:
    """`objectives.ranked.Ranked` for CLHA: counts, scores, slopes and metrics of a batch, on the device.

    `count` (or `combine.combine`, whose launch does the same) comes first, then `rank` for the whole batch or for one
    chunk after the other, then `finish`: a launch each.
    """

    def __init__(self, options: CLHAOptions, inputs: RankingInputs, head: Head) -> None:
        self.head, self.options = head, options
        self.device = head.targets.device
        self.num_candidates = inputs.candidate_lengths.shape[0]
        self.num_prompts = inputs.candidates_per_prompt.shape[0]
        self.token_ends = self._here(inputs.candidate_lengths, torch.int64).cumsum(0)
        self.prompt_ends = self._here(inputs.candidates_per_prompt, torch.int64).cumsum(0)
        rewards, sft_index, prompt_count = inputs.rewards, inputs.sft_index, inputs.prompt_count
        self.rewards = None if rewards is None else self._here(rewards, torch.float32)
        self.sft_index = None if sft_index is None else self._here(sft_index, torch.int64)
        self.prompt_count = None if prompt_count is None else self._here(prompt_count, torch.float32)
        self.pair_counts = self._pair_counts(inputs.pair_counts)
        self.lengths = self._empty(self.num_candidates, torch.int32)
        self.scores, self.coefficients = (self._empty(self.num_candidates, torch.float32) for _ in range(2))
        self.sums = self._empty(self.num_candidates, torch.float64)
        self._seen = 0
        self.partials = torch.empty(self.num_prompts, ranking.METRICS.value, dtype=torch.float64, device=self.device)
        self.flags: dict[str, Any] = {
            "HAS_REWARDS": rewards is not None,
            # Without rewards no pair is noise.
            "NOISE": _NOISE["none" if rewards is None else options.noise_rule],
            "REDUCE": _REDUCE[options.reduction],
        }
        self.count_flags = self.flags | {"COUNT_PAIRS": self.pair_counts is not None and inputs.pair_counts is None}

    def _here(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, dtype, non_blocking=True).contiguous()

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _pair_counts(self, given: Tensor | None) -> Tensor | None:
        """The kept pairs that the reduction divides by: given, or zeros to count in."""
        reduction = self.options.reduction
        if reduction == "sum":
            return None
        if given is None:
            distances = max(1, self.num_candidates - 1) if reduction == "distance_mean" else 1
            return torch.zeros(distances, dtype=torch.int32, device=self.device)
        counts = self._here(given, torch.float32)
        return counts.sum().reshape(1) if reduction == "pair_mean" else counts

    def count(self) -> None:
        """Fills lengths and pair counts, which every chunk's weights need beforehand."""
        ranking.count_kernel[(self.num_prompts,)](
            self.head.targets,
            self.token_ends,
            self.prompt_ends,
            self.rewards,
            self.lengths,
            self.pair_counts,
            self.head.targets.shape[0],
            self.num_candidates,
            self.head.ignore_index,
            float(self.options.reward_margin),
            **self.count_flags,
            **self.head.config("count"),
        )

    def rank(self, first: int, last: int, logps: Tensor, statistics: Statistics = None) -> Tensor:
        """dL/dlogp of the tokens of prompts [first, last); fills their candidates' scores and coefficients."""
        start = 0 if first == 0 else self._seen
        stop = self._seen = start + logps.shape[0]
        if logps.storage_offset():
            logps = logps.clone()  # a view in the middle of a tensor would make Triton compile for its alignment
        options = self.options
        ranking.prompts_kernel[(last - first,)](
            logps,
            self.lengths,
            self.token_ends,
            self.prompt_ends,
            self.rewards,
            self.sft_index,
            self.pair_counts,
            self.prompt_count,
            self.sums,
            self.scores,
            self.coefficients,
            self.partials,
            stop,
            self.num_candidates,
            self.num_prompts,
            0 if self.pair_counts is None else self.pair_counts.shape[0],
            first,
            start,
            float(options.margin),
            float(options.reward_margin),
            float(options.rank_weight),
            float(options.sft_weight),
            float(options.reward_floor),
            HAS_SFT_INDEX=self.sft_index is not None,
            HAS_PROMPT_COUNT=self.prompt_count is not None,
            SFT_MEAN=options.sft == "mean",
            SFT_SQUARED=options.sft_factor == "squared",
            **self.flags,
            **self.head.config("prompts"),
        )
        return self.coefficients[self.owner[start:stop]]

    @cached_property
    def owner(self) -> Tensor:
        """Each token's candidate [N]."""
        tokens = torch.arange(self.head.targets.shape[0], device=self.device)
        # Lengths that do not add up must not become an access out of bounds.
        return torch.searchsorted(self.token_ends, tokens, right=True).clamp_(max=max(0, self.num_candidates - 1))

    def finish(self, logps: Tensor, statistics: Statistics = None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, metrics, scores), once every prompt has been ranked; the metrics of a routed backward stay 0."""
        loss = torch.empty((), dtype=torch.float32, device=self.device)
        metrics = torch.zeros(len(METRIC_NAMES), dtype=torch.float32, device=self.device)
        ranking.finish_kernel[(1,)](self.partials, loss, metrics, self.num_prompts, **self.head.config("finish"))
        return loss, metrics, self.scores
