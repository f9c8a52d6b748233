"""Compiles the Triton kernels for GPUs that are not there, and reports what the compilers made of them, as JSON.

A program of its own (`python -m tests.support.compile_kernels`), because the tests' own process runs Triton's
interpreter, under which nothing can be compiled. Arguments are specialised as a launch would: an int 1 becomes a
constant, multiples of 16 and pointers are known as such, None is a constant.

`RECORD` keeps what was found, by a key of everything that it came of: the kernel's source and what it calls, arguments,
options, target, compilers. What has another key is compiled, so a change that is not recorded takes time, no more;
`--write` records it, `--anew` compiles everything.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from csrc_triton import backward, combine, configs, forward, persistent_backward, routed, routing, softmax
from csrc_triton import clha as ranking

GPU = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
RECORD = Path(__file__).with_name("compiled_kernels.jsonl")
POINTERS = {"16-bit": "*bf16", "fp32": "*fp32", "tf32": "*fp32"}
MATRIX = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b", "gfx942": r"\bv_mfma_"}

ROUTE_WORDS = 128
N, V, H, CHUNK_N, CHUNK_V, P, C = 8192, 128256, 4096, 8192, 4096, 64, 512
# H of each variant that is not plain: rows not aligned, and aligned rows that end within a block.
WIDTH = {"odd": 1001, "ragged": 2320}


# Of statistics: what else a kernel reads and writes with them, and does not have without.
EXTRAS = {"temperature_ptr": "temperature", "entropy_grad_ptr": "moments", "entropy_ptr": "moments"}


def extras(variant: str) -> dict[str, Any]:
    """Arguments of kernels that know of temperatures for each token and of moments."""
    pointers = {
        name: "*fp32" if of in variant else None for name, of in (EXTRAS | {"block_moments_ptr": "moments"}).items()
    }
    has_moments = "moments" in variant
    return pointers | {"HAS_TEMPERATURE": "temperature" in variant, "MOMENTS": has_moments, "HAS_ENTROPY": has_moments}


def head_arguments(kernel: str, arch: str, dtype: str, variant: str, launch: dict[str, int]) -> dict[str, Any]:
    """Values as the host passes them; strings stand for pointers."""
    x, n, v, h = POINTERS[dtype], N, V, WIDTH.get(variant, H)
    ones = variant == "ones"
    if ones:
        n = v = 1
        # The host gives the persistent backward multiples of 16 alone (`Head.is_persistent_backward`).
        h = 16 if kernel.startswith("persistent") and "grad" in kernel else 1
    bias, softcap = "bias" in variant, "softcap" in variant
    partial = variant == "partial" or kernel.endswith("_partial")
    common = {"bias_ptr": x if bias else None, "V": v, "H": h, "stride_weight_v": h, "stride_weight_h": 1}
    chunk = {
        "first_token": 0,
        "first_word": 0 if ones else 4096,
        # The backward's are padded to whole tiles.
        "chunk_tokens": 1 if ones and kernel == "persistent_forward" else CHUNK_N,
        "chunk_words": CHUNK_V,
        "num_words": 1 if ones else CHUNK_V,
    }
    scales = {"pre_scale": 1.0, "post_scale": 1.0, "factor": 1.0, "ignore_index": -100}
    flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap, "PRECISION": "tf32" if dtype == "tf32" else "ieee"}
    flags |= {"PTX": arch.startswith("sm_"), "AMD": arch.startswith("gfx"), "POSITIVE": True}
    pointers = {
        "hidden_ptr": x,
        "weight_ptr": x,
        "rows_ptr": x,
        "dlogits_ptr": x,
        "mass_ptr": x,
        "dweight_ptr": x,
        "dhidden_ptr": x,
        "targets_ptr": "*i64",
        "row_index_ptr": "*i64",
        "order_ptr": "*i64",
        "row_ends_ptr": "*i64",
        "count_ptr": "*i32",
        "lse_ptr": "*fp64",
        "list_ptr": "*i32",
        "ends_ptr": "*i32",
        "firsts_ptr": "*i32",
        "used_ptr": "*i32",
        "first_row_ptr": "*i32",
        "owner_ptr": "*i32",
        "counts_ptr": "*i32",
    }
    sizes = {"M": n, "padded": n, "N": n, "stride_hidden_n": h, "stride_hidden_h": 1, "stride_rows_n": h}
    blocks = -(-v // ROUTE_WORDS)
    sizes |= {"num_blocks": blocks, "num_statistics": blocks, "most_blocks": 1 if v == 1 else 256}
    sizes |= {"num_segments": 1 if n == 1 else n // 256, "span": 1 if n == 1 else 4}
    sizes |= {"chunk": 1, "num_chunks": 1 if n == 1 else 32, "rows": 1 if n == 1 else 2**18, "TILE": 128}
    sizes |= {"part_words": 1024, "size": 1 if ones else CHUNK_V * h}
    sizes |= {"first_position": 0, "num_rows": n, "num_columns": -(-blocks // 8) * 8}
    if kernel.startswith("persistent"):
        operands = {"rows_desc": "NH", "weight_desc": "VH", "dlogits_desc": "NV"}
        pointers |= {
            name: "tensordesc<bf16[{}, {}]>".format(*(launch[f"BLOCK_{axis}"] for axis in axes))
            for name, axes in operands.items()
        }
    # A routed forward's statistics are of the blocks that it routes to.
    statistic = min(launch.get("BLOCK_V", ROUTE_WORDS), ROUTE_WORDS if "routed" in variant else 256)
    flags |= {"STATISTIC": statistic, "ROUTE_WORDS": ROUTE_WORDS, "RATIO": 1, "HAS_ORDER": True}
    scales["max_dropped_mass"] = 0.01
    variants = {"HAS_ROW_INDEX": True, "HAS_PARTIAL": partial}
    if kernel == "route_chunks":
        variants["BLOCK_B"] = 2048
    variants |= {"EVEN_H": h % launch["BLOCK_H"] == 0 if "BLOCK_H" in launch else True, "WIDE": variant == "wide"}
    own = extras("moments" if kernel == "token_statistics" else variant)
    return common | chunk | scales | flags | pointers | sizes | variants | own


def ranking_arguments(variant: str) -> dict[str, Any]:
    prompts, candidates, tokens = (1, 1, 1) if variant == "ones" else (P, C, N)
    flags = {"HAS_PROMPTS": True, "HAS_REWARDS": True, "HAS_SFT_INDEX": True, "HAS_PROMPT_COUNT": True}
    flags |= {"NOISE": 1, "REDUCE": 1, "COUNT_PAIRS": True, "SFT_MEAN": False, "SFT_SQUARED": True}
    pointers = dict.fromkeys(("targets_ptr", "token_ends_ptr", "prompt_ends_ptr", "sft_index_ptr"), "*i64")
    pointers |= {"lengths_ptr": "*i32", "pair_counts_ptr": "*i32", "sums_ptr": "*fp64", "partials_ptr": "*fp64"}
    floats = ("margin", "reward_margin", "rank_weight", "sft_weight", "reward_floor")
    return (
        flags
        | pointers
        | dict.fromkeys(floats, 1.0)
        | {"lse_ptr": "*fp64"}
        | {"N": tokens, "C": candidates, "P": prompts, "num_blocks": 501, "num_distances": 1, "ignore_index": -100}
        | {"first_prompt": 8, "first_token": 310}
    )


KERNELS = {
    "persistent_forward": forward.persistent_forward_kernel,
    "persistent_forward_softcap": forward.persistent_forward_kernel,
    "persistent_forward_statistics": forward.persistent_forward_kernel,
    "persistent_logit_grad_statistics": persistent_backward.persistent_logit_grad_kernel,
    "persistent_logit_grad": persistent_backward.persistent_logit_grad_kernel,
    "persistent_logit_grad_softcap": persistent_backward.persistent_logit_grad_kernel,
    "persistent_hidden_grad": persistent_backward.persistent_hidden_grad_kernel,
    "persistent_weight_grad": persistent_backward.persistent_weight_grad_kernel,
    "persistent_weight_grad_partial": persistent_backward.persistent_weight_grad_kernel,
    "routed_logit_grad": routed.routed_logit_grad_kernel,
    "routed_logit_grad_softcap": routed.routed_logit_grad_kernel,
    "routed_weight_grad": routed.routed_weight_grad_kernel,
    "routed_hidden_grad": routed.routed_hidden_grad_kernel,
    "routed_bias_grad": routed.routed_bias_grad_kernel,
    "route": routing.route_kernel,
    "route_count": routing.route_count_kernel,
    "route_chunks": routing.route_chunks_kernel,
    "route_list": routing.route_list_kernel,
    "dropped_mass": routing.dropped_mass_kernel,
    "head_forward": forward.head_forward_kernel,
    "head_forward_softcap": forward.head_forward_kernel,
    "head_forward_statistics": forward.head_forward_kernel,
    "logit_grad_statistics": backward.logit_grad_kernel,
    "logit_grad": backward.logit_grad_kernel,
    "logit_grad_softcap": backward.logit_grad_kernel,
    "hidden_grad": backward.hidden_grad_kernel,
    "weight_grad": backward.weight_grad_kernel,
    "bias_grad": backward.bias_grad_kernel,
    "gather": backward.gather_kernel,
    "row_sum": backward.row_sum_kernel,
    "scale": backward.scale_kernel,
    "combine": combine.combine_kernel,
    "token_statistics": combine.token_statistics_kernel,
    "prompts": ranking.prompts_kernel,
    "finish": ranking.finish_kernel,
    "statistics": softmax.statistics_kernel,
    "gradient": softmax.gradient_kernel,
    "count": ranking.count_kernel,
}


def workspace_arguments(dtype: str, variant: str) -> dict[str, Any]:
    """The passes over the workspace: a vocabulary of whole vectors, or one that only its padding makes so."""
    words = 50257 if variant == "odd" else V
    pointers = {"z_ptr": POINTERS[dtype], "targets_ptr": "*i64", "lse_ptr": "*fp64"} | extras(variant)
    sizes = {"N": N, "V": words, "width": (words + 63) // 64 * 64, "stride_z": 50304, "ignore_index": -100}
    scales = {"pre_scale": 1.0, "post_scale": 1.5, "HAS_SOFTCAP": "softcap" in variant}
    return pointers | sizes | scales | {"SPLITS": 1}


def _variants(kernel: str) -> list[str]:
    """What changes the code of a kernel's entry in the table."""
    if kernel.endswith("_statistics"):
        return ["moments", "temperature", "bias+softcap+moments+temperature"]
    return ["softcap", "bias", "bias+softcap"] if kernel.endswith("_softcap") else ["plain"]


