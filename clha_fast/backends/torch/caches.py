"""How large the caches of this machine's CPU are, as its operating system says."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NamedTuple

_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")


class Caches(NamedTuple):
    """Bytes of one core's second-level cache, and of the last-level cache, which `sharing` CPUs share."""

    second: int
    last: int
    sharing: int


# Of a server's CPU, where nobody says.
USUAL = Caches(2**20, 2**25, 2)


@functools.lru_cache(maxsize=1)
def caches() -> Caches:
    """Linux's /sys, else what `sysconf` knows, else `USUAL`."""
    return _listed(_SYSTEM) or _configured() or USUAL


def _listed(folder: Path) -> Caches | None:
    """The caches of a folder as Linux lays it out: index2/{level,type,size,shared_cpu_list}."""
    sizes: dict[int, tuple[int, int]] = {}
    try:
        for index in folder.glob("index*"):
            kind, size = ((index / name).read_text().strip() for name in ("type", "size"))
            if kind != "Instruction":
                shared = _count((index / "shared_cpu_list").read_text())
                sizes[int((index / "level").read_text())] = (_bytes(size), shared)
    except (OSError, ValueError):
        return None
    if 2 not in sizes:
        return None
    last = sizes[max(sizes)]
    return Caches(sizes[2][0], *last) if sizes[2][0] > 0 and last[0] > 0 else None


def _bytes(text: str) -> int:
    """Bytes of a size such as 512K, 8M, or a plain number."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
    return int(text[:-1]) * unit if unit else int(text)


def _count(cpus: str) -> int:
    """How many CPUs a list such as "0-3,8" names."""
    edges = [part.split("-") for part in cpus.strip().split(",")]
    return sum(int(part[-1]) - int(part[0]) + 1 for part in edges)


def _configured() -> Caches | None:
    found = []
    for level in (2, 3):
        try:
            found.append(os.sysconf(f"SC_LEVEL{level}_CACHE_SIZE"))
        except (AttributeError, OSError, ValueError):
            return None
    return Caches(found[0], found[1], os.cpu_count() or 1) if min(found) > 0 else None
