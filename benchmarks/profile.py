"""What ncu and compute-sanitizer say of one step of each path, where these tools are; their times are not used."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import sys
from pathlib import Path
from typing import Any

import csrc_triton
from benchmarks.measure import Deadline
from benchmarks.processes import OUT_OF_TIME, START_SECONDS, output_within

SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "LaunchStats")
STEP = """
from benchmarks.inputs import Shape, make_batch
from benchmarks.methods import clha, routed
for build in (lambda b: clha(b, "workspace"), lambda b: clha(b, "triton"), lambda b: routed(b, "triton")):
    build(make_batch(Shape({tokens}, 2048, 32000), "cuda", on_device=False))()
"""


def kernels() -> list[str]:
    """Names of the library's kernels: torch's own end alike, and would take most of the launches that are looked at."""
    modules = [importlib.import_module(f"csrc_triton.{m.name}") for m in pkgutil.iter_modules(csrc_triton.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def commands(dry: bool) -> dict[str, list[str]]:
    """Tool: its command. A dry run has no kernels to look at, and asks for the version alone."""
    if dry:
        return {"ncu": ["ncu", "--version"], "compute-sanitizer": ["compute-sanitizer", "--version"]}
    sections = [option for section in SECTIONS for option in ("--section", section)]
    own = f"regex:^({'|'.join(kernels())})$"
    step = [sys.executable, "-c"]
    return {
        "ncu": [
            *("ncu", "--clock-control", "none", "--kernel-name", own, "--launch-count", "40", *sections),
            *(*step, STEP.format(tokens=4096)),
        ],
        "compute-sanitizer": [
            *("compute-sanitizer", "--tool", "memcheck", "--kernel-regex", "kns=_kernel", "--error-exitcode", "9"),
            *(*step, STEP.format(tokens=300)),
        ],
    }


def all_tools(output: Path, deadline: Deadline, dry: bool) -> dict[str, Any]:
    """Tool: exit status and the file with what it said, or why there is none."""
    found: dict[str, Any] = {}
    for tool, command in commands(dry).items():
        if shutil.which(tool) is None:
            found[tool] = {"failed": f"not installed: {tool}"}
        elif not deadline.allows(START_SECONDS):
            found[tool] = {"failed": OUT_OF_TIME}
        else:
            said, _, status = output_within(command, min(240.0, deadline.left() - 5), merge=True)
            (output / f"{tool}.txt").write_text(said)
            found[tool] = {"status": status, "file": f"{tool}.txt"}
            if status is None:
                found[tool]["failed"] = OUT_OF_TIME
    return found
