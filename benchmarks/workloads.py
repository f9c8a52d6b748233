"""Workloads: the inputs of one training step's loss, with random or with peaked softmax."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass
class Batch:
    """Inputs of one step; hidden covers every row of the padded batch, prompts and padding included."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    row_index: Tensor
    candidate_lengths: Tensor
    candidates_per_prompt: Tensor
    rewards: Tensor
    workload: Workload

    @property
    def ranking(self) -> dict[str, Tensor]:
        names = ("candidate_lengths", "candidates_per_prompt", "rewards")
        return {name: getattr(self, name) for name in names}

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        assert self.hidden.grad is not None
        assert self.weight.grad is not None
        return self.hidden.grad, self.weight.grad

    def gradient_bytes(self) -> int:
        return (self.hidden.numel() + self.weight.numel()) * self.hidden.element_size()


def make_batch(workload: Workload, seed: int = 0) -> Batch:
    """The workload's inputs, the same for the same seed. Rewards have a standard deviation of 4."""
    generator = torch.Generator().manual_seed(seed)
    count = workload.prompts * workload.candidates
    width = workload.prompt_tokens + workload.max_response
    lengths = torch.randint(workload.min_response, workload.max_response + 1, (count,), generator=generator)
    starts = torch.arange(count) * width + workload.prompt_tokens - 1
    rows = [start + torch.arange(n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
    shape = (count * width, workload.hidden_size)
    hidden = torch.randn(shape, generator=generator).mul_(workload.spread)
    weight = torch.randn(workload.vocabulary, workload.hidden_size, generator=generator)
    weight *= 0.64 / math.sqrt(workload.hidden_size)
    if workload.zipf:
        hidden[:, 0] = _SHARED
        weight[:, 0] = torch.arange(1, workload.vocabulary + 1).log() * (-workload.zipf / _SHARED)
    row_index = torch.cat(rows)
    targets = torch.randint(0, workload.vocabulary, (row_index.numel(),), generator=generator)
    if workload.peaked:
        for part in torch.arange(targets.numel()).split(128):
            probabilities = (hidden[row_index[part]] @ weight.t()).softmax(-1)
            targets[part] = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    return Batch(
        hidden=hidden.to(workload.dtype).requires_grad_(),
        weight=weight.to(workload.dtype).requires_grad_(),
        targets=targets,
        row_index=row_index,
        candidate_lengths=lengths,
        candidates_per_prompt=torch.full((workload.prompts,), workload.candidates),
        rewards=torch.randn(count, generator=generator) * 4,
        workload=workload,
    )


def softmax_entropy(batch: Batch) -> float:
    """Mean entropy of the scored tokens' softmax, in nats."""
    total = 0.0
    for part in batch.row_index.split(128):
        logp = (batch.hidden.detach()[part].float() @ batch.weight.detach().float().t()).log_softmax(-1)
        total -= float((logp.exp() * logp).sum())
    return total / batch.row_index.numel()


def shrink(workload: Workload, factor: int) -> Workload:
    """The same workload with hidden size and vocabulary divided by `factor`, to check results before timing."""
    return dataclasses.replace(
        workload,
        name=f"{workload.name}/{factor}",
        hidden_size=workload.hidden_size // factor,
        vocabulary=workload.vocabulary // factor,
    )