def cases() -> list[tuple[str, str, str, str]]:
    """(kernel, architecture, dtype, variant) of everything that is compiled: the table, and what changes code."""
    listed = []
    for arch in GPU:
        for kernel in configs.GEMMS:
            variants = _variants(kernel)
            if kernel == "weight_grad":
                variants.append("partial")
            if kernel == "head_forward":
                variants.append("routed")
            listed += [(kernel, arch, "16-bit", variant) for variant in variants]
            listed.append((kernel, arch, "fp32", variants[-1]))
        listed += [(kernel, arch, "16-bit", "plain") for kernel in configs.SMALL]
        for kernel, entries in configs.PERSISTENT.items():
            variants = _variants(kernel)
            if kernel == "persistent_forward":
                variants.append("routed")
            if kernel == "persistent_forward_softcap":
                variants.append("routed softcap")
            listed += [(kernel, arch, "16-bit", variant) for variant in variants if arch in entries]
    listed += [(kernel, "sm_90", "16-bit", v) for v in ("odd", "wide") for kernel in ("head_forward", "hidden_grad")]
    # Sizes and strides of 1, which triton turns into constants. TMA takes one column of rows that are 16 bytes apart.
    once = [kernel for kernel in KERNELS if not kernel.endswith(("_softcap", "_statistics")) or kernel in configs.SMALL]
    listed += [(kernel, "sm_90", "16-bit", "ones") for kernel in once]
    for kernel in ("head_forward", "logit_grad", "hidden_grad", "weight_grad"):
        listed += [(kernel, "sm_90", "16-bit", "ragged"), (kernel, "sm_90", "tf32", "plain")]
    listed += [("dropped_mass", arch, "16-bit", "bias+softcap") for arch in GPU]
    for kernel in ("statistics", "gradient"):
        both = ("softcap", "softcap+moments+temperature")
        listed += [(kernel, arch, "16-bit", variant) for arch in ("sm_90", "gfx942") for variant in both]
        listed += [(kernel, "sm_90", "16-bit", "odd"), (kernel, "sm_90", "fp32", "plain")]
    return listed


