"""The ways to compute the loss, on the device of a batch: this library's paths, the bound, and the peers.

A method is built for one batch and returns the step that is timed: forward and backward, gradients left in the batch
(or the forward alone where it says so). Peers are imported when built; one that is absent raises ImportError.
`GPU_METHODS` and `CPU_METHODS` name what each benchmark times, each by the names in its results files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import IGNORE, Batch, PairLoss
from benchmarks.measure import Step
from clha_fast import HeadOptions, linear_clha_loss

Logps = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_VOCABULARY_CHUNK = 32768  # trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
DROPPED = 1e-2


@dataclass(frozen=True)
class Method:
    """How a method is built, what it computes, and which modes ("scored", "padded", "pairs") it is timed in."""

    build: Callable[[Batch], Step]
    computes: str
    own: bool = False
    modes: tuple[str, ...] = ("scored", "padded")
    backward: bool = True
    # Cost model's name in benchmarks.roofline, None for a peer whose bytes are not modelled; GEMMs it needs.
    model: str | None = None
    gemms: float = 3.0
    compiles: bool = False  # torch.compile: tens of seconds for the first call
    packages: tuple[str, ...] = ()  # beside torch


def _training(batch: Batch, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        batch.clear()
        value = loss()
        value.backward()
        return value.detach()

    return step


def clha_arguments(batch: Batch, backend: str, head: HeadOptions | None = None) -> dict[str, Any]:
    """What `linear_clha_loss` takes of a batch."""
    return {
        "hidden": batch.hidden,
        "weight": batch.weight,
        "targets": batch.targets,
        "candidate_lengths": batch.candidate_lengths,
        "candidates_per_prompt": batch.candidates_per_prompt,
        "rewards": batch.rewards,
        "row_index": batch.row_index,
        "head": head or HeadOptions(),
        "backend": backend,
    }


def clha(batch: Batch, backend: str, head: HeadOptions | None = None, backward: bool = True) -> Step:
    """The library's loss through its public face."""
    arguments = clha_arguments(batch, backend, head)
    if backward:
        return _training(batch, lambda: linear_clha_loss(**arguments)[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return linear_clha_loss(**arguments)[0]

    return forward


def _on_host(batch: Batch) -> Batch:
    """The sizes of candidates and prompts on the CPU, where the sweeping paths read them for free."""
    return dataclasses.replace(
        batch,
        candidate_lengths=batch.candidate_lengths.cpu(),
        candidates_per_prompt=batch.candidates_per_prompt.cpu(),
    )


def routed(batch: Batch, backend: str, dropped_mass: float = DROPPED) -> Step:
    """The library's loss with routed gradients."""
    return clha(batch, backend, HeadOptions(max_dropped_mass=dropped_mass))


def bare_gemms(batch: Batch, backward: bool = True, chunk: int | None = None) -> Step:
    """The bound: the head's bare matrix products on the scored rows at the library's speed, and nothing else.

    chunk: rows whose logits are held at a time, None for all.
    """
    x, weight = batch.scored(batch.hidden.detach()), batch.weight.detach()
    chunk = min(chunk or x.shape[0], x.shape[0])
    if "logits" not in batch.scratch:
        batch.scratch["logits"] = x.new_empty(chunk, weight.shape[0])
    logits = batch.scratch["logits"]
    dhidden, dweight = torch.empty_like(x), torch.empty_like(weight)

    def step() -> Tensor:
        for start in range(0, x.shape[0], chunk):
            rows = x[start : start + chunk]
            z = logits[: rows.shape[0]]
            torch.mm(rows, weight.t(), out=z)
            if not backward:
                continue
            torch.mm(z, weight, out=dhidden[start : start + chunk])
            if start == 0:
                torch.mm(z.t(), rows, out=dweight)
            else:
                dweight.addmm_(z.t(), rows)
        return dweight

    return step


def _eager_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As Hugging Face models and trainers do: logits, float32 copy, log-softmax, gather."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _ranked(batch: Batch, logps_of: Logps, *, scored: bool = False, ignore: bool = False) -> Step:
    """The CLHA loss of log-probabilities that a function of (rows, weight, words) gives.

    scored: it gets the scored rows alone; else every row of hidden, padding's are computed too, and thrown away.
    ignore: it knows `IGNORE`; else rows that score nothing get word 0.
    """
    pairs = PairLoss(batch)
    labels = batch.labels if ignore else batch.labels.clamp(min=0)

    def loss() -> Tensor:
        if scored:
            return pairs(logps_of(batch.scored(batch.hidden), batch.weight, batch.targets))
        return pairs(batch.scored(logps_of(batch.hidden, batch.weight, labels)))

    return _training(batch, loss)


def _eager(batch: Batch) -> Step:
    return _ranked(batch, _eager_logps)


def _compiled(batch: Batch, scored: bool = False) -> Step:
    return _ranked(batch, torch.compile(_eager_logps, dynamic=False), scored=scored)


def _published(batch: Batch) -> Step:
    """The published training step's head: one forward a candidate rank, logits of every token of the padded batch."""
    pairs = PairLoss(batch)
    prompts, n, width = len(batch.sizes), batch.sizes[0], batch.width
    labels = batch.labels.clamp(min=0).view(prompts, n, width)

    def loss() -> Tensor:
        rows = batch.hidden.view(prompts, n, width, -1)
        logps = [_eager_logps(rows[:, i], batch.weight, labels[:, i]) for i in range(n)]
        return pairs(batch.scored(torch.stack(logps, dim=1).flatten()))

    return _training(batch, loss)


def _linear_cross_entropy(batch: Batch) -> Step:
    """torch's chunked operator; mean token loss, for per-token losses cost it a fourth GEMM."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return _training(
        batch,
        lambda: F.linear_cross_entropy(
            batch.hidden, batch.weight, batch.labels, ignore_index=IGNORE, options=options, reduction="mean"
        ),
    )


def _linear_cross_entropy_by_token(batch: Batch, chunked: bool) -> Step:
    """torch's operator of the scored rows: its reference path, or with `options=` its chunked one."""
    settings: dict[str, Any] = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return _ranked(batch, lambda x, w, y: -F.linear_cross_entropy(x, w, y, reduction="none", **settings), scored=True)


def _trl(batch: Batch, chunk: int) -> Step:
    """TRL's trainers: scored rows selected, tiles of `chunk` words, log-probabilities, recomputed in the backward."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return _ranked(
        batch, lambda x, w, y: ChunkedLogProbFunction.apply(x, w, None, y, 1.0, chunk, None, 1.0, ())[0], scored=True
    )


def _liger_cross_entropy(batch: Batch) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    compute = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return _training(batch, lambda: compute(batch.weight, batch.hidden, batch.labels))


def _cce(batch: Batch, scored: bool = False, **settings: Any) -> Step:
    """Apple's CCE; `impl` among the settings where there is no GPU for its kernels."""
    from cut_cross_entropy import linear_cross_entropy

    def logps(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE, **settings)

    return _ranked(batch, logps, scored=scored, ignore=True)


def _liger_preference(name: str, **settings: Any) -> Callable[[Batch], Step]:
    """Liger's own loss of chosen and rejected responses, all chosen first, as its layers take them."""

    def build(batch: Batch) -> Step:
        from liger_kernel import chunked_loss

        prompts = len(batch.sizes)
        compute = getattr(chunked_loss, name)(
            ignore_index=IGNORE, compute_nll_loss=False, compiled=batch.hidden.is_cuda, **settings
        )
        order = torch.arange(prompts * 2, device=batch.hidden.device).view(prompts, 2).t().flatten()
        labels = batch.labels.view(prompts * 2, batch.width)[order]

        def loss() -> Tensor:
            rows = batch.hidden.view(prompts * 2, batch.width, -1)[order]
            return compute(batch.weight, rows, labels)[0]

        return _training(batch, loss)

    return build


LOGPS, NLL = "CLHA loss", "mean token loss only"
ALL_MODES = ("scored", "padded", "pairs")
GPU_METHODS: dict[str, Method] = {
    "bound": Method(bare_gemms, "three bare GEMMs", modes=ALL_MODES, model="bound"),
    "bound_forward": Method(
        lambda b: bare_gemms(b, False),
        "one bare GEMM",
        modes=("scored",),
        backward=False,
        model="bound_forward",
        gemms=1,
    ),
    "workspace": Method(lambda b: clha(_on_host(b), "workspace"), LOGPS, own=True, modes=ALL_MODES, model="workspace"),
    "fused": Method(lambda b: clha(b, "triton"), LOGPS, own=True, modes=ALL_MODES, model="fused", gemms=4),
    "fused_forward": Method(
        lambda b: clha(b, "triton", backward=False),
        LOGPS,
        own=True,
        modes=("scored",),
        backward=False,
        model="fused_forward",
        gemms=1,
    ),
    "routed": Method(lambda b: routed(b, "triton"), LOGPS, own=True, modes=("peaked",), model="routed", gemms=1),
    "eager_hf": Method(_eager, LOGPS, model="eager"),
    "torch_linear_cross_entropy": Method(_linear_cross_entropy, NLL),
    "trl_chunked_logprob": Method(lambda b: _trl(b, TRL_VOCABULARY_CHUNK), LOGPS, gemms=4),
    "liger_fused_linear_ce": Method(_liger_cross_entropy, NLL),
    "cce": Method(lambda b: _cce(b, filter_eps="high"), LOGPS, gemms=4),
    "cce_exact": Method(lambda b: _cce(b, filter_eps=None), LOGPS, gemms=4, modes=("scored",)),
    "published": Method(_published, LOGPS, modes=("padded",)),
    "torch_compile": Method(_compiled, LOGPS, compiles=True),
    "liger_cpo": Method(_liger_preference("LigerFusedLinearCPOLoss"), "CPO", modes=("pairs",), compiles=True),
    "liger_dpo": Method(
        _liger_preference("LigerFusedLinearDPOLoss", use_ref_model=False), "DPO", modes=("pairs",), compiles=True
    ),
    "liger_orpo": Method(_liger_preference("LigerFusedLinearORPOLoss"), "ORPO", modes=("pairs",), compiles=True),
    "liger_simpo": Method(_liger_preference("LigerFusedLinearSimPOLoss"), "SimPO", modes=("pairs",), compiles=True),
}
PEAKED = ("bound", "workspace", "fused", "routed", "cce", "eager_hf")


def methods_of(mode: str) -> list[str]:
    """The GPU's methods of a mode by name, the bound first; "peaked" is scored tokens with a peaked softmax."""
    if mode == "peaked":
        return list(PEAKED)
    return [name for name, method in GPU_METHODS.items() if mode in method.modes]


CPU_BOUND = "bare_gemms"
CPU_METHODS: dict[str, Method] = {
    "eager": Method(lambda b: clha(b, "reference"), LOGPS, own=True),
    "clha_fast_torch": Method(lambda b: clha(b, "torch"), LOGPS, own=True),
    "clha_fast_routed": Method(lambda b: routed(b, "torch"), LOGPS, own=True),
    "published": Method(_published, LOGPS),
    "eager_compiled": Method(lambda b: _compiled(b, scored=True), LOGPS, compiles=True),
    "torch_linear_cross_entropy": Method(lambda b: _linear_cross_entropy_by_token(b, chunked=False), LOGPS),
    "torch_linear_cross_entropy_chunked": Method(lambda b: _linear_cross_entropy_by_token(b, chunked=True), LOGPS),
    "trl_chunked": Method(lambda b: _trl(b, 8192), LOGPS, packages=("trl",)),
    "cce_torch_compile": Method(
        lambda b: _cce(b, scored=True, impl="torch_compile"),
        LOGPS,
        compiles=True,
        packages=("cut_cross_entropy", "triton"),
    ),
    # Over a bounded workspace, and never among the methods that are chosen: a CPU run always times it.
    CPU_BOUND: Method(lambda b: bare_gemms(b, chunk=512), "three bare GEMMs"),
}


def why_not(name: str) -> str | None:
    """Why a CPU's method cannot run here, None when it can."""
    method = CPU_METHODS[name]
    for package in method.packages:
        if importlib.util.find_spec(package) is None:
            return f"not installed: {package}"
    if method.compiles and shutil.which("c++") is None and shutil.which("g++") is None:
        return "not installed: a C++ compiler"
    if name.startswith("torch_linear") and not hasattr(F, "linear_cross_entropy"):
        return f"not in torch {torch.__version__}"
    return None
