"""Inputs of one training step's loss, on a device: what the GPU benchmark and the CPU benchmark draw, and the batch.

A `Shape` (GPU) is drawn on its device in its dtype; a `Workload` (CPU) in float32 by a CPU generator, and moved.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
# The mean response of a padded batch; prompts are as long.
MEAN_RESPONSE = 384


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


@dataclass(frozen=True)
class Workload:
    """A padded batch as a training step has it: `prompts` x `candidates` rows of `prompt_tokens` + response tokens.

    Logits are 0.64 * spread * normal - zipf * log(v + 1): `spread` is the standard deviation of the hidden states;
    `zipf` lifts words by their place in the vocabulary, which tokenizers number roughly by frequency, through one
    coordinate that all hidden states share. Targets are drawn from a peaked softmax, else uniformly.
    """

    name: str
    hidden_size: int
    vocabulary: int
    prompts: int = 4
    candidates: int = 4
    prompt_tokens: int = 192
    max_response: int = 128
    min_response: int = 64
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    zipf: float = 0.0

    @property
    def peaked(self) -> bool:
        return self.spread != 1.0 or self.zipf != 0.0

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.prompts} prompts x {self.candidates} candidates, prompts {self.prompt_tokens}, responses "
            f"{self.min_response}-{self.max_response}, H {self.hidden_size}, V {self.vocabulary}, {dtype}"
        )


# The coordinate that all hidden states share, when they do.
_SHARED = 16.0
# Spread and zipf of the peaked ones put the mean softmax entropy at about 2 nats; what it is, is measured and reported.
WORKLOADS = {
    w.name: w
    for w in (
        Workload("small-vocabulary", hidden_size=1024, vocabulary=32000),
        Workload("large-vocabulary", hidden_size=1024, vocabulary=128256),
        Workload("peaked-unstructured", hidden_size=1024, vocabulary=128256, spread=10.6),
        Workload("peaked-zipf", hidden_size=1024, vocabulary=128256, spread=6.0, zipf=1.69),
    )
}


def find(name: str) -> Workload:
    """A workload by its name.

    "tokens-N" has about N scored tokens, 4 candidates of 96 a prompt; "candidates-n" 16 candidates of 96, n a prompt;
    both have V 32000 and no prompt tokens.
    """
    kind, _, number = name.rpartition("-")
    if kind in ("tokens", "candidates") and number.isdigit() and int(number) > 0:
        candidates = 4 if kind == "tokens" else int(number)
        prompts = max(1, round(int(number) / 384) if kind == "tokens" else 16 // candidates)
        settings = {"prompts": prompts, "candidates": candidates, "prompt_tokens": 1}
        return Workload(name, 1024, 32000, min_response=96, max_response=96, **settings)
    if name not in WORKLOADS:
        raise SystemExit(f"workload: expected one of {', '.join(WORKLOADS)}, tokens-N or candidates-n, got {name!r}")
    return WORKLOADS[name]


def shrink(workload: Workload, factor: int) -> Workload:
    """The same workload with hidden size and vocabulary divided by `factor`, to check results before timing."""
    return dataclasses.replace(
        workload,
        name=f"{workload.name}/{factor}",
        hidden_size=workload.hidden_size // factor,
        vocabulary=workload.vocabulary // factor,
    )


@dataclass
class Batch:
    """One step's tensors: scored rows packed, or the padded batch they are part of."""

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
    scratch: dict[str, Tensor] = field(default_factory=dict)  # buffers that methods of one batch share

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def entropy(self) -> float:
        """Of the softmax, in nats; over a sample of the scored rows."""
        return softmax_entropy(self.scored(self.hidden.detach()), self.weight)

    @property
    def gradient_bytes(self) -> int:
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.element_size()

    def scored(self, values: Tensor) -> Tensor:
        """The scored ones of values, one a row of hidden."""
        return values if self.row_index is None else values[self.row_index]

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad


def _split(total: int, parts: int, generator: torch.Generator) -> list[int]:
    """Lengths between 2/3 and 4/3 of the mean that sum to `total`."""
    shares = 2 / 3 + torch.rand(parts, generator=generator) * 2 / 3
    edges = (shares.cumsum(0) / shares.sum() * total).round().long().tolist()
    return [b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]