def specialise(kernel: str, values: dict[str, Any], launch: dict[str, int]) -> tuple[dict, dict, dict]:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(KERNELS[kernel].params):
        name = parameter.name
        value = launch[name] if name in launch else values.get(name, "*fp32")
        varies = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not varies):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "fp32" if isinstance(value, float) else "i32"
        is_aligned = isinstance(value, int) and value % 16 == 0 and not varies
        if (isinstance(value, str) and value.startswith("*")) or is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def entry_of(case: tuple[str, str, str, str]) -> str:
    """The row of the table that serves it."""
    kernel, _, dtype, variant = case
    is_pass = kernel in ("statistics", "gradient")
    return "16-bit" if dtype == "16-bit" and (is_pass or variant not in ("odd", "wide", "ones")) else "fp32"


def source_of(case: tuple[str, str, str, str]) -> tuple[Any, dict[str, int], dict[str, int]]:
    """Triton's source of a case, its block sizes and flags, and the compiler's options."""
    from triton.compiler import ASTSource

    kernel, arch, dtype, variant = case
    launch = configs.select(kernel, arch, entry_of(case))
    values = (
        workspace_arguments(dtype, variant)
        if kernel in ("statistics", "gradient")
        else ranking_arguments(variant)
        if kernel in ("combine", "count", "prompts", "finish")
        else head_arguments(kernel, arch, dtype, variant, launch)
    )
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in launch}
    return ASTSource(KERNELS[kernel], *specialise(kernel, values, launch)), launch, options


