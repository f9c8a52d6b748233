"""Block sizes and warps as data: one table for all kernels, architectures and dtypes. Nothing is probed or tuned here.

BLOCK_N counts tokens, BLOCK_V words and BLOCK_H hidden units, whichever of them a kernel reduces over. GROUP is the
number of tiles on the program order's first axis that share the tiles of the second while they are in L2.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton

Config = Mapping[str, int]

# Shared memory that one program may take, bytes.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ARCHITECTURES = (*SHARED_MEMORY, "interpreter")
DTYPES = ("16-bit", "fp32")


# Left to itself ptxas spills a few registers where that makes room for one program more on a multiprocessor, in other
# kernels with every release. Told that a thread may have all, it does not, and still takes what it needs:
# the fp32 tiles are, for strides that they see in many forms.
ALL_REGISTERS = {"maxnreg": 255}


# The forward of `sm_90`, alone on its multiprocessor with 8 warps, fits 170. Left to itself one ptxas takes 254 and
# another 170, by no rule that a release keeps.
SETTLED = {"maxnreg": 208}


def _tile(n: int, v: int, h: int, group: int, warps: int, stages: int) -> Config:
    return {
        "BLOCK_N": n,
        "BLOCK_V": v,
        "BLOCK_H": h,
        "GROUP": group,
        "num_warps": warps,
        "num_stages": stages,
    }


# The kernels that hold a GEMM. The fp32 tiles are those that "ieee" precision, which has no tensor cores on NVIDIA,
# can hold in registers, two programs on a multiprocessor; 16-bit matrices whose rows are not aligned to 16 elements, or
# lie 2^22 apart, use them too. sm_80's entries stay within 99 KiB, the shared memory of its consumer relatives.
GEMMS: dict[str, dict[tuple[str, str], Config]] = {
    # tokens x words, reduced over H
    "head_forward": {
        ("sm_80", "16-bit"): _tile(128, 128, 64, 16, 8, 3),
        ("sm_90", "16-bit"): _tile(128, 256, 64, 16, 8, 4),
        ("sm_100", "16-bit"): _tile(128, 256, 64, 16, 8, 4),
        ("gfx942", "16-bit"): _tile(128, 128, 64, 16, 8, 2),
        ("sm_80", "fp32"): _tile(64, 64, 32, 16, 8, 3),
        ("sm_90", "fp32"): _tile(64, 64, 32, 16, 8, 3),
        ("sm_100", "fp32"): _tile(64, 64, 32, 16, 8, 3),
        ("gfx942", "fp32"): _tile(64, 64, 32, 16, 8, 2),
        ("interpreter", "16-bit"): _tile(32, 32, 32, 2, 4, 1),
        ("interpreter", "fp32"): _tile(32, 32, 32, 2, 4, 1),
    },
    # tokens x words, reduced over H, written back
    "logit_grad": {
        ("sm_80", "16-bit"): _tile(128, 128, 32, 16, 8, 4),
        ("sm_90", "16-bit"): _tile(128, 256, 64, 16, 8, 4),
        ("sm_100", "16-bit"): _tile(128, 256, 64, 16, 8, 4),
        ("gfx942", "16-bit"): _tile(128, 128, 64, 16, 8, 2),
        ("sm_80", "fp32"): _tile(64, 64, 32, 16, 8, 2),
        ("sm_90", "fp32"): _tile(64, 64, 32, 16, 8, 3),
        ("sm_100", "fp32"): _tile(64, 64, 32, 16, 8, 3),
        ("gfx942", "fp32"): _tile(64, 64, 32, 16, 8, 2),
        ("interpreter", "16-bit"): _tile(32, 32, 32, 2, 4, 1),
        ("interpreter", "fp32"): _tile(32, 32, 32, 2, 4, 1),
    },
    # tokens x H, reduced over words
    "hidden_grad": {
        ("sm_80", "16-bit"): _tile(128, 64, 128, 16, 8, 3),
        ("sm_90", "16-bit"): _tile(128, 64, 128, 16, 8, 4),
        ("sm_100", "16-bit"): _tile(128, 64, 128, 16, 8, 4),
        ("gfx942", "16-bit"): _tile(128, 64, 128, 16, 8, 2),
        ("sm_80", "fp32"): _tile(64, 32, 64, 16, 8, 3),
        ("sm_90", "fp32"): _tile(64, 32, 64, 16, 8, 3),
        ("sm_100", "fp32"): _tile(64, 32, 64, 16, 8, 4),
        ("gfx942", "fp32"): _tile(64, 32, 64, 16, 8, 2),
        ("interpreter", "16-bit"): _tile(32, 32, 32, 2, 4, 1),
        ("interpreter", "fp32"): _tile(32, 32, 32, 2, 4, 1),
    },
    # words x H, reduced over tokens
    "weight_grad": {
        ("sm_80", "16-bit"): _tile(64, 128, 128, 16, 8, 3),
        ("sm_90", "16-bit"): _tile(64, 128, 256, 16, 8, 4),
        ("sm_100", "16-bit"): _tile(64, 128, 128, 16, 8, 4),
        ("gfx942", "16-bit"): _tile(64, 128, 128, 16, 8, 2),
        ("sm_80", "fp32"): _tile(32, 64, 64, 16, 8, 3),
        ("sm_90", "fp32"): _tile(32, 64, 64, 16, 8, 3),
        ("sm_100", "fp32"): _tile(32, 64, 64, 16, 8, 3),
        ("gfx942", "fp32"): _tile(32, 64, 64, 16, 8, 2),
        ("interpreter", "16-bit"): _tile(32, 32, 32, 2, 4, 1),
        ("interpreter", "fp32"): _tile(32, 32, 32, 2, 4, 1),
    },
}

# With a softcap or a bias: tanh, its slope, or one more operand need registers beside the logits.
GEMMS["head_forward_softcap"] = GEMMS["head_forward"] | {
    ("sm_90", "16-bit"): _tile(128, 128, 64, 16, 8, 4),
    ("sm_100", "16-bit"): _tile(128, 128, 64, 16, 8, 4),
}
GEMMS["logit_grad_softcap"] = GEMMS["logit_grad"] | {
    ("gfx942", "16-bit"): _tile(128, 128, 64, 16, 16, 2),
    ("sm_90", "16-bit"): _tile(128, 128, 64, 16, 8, 4),
    ("sm_100", "16-bit"): _tile(128, 128, 64, 16, 8, 4),
}

# With statistics of the softmax, or a temperature for each token, whatever the head: more beside the logits.
GEMMS["head_forward_statistics"] = GEMMS["head_forward_softcap"] | {}
GEMMS["logit_grad_statistics"] = GEMMS["logit_grad_softcap"] | {}

# The routed backward's GEMMs: a vocabulary block of 128 words with the tokens that keep it.
GEMMS["routed_logit_grad"] = {  # tokens x words, reduced over H
    ("sm_80", "16-bit"): _tile(128, 128, 32, 16, 8, 4),
    ("sm_90", "16-bit"): _tile(128, 128, 64, 8, 8, 3),
    ("sm_100", "16-bit"): _tile(128, 128, 64, 16, 8, 3),
    ("gfx942", "16-bit"): _tile(128, 128, 64, 16, 8, 2),
    ("sm_80", "fp32"): _tile(64, 64, 32, 16, 8, 3),
    ("sm_90", "fp32"): _tile(64, 64, 32, 16, 8, 3),
    ("sm_100", "fp32"): _tile(64, 64, 32, 16, 8, 3),
    ("gfx942", "fp32"): _tile(64, 64, 32, 16, 8, 2),
    # The forward's tile: other shapes round the interpreter's products otherwise, and p - 1 would lose digits.
    ("interpreter", "16-bit"): _tile(32, 32, 32, 2, 4, 1),
    ("interpreter", "fp32"): _tile(32, 32, 32, 2, 4, 1),
}
GEMMS["routed_logit_grad_softcap"] = GEMMS["routed_logit_grad"] | {
    ("gfx942", "16-bit"): _tile(128, 128, 64, 16, 16, 2),
}
GEMMS["routed_weight_grad"] = {  # words x H, reduced over tokens
    ("sm_80", "16-bit"): _tile(32, 128, 128, 16, 8, 3),
    ("sm_90", "16-bit"): _tile(64, 128, 128, 16, 8, 3),
    ("sm_100", "16-bit"): _tile(64, 128, 128, 16, 8, 3),
    ("gfx942", "16-bit"): _tile(64, 128, 128, 16, 8, 2),
    ("sm_80", "fp32"): _tile(32, 64, 64, 16, 8, 3),
    ("sm_90", "fp32"): _tile(32, 64, 64, 16, 8, 3),
    ("sm_100", "fp32"): _tile(32, 64, 64, 16, 8, 3),
    ("gfx942", "fp32"): _tile(32, 64, 64, 16, 8, 2),
    ("interpreter", "16-bit"): _tile(16, 128, 32, 2, 4, 1),
    ("interpreter", "fp32"): _tile(32, 64, 32, 2, 4, 1),
}


def _in_turns(tile: Config, resident: int) -> Config:
    """RESIDENT programs at once on a multiprocessor: the lengths of their segments of tokens are chosen for so many."""
    return {**tile, "RESIDENT": resident}


# With all words of a block in a tile its weight is loaded once for all tokens; short tiles of tokens waste less, and
# small programs, several on a multiprocessor, hide each other's waiting better than stages do. Half the units of H are
# twice the tokens a program, so twice the pairs for what it waits for at every block: less time of few tokens, and as
# much of many. Four programs at once took longer than two (docs/kernels.md has what was tried on sm_90).
GEMMS["routed_hidden_grad"] = {  # tokens x H, reduced over words
    ("sm_80", "16-bit"): _in_turns({**_tile(32, 128, 128, 1, 8, 1), **ALL_REGISTERS}, 2),
    ("sm_90", "16-bit"): _in_turns(_tile(64, 128, 64, 1, 8, 1), 2),
    ("sm_100", "16-bit"): _in_turns(_tile(64, 128, 128, 1, 8, 1), 2),
    # Its registers would hold a whole block's weight, and one program.
    ("gfx942", "16-bit"): _in_turns(_tile(64, 64, 128, 1, 8, 2), 2),
    ("sm_80", "fp32"): _in_turns(_tile(32, 16, 64, 1, 8, 2), 2),
    ("sm_90", "fp32"): _in_turns(_tile(32, 16, 64, 1, 8, 2), 2),
    ("sm_100", "fp32"): _in_turns(_tile(32, 32, 64, 1, 8, 2), 2),
    ("gfx942", "fp32"): _in_turns(_tile(32, 32, 64, 1, 8, 2), 2),
    # Whole blocks, and parts of them: each is one way through the kernel.
    ("interpreter", "16-bit"): _in_turns(_tile(16, 128, 32, 1, 4, 1), 2),
    ("interpreter", "fp32"): _in_turns(_tile(16, 32, 32, 1, 4, 1), 2),
}


def _persistent(tile: Config, flatten: bool, warp_specialize: bool) -> Config:
    return {**tile, "FLATTEN": flatten, "WARP_SPECIALIZE": warp_specialize}


# Operands by tensor descriptors (TMA), 16-bit only, where the hardware has it. FLATTEN fetches the next tile's operands
# during the epilogue of the last: on sm_90, measured on an H200 (benchmarks.tiles, 8192 x 4096 x 128256), the one loop
# that this makes of two costs a fifth, 14.1 ms for 11.6 of the forward and 15.6 for 12.7 of the logits' gradient. On
# sm_100 a warp of its own fetches. The softcap's rows serve heads with a bias, too.
_INTERPRETED = _persistent(_tile(32, 32, 32, 2, 4, 1), True, False)
PERSISTENT: dict[str, dict[str, Config]] = {
    "persistent_forward": {
        "sm_90": _persistent({**_tile(128, 256, 64, 16, 8, 4), **SETTLED}, False, False),
        "sm_100": _persistent(_tile(128, 128, 64, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
    "persistent_forward_softcap": {
        "sm_90": _persistent(_tile(128, 128, 64, 16, 8, 4), False, False),
        "sm_100": _persistent(_tile(128, 128, 64, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
    "persistent_logit_grad": {
        "sm_90": _persistent(_tile(128, 256, 64, 16, 8, 3), False, False),
        "sm_100": _persistent(_tile(128, 128, 64, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
    "persistent_logit_grad_softcap": {
        "sm_90": _persistent(_tile(128, 128, 64, 16, 8, 4), False, False),
        # Specialised warps have 168 registers, and spill: the plain pipeline does not.
        "sm_100": _persistent(_tile(128, 128, 64, 16, 8, 4), False, False),
        "interpreter": _INTERPRETED,
    },
    "persistent_forward_statistics": {
        "sm_90": _persistent(_tile(128, 128, 64, 16, 8, 4), False, False),
        "sm_100": _persistent({**_tile(128, 128, 64, 16, 8, 4), **ALL_REGISTERS}, False, False),
        "interpreter": _INTERPRETED,
    },
    "persistent_logit_grad_statistics": {
        "sm_90": _persistent(_tile(128, 128, 64, 16, 8, 4), False, False),
        # With four stages Triton 3.9 spills two registers.
        "sm_100": _persistent(_tile(128, 128, 64, 16, 8, 3), False, False),
        "interpreter": _INTERPRETED,
    },
    "persistent_hidden_grad": {
        "sm_90": _persistent(_tile(128, 64, 256, 8, 8, 4), False, False),
        "sm_100": _persistent(_tile(128, 64, 128, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
    "persistent_weight_grad": {
        "sm_90": _persistent(_tile(64, 128, 256, 8, 8, 4), False, False),
        "sm_100": _persistent(_tile(64, 128, 256, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
    # With float32 sums of earlier chunks to add to.
    "persistent_weight_grad_partial": {
        "sm_90": _persistent(_tile(64, 128, 256, 8, 8, 4), False, False),
        "sm_100": _persistent(_tile(64, 128, 128, 16, 8, 4), False, True),
        "interpreter": _INTERPRETED,
    },
}

# Triton 3.6 fails to specialise warps in these loops; its plain pipeline does not spill there.
SPECIALISES_WARPS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)

# The small kernels: the same on every GPU, and small enough in the interpreter that a test crosses every border.
SMALL: dict[str, tuple[Config, Config]] = {
    "combine": (
        {"BLOCK_N": 32, "BLOCK_B": 64, "BLOCK_C": 16, "BLOCK_T": 64, "num_warps": 4},
        {"BLOCK_N": 64, "BLOCK_B": 2, "BLOCK_C": 16, "BLOCK_T": 64, "num_warps": 4},
    ),
    "token_statistics": (
        {"BLOCK_N": 32, "BLOCK_B": 32, "num_warps": 4},
        {"BLOCK_N": 64, "BLOCK_B": 2, "num_warps": 4},
    ),
    "count": (
        {"BLOCK_C": 16, "BLOCK_T": 64, "num_warps": 4},
        {"BLOCK_C": 16, "BLOCK_T": 64, "num_warps": 4},
    ),
    "prompts": (
        {"BLOCK_C": 16, "BLOCK_T": 128, "num_warps": 8},
        {"BLOCK_C": 16, "BLOCK_T": 64, "num_warps": 4},
    ),
    "finish": ({"BLOCK_P": 64, "num_warps": 4}, {"BLOCK_P": 2, "num_warps": 4}),
    "gather": ({"BLOCK_N": 4, "BLOCK_H": 512, "num_warps": 4}, {"BLOCK_N": 16, "BLOCK_H": 32, "num_warps": 4}),
    "bias_grad": ({"BLOCK_N": 64, "BLOCK_V": 64, "num_warps": 8}, {"BLOCK_N": 16, "BLOCK_V": 16, "num_warps": 4}),
    # Passes over the workspace: few words at a time in the interpreter, so that a row is several blocks and parts.
    "statistics": (
        {"BLOCK_K": 4, "BLOCK_V": 2048, "num_warps": 8},
        {"BLOCK_K": 2, "BLOCK_V": 32, "num_warps": 4},
    ),
    "gradient": ({"BLOCK_V": 4096, "num_warps": 8}, {"BLOCK_V": 64, "num_warps": 4}),
    "scale": ({"BLOCK": 4096, "num_warps": 8}, {"BLOCK": 256, "num_warps": 4}),
    "row_sum": ({"BLOCK_N": 4, "BLOCK_H": 512, "num_warps": 4}, {"BLOCK_N": 16, "BLOCK_H": 32, "num_warps": 4}),
    "route": ({"BLOCK_N": 32, "BLOCK_B": 64, "num_warps": 4}, {"BLOCK_N": 32, "BLOCK_B": 4, "num_warps": 4}),
    # A program of `routed_hidden_grad` adds to one such segment of tokens, or to several.
    "route_count": ({"SEGMENT": 256, "BLOCK_B": 8, "num_warps": 4}, {"SEGMENT": 32, "BLOCK_B": 2, "num_warps": 4}),
    "route_chunks": ({"num_warps": 8}, {"num_warps": 4}),
    "route_list": ({"SEGMENT": 256, "num_warps": 4}, {"SEGMENT": 32, "num_warps": 4}),
    "dropped_mass": ({"BLOCK_N": 64, "BLOCK_B": 64, "num_warps": 8}, {"BLOCK_N": 32, "BLOCK_B": 4, "num_warps": 4}),
    "routed_bias_grad": (
        {"BLOCK_N": 64, "BLOCK_V": 64, "num_warps": 8},
        {"BLOCK_N": 16, "BLOCK_V": 64, "num_warps": 4},
    ),
}


def select(kernel: str, arch: str, dtype: str) -> dict[str, int]:
    """Launch arguments of a kernel: block sizes, and the num_warps and num_stages that triton takes beside them.

    Args:
        kernel: a key of `GEMMS`, `PERSISTENT` (16-bit, the architectures that it lists) or `SMALL`.
        arch: one of `ARCHITECTURES`. dtype: one of `DTYPES`.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if kernel in GEMMS:
        told = arch.startswith("sm_") and dtype == "fp32"
        return dict(GEMMS[kernel][arch, dtype]) | (ALL_REGISTERS if told else {})
    if kernel in PERSISTENT:
        entry = dict(PERSISTENT[kernel][arch])
        entry["WARP_SPECIALIZE"] = entry["WARP_SPECIALIZE"] and SPECIALISES_WARPS
        return entry
    if kernel not in SMALL:
        raise ValueError(f"kernel: expected one of {', '.join((*GEMMS, *PERSISTENT, *SMALL))}, got {kernel!r}")
    gpu, interpreter = SMALL[kernel]
    return dict(interpreter if arch == "interpreter" else gpu)
