"""The ranking kernels on chunks of whole prompts: counts once, each chunk's scores and slopes, the loss at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clha_fast.inputs import LossResult, RankingInputs
from clha_fast.metrics import METRIC_NAMES
from clha_fast.options import CLHAOptions
from clha_fast.sweep import Chunk
from clha_fast.triton_head import Head
from csrc_triton import ranking, softmax

_NOISE = {"none": ranking.NOISE_NONE, "abs": ranking.NOISE_ABS, "signed": ranking.NOISE_SIGNED}
_REDUCE = {
    "sum": ranking.REDUCE_SUM,
    "distance_mean": ranking.REDUCE_DISTANCE_MEAN,
    "pair_mean": ranking.REDUCE_PAIR_MEAN,
}


class ChunkRanking:
    """Scores, coefficients and metrics of a batch, filled chunk by chunk; nothing is read back from the device.

    Launches: one for the counts, a copy of the sizes and rewards, three small ones a chunk, one at the end.
    """

    def __init__(self, inputs: RankingInputs, options: CLHAOptions, head: Head) -> None:
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
        # The token's candidate; lengths that do not add up must not become an access out of bounds.
        tokens = torch.arange(head.targets.shape[0], device=self.device)
        self.owner = torch.searchsorted(self.token_ends, tokens, right=True).clamp_(max=max(0, self.num_candidates - 1))
        self.lengths = self._empty(self.num_candidates, torch.int32)
        self.scores, self.coefficients = (self._empty(self.num_candidates, torch.float32) for _ in range(2))
        self.sums = self._empty(self.num_candidates, torch.float64)
        self.partials = torch.empty(self.num_prompts, ranking.METRICS.value, dtype=torch.float64, device=self.device)
        self.flags: dict[str, Any] = {
            "HAS_REWARDS": rewards is not None,
            "NOISE": _NOISE["none" if rewards is None else options.noise_rule],
            "REDUCE": _REDUCE[options.reduction],
        }
        self.pair_counts = self._count(inputs.pair_counts)

    def _here(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(self.device, dtype, non_blocking=True).contiguous()

    def _empty(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.device)

    def _count(self, given: Tensor | None) -> Tensor | None:
        """Fills `lengths` and returns the kept pairs that the reduction divides by."""
        counts, options = None, self.options
        if options.reduction != "sum":
            if given is None:
                distances = max(1, self.num_candidates - 1) if options.reduction == "distance_mean" else 1
                counts = torch.zeros(distances, dtype=torch.int32, device=self.device)
            else:
                counts = self._here(given, torch.float32)
                counts = counts.sum().reshape(1) if options.reduction == "pair_mean" else counts
        softmax.count_kernel[(self.num_prompts,)](
            self.head.targets,
            self.token_ends,
            self.prompt_ends,
            self.rewards,
            self.lengths,
            counts,
            self.head.targets.shape[0],
            self.num_candidates,
            self.head.ignore_index,
            float(options.reward_margin),
            COUNT_PAIRS=counts is not None and given is None,
            **self.flags,
            **self.head.config("prompts"),
        )
        return counts

    def rank(self, chunk: Chunk, logps: Tensor) -> None:
        """Takes the log-probabilities [stop - start] of a chunk and fills its candidates' scores and slopes."""
        candidates = slice(chunk.first_candidate, chunk.last_candidate)
        prompts = slice(chunk.first_prompt, chunk.last_prompt)
        options = self.options
        softmax.chunk_prompts_kernel[(chunk.last_prompt - chunk.first_prompt,)](
            logps,
            self.lengths,
            self.token_ends[candidates] - chunk.start,
            self.prompt_ends[prompts] - chunk.first_candidate,
            self.rewards,
            self.sft_index,
            self.pair_counts,
            self.prompt_count,
            self.sums,
            self.scores,
            self.coefficients,
            self.partials,
            logps.shape[0],
            chunk.last_candidate - chunk.first_candidate,
            self.num_prompts,
            0 if self.pair_counts is None else self.pair_counts.shape[0],
            chunk.first_prompt,
            chunk.first_candidate,
            float(options.margin),
            float(options.reward_margin),
            float(options.rank_weight),
            float(options.sft_weight),
            float(options.reward_floor),
            HAS_SFT_INDEX=self.sft_index is not None,
            HAS_PROMPT_COUNT=self.prompt_count is not None,
            SFT_MEAN=options.sft == "mean",
            SFT_SQUARED=options.sft_factor == "squared",
            METRICS=ranking.METRICS.value,
            **self.flags,
            **self.head.config("prompts"),
        )

    def token_coefficients(self, start: int, stop: int) -> Tensor:
        """dL/dlogp of tokens [start, stop), whose prompts have been ranked."""
        return self.coefficients[self.owner[start:stop]]

    def finish(self, lse: Tensor) -> LossResult:
        """The loss and what goes with it, once every chunk has been ranked."""
        loss = torch.empty((), dtype=torch.float32, device=self.device)
        # The kernel fills the ranking's own; those of a routed backward stay 0.
        metrics = torch.zeros(len(METRIC_NAMES), dtype=torch.float32, device=self.device)
        ranking.finish_kernel[(1,)](self.partials, loss, metrics, self.num_prompts, **self.head.config("finish"))
        return LossResult(loss, metrics, self.scores, self.coefficients, lse, loss.new_empty(0))
