"""The tables of what a GPU measured, for `benchmarks.render`: the loss by method, kernels by name, a whole step."""

from __future__ import annotations

from typing import Any

LABELS = {
    "workspace": "**clha-fast, workspace**",
    "fused": "**clha-fast, fused**",
    "torch_compile": "eager under `torch.compile`",
    "eager_hf": "eager: logits, float32 log-softmax",
    "trl_chunked_logprob": "TRL's chunked log-probabilities",
    "liger_fused_linear_ce": "Liger's fused linear cross-entropy (mean token loss only)",
    "cce": "CCE, gradients filtered",
    "cce_exact": "CCE, exact",
    "bound": "three bare matrix products (the bound)",
}
WAYS = {
    "logits": "the model's own logits, float32 log-softmax",
    "padded": "**clha-fast, padded**",
    "packed": "**clha-fast, packed rows**",
    "shared": "**clha-fast, shared prompts**",
    "no head": "no head at all, padded: the model alone",
}
GIB = 2**30
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
LIBRARY = "products of the vendor's library"


def origin(environment: dict[str, Any]) -> str:
    """Device, releases and commit of a run."""
    e, packages = environment, environment["packages"]
    return (
        f"{e['device']}, driver {e['gpu'].split(', ')[1]}, torch {packages['torch']} (CUDA {e['cuda']}), Triton "
        f"{packages['triton']}, {e['date']}, commit {e['commit']}"
    )


def shapes(report: dict[str, Any], names: list[str] | None = None, mode: str = "scored") -> str:
    """Markdown of forward and backward by method: a column for each of the shapes (None: all), their origin below."""
    entries = [e for e in report["shapes"] if e["mode"] == mode and (names is None or e["shape"] in names)]
    alone = len(entries) == 1
    head = ["ms", "over the bound", "peak above inputs"] if alone else [e["shape"] for e in entries]
    lines = [f"| forward + backward of the loss | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method, label in LABELS.items():
        rows = [e["methods"].get(method, {}) for e in entries]
        if not any("seconds" in row for row in rows):
            continue
        cells = [_alone(rows[0])] if alone else [_time(row) for row in rows]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    rounds = sorted({row["rounds"] for e in entries for row in e["methods"].values() if "rounds" in row})
    peers = report["environment"]["packages"]
    peaks = {e["peaks_commit"] for e in entries if "peaks_commit" in e}
    sizes = f" = {entries[0]['shape']}" if alone else ""
    text = (
        f"N x H x V{sizes}, bfloat16, random weights; medians over "
        f"{' or '.join(map(str, rounds))} interleaved rounds, ratios within a round. `python -m benchmarks.gpu`, "
        f"{origin(report['environment'])}; Liger {peers['liger-kernel']}, CCE {peers['cut-cross-entropy']}, "
        f"TRL {peers['trl']}."
    )
    if alone and peaks:
        text += f" Peaks: commit {', '.join(sorted(peaks))}."
    return "\n".join([*lines, "", text])


def _time(row: dict[str, Any]) -> str:
    return f"{row['seconds'] * 1e3:.1f} ms, {row['over_bound']:.2f} x" if "seconds" in row else "-"


def _alone(row: dict[str, Any]) -> str:
    low, high = row["over_bound_quartiles"]
    peak = f"{row['peak_bytes'] / GIB:.1f} GiB" if row.get("peak_bytes") else "-"
    return f"{row['seconds'] * 1e3:.1f} | {row['over_bound']:.2f} x [{low:.2f}, {high:.2f}] | {peak}"


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
