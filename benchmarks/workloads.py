"""Workloads and the ways to compute their loss: what is timed, what is compared, what bounds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast import PUBLISHED, HeadOptions, linear_clha_loss, reference

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """A padded batch as a training step has it: `prompts` x `candidates` rows of `prompt_tokens` + response tokens."""

    name: str
    hidden_size: int
    vocabulary: int
    prompts: int = 4
    candidates: int = 4
    prompt_tokens: int = 192
    max_response: int = 128
    min_response: int = 64
    dtype: torch.dtype = torch.float32

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.prompts} prompts x {self.candidates} candidates, prompts {self.prompt_tokens}, responses "
            f"{self.min_response}-{self.max_response}, H {self.hidden_size}, V {self.vocabulary}, {dtype}"
        )


WORKLOADS = {
    w.name: w
    for w in (
        Workload("small-vocabulary", hidden_size=1024, vocabulary=32000),
        Workload("large-vocabulary", hidden_size=1024, vocabulary=128256),
    )
}


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
    hidden = torch.randn(shape, generator=generator).to(workload.dtype)
    weight = torch.randn(workload.vocabulary, workload.hidden_size, generator=generator) * 0.02
    return Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.to(workload.dtype).requires_grad_(),
        targets=torch.randint(0, workload.vocabulary, (int(lengths.sum()),), generator=generator),
        row_index=torch.cat(rows),
        candidate_lengths=lengths,
        candidates_per_prompt=torch.full((workload.prompts,), workload.candidates),
        rewards=torch.randn(count, generator=generator) * 4,
        workload=workload,
    )


def _from_logps(batch: Batch, logps: Tensor) -> Tensor:
    ranking = (batch.candidate_lengths, batch.candidates_per_prompt, batch.rewards, None, None, None)
    return reference.clha_loss(logps, batch.targets, *ranking, HeadOptions(), PUBLISHED)[0]


def eager(batch: Batch) -> Tensor:
    """Eager on scored tokens: logits, float32 log-softmax, gather, autograd."""
    loss, _ = linear_clha_loss(
        batch.hidden, batch.weight, batch.targets, row_index=batch.row_index, backend="reference", **batch.ranking
    )
    return loss


def published(batch: Batch) -> Tensor:
    """The published code's way: one forward a candidate rank, logits of every token, prompts and padding included."""
    w = batch.workload
    width = w.prompt_tokens + w.max_response
    rows = batch.hidden.view(w.prompts, w.candidates, width, -1)
    flat_targets = torch.zeros(batch.hidden.shape[0], dtype=torch.long)
    flat_targets[batch.row_index] = batch.targets
    flat_targets = flat_targets.view(w.prompts, w.candidates, width)
    logps = torch.stack(
        [
            F.linear(rows[:, i], batch.weight)
            .float()
            .log_softmax(-1)
            .gather(2, flat_targets[:, i].unsqueeze(2))
            .squeeze(2)
            for i in range(w.candidates)
        ],
        dim=1,
    )
    return _from_logps(batch, logps.flatten()[batch.row_index])


def clha_fast_torch(batch: Batch) -> Tensor:
    """clha-fast's torch backend."""
    loss, _ = linear_clha_loss(
        batch.hidden, batch.weight, batch.targets, row_index=batch.row_index, backend="torch", **batch.ranking
    )
    return loss


def torch_linear_cross_entropy(batch: Batch) -> Tensor:
    """torch's chunked linear cross-entropy per token, then the ranking loss on its log-probabilities."""
    nll = F.linear_cross_entropy(batch.hidden[batch.row_index], batch.weight, batch.targets, reduction="none")
    return _from_logps(batch, -nll)


METHODS: dict[str, Callable[[Batch], Tensor]] = {
    "eager": eager,
    "clha_fast_torch": clha_fast_torch,
    "published": published,
}
if hasattr(F, "linear_cross_entropy"):
    METHODS["torch_linear_cross_entropy"] = torch_linear_cross_entropy


def training_step(method: str, batch: Batch) -> Step:
    """Forward and backward of one method; gradients are left in the batch."""
    compute = METHODS[method]

    def step() -> Tensor:
        batch.clear()
        loss = compute(batch)
        loss.backward()
        return loss.detach()

    return step


def bare_gemms(batch: Batch, chunk: int = 512) -> Step:
    """The bound: the head's three matrix products on the scored rows over a bounded workspace, and nothing else."""
    rows = batch.hidden.detach()[batch.row_index]
    weight = batch.weight.detach()
    workspace = torch.empty(min(chunk, rows.shape[0]), weight.shape[0], dtype=rows.dtype)
    dhidden, dweight = torch.empty_like(rows), torch.empty_like(weight)

    def step() -> Tensor:
        for a in range(0, rows.shape[0], chunk):
            x = rows[a : a + chunk]
            z = workspace[: x.shape[0]]
            torch.mm(x, weight.t(), out=z)
            torch.mm(z, weight, out=dhidden[a : a + chunk])
            if a == 0:
                torch.mm(z.t(), x, out=dweight)
            else:
                dweight.addmm_(z.t(), x)
        return dweight

    return step


def shrink(workload: Workload, factor: int) -> Workload:
    """The same workload with hidden size and vocabulary divided by `factor`, to check results before timing."""
    return dataclasses.replace(
        workload,
        name=f"{workload.name}/{factor}",
        hidden_size=workload.hidden_size // factor,
        vocabulary=workload.vocabulary // factor,
    )


def check(method: str, workload: Workload) -> None:
    """Raises RuntimeError when a method's loss or gradients differ from eager's in float32 by over 1e-4 in norm."""
    small = shrink(workload, 8)
    want_batch, got_batch = make_batch(small), make_batch(small)
    want, got = training_step("eager", want_batch)(), training_step(method, got_batch)()
    pairs = [(want, got), *zip(want_batch.gradients(), got_batch.gradients(), strict=True)]
    for name, (a, b) in zip(("loss", "dhidden", "dweight"), pairs, strict=True):
        error = float((a - b).norm() / a.norm())
        if not error < 1e-4:
            raise RuntimeError(f"{method} on {workload.name}: {name} is off by {error:.2e}; no speed is reported")