def softmax_entropy(hidden: Tensor, weight: Tensor, most: int | None = 256) -> float:
    """Mean entropy in nats of the softmax over the vocabulary, over at most `most` of the rows (None: all)."""
    rows = hidden.detach()
    if most is not None:
        rows = rows[:: max(1, hidden.shape[0] // most)][:most]
    found = []
    for part in rows.split(256):
        logp = F.linear(part, weight.detach()).float().log_softmax(-1)
        found.append(-(logp.exp() * logp).sum(-1))
    return float(torch.cat(found).mean())


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


def _draw_targets(hidden: Tensor, weight: Tensor, generator: torch.Generator, rows: int) -> Tensor:
    """A word from each row's own softmax, as trained models see them; `rows` at a time, which decides the draws."""
    parts = []
    for part in hidden.split(rows):
        p = F.linear(part, weight).float().softmax(-1)
        parts.append(torch.multinomial(p, 1, generator=generator).squeeze(1))
    return torch.cat(parts)


def _scored_rows(lengths: list[int], width: int, prompt_tokens: int) -> Tensor:
    """Rows of a padded batch that score its responses: a token is scored from the row before it."""
    starts = range(prompt_tokens - 1, len(lengths) * width, width)
    return torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths, strict=True)])


def workload_batch(workload: Workload, device: str = "cpu") -> Batch:
    """The workload's padded batch, always the same. Rewards have a standard deviation of 4."""
    generator = torch.Generator().manual_seed(0)
    count = workload.prompts * workload.candidates
    width = workload.prompt_tokens + workload.max_response
    lengths = torch.randint(workload.min_response, workload.max_response + 1, (count,), generator=generator)
    index = _scored_rows(lengths.tolist(), width, workload.prompt_tokens)
    shape = (count * width, workload.hidden_size)
    hidden = torch.randn(shape, generator=generator).mul_(workload.spread)
    weight = torch.randn(workload.vocabulary, workload.hidden_size, generator=generator)
    weight *= 0.64 / math.sqrt(workload.hidden_size)
    if workload.zipf:
        hidden[:, 0] = _SHARED
        weight[:, 0] = torch.arange(1, workload.vocabulary + 1).log() * (-workload.zipf / _SHARED)
    targets = torch.randint(0, workload.vocabulary, (index.numel(),), generator=generator)
    if workload.peaked:
        targets = _draw_targets(hidden[index], weight, generator, 128)
    return _assemble(
        hidden.to(device, workload.dtype),
        weight.to(device, workload.dtype),
        targets.to(device),
        index.to(device),
        lengths.tolist(),
        workload.candidates,
        torch.randn(count, generator=generator) * 4,
        width,
    )


def _assemble(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    lengths: list[int],
    candidates: int,
    rewards: Tensor,
    width: int,
    on_device: bool = True,
) -> Batch:
    labels = targets
    if row_index is not None:
        labels = torch.full((hidden.shape[0],), IGNORE, device=hidden.device)
        labels[row_index] = targets
    side = hidden.device if on_device else "cpu"
    sizes = [candidates] * (len(lengths) // candidates)
    return Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        row_index=row_index,
        labels=labels,
        lengths=lengths,
        sizes=sizes,
        candidate_lengths=torch.tensor(lengths, device=side),
        candidates_per_prompt=torch.tensor(sizes, device=side),
        rewards=rewards.to(side),
        width=width,
    )


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
    width = shape.mean_response + max(lengths)
    rows = len(lengths) * width if padded else shape.tokens
    here = torch.Generator(device).manual_seed(seed)
    options = {"generator": here, "device": device, "dtype": shape.dtype}
    hidden = torch.randn(rows, shape.width, **options)
    weight = torch.randn(shape.vocabulary, shape.width, **options).mul_(0.02)
    index = _scored_rows(lengths, width, shape.mean_response).to(device) if padded else None
    scored = hidden if index is None else hidden[index]
    if nats is None:
        targets = torch.randint(0, shape.vocabulary, (shape.tokens,), generator=here, device=device)
    else:
        _peak(scored, weight, nats)
        targets = _draw_targets(scored, weight, here, max(1, 2**27 // shape.vocabulary))
    rewards = torch.randn(len(lengths), generator=draw) * 4
    return _assemble(hidden, weight, targets, index, lengths, shape.candidates, rewards, width, on_device)


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
