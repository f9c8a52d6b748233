"""The ways to compute a workload's loss: what is timed, what is compared, and the bound.

Peers are optional: one that is not installed is said to be, one that computes something else is refused.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Batch, Workload, make_batch, shrink
from clha_fast import PUBLISHED, CLHAMetrics, HeadOptions, linear_clha_loss, reference

Step = Callable[[], Tensor]
DROPPED_MASS = 1e-2


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


Method = Callable[[Batch], Tensor]


def _routed_loss(batch: Batch, dropped_mass: float | None) -> tuple[Tensor, CLHAMetrics]:
    head = HeadOptions(max_dropped_mass=dropped_mass)
    return linear_clha_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        row_index=batch.row_index,
        head=head,
        backend="torch",
        **batch.ranking,
    )


def routed(dropped_mass: float) -> Method:
    """clha-fast's torch backend with routed gradients."""

    def compute(batch: Batch) -> Tensor:
        return _routed_loss(batch, dropped_mass)[0]

    return compute


def routed_metrics(batch: Batch, dropped_mass: float = DROPPED_MASS) -> dict[str, float]:
    """Kept share, dropped mass and the gradients' errors (norm over norm) against the exact path's."""
    batch.clear()
    _routed_loss(batch, None)[0].backward()
    exact = batch.gradients()
    batch.clear()
    loss, metrics = _routed_loss(batch, dropped_mass)
    loss.backward()
    hidden, weight = (
        float((got - want).norm() / want.norm()) for got, want in zip(batch.gradients(), exact, strict=True)
    )
    return {
        "max_dropped_mass": dropped_mass,
        "kept_block_share": float(metrics.kept_block_share),
        "dropped_mass": float(metrics.dropped_mass),
        "dhidden_error": hidden,
        "dweight_error": weight,
    }


@cache
def _compiled_logps() -> Callable[..., Tensor]:
    return torch.compile(reference.token_logps, dynamic=False)


def eager_compiled(batch: Batch) -> Tensor:
    """Eager's token log-probabilities under torch.compile, then the ranking loss."""
    return _from_logps(batch, _compiled_logps()(batch.hidden, batch.weight, None, batch.targets, batch.row_index))


def torch_linear_cross_entropy(batch: Batch) -> Tensor:
    """torch's linear cross-entropy per token, reference path, then the ranking loss on its log-probabilities."""
    nll = F.linear_cross_entropy(batch.hidden[batch.row_index], batch.weight, batch.targets, reduction="none")
    return _from_logps(batch, -nll)


def torch_linear_cross_entropy_chunked(batch: Batch) -> Tensor:
    """The same with `options=`: torch's chunked path."""
    options = torch.nn.LinearCrossEntropyOptions()
    rows = batch.hidden[batch.row_index]
    nll = F.linear_cross_entropy(rows, batch.weight, batch.targets, reduction="none", options=options)
    return _from_logps(batch, -nll)


def trl_chunked(batch: Batch) -> Tensor:
    """TRL's chunked log-probabilities with its own chunk of words, then the ranking loss."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = batch.hidden[batch.row_index]
    logps = ChunkedLogProbFunction.apply(rows, batch.weight, None, batch.targets, 1.0, 8192, None, 1.0, ())[0]
    return _from_logps(batch, logps)


def cce_torch_compile(batch: Batch) -> Tensor:
    """Apple's CCE, its torch_compile implementation (the kernels need a GPU), then the ranking loss."""
    from cut_cross_entropy import linear_cross_entropy

    rows = batch.hidden[batch.row_index]
    nll = linear_cross_entropy(rows, batch.weight, batch.targets, reduction="none", impl="torch_compile")
    return _from_logps(batch, -nll)


METHODS: dict[str, Method] = {
    "eager": eager,
    "clha_fast_torch": clha_fast_torch,
    "clha_fast_routed": routed(DROPPED_MASS),
    "published": published,
    "eager_compiled": eager_compiled,
    "torch_linear_cross_entropy": torch_linear_cross_entropy,
    "torch_linear_cross_entropy_chunked": torch_linear_cross_entropy_chunked,
    "trl_chunked": trl_chunked,
    "cce_torch_compile": cce_torch_compile,
}
# Their first call compiles, which no later one does.
COMPILED = ("eager_compiled", "cce_torch_compile")
PACKAGES = {"trl_chunked": ("trl",), "cce_torch_compile": ("cut_cross_entropy", "triton")}


def why_not(method: str) -> str | None:
    """Why a method cannot run here, None when it can."""
    for package in PACKAGES.get(method, ()):
        if importlib.util.find_spec(package) is None:
            return f"not installed: {package}"
    if method in COMPILED and shutil.which("c++") is None and shutil.which("g++") is None:
        return "not installed: a C++ compiler"
    if method.startswith("torch_linear") and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    return None


def training_step(method: str | Method, batch: Batch) -> Step:
    """Forward and backward of one method; gradients are left in the batch."""
    compute = METHODS[method] if isinstance(method, str) else method

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


def check(method: str, workload: Workload) -> None:
    """Raises RuntimeError when loss or gradients differ from eager's in float32 by over 1e-4 in norm.

    Routed gradients may differ by `DROPPED_MASS` in norm; with nothing dropped they must pass as the others do.
    """
    small = shrink(workload, 8)
    want_batch = make_batch(small)
    want = training_step("eager", want_batch)()
    runs = [(METHODS[method], 1e-4)]
    if method == "clha_fast_routed":
        runs = [(METHODS[method], DROPPED_MASS), (routed(0.0), 1e-4)]
    for compute, tolerance in runs:
        got_batch = make_batch(small)
        got = compute(got_batch)
        got.backward()
        pairs = [(want, got.detach()), *zip(want_batch.gradients(), got_batch.gradients(), strict=True)]
        for name, (a, b) in zip(("loss", "dhidden", "dweight"), pairs, strict=True):
            error = float((a - b).norm() / a.norm())
            if not error < (1e-4 if name == "loss" else tolerance):
                raise RuntimeError(f"{method} on {workload.name}: {name} is off by {error:.2e}; no speed is reported")
