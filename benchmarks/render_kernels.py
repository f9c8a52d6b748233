"""The tables of what GPUs measured by kernel, and of a whole step, for `benchmarks.render`."""

from __future__ import annotations

from typing import Any

from benchmarks.render_gpu import GIB, machine, origin

WAYS = {
    "logits": "the model's own logits, float32 log-softmax",
    "padded": "**clha-fast, padded**",
    "packed": "**clha-fast, packed rows**",
    "shared": "**clha-fast, shared prompts**",
    "no head": "no head at all, padded: the model alone",
}
# Kernels of a step, and those of the vendor's library, which are named by it.
OWN = {
    "persistent_forward_kernel": "forward",
    "persistent_logit_grad_kernel": "logits' gradient",
    "persistent_hidden_grad_kernel": "dhidden",
    "persistent_weight_grad_kernel": "dweight",
    "routed_logit_grad_kernel": "logits' gradient, kept pairs",
    "routed_hidden_grad_kernel": "dhidden, kept pairs",
    "routed_weight_grad_kernel": "dweight, kept pairs",
    "statistics_kernel": "pass over the logits: statistics",
    "gradient_kernel": "pass over the logits: gradient",
}
# The products of a step, of pairs or of all.
PRODUCTS = {"forward": "forward", "logit_grad": "logits' gradient", "hidden_grad": "dhidden", "weight_grad": "dweight"}
LIBRARY = "products of the vendor's library"


