"""Peak memory of the loss alone, forward and backward, beside the eager loss's: measured, not computed.

On a CPU every variant runs in a fresh child process, whose peak resident memory above its inputs is read; on a GPU the
allocator's peak is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clha_fast import reference
from clha_fast.functional import linear_loss
from clha_fast.objectives import Objective, decode
from clha_fast.objectives.clha import PUBLISHED
from clha_fast.options import HeadOptions
from clha_fast.types import SIGNALS, RankingInputs

# name -> what it is, in the order of the table
VARIANTS = {
    "fused": "clha-fast",
    "eager_scored": "eager, logits of scored tokens",
    "eager_all": "eager, logits of all positions",
}


# What torch says on a CPU, which has no class of its own for it.
_NO_MEMORY = ("MemoryError", "can't allocate memory", "not enough memory")


class MemoryReportError(RuntimeError):
    """A measurement failed; the message carries its last line."""


class DoesNotFitError(MemoryReportError):
    """What was to be measured needs more memory than there is."""


@dataclass(frozen=True)
class LossShapes:
    """One loss call: M hidden rows [M, H], weight [V, H], candidates' lengths (0 for dropped ones) and rewards.

    `options` is an objective's `encoded`; what else it reads is made up.
    """

    rows: int
    hidden_size: int
    vocab_size: int
    candidate_lengths: Sequence[int]
    candidates_per_prompt: Sequence[int]
    rewards: Sequence[float] | None = None
    bias: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"
    head: str = field(default_factory=lambda: HeadOptions().encoded)
    options: str = PUBLISHED.encoded

    def tiny(self) -> LossShapes:
        """The same call in small: what it loads and sets up must not count."""
        return dataclasses.replace(
            self,
            rows=8,
            hidden_size=8,
            vocab_size=32,
            candidate_lengths=[2, 2],
            candidates_per_prompt=[2],
            rewards=None if self.rewards is None else [4.0, 0.0],
        )


def _inputs(shapes: LossShapes) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, shapes.dtype)

    def normal(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator).to(device=shapes.device, dtype=dtype)
        return values.requires_grad_()

    tokens = sum(shapes.candidate_lengths)
    rows = torch.randint(shapes.rows, (tokens,), generator=generator)
    targets = torch.randint(shapes.vocab_size, (tokens,), generator=generator)
    rewards = None if shapes.rewards is None else torch.tensor(shapes.rewards, dtype=torch.float32)
    return {
        "hidden": normal(shapes.rows, shapes.hidden_size),
        "weight": normal(shapes.vocab_size, shapes.hidden_size),
        "bias": normal(shapes.vocab_size) if shapes.bias else None,
        "targets": targets.to(shapes.device),
        "row_index": rows.to(shapes.device),
        # On the CPU, as in training: on a GPU they would change what is run.
        "candidate_lengths": torch.tensor(shapes.candidate_lengths),
        "candidates_per_prompt": torch.tensor(shapes.candidates_per_prompt),
        "rewards": None if rewards is None else rewards.to(shapes.device),
    }


def _given(inputs: dict[str, Any], objective: Objective) -> RankingInputs:
    """Takes the candidates out of `inputs`; signals that the objective reads are numbers, one a token."""
    generator = torch.Generator().manual_seed(1)
    tokens, names = len(inputs["targets"]), (*objective.reads, *objective.needs)
    made = {
        name: torch.rand(tokens, generator=generator).to(inputs["targets"].device) for name in SIGNALS if name in names
    }
    return RankingInputs(
        *(inputs.pop(name) for name in ("candidate_lengths", "candidates_per_prompt", "rewards")), **made
    )


def _eager_all(inputs: dict[str, Any], given: RankingInputs, head: HeadOptions, objective: Objective) -> Tensor:
    """As a training loop does that takes `model(...).logits`."""
    logits = reference.logits(inputs["hidden"], inputs["weight"], inputs["bias"], head)
    logps = F.log_softmax(logits, dim=-1)[inputs["row_index"], inputs["targets"]]
    return reference.loss(logps, inputs["targets"], given, head, objective)[0]


def _run(variant: str, inputs: dict[str, Any], shapes: LossShapes) -> None:
    head, objective = HeadOptions.decode(shapes.head), decode(shapes.options)
    given = _given(inputs, objective)
    if variant == "eager_all":
        loss = _eager_all(inputs, given, head, objective)
    else:
        backend: Any = "reference" if variant == "eager_scored" else shapes.backend
        loss, _ = linear_loss(**inputs, given=given, objective=objective, head=head, backend=backend)
    loss.backward()


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes, None where there is no such file."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(f"{name}:"))
    except (FileNotFoundError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def _highest() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_in_this_process(variant: str, shapes: LossShapes) -> int:
    """Bytes that forward and backward needed at their peak above the inputs; gradients are among them."""
    _run(variant, _inputs(shapes.tiny()), shapes)
    inputs = _inputs(shapes)
    if shapes.device.startswith("cuda"):
        torch.cuda.synchronize(shapes.device)
        torch.cuda.reset_peak_memory_stats(shapes.device)
        before = torch.cuda.memory_allocated(shapes.device)
        _run(variant, inputs, shapes)
        torch.cuda.synchronize(shapes.device)
        return torch.cuda.max_memory_allocated(shapes.device) - before
    current = _status("VmRSS")
    if current is None:  # no /proc: the peak so far may lie above what is used now, so this is a lower bound
        current = _highest()
    else:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak starts again from here
    _run(variant, inputs, shapes)
    return (_status("VmHWM") or _highest()) - current


def measure(variant: str, shapes: LossShapes) -> int:
    """`peak_in_this_process`, for a CPU in a child process of its own.

    Raises:
        DoesNotFitError: there is not so much memory. MemoryReportError: the measurement failed otherwise.
    """
    if shapes.device.startswith("cuda"):
        return _peak_on_gpu(variant, shapes)
    environment = {
        **os.environ,
        # The package of this process, from wherever it was imported.
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        # Otherwise glibc keeps freed blocks for later, and they would hide in the inputs.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "clha_fast.evaluation.memory", variant]
    shapes_text = json.dumps(dataclasses.asdict(shapes))
    done = subprocess.run(command, input=shapes_text, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        # Killed: by the kernel, for want of memory, as a rule.
        does_not_fit = done.returncode == -9 or any(words in last for words in _NO_MEMORY)
        kind = DoesNotFitError if does_not_fit else MemoryReportError
        raise kind(f"measuring {VARIANTS[variant]} failed: {last}")
    return int(json.loads(done.stdout)["peak_bytes"])


def _peak_on_gpu(variant: str, shapes: LossShapes) -> int:
    try:
        return peak_in_this_process(variant, shapes)
    except (RuntimeError, ValueError) as error:
        kind = DoesNotFitError if isinstance(error, torch.OutOfMemoryError) else MemoryReportError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    # Not in the handler, whose error holds on to what the frames had.
    torch.cuda.empty_cache()
    raise kind(f"measuring {VARIANTS[variant]} failed: {reason}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Child process: shapes as JSON on standard input, {"peak_bytes": ...} on standard output."""
    parser = argparse.ArgumentParser(prog="python -m clha_fast.evaluation.memory", description=main.__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    variant = parser.parse_args(arguments).variant
    print(json.dumps({"peak_bytes": peak_in_this_process(variant, LossShapes(**json.load(sys.stdin)))}))


if __name__ == "__main__":
    main()