def key(case: tuple[str, str, str, str]) -> str:
    """Of all that a case's row comes of. Triton's own has paths and bytes of its files, this one their version."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    source, _, options = source_of(case)
    readers = [inspect.getsource(reader) for reader in (amd_usage, nvidia_usage, nvidia_registers)]
    parts = (case, source.hash(), options, triton.__version__, make_backend(GPUTarget(*GPU[case[1]])).hash())
    whole = (*parts, sorted(get_cache_invalidating_env_vars().items()), readers, MATRIX)
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:32]


def compile_case(case: tuple[str, str, str, str]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, arch, dtype, variant = case
    source, launch, options = source_of(case)
    compiled = triton.compile(source, target=GPUTarget(*GPU[arch]), options=options)
    usage = amd_usage(compiled.asm["amdgcn"]) if arch == "gfx942" else nvidia_usage(compiled.asm["cubin"], MATRIX[arch])
    return {
        "kernel": kernel,
        "arch": arch,
        "entry": entry_of(case),
        "dtype": dtype,
        "variant": variant,
        "blocks": "x".join(str(launch[name]) for name in launch if name.startswith("BLOCK")),
        "warps": options["num_warps"],
        "shared": compiled.metadata.shared,
        **usage,
    }


def amd_usage(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s*(\d+)", assembly).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
        "matrix": len(re.findall(MATRIX["gfx942"], assembly)),
        "fma": len(re.findall(r"\bv_(?:pk_)?fma\w*_f32", assembly)),
        "vectors": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", assembly)),
        "tma": 0,
        "reductions": len(re.findall(r"\b(?:global|buffer)_atomic_add_f32 (?!.*\bsc0\b)", assembly)),
        "atomics": len(re.findall(r"\b(?:global|buffer|flat)_atomic_\w+ .*\bsc0\b", assembly)),
        # A wait that the kernel wrote itself, and nothing but waits and scalars up to the barrier.
        "drained": len(
            re.findall(r"ASMSTART\n\ts_waitcnt vmcnt\(0\)\n(?:\s*(?:[;.]|s_mov|s_wait).*\n)*\ts_barrier", assembly)
        ),
        "maxreg": 0,
        "instructions": len(re.findall(r"^\s+[vs]_\w+", assembly, re.MULTILINE)),
    }


def nvidia_usage(cubin: bytes, matrix: str) -> dict[str, Any]:
    """Registers and spills of a kernel for NVIDIA, and how many of its instructions are of the kinds that matter."""
    sass = cuobjdump("-sass", cubin)
    resources = nvidia_registers(cubin)
    return {
        "registers": resources["registers"],
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)) + resources["local"],
        "stack": resources["stack"],
        "matrix": len(re.findall(matrix, sass)),
        "fma": len(re.findall(r"\bFFMA2?\b", sass)),
        "vectors": len(re.findall(r"\bLDG\.E\.128\b", sass)),
        "tma": len(re.findall(r"\bUTMALDG\b", sass)),
        "reductions": len(re.findall(r"\bREDG?\.E\.ADD\.F32", sass)),
        "atomics": len(re.findall(r"\bATOM[G.]", sass)),
        "drained": 0,
        "maxreg": len(re.findall(r"\bUSETMAXREG\b", sass)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,5}\*/ +[A-Z@]", sass)),
    }


def nvidia_registers(cubin: bytes) -> dict[str, int]:
    """Registers, and the stack and local memory, in bytes, that a spill takes."""
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", cuobjdump("-res-usage", cubin))
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def cuobjdump(flag: str, cubin: bytes) -> str:
    import triton.backends.nvidia as nvidia

    tool = str(Path(nvidia.__file__).parent / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout


def recorded() -> dict[str, dict[str, Any]]:
    """Rows by key."""
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
    return {line.pop("key"): line for line in map(json.loads, lines)}


def rows(anew: bool) -> dict[str, dict[str, Any]]:
    """A row for each case, by its key, in order."""
    known, keys = {} if anew else recorded(), {key(case): case for case in cases()}
    missing = [name for name in keys if name not in known]
    if missing:
        with ProcessPoolExecutor(2) as pool:
            made = pool.map(compile_case, (keys[name] for name in missing), chunksize=1)
            known |= zip(missing, made, strict=True)
    return {name: known[name] for name in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anew", action="store_true", help="compile what is recorded, too")
    parser.add_argument("--write", action="store_true", help=f"record the rows in {RECORD.name}")
    given = parser.parse_args()
    found = rows(given.anew)
    if given.write:
        lines = [json.dumps({"key": name, **row}) + "\n" for name, row in found.items()]
        RECORD.write_text("".join(lines), encoding="utf-8")
    json.dump(list(found.values()), sys.stdout)


if __name__ == "__main__":
    main()
