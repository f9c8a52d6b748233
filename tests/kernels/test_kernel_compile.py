"""Every entry of the kernels' table, compiled for GPUs that are not there: no spills, matrix units, memory that fits.

`pytest -s tests/kernels/test_kernel_compile.py` prints the table.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

from clha_fast.options import ROUTE_WORDS
from csrc_triton import configs
from tests.support.helpers import ROOT

Row = dict[str, Any]
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def compile_all(cache: Path, *words: str) -> list[Row]:
    """A child process does it, for this one may be running the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tests.support.compile_kernels", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    compiled: list[Row] = json.loads(done.stdout)
    return compiled


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """What has changed since it was recorded is compiled, and else nothing."""
    compiled = compile_all(tmp_path_factory.mktemp("triton"))
    print("\n" + table(compiled))
    return compiled


@pytest.mark.slow
def test_the_compiler_makes_what_is_recorded(rows: list[Row], tmp_path: Path) -> None:
    assert compile_all(tmp_path, "--anew") == rows


def table(rows: list[Row]) -> str:
    columns = list(rows[0])
    cells = [columns, *([str(row[name]) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def none_of(rows: list[Row], what: str) -> None:
    assert not rows, f"{what}:\n{table(rows)}"


def test_every_entry_was_compiled(rows: list[Row]) -> None:
    done = {(row["kernel"], row["arch"], row["entry"]) for row in rows}
    for kernel, entries in configs.GEMMS.items():
        assert done >= {(kernel, arch, dtype) for arch, dtype in entries if arch != "interpreter"}
    assert done >= {(kernel, arch, "16-bit") for kernel in configs.SMALL for arch in configs.SHARED_MEMORY}
    for kernel, entries in configs.PERSISTENT.items():
        assert done >= {(kernel, arch, "16-bit") for arch in entries if arch != "interpreter"}


def test_no_register_is_spilled(rows: list[Row]) -> None:
    none_of([row for row in rows if row["spills"] or row["stack"]], "spilled")


def test_shared_memory_fits(rows: list[Row]) -> None:
    none_of([row for row in rows if row["shared"] > configs.SHARED_MEMORY[row["arch"]]], "more than the device has")
    # sm_80's entries serve compute capabilities 8.6, 8.9 and 12.x too, which have 99 KiB.
    none_of([row for row in rows if row["arch"] == "sm_80" and row["shared"] > 99 * 1024], "more than 99 KiB")


def test_matrix_units_are_used(rows: list[Row]) -> None:
    """HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100, MFMA on gfx942; ieee float32 has them on AMD only."""
    gemms = [row for row in rows if row["kernel"] in configs.GEMMS | configs.PERSISTENT]
    # One unit of H is too little for a matrix instruction on its own.
    gemms = [row for row in gemms if row["variant"] != "ones"]
    expected = [row for row in gemms if row["dtype"] != "fp32" or row["arch"] == "gfx942"]
    none_of([row for row in expected if not row["matrix"]], "no matrix instruction")
    ieee = [row for row in gemms if row["dtype"] == "fp32" and row["arch"] != "gfx942"]
    none_of([row for row in ieee if row["matrix"] or not row["fma"]], "float32 rounded to tensor-core precision")


def test_operands_come_by_tma_and_warps_are_specialised_where_the_table_says_so(rows: list[Row]) -> None:
    """UTMALDG; USETMAXREG is how the warps of a specialised kernel divide the registers among them."""
    persistent = [row for row in rows if row["kernel"] in configs.PERSISTENT]
    none_of([row for row in persistent if not row["tma"]], "no TMA load")
    none_of([row for row in rows if row["tma"] and row not in persistent], "TMA where nobody made a descriptor")
    specialised = [row for row in persistent if configs.select(row["kernel"], row["arch"], "16-bit")["WARP_SPECIALIZE"]]
    # Not under Triton 3.6.
    assert {row["arch"] for row in specialised} == ({"sm_100"} if configs.SPECIALISES_WARPS else set())
    none_of([row for row in specialised if not row["maxreg"]], "warps not specialised")
    none_of([row for row in rows if row["maxreg"] and row not in specialised], "warps specialised unasked")


def test_registers_leave_room_for_the_programs_meant_to_share_a_multiprocessor(rows: list[Row]) -> None:
    """Of 65,536 registers and 227 KiB: two programs of the routed recompute and of the routed dhidden on sm_90."""
    for kernel in ("routed_logit_grad", "routed_hidden_grad"):
        together = configs.select(kernel, "sm_90", "16-bit").get("RESIDENT", 2)
        row = one(rows, kernel)
        assert row["registers"] * row["warps"] * 32 * together <= 65536, table([row])
        assert (row["shared"] + 1024) * together <= 228 * 1024, table([row])


def test_sums_in_parts_are_reducing_stores(rows: list[Row]) -> None:
    """One instruction for each sum or four of them, none that waits for what stood there; nobody else has atomics."""
    of = ("routed_hidden_grad", "persistent_hidden_grad", "persistent_weight_grad_partial")
    adding = [row for row in rows if row["kernel"] in of]
    assert {row["arch"] for row in adding} == set(configs.SHARED_MEMORY)
    none_of([row for row in adding if not row["reductions"]], "no reducing store")
    none_of([row for row in rows if row["reductions"] and row not in adding], "a reducing store where nobody asked")
    none_of([row for row in rows if row["atomics"]], "an atomic operation")


def test_sums_have_reached_l2_before_the_next_block_on_amd(rows: list[Row]) -> None:
    """Its barrier waits for shared memory alone: the kernel itself waits for its stores first."""
    routed = [row for row in rows if (row["kernel"], row["arch"]) == ("routed_hidden_grad", "gfx942")]
    assert {row["dtype"] for row in routed} == {"16-bit", "fp32"}
    none_of([row for row in routed if row["drained"] != 1], "a barrier that does not wait for reducing stores")


def one(rows: list[Row], kernel: str, variant: str = "plain") -> Row:
    (row,) = [
        row
        for row in rows
        if (row["kernel"], row["arch"], row["entry"], row["variant"]) == (kernel, "sm_90", "16-bit", variant)
    ]
    return row


def test_epilogues_are_light(rows: list[Row]) -> None:
    """Instructions of a whole kernel: a product, a power and two sums a logit, in branches what few tiles need."""
    forward = one(rows, "persistent_forward")
    assert forward["blocks"].startswith("128x256"), table([forward])
    assert forward["registers"] <= 215, table([forward])
    # One epilogue, not a second for H = 0. Triton 3.8 writes more of everything.
    assert forward["instructions"] <= (2900 if TRITON == (3, 8) else 2300), table([forward])
    for variant in ("softcap", "bias", "bias+softcap"):
        row = one(rows, "persistent_forward_softcap", variant)
        assert row["registers"] <= 215, table([row])
    for kernel, variant, most in (
        ("persistent_logit_grad", "plain", 2500),
        ("persistent_forward_softcap", "softcap", 3200),
        ("persistent_forward_softcap", "bias", 1700),
        ("persistent_logit_grad_softcap", "softcap", 3600),
    ):
        row = one(rows, kernel, variant)
        assert row["instructions"] <= most, table([row])


def test_blocks_fit_together() -> None:
    """The GEMMs of the backward walk a workspace that `logit_grad` cuts into whole tiles of its own."""
    for name in ("logit_grad", "logit_grad_softcap", "logit_grad_statistics"):
        for (arch, dtype), tile in configs.GEMMS[name].items():
            for other in ("hidden_grad", "weight_grad"):
                inner = configs.GEMMS[other][arch, dtype]
                assert tile["BLOCK_N"] % inner["BLOCK_N"] == 0, (name, other, arch, dtype)
                assert tile["BLOCK_V"] % inner["BLOCK_V"] == 0, (name, other, arch, dtype)
    for name in ("persistent_logit_grad", "persistent_logit_grad_softcap", "persistent_logit_grad_statistics"):
        for arch, tile in configs.PERSISTENT[name].items():
            for other in ("persistent_hidden_grad", "persistent_weight_grad", "persistent_weight_grad_partial"):
                inner = configs.PERSISTENT[other][arch]
                assert tile["BLOCK_N"] % inner["BLOCK_N"] == 0, (name, other, arch)
                assert tile["BLOCK_V"] % inner["BLOCK_V"] == 0, (name, other, arch)
    for name in ("routed_logit_grad", "routed_logit_grad_softcap"):
        for (arch, dtype), tile in configs.GEMMS[name].items():
            # The sum over a block's tokens reads whole tiles, to whose end this kernel writes zeros.
            assert tile["BLOCK_N"] % configs.GEMMS["routed_weight_grad"][arch, dtype]["BLOCK_N"] == 0
            for other in (name, "routed_weight_grad", "routed_hidden_grad"):
                assert ROUTE_WORDS % configs.GEMMS[other][arch, dtype]["BLOCK_V"] == 0, (other, arch, dtype)
    for kernel in (*configs.GEMMS, *configs.PERSISTENT):
        if "forward" in kernel:
            tiles = {**configs.GEMMS, **configs.PERSISTENT}[kernel].values()
            assert all(max(tile["BLOCK_V"], ROUTE_WORDS) % min(tile["BLOCK_V"], ROUTE_WORDS) == 0 for tile in tiles)
    for column in (0, 1):
        assert configs.SMALL["route_count"][column]["SEGMENT"] == configs.SMALL["route_list"][column]["SEGMENT"]
        assert ROUTE_WORDS % configs.SMALL["routed_bias_grad"][column]["BLOCK_V"] == 0


def test_the_table_is_whole() -> None:
    expected = {(arch, dtype) for arch in configs.ARCHITECTURES for dtype in configs.DTYPES}
    for kernel, entries in configs.GEMMS.items():
        assert set(entries) == expected, kernel
        # The host takes offsets within a tile for int32 on the strength of this.
        assert max(tile[name] for tile in entries.values() for name in tile if name.startswith("BLOCK")) <= 256
    for arguments, name in ((("x", "sm_90", "fp32"), "kernel"), (("gather", "sm_75", "fp32"), "arch")):
        with pytest.raises(ValueError, match=rf"^{name}: expected one of .*, got "):
            configs.select(*arguments)
    with pytest.raises(ValueError, match=r"^dtype: expected one of 16-bit, fp32, got 'bf16'$"):
        configs.select("gather", "sm_90", "bf16")


def test_passes_over_the_workspace_load_whole_vectors(rows: list[Row]) -> None:
    """At most 80 registers without a softcap: three programs of eight warps an SM, loads enough in flight."""
    names = ("statistics", "gradient", "scale")
    passes = [row for row in rows if row["kernel"] in names and row["arch"].startswith("sm_")]
    passes = [row for row in passes if (row["kernel"], row["variant"]) != ("scale", "ones")]
    assert len(passes) >= 15
    none_of([row for row in passes if row["vectors"] == 0], "no 16-byte access")
    none_of([row for row in passes if "softcap" not in row["variant"] and row["registers"] > 80], "too many registers")
