"""Walks the CUDA branches of the Triton and workspace backends without a GPU, and counts their memory.

A program of its own (`python -m tests.support.cuda_walk`), because the tests' own process runs Triton's interpreter.
Every launch that the host code makes goes through Triton's specialisation and compiler. It prints JSON: a row for each
case, a row for each compiled specialisation. `--cases memory` prints the table of counted memory of docs/kernels.md
instead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Shape
from benchmarks.roofline import counted_bytes
from clha_fast import HeadOptions, linear_clha_loss, token_logps
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.types import STATISTICS, Factors, Gradients, LossResult
from csrc_triton import backward, combine, forward, persistent_backward, routed, routing, softmax
from csrc_triton import clha as ranking
from tests.support.compile_kernels import amd_usage, nvidia_registers
from tests.support.fake_gpu import FakeGPU

RICH = HeadOptions(scale=2.0, softcap=5.0, temperature=0.7)
ROUTED = HeadOptions(max_dropped_mass=0.01)
PAPER = CLHAOptions.preset("paper")
PAIR_MEAN = CLHAOptions(reduction="pair_mean")
PATHS = {"fused": ("triton", HeadOptions()), "routed": ("triton", ROUTED), "workspace": ("workspace", HeadOptions())}
# The shapes of the speed and memory targets: N, H, V.
SHAPES = (
    (4096, 4096, 128256),
    (8192, 2048, 151936),
    (8192, 4096, 128256),
    (16384, 2304, 256000),
    (4096, 8192, 128256),
    (65536, 4096, 128256),
    (131072, 4096, 128256),
)


@dataclass(frozen=True)
class Case:
    """One call of a public function, and its backward.

    Attributes:
        entry: "loss", "logps" or "statistics". lengths: of candidates; None is four prompts of four. rows: hidden
            states, read by row_index. form: how hidden (or "weight") lies in memory. frozen: inputs without a
            gradient. sizes: where the ranking's tensors are. extras: which of its optional tensors are given.
            autocast: its dtype.
    """

    backend: str
    entry: str = "loss"
    tokens: int = 320
    width: int = 256
    vocabulary: int = 1024
    dtype: str = "bfloat16"
    head: HeadOptions = field(default_factory=HeadOptions)
    options: CLHAOptions = PUBLISHED
    lengths: tuple[int, ...] | None = None
    prompts: tuple[int, ...] = (4, 4, 4, 4)
    bias: bool = False
    rows: int | None = None
    form: str = ""
    frozen: tuple[str, ...] = ()
    sizes: str = "cpu"
    extras: tuple[str, ...] = ("rewards",)
    autocast: str = ""

    @property
    def name(self) -> str:
        changed = [
            f"{f.name}={value if not isinstance(value, HeadOptions | CLHAOptions) else value.encoded}"
            for f in dataclasses.fields(self)
            if f.name != "backend" and (value := getattr(self, f.name)) != getattr(Case("triton"), f.name)
        ]
        return " ".join([self.backend, *changed])


def _matrix(rows: int, width: int, dtype: torch.dtype, form: str) -> Tensor:
    """[rows, width] on the fake device; not contiguous, or not aligned, as `form` says."""
    if form == "transposed":
        return torch.empty(width, rows, device="cuda", dtype=dtype).t()
    if form == "strided":
        return torch.empty(rows, width + 24, device="cuda", dtype=dtype)[:, :width]
    if form == "offset":
        return torch.empty(rows * width + 1, device="cuda", dtype=dtype)[1:].view(rows, width)
    if form == "wide":
        return torch.empty(rows, 2**22, device="cuda", dtype=dtype)[:, :width]
    return torch.empty(rows, width, device="cuda", dtype=dtype)


def _inputs(case: Case) -> dict[str, Any]:
    dtype, of_weight = getattr(torch, case.dtype), case.form.startswith("weight ")
    rows = case.tokens if case.rows is None else case.rows
    hidden = _matrix(rows, case.width, dtype, "" if of_weight else case.form)
    weight = _matrix(case.vocabulary, case.width, dtype, case.form.removeprefix("weight ") if of_weight else "")
    found = {
        "hidden": hidden.requires_grad_("hidden" not in case.frozen),
        "weight": weight.requires_grad_("weight" not in case.frozen),
        "targets": torch.empty(case.tokens, device="cuda", dtype=torch.int64),
    }
    if case.bias:
        found["bias"] = torch.empty(
            case.vocabulary, device="cuda", dtype=dtype, requires_grad="bias" not in case.frozen
        )
    if case.rows is not None:
        found["row_index"] = torch.empty(case.tokens, device="cuda", dtype=torch.int64)
    return found


def _ranking(case: Case) -> dict[str, Any]:
    count, lengths = sum(case.prompts), case.lengths
    if lengths is None:
        lengths = tuple(case.tokens * (c + 1) // count - case.tokens * c // count for c in range(count))
    found = {
        "candidate_lengths": torch.tensor(lengths),
        "candidates_per_prompt": torch.tensor(case.prompts),
        "rewards": torch.arange(count).flip(0).float(),
        "sft_index": torch.zeros(len(case.prompts), dtype=torch.int64),
        "pair_counts": torch.ones(max(1, max(case.prompts) - 1)),
        "prompt_count": torch.tensor(float(len(case.prompts))),
    }
    given = ("candidate_lengths", "candidates_per_prompt", *case.extras)
    return {name: found[name].to(case.sizes, non_blocking=True) for name in given}


def run(gpu: FakeGPU, case: Case) -> dict[str, Any]:
    """The case's row: launches, and bytes at the peak above the inputs, gradients among them."""
    inputs, memory = _inputs(case), gpu.memory
    ranking = _ranking(case) if case.entry == "loss" else {}
    first, start = len(gpu.launches), memory.live
    memory.peak = start
    with torch.autocast("cuda", getattr(torch, case.autocast)) if case.autocast else contextlib.nullcontext():
        if case.entry == "loss":
            result, _ = linear_clha_loss(
                **inputs, **ranking, head=case.head, options=case.options, backend=case.backend
            )
        elif case.entry == "statistics":
            # A temperature for each token where the head has none.
            own = torch.empty(case.tokens, device="cuda") if case.head.temperature == 1 else None
            settings = {"head": case.head, "backend": case.backend, "temperature": own}
            result, _ = token_logps(**inputs, **settings, statistics=STATISTICS)
        else:
            result = token_logps(**inputs, head=case.head, backend=case.backend)
        forward_peak = memory.peak - start
        gradients = {} if result.grad_fn is None else _backward(result, inputs, case.autocast or case.dtype)
    row = {
        "case": case.name,
        "launches": len(gpu.launches) - first,
        "peak": memory.peak - start,
        "forward_peak": forward_peak,
        "gradients": sum(g.untyped_storage().nbytes() for g in gradients.values()),
        "kernels": sorted({name for name, _, _ in gpu.launches[first:]}),
    }
    del result, gradients
    return row