def kernels(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown of milliseconds by kernel: a column for each path of each run, the table's own tiles."""
    columns: list[tuple[str, dict[str, float], float]] = []
    for title, run in runs.items():
        rows = {row["run"]: row["kernels"] for row in run["runs"]}
        bound = sum(rows["bound"].values()) / 1e3
        columns += [(f"{path}, {title}", rows[0][path], bound) for path in ("workspace", "fused", "routed")]
    columns.append((f"eager, {title}", rows["eager_hf"], bound))
    lines = [f"| ms | {' | '.join(title for title, _, _ in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, label in (OWN | {"nvjet": LIBRARY}).items():
        cells = [sum(t for kernel, t in times.items() if kernel.startswith(name)) / 1e3 for _, times, _ in columns]
        lines.append(f"| {label} | {' | '.join(f'{t:.2f}' if t else '-' for t in cells)} |")
    sums = [sum(times.values()) / 1e3 for _, times, _ in columns]
    known = [
        sum(t for kernel, t in times.items() if kernel.startswith((*OWN, "nvjet"))) / 1e3 for _, times, _ in columns
    ]
    lines.append("| all others | " + " | ".join(f"{a - b:.2f}" for a, b in zip(sums, known, strict=True)) + " |")
    lines.append("| sum | " + " | ".join(f"{a:.2f}" for a in sums) + " |")
    lines.append("| three bare products of that run | " + " | ".join(f"{b:.2f}" for _, _, b in columns) + " |")
    lines.append(
        "| sum over them | " + " | ".join(f"{a / b:.2f} x" for a, (_, _, b) in zip(sums, columns, strict=True)) + " |"
    )
    last = list(runs.values())[-1]
    commits = ", ".join(f"{title} {run['environment']['commit']}" for title, run in runs.items())
    text = (
        f"{last['shape']}, bfloat16; routed: a softmax of about 2 nats, `max_dropped_mass=0.01`. Time on the device by "
        f"torch's profiler, the mean of three steps, kernels of 3 microseconds and more. `python -m benchmarks.tiles`, "
        f"{origin(last['environment'])} ({commits})."
    )
    return "\n".join([*lines, "", text])


def compared(report: dict[str, Any]) -> str:
    """Markdown of milliseconds by kernel before and after a commit: a column for each profile."""
    profiles = sorted(report["profiles"], key=lambda row: (row["path"], len(row["shape"]), row["shape"]))
    titles = [f"{row['path']}, {row['shape'].replace('x', ' x ')}, {row['commit']}" for row in profiles]
    lines = [f"| ms | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    parts = {label: (f"persistent_{name}_kernel", f"routed_{name}_kernel") for name, label in PRODUCTS.items()}
    parts |= {"which pairs are kept": ("route_kernel",), "lists of them": ("route_list", "route_pieces")}
    sums = [0.0] * len(profiles)
    for label, names in parts.items():
        cells = [sum(t for kernel, t in row["kernels"].items() if kernel.startswith(names)) / 1e3 for row in profiles]
        sums = [a + b for a, b in zip(sums, cells, strict=True)]
        lines.append(f"| {label} | {' | '.join(f'{t:.2f}' if t else '-' for t in cells)} |")
    rest = [row["sum_ms"] - known for row, known in zip(profiles, sums, strict=True)]
    lines.append("| all others | " + " | ".join(f"{t:.2f}" for t in rest) + " |")
    lines.append("| sum | " + " | ".join(f"{row['sum_ms']:.2f}" for row in profiles) + " |")
    text = (
        "bfloat16, a softmax of 2.0 nats for routed, `max_dropped_mass=0.01`. Time on the device by torch's profiler, "
        "the mean of three steps; parts of the 14 longest kernels, the sum of all of 3 microseconds and more. "
        "`benchmarks.tiles.by_kernel` of both commits, one after the other in one run, by hand: no command of the "
        "repository writes the file (`benchmarks/results/gpu-h100-kernels.json`), "
        f"{machine(report['environment'])}, {report['environment']['date']}."
    )
    return "\n".join([*lines, "", text])


def routed_parts(report: dict[str, Any]) -> str:
    """Markdown of what routed dhidden takes with one part left out at a time: a column a shape."""
    parts = {
        "own": "the whole kernel",
        "no_add": "without its adds",
        "store": "plain stores for adds",
        "add_in_place": "every add to the same 64 rows of a program",
        "add_alone": "its adds alone: no products, nor what they read",
        "no_barrier": "without the barrier between blocks",
    }
    shapes = report["parts_us"]
    lines = [f"| routed dhidden, ms | {' | '.join(shape.replace('x', ' x ') for shape in shapes)} |"]
    lines.append("|---" * (len(shapes) + 1) + "|")
    for name, label in parts.items():
        lines.append(f"| {label} | {' | '.join(f'{found[name] / 1e3:.2f}' for found in shapes.values())} |")
    text = (
        "Tiles of 64 tokens x 128 of H, a softmax of 2.0 nats, `max_dropped_mass=0.01`; torch's profiler, the mean of "
        f"three steps, by hand (`benchmarks/results/gpu-routed.json`), {origin(report['environment'])}."
    )
    return "\n".join([*lines, "", text])


def step(report: dict[str, Any]) -> str:
    """Markdown of whole training steps by way."""
    lines = [
        "| forward + backward of model and loss | ms | over the logits' way | peak above weights and gradients |",
        "|---|---|---|---|",
    ]
    for way, label in WAYS.items():
        row = report["ways"][way]
        over = f"{row['over_logits']:.2f} x"
        lines.append(f"| {label} | {row['seconds'] * 1e3:.0f} | {over} | {row['peak_bytes'] / GIB:.1f} GiB |")
    text = (
        f"A Llama of {report['parameters'] / 1e9:.1f} B parameters (16 layers, H 2048, V 128256), bfloat16, random "
        f"weights, no checkpointing: 4 prompts of 256 tokens with 4 responses of 256 to 512, "
        f"{report['padded_tokens']:,} tokens padded, {report['shared_tokens']:,} with prompts shared, "
        f"{report['scored_tokens']:,} scored (the logits' way forms all). Medians over "
        f"{report['ways']['logits']['rounds']} interleaved rounds. "
        f"`python -m benchmarks.step`, {origin(report['environment'])}."
    )
    return "\n".join([*lines, "", text])
