"""Inputs of the GPU benchmark: shapes, batches with random or peaked softmax, and the padded batch they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# Mean and largest response of a padded batch; prompts are as long as a mean response.
MEAN_RESPONSE, MAX_RESPONSE = 384, 512


@dataclass(frozen=True)
class Shape:
    """N scored tokens, hidden size H, vocabulary V; `candidates` a prompt."""

    tokens: int
    width: int
    vocabulary: int
    candidates: int = 4
    mean_response: int = MEAN_RESPONSE
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.tokens} x {self.width} x {self.vocabulary}"


SHAPES = (
    Shape(8192, 4096, 128256),
    Shape(8192, 2048, 151936),
    Shape(16384, 2304, 256000),
    Shape(4096, 8192, 128256),
    Shape(65536, 4096, 128256),
)
TINY = (Shape(48, 32, 200, mean_response=4, dtype=torch.float32),)


@dataclass
class Batch:
    """One step's tensors: scored rows packed, or the padded batch they are part of."""

    shape: Shape
    hidden: Tensor  # [N, H] scored rows, or [rows, H] padded
    weight: Tensor
    targets: Tensor  # [N]
    row_index: Tensor | None  # [N] into hidden where it is padded
    labels: Tensor  # one a row of hidden, IGNORE where nothing is scored
    lengths: list[int]
    sizes: list[int]
    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    rewards: Tensor
    width: int  # tokens of a padded row
    entropy: float
    scratch: dict[str, Tensor] = field(default_factory=dict)  # buffers that methods of one batch share

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(dhidden of the scored rows, dweight)."""
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        dhidden = self.hidden.grad if self.row_index is None else self.hidden.grad[self.row_index]
        return dhidden, self.weight.grad


def _split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Lengths between 2/3 and 4/3 of the mean that sum to `total`."""
    shares = 2 / 3 + torch.rand(parts, generator=generator) * 2 / 3
    edges = (shares.cumsum(0) / shares.sum() * total).round().long().tolist()
    return [b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]


def softmax_entropy(hidden: Tensor, weight: Tensor) -> float:
    """Mean entropy in nats of the softmax over the vocabulary, over at most 256 of the rows."""
    rows = hidden.detach()[:: max(1, hidden.shape[0] // 256)][:256]
    logp = F.linear(rows, weight.detach()).float().log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def _peak(hidden: Tensor, weight: Tensor, nats: float) -> None:
    """Scales weight in place until the softmax's mean entropy is about `nats`."""
    low, high = 0.01, 100.0
    original = weight.clone()
    for _ in range(24):
        factor = math.sqrt(low * high)
        torch.mul(original, factor, out=weight)
        if softmax_entropy(hidden, weight) > nats:
            low = factor
        else:
            high = factor


def _draw_targets(hidden: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """A word from each row's own softmax, as trained models see them."""
    parts = []
    step = max(1, 2**27 // weight.shape[0])
    for start in range(0, hidden.shape[0], step):
        p = F.linear(hidden[start : start + step], weight).float().softmax(-1)
        parts.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
    return torch.cat(parts)


def make_batch(
    shape: Shape, device: str, *, padded: bool = False, nats: float | None = None, seed: int = 0, on_device: bool = True
) -> Batch:
    """The inputs of one step, the same for the same seed.

    nats: wanted entropy of the softmax, targets drawn from it; None leaves random weights with a standard deviation of
    0.02 and random targets. on_device: whether the ranking tensors live beside hidden (else on the CPU).
    """
    draw = torch.Generator().manual_seed(seed)
    prompts = max(1, round(shape.tokens / shape.mean_response / shape.candidates))
    lengths = _split(shape.tokens, prompts * shape.candidates, draw)
    prompt_tokens, longest = shape.mean_response, max(lengths)
    width = prompt_tokens + longest
    rows = len(lengths) * width if padded else shape.tokens
    here = torch.Generator(device).manual_seed(seed)
    options = {"generator": here, "device": device, "dtype": shape.dtype}
    hidden = torch.randn(rows, shape.width, **options)
    weight = torch.randn(shape.vocabulary, shape.width, **options).mul_(0.02)
    index = None
    if padded:
        starts = torch.arange(len(lengths)) * width + prompt_tokens - 1
        spans = [int(start) + torch.arange(n) for start, n in zip(starts, lengths, strict=True)]
        index = torch.cat(spans).to(device)
    scored = hidden if index is None else hidden[index]
    if nats is None:
        targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=here, device=device)
    else:
        _peak(scored, weight, nats)
        targets = _draw_targets(scored, weight, here)
    labels = targets
    if index is not None:
        labels = torch.full((rows,), IGNORE, device=device)
        labels[index] = targets
    side = device if on_device else "cpu"
    return Batch(
        shape=shape,
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        row_index=index,
        labels=labels,
        lengths=lengths,
        sizes=[shape.candidates] * prompts,
        candidate_lengths=torch.tensor(lengths, device=side),
        candidates_per_prompt=torch.full((prompts,), shape.candidates, device=side),
        rewards=(torch.randn(len(lengths), generator=draw) * 4).to(side),
        width=width,
        entropy=softmax_entropy(scored, weight),
    )


class PairLoss:
    """The published CLHA loss of token log-probabilities, everything but the scores prepared beforehand.

    What a careful user writes around a peer's log-probabilities: a few kernels, no synchronisation.
    """

    def __init__(self, batch: Batch, margin: float = 3.0, reward_margin: float = 3.0, sft_weight: float = 0.05) -> None:
        device = batch.hidden.device
        rewards = batch.rewards.tolist()
        pairs: list[tuple[int, int]] = []
        first = 0
        heads, factors = [], []
        for size in batch.sizes:
            members = range(first, first + size)
            pairs += [
                (i, j) for i in members for j in members if i < j and abs(rewards[i] - rewards[j]) > reward_margin
            ]
            if rewards[first] > 0:
                heads.append(first)
                factors.append(sft_weight * (size - 1) ** 2 / len(batch.sizes))
            first += size
        counts: dict[int, int] = {}
        for i, j in pairs:
            counts[j - i] = counts.get(j - i, 0) + 1
        self.i, self.j = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).to(device).unbind(1)
        self.margins = torch.tensor([margin * (j - i) for i, j in pairs], device=device)
        self.weights = torch.tensor([1 / counts[j - i] for i, j in pairs], device=device)
        self.heads = torch.tensor(heads, dtype=torch.long, device=device)
        self.factors = torch.tensor(factors, device=device)
        self.lengths = torch.tensor(batch.lengths, device=device, dtype=torch.float32)
        self.owner = torch.repeat_interleave(
            torch.arange(len(batch.lengths), device=device), torch.tensor(batch.lengths, device=device)
        )

    def __call__(self, logps: Tensor) -> Tensor:
        sums = torch.zeros_like(self.lengths).index_add(0, self.owner, logps.float())
        scores = sums / self.lengths
        hinge = torch.relu(scores[self.j] - scores[self.i] + self.margins) * self.weights
        return hinge.sum() - (sums[self.heads] * self.factors).sum()