def _backward(result: Tensor, inputs: dict[str, Any], dtype: str) -> dict[str, Tensor]:
    """The gradients, by the one node that the operator left; torch's engine itself asks for an accelerator."""
    node = result.grad_fn
    assert node is not None
    upstream = torch.empty_like(result)
    # Of the loss and of log-probabilities the first result has a gradient; with statistics their third, the entropy.
    count = len(LossResult._fields) + len(Gradients._fields) + len(Factors._fields) if result.dim() == 0 else 3
    others = [None, upstream, *[None] * 3] if "statistics" in node.name() else [None] * (count - 1)
    with torch.no_grad():
        found = node.apply(upstream, *others)
    gradients = {}
    for name, gradient in zip(("hidden", "weight", "bias"), found, strict=False):
        of = inputs.get(name)
        wanted = of is not None and of.requires_grad
        assert (gradient is not None) == wanted, f"{name}: gradient {gradient}"
        if of is not None and gradient is not None:
            wanted_form = (of.shape, getattr(torch, dtype), of.device)
            assert (gradient.shape, gradient.dtype, gradient.device) == wanted_form, f"{name}: {gradient}"
            gradients[name] = gradient
    return gradients


def cases(which: str) -> Iterator[Case]:
    """ "quick": every kernel and host branch once. "full": every mode that may matter. "shapes": the large ones.

    "sizes": one head and one way to call it, batch after batch, as packed batches differ.
    """
    if which == "quick":
        yield from _quick()
    elif which == "sizes":
        yield from _batches()
    elif which == "full":
        for backend in ("triton", "workspace"):
            yield from _modes(backend)
            yield from _sizes(backend)
            yield from _autocast(backend)
    else:
        for (tokens, width, vocabulary), (backend, head) in itertools.product(SHAPES, PATHS.values()):
            yield Case(backend, tokens=tokens, width=width, vocabulary=vocabulary, prompts=(4,) * 16, head=head)


