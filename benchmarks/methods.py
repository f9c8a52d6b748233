"""The ways to compute the loss that the GPU benchmark times: this library's paths, the bound, and the peers.

A method is built for one batch and returns the step that is timed: forward and backward, gradients left in the batch
(or the forward alone where it says so). Peers are imported when built; one that is absent raises ImportError.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.inputs import IGNORE, Batch, PairLoss
from clha_fast import HeadOptions, linear_clha_loss

Step = Callable[[], Any]
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


def _training(batch: Batch, loss: Callable[[], Tensor]) -> Step:
    def step() -> Tensor:
        batch.clear()
        value = loss()
        value.backward()
        return value.detach()

    return step


def clha(batch: Batch, backend: str, head: HeadOptions | None = None, backward: bool = True) -> Step:
    """The library's loss through its public face."""
    arguments: dict[str, Any] = {
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


def _routed(batch: Batch) -> Step:
    return clha(batch, "triton", HeadOptions(max_dropped_mass=DROPPED))


def bare_gemms(batch: Batch, backward: bool = True) -> Step:
    """The bound: the head's bare matrix products on the scored rows at the library's speed, and nothing else."""
    x = batch.hidden.detach() if batch.row_index is None else batch.hidden.detach()[batch.row_index]
    weight = batch.weight.detach()
    if "logits" not in batch.scratch:
        # Random, as gradients are: a GPU multiplies zeros at a higher clock.
        batch.scratch["logits"] = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device).normal_()
    logits = batch.scratch["logits"]
    dhidden, dweight = torch.empty_like(x), torch.empty_like(weight)

    def step() -> Tensor:
        torch.mm(x, weight.t(), out=logits)
        if backward:
            torch.mm(logits, weight, out=dhidden)
            torch.mm(logits.t(), x, out=dweight)
        return dweight

    return step


def _eager_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As Hugging Face models and trainers do: logits, float32 copy, log-softmax, gather."""
    logits = F.linear(hidden, weight).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _from_rows(batch: Batch, logps_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """A loss from log-probabilities of every row of hidden; padding's are computed too, and thrown away."""
    pairs = PairLoss(batch)
    labels = batch.labels.clamp(min=0)

    def loss() -> Tensor:
        logps = logps_of(batch.hidden, batch.weight, labels)
        return pairs(logps if batch.row_index is None else logps[batch.row_index])

    return _training(batch, loss)


def _eager(batch: Batch) -> Step:
    return _from_rows(batch, _eager_logps)


def _compiled(batch: Batch) -> Step:
    return _from_rows(batch, torch.compile(_eager_logps, dynamic=False))


def _published(batch: Batch) -> Step:
    """The published training step's head: one forward a candidate rank, logits of every token of the padded batch."""
    pairs = PairLoss(batch)
    prompts, n, width = len(batch.sizes), batch.sizes[0], batch.width
    labels = batch.labels.clamp(min=0).view(prompts, n, width)
    assert batch.row_index is not None
    index = batch.row_index

    def loss() -> Tensor:
        rows = batch.hidden.view(prompts, n, width, -1)
        logps = [_eager_logps(rows[:, i], batch.weight, labels[:, i]) for i in range(n)]
        return pairs(torch.stack(logps, dim=1).flatten()[index])

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


def _trl(batch: Batch) -> Step:
    """TRL's trainers: scored rows selected, tiles by cuBLAS, log-probabilities, recomputed in the backward."""
    from trl.kernels import ChunkedLogProbFunction

    pairs = PairLoss(batch)

    def loss() -> Tensor:
        hidden = batch.hidden if batch.row_index is None else batch.hidden[batch.row_index]
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden, batch.weight, None, batch.targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
        )
        return pairs(logps)

    return _training(batch, loss)


def _liger_cross_entropy(batch: Batch) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    compute = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
    return _training(batch, lambda: compute(batch.weight, batch.hidden, batch.labels))


def _cce(filter_eps: str | None) -> Callable[[Batch], Step]:
    def build(batch: Batch) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        pairs = PairLoss(batch)

        def loss() -> Tensor:
            nll = linear_cross_entropy(
                batch.hidden, batch.weight, batch.labels, reduction="none", filter_eps=filter_eps, ignore_index=IGNORE
            )
            return pairs(-(nll if batch.row_index is None else nll[batch.row_index]))

        return _training(batch, loss)

    return build


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
METHODS: dict[str, Method] = {
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
    "routed": Method(_routed, LOGPS, own=True, modes=("peaked",), model="routed", gemms=1),
    "eager_hf": Method(_eager, LOGPS, model="eager"),
    "torch_linear_cross_entropy": Method(_linear_cross_entropy, NLL),
    "trl_chunked_logprob": Method(_trl, LOGPS, gemms=4),
    "liger_fused_linear_ce": Method(_liger_cross_entropy, NLL),
    "cce": Method(_cce("high"), LOGPS, gemms=4),
    "cce_exact": Method(_cce(None), LOGPS, gemms=4, modes=("scored",)),
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
    """Names of the methods that a mode times, the bound first; "peaked" is scored tokens with a peaked softmax."""
    if mode == "peaked":
        return list(PEAKED)
    return [name for name, method in METHODS.items() if mode in method.modes]
