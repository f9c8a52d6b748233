"""Runs the wrapper matrix: every case of `wrapper_cases.py` in real processes on the CPU, compared with one process.

``python -m tests.support.wrappers`` runs them all and prints the table; ``--write PATH`` renders it into a file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import forked
from tests.support.helpers import ROOT

PROCESSES = 2
# For a case; the first of a group also pays for the imports, and DeepSpeed's first of all for compiling an operator:
# minutes, under a lock that a process leaves behind if it is killed there, and for which all later ones wait.
SECONDS = 600


@dataclass
class Result:
    """What a case gave; `reason` says why it has no numbers."""

    name: str
    loss: float = float("inf")
    gradients: float = float("inf")
    tolerance: float = 0.0
    seconds: float = 0.0
    reason: str = ""

    @property
    def right(self) -> bool:
        return not self.reason and max(self.loss, self.gradients) <= self.tolerance


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(out: Path, names: Sequence[str], rank: int, port: int) -> forked.Program:
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
    }
    program = ["tests.support.wrapper_cases", str(out), *names]
    return forked.start("train", *program, out=out.with_suffix(f".{rank}"), **environment)


def _lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []


def _group(names: Sequence[str], seconds: float) -> list[Result]:
    """Results of one group of processes, in order; the last has a reason where the group did not reach the end."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        port = _free_port()
        processes = [_start(out, names, rank, port) for rank in range(PROCESSES)]
        seen, since, reason = 0, time.monotonic(), ""
        try:
            while any(process.poll() is None for process in processes) and not reason:
                if len(_lines(out)) > seen:
                    seen, since = len(_lines(out)), time.monotonic()
                if any(process.poll() for process in processes):
                    time.sleep(2)  # the other process may say more
                    break
                if time.monotonic() - since > seconds:
                    reason = f"hung: no result after {seconds:.0f} s"
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = [Result(**line) for line in _lines(out) if "name" in line]  # type: ignore[arg-type]
        if len(results) < len(names):
            results.append(Result(names[len(results)], reason=reason or _last_error(out)))
        return results


def _last_error(out: Path) -> str:
    """The message that a process died with; not that of another one which lost its peer by it."""
    found = []
    for rank in range(PROCESSES):
        for name in ("out", "err"):
            lines = out.with_suffix(f".{rank}.{name}").read_text("utf-8").splitlines()
            found += [line for line in lines if "Error" in line]
    first = [line for line in found if "Connection" not in line and "gloo" not in line]
    return ((first or found or ["died without a message"])[0])[:300]


def run(names: Sequence[str], seconds: float = SECONDS) -> list[Result]:
    """The cases one after the other in one group of processes; a new group after a crash or a hang."""
    results: list[Result] = []
    while len(results) < len(names):
        results += _group(names[len(results) :], seconds)
    return results


def case_names() -> list[str]:
    """All cases that can run here: DeepSpeed's need it installed."""
    code = "import json; from tests.support import wrapper_cases; print(json.dumps(list(wrapper_cases.CASES)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    names: list[str] = json.loads(listed.stdout.splitlines()[-1])
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    return [name for name in names if has_deepspeed or not name.startswith("DeepSpeed")]


def render(results: Sequence[Result]) -> str:
    """The matrix as Markdown."""
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    right = sum(result.right for result in results)
    text = [
        "# Wrappers",
        "",
        "`clha_fast.attach(model)` under what people train with. Rendered by `python -m tests.support.wrappers --write",
        "docs/wrappers.md` from real runs: a two-layer Llama in two processes on the CPU (gloo, loopback), four ranked",
        "prompts, against one process's eager loss (full logits, float32) of the same global batch. The errors are",
        "relative: of the loss, and the largest of any parameter's gradient over the norm of all gradients.",
        "",
        f"**{right} of {len(results)} right.** {', '.join(versions)}; Python {platform.python_version()}.",
        "",
        "| case | loss error | gradient error | allowed | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        numbers = f"{result.loss:.1e} | {result.gradients:.1e} | {result.tolerance:.0e}"
        if result.reason:
            numbers = "| | "
        verdict = "right" if result.right else f"**wrong** {result.reason}"
        text.append(f"| {result.name} | {numbers} | {verdict} |")
    return "\n".join([*text, "", *NOTES.strip().splitlines(), ""])


NOTES = """
## How to use them

- Attach first, then wrap: DDP, `fully_shard`, `parallelize_module`, `accelerator.prepare`, `Trainer`, `torch.compile`,
  `deepspeed.initialize`, `fabric.setup`. Attaching a model that is already wrapped is right as well, on all processes,
  but not under ZeRO-3, whose weights are taken apart by then, nor in the older `FullyShardedDataParallel` class: both
  say so. So does a wrapper that hands its attributes on to what it wraps: attach what is inside it.
- What the loss divides by (kept pairs, prompts) differs from process to process. `counts = attached.counts(batches)`
  takes the global batch's; `model(**batch, **counts)` then gives losses whose mean over processes and micro-batches is
  the loss of the one large batch. Without it every process and micro-batch divides by its own.
- A process that has run out of prompts passes `clha_fast.models.attach.empty_batch()`: loss 0, gradients of zeros, and
  the collectives of the others go on. The same holds for a batch in which no pair is kept and no gate is open.
- A head that tensor parallelism has spread by rows is computed vocabulary-parallel: two all-reduces of [N] numbers in
  the forward, one of the hidden states' gradient in the backward; the logits exist one bounded workspace at a time.
  All processes of the tensor-parallel group get the same batch.
- Attaching runs the model once, after which FSDP2's outermost module would keep its gathered weights, and an optimizer
  made then would step those; `attach` hands the shards back. After a forward of your own without a backward, do so
  with `clha_fast.models.sharding.reshard(model)` before you make an optimizer.
- A head that is sharded by itself (`fully_shard(model.lm_head)`) is gathered again for the backward.
- ZeRO-3 fetches a layer's weights each time it is called, and waits for all processes: an adapter on the head, which is
  called a chunk of tokens at a time, is refused there (but for `backend="reference"`), and so is `tiled_mlp`.
- A wrapper that casts a batch to 16 bits would round rewards, counts and what else stands in it: that is refused. FSDP2
  casts unless told otherwise, `MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)`; Lightning
  Fabric does in its 16-bit precisions: take `32-true` there.
- A model that a `device_map` has spread over devices (accelerate's hooks), some of its layers on disk or in memory, is
  taken, by `attach`, `score` and `CLHATrainer(ref_model=)`, where its embeddings are on a device; the loss is computed
  on the head's. A head that is offloaded itself (`cpu_offload`, `disk_offload`) is refused. Seen on one CPU with layers
  on disk, not with GPUs.
- `nn.DataParallel` is refused: its copies of the model share one head.
- What the table does not show: GPUs and NCCL, sequence parallelism, and, tried by hand and right in three and four
  processes, more than two of them and tensor parallelism together with FSDP2. `torch.compile` ran with its `aot_eager`
  backend. accelerate takes FSDP2 on GPUs only, so its preparation was called by hand. `CLHATrainer` under the same
  wrappers: [trainer.md](trainer.md). The autocast row is
  compared with an eager loss under autocast. "Head sharded by itself" and ZeRO used the backend `reference`, which
  keeps the weight for the backward as recomputing ones do.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="render the table into this file")
    parser.add_argument("--only", nargs="*", help="names of cases")
    arguments = parser.parse_args()
    results = run(arguments.only or case_names())
    table = render(results)
    print(table)
    if arguments.write is not None:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(table, encoding="utf-8")
    return 0 if all(result.right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