def _autocast(backend: str) -> Iterator[Case]:
    for dtype, cast, entry in itertools.product(("float32", "bfloat16"), ("float16", "bfloat16"), ("loss", "logps")):
        yield Case(backend, entry, dtype=dtype, autocast=cast)
        yield Case(backend, entry, dtype=dtype, autocast=cast, bias=True, rows=100, head=RICH)


def _modes(backend: str) -> Iterator[Case]:
    """Heads, dtypes, layouts, and what the ranking is given."""
    heads = [HeadOptions(), RICH, HeadOptions(workspace_bytes=1)]
    if backend == "triton":
        heads += [ROUTED, RICH.replace(max_dropped_mass=0.01)]
    for head, dtype, bias in itertools.product(heads, ("bfloat16", "float16", "float32"), (False, True)):
        for entry in ("loss", "logps"):
            yield Case(backend, entry, head=head, dtype=dtype, bias=bias, rows=100 if bias else None)
    frozen = [("hidden",), ("weight",), ("hidden", "weight"), ("bias",), ("hidden", "weight", "bias")]
    for head, names, dtype in itertools.product(heads, frozen, ("bfloat16", "float16")):
        for entry in ("loss", "logps"):
            yield Case(backend, entry, head=head, frozen=names, bias="bias" in names, dtype=dtype)
    forms = ("transposed", "strided", "offset", "weight transposed", "weight strided", "weight offset", "weight wide")
    for head, form in itertools.product(heads, forms):
        yield Case(backend, head=head, form=form)
        yield Case(backend, head=head, form=form, dtype="float32", bias=True)
    every = ("rewards", "sft_index", "pair_counts", "prompt_count")
    for reduction, noise, sizes in itertools.product(
        ("sum", "distance_mean", "pair_mean"), ("abs", "signed", "none"), ("cpu", "cuda")
    ):
        for extras in ((), ("rewards",), every):
            options = CLHAOptions(reduction=reduction, noise_rule=noise, sft="mean" if extras == every else "sum")
            yield Case(backend, options=options, sizes=sizes, extras=extras)


def _sizes(backend: str) -> Iterator[Case]:
    """Numbers of tokens, words and hidden units that fit nothing, and prompts larger than the workspace."""
    small = HeadOptions(workspace_bytes=2**20)
    heads = [HeadOptions(), small] + ([ROUTED, ROUTED.replace(workspace_bytes=2**20)] if backend == "triton" else [])
    for head, entry in itertools.product(heads, ("loss", "logps")):
        for tokens in (0, 1, 2, 16, 17, 333, 2000):
            one = {"prompts": (1,), "lengths": (tokens,)} if tokens < 4 else {}
            yield Case(backend, entry, tokens=tokens, head=head, **one)
            yield Case(backend, entry, tokens=tokens, head=head, rows=5, bias=True, **one)
        for width, vocabulary in itertools.product((1, 8, 20, 72, 264, 1001), (1, 7, 1000, 50257)):
            yield Case(backend, entry, width=width, vocabulary=vocabulary, head=head)
        yield Case(backend, entry, width=1, vocabulary=1, dtype="float32", bias=True, head=head)
    for prompts, lengths in (
        ((3, 1, 2), (5, 3, 0, 900, 2, 4)),
        ((1,), (64,)),
        ((64, 1), (3,) * 65),
        ((2, 2), (0,) * 4),
    ):
        for head, sizes in itertools.product(heads, ("cpu", "cuda")):
            yield Case(backend, tokens=sum(lengths), lengths=lengths, prompts=prompts, head=head, sizes=sizes)


def _quick() -> Iterator[Case]:
    rich = RICH.replace(workspace_bytes=2**19)
    yield Case("triton", sizes="cuda")
    yield Case("triton", "logps", head=rich, bias=True, rows=100)
    yield Case("triton", dtype="float32", head=rich, bias=True, rows=100, extras=())
    yield Case("triton", "logps", head=RICH, frozen=("weight",))
    yield Case("triton", width=264, options=PAIR_MEAN)
    yield Case("triton", head=ROUTED, bias=True)
    yield Case("triton", "statistics")
    yield Case("triton", "statistics", head=rich, bias=True, rows=100)
    yield Case("workspace", "statistics", head=HeadOptions(workspace_bytes=2**19), rows=100)
    yield Case("triton", tokens=0, lengths=(0, 0), prompts=(2,), options=PAPER)
    yield Case("workspace")
    yield Case("workspace", "logps", head=rich, bias=True, rows=100, dtype="float16")
    yield Case("workspace", head=rich, sizes="cuda", vocabulary=1000, options=PAIR_MEAN)
    yield Case("workspace", tokens=0, lengths=(0, 0), prompts=(2,))


def _batches() -> Iterator[Case]:
    small, rows = HeadOptions(workspace_bytes=2**20), (None, 777)
    heads = {"triton": (small, small.replace(max_dropped_mass=0.01)), "workspace": (small,)}
    for backend, entry in itertools.product(heads, ("loss", "logps")):
        for head, hidden_rows in itertools.product(heads[backend], rows):
            for number, tokens in enumerate((16, 1, 1041, 2000)):
                prompts = ((4,), (1,), (3, 2), (2,) * 8)[number]
                m = None if hidden_rows is None else hidden_rows + 8 * number
                yield Case(backend, entry, tokens, vocabulary=1025, head=head, bias=True, rows=m, prompts=prompts)


def variants(gpu: FakeGPU) -> list[dict[str, Any]]:
    """A row for each kernel and choice of its own constants: by argument, what its variants have been compiled for."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for module in (backward, combine, forward, persistent_backward, ranking, routed, routing, softmax):
        for name, kernel in vars(module).items():
            for variant in gpu.variants.get(name, ()):
                own = tuple(
                    getattr(value, "value", value) if parameter.is_constexpr or value is None else kind
                    for parameter, (kind, value) in zip(kernel.params, variant, strict=True)
                    if parameter.is_constexpr or kind[0] not in "i" or value is None
                )
                row = found.setdefault((name, own), {"kernel": name, "variants": 0, "arguments": {}})
                row["variants"] += 1
                for parameter, known in zip(kernel.params, variant, strict=True):
                    if not parameter.is_constexpr:
                        row["arguments"].setdefault(parameter.name, set()).add(str(known))
    return [
        row | {"arguments": {name: sorted(known) for name, known in row["arguments"].items() if len(known) > 1}}
        for row in found.values()
    ]


def specialisations(gpu: FakeGPU) -> list[dict[str, Any]]:
    """A row for each kernel that was compiled: what its arguments made of it, and what the compiler did.

    constants: the kernel's own, and pointers that are None. ones: arguments that are constants because they are 1.
    odd: integers and pointers not known as multiples of 16.
    """
    found = {compiled.hash: (name, compiled) for name, _, compiled in gpu.launches if compiled is not None}
    rows = []
    for name, compiled in found.values():
        source, params = compiled.src, compiled.src.fn.params
        given = [params[path[0]] for path, value in source.constants.items() if value == 1 and type(value) is int]
        aligned = {params[path[0]].name for path, value in source.attrs.items() if value}
        kinds = source.signature
        rows.append(
            {
                "kernel": name,
                "types": sorted({kind for kind in kinds.values() if kind.startswith(("*", "tensordesc"))}),
                "ones": [parameter.name for parameter in given if not parameter.is_constexpr],
                "odd": [name for name, kind in kinds.items() if kind[0] in "i*" and name not in aligned],
                "constants": {
                    params[path[0]].name: getattr(value, "value", value)
                    for path, value in source.constants.items()
                    if params[path[0]].is_constexpr or value is None
                },
                "shared": compiled.metadata.shared,
                **made(compiled.asm),
            }
        )
    return rows


def made(asm: dict[str, Any]) -> dict[str, Any]:
    """Whether matrix units are used; registers, and what spills take."""
    if "cubin" not in asm:
        usage = amd_usage(asm["amdgcn"])
        return {"matrix": usage["matrix"] > 0, "local": usage["spills"]} | {k: usage[k] for k in ("registers", "stack")}
    matrix = bool(re.search(r"\b(?:wgmma|mma\.sync|tcgen05\.mma)", asm["ptx"]))
    return {"matrix": matrix, **nvidia_registers(asm["cubin"])}


MIB = 2**20


def allowed(case: Case) -> tuple[int, int]:
    """`roofline.counted_bytes` of a case."""
    path = next(name for name, known in PATHS.items() if known == (case.backend, case.head))
    return counted_bytes(path, Shape(case.tokens, case.width, case.vocabulary))


def table(rows: list[dict[str, Any]]) -> str:
    """MiB at the peak above the inputs: what each path takes beyond its gradients."""
    titles = ["N x H x V", "gradients", "fused, forward alone", *(f"{path}, beyond gradients" for path in PATHS)]
    lines = [titles, ["---"] * len(titles)]
    for (n, h, v), group in zip(SHAPES, batched(rows, len(PATHS)), strict=True):
        numbers = [group[0]["gradients"], group[0]["forward_peak"], *(row["peak"] - row["gradients"] for row in group)]
        lines.append([f"{n} x {h} x {v}", *(f"{number / MIB:,.0f}" for number in numbers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def batched(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def walk(which: str, backend: str, capability: int, compiles: bool) -> dict[str, list[dict[str, Any]]]:
    gpu, rows = FakeGPU(capability, compiles=compiles), []
    with gpu.here():
        for case in (case for case in cases(which) if backend in ("", case.backend)):
            try:
                rows.append(run(gpu, case))
            except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                rows.append({"case": case.name, "error": f"{type(error).__name__}: {error}"})
            if which in ("shapes", "memory"):
                rows[-1]["allowed_forward"], rows[-1]["allowed"] = allowed(case)
    return {"cases": rows, "kernels": specialisations(gpu), "variants": variants(gpu)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", choices=("quick", "full", "shapes", "sizes", "memory"), default="quick")
    parser.add_argument("--backend", choices=("triton", "workspace"), default="")
    parser.add_argument("--capability", type=int, default=90, choices=(80, 90, 100, 942), help="942: AMD's gfx942")
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    compiles = not (given.no_compile or given.cases == "memory")
    found = walk(given.cases, given.backend, given.capability, compiles)
    if given.cases == "memory":
        print(table(found["cases"]))
    else:
        json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
