"""The tables of what a GPU measured, for `benchmarks.render`: the loss by method, kernels by name, a whole step."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

# Runs of `benchmarks.gpu` in benchmarks/results, of all devices, oldest first: of the same device, shape, mode and
# method the last one counts.
FILES = ("gpu-first.json", "gpu.json", "gpu-h100.json")
# How a failure begins that says nothing of the method: an earlier run's figure stays.
UNSAID = ("out of time", "not checked: ", "not installed: ")
LABELS = {
    "workspace": "**clha-fast, workspace**",
    "fused": "**clha-fast, fused**",
    "routed": "**clha-fast, routed (1% of the mass left out)**",
    "torch_compile": "eager under `torch.compile`",
    "eager_hf": "eager: logits, float32 log-softmax",
    "trl_chunked_logprob": "TRL's chunked log-probabilities",
    "liger_fused_linear_ce": "Liger's fused linear cross-entropy (mean token loss only)",
    "cce": "CCE, gradients filtered",
    "cce_exact": "CCE, exact",
    "bound": "three bare matrix products (the bound)",
}
# What a sentence has of them.
BRIEF = {
    "workspace": "workspace",
    "fused": "fused",
    "torch_compile": "compiled eager",
    "trl_chunked_logprob": "TRL",
    "liger_fused_linear_ce": "Liger (mean token loss only)",
    "eager_hf": "eager:",
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
# The products of a step, of pairs or of all.
PRODUCTS = {"forward": "forward", "logit_grad": "logits' gradient", "hidden_grad": "dhidden", "weight_grad": "dweight"}
LIBRARY = "products of the vendor's library"


def by_device(folder: Path) -> dict[str, dict[str, Any]]:
    """One report for each device of the runs that a folder has, the device measured first in front."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in (folder / name for name in FILES):
        if path.exists():
            report = json.loads(path.read_text())
            runs.setdefault(report["environment"]["device"], []).append(report)
    return {device: merged(reports) for device, reports in runs.items()}


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of a device's runs, oldest first; every method's row has the environment of its `run`.

    A peak that a later run did not take stays, with the commit that it is of.
    """
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        for entry in report["shapes"]:
            kept = entries.setdefault((entry["shape"], entry["mode"]), {"entropy": None, "methods": {}})
            kept |= {name: value for name, value in entry.items() if name != "methods" and value is not None}
            for name, row in entry["methods"].items():
                before = kept["methods"].get(name, {})
                if before and row.get("failed", "").startswith(UNSAID):
                    continue
                new = row | {"run": report["environment"]}
                if row.get("peak_bytes"):
                    new["peak_commit"] = entry.get("peaks_commit", report["environment"]["commit"])
                elif "peak_commit" in before:
                    new |= {name: before[name] for name in ("peak_bytes", "peak_commit")}
                kept["methods"][name] = new
    return {**reports[-1], "shapes": list(entries.values())}


def origin(environment: dict[str, Any]) -> str:
    """Device, releases and commit of a run."""
    return f"{_machine(environment)}, {environment['date']}, commit {environment['commit']}"


def _machine(environment: dict[str, Any]) -> str:
    e, packages = environment, environment["packages"]
    return (
        f"{e['device']}, driver {e['gpu'].split(', ')[1]}, torch {packages['torch']} (CUDA {e['cuda']}), Triton "
        f"{packages['triton']}"
    )


def _timed(entries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of every method that has a time at one of the shapes, in the order of the labels."""
    found = {method: [e["methods"].get(method, {}) for e in entries] for method in LABELS}
    return {method: rows for method, rows in found.items() if any("seconds" in row for row in rows)}


def origins(entries: list[dict[str, Any]], brief: bool = False) -> str:
    """Where a table's times come from: the run that most of them are of, and which are of other runs.

    brief: the first of them by its commit alone.
    """
    cells = [
        (LABELS[method].strip("*"), entry["shape"], row["run"])
        for method, rows in _timed(entries).items()
        for entry, row in zip(entries, rows, strict=True)
        if "seconds" in row
    ]
    runs = {run["commit"]: run for _, _, run in cells}
    (main, _), *_ = Counter(run["commit"] for _, _, run in cells).most_common(1)
    text = f"commit {main}" if brief else origin(runs[main])
    for commit, run in runs.items():
        if commit == main:
            continue
        names = []
        for label in dict.fromkeys(label for label, _, other in cells if other["commit"] == commit):
            own = [shape for name, shape, other in cells if name == label and other["commit"] == commit]
            whole = len(own) == sum(name == label for name, _, _ in cells)
            names.append(label if whole else f"{label} at {' and '.join(own)}")
        same = all(run[key] == runs[main][key] for key in ("device", "gpu", "cuda", "packages"))
        said = f"commit {commit}, {run['date']}" if same else f"{origin(run)}; {peers_of(run)}"
        text += f" ({said}: {'; '.join(names)})"
    return text


def rounds_of(entries: list[dict[str, Any]]) -> str:
    """How many rounds the medians are over, and where they are of others."""
    counts: dict[str, set[int]] = {}
    for e in entries:
        counts.setdefault(e["shape"], set()).update(row["rounds"] for row in e["methods"].values() if "rounds" in row)
    said = {shape: " or ".join(map(str, sorted(found))) for shape, found in counts.items()}
    (most, _), *_ = Counter(said.values()).most_common(1)
    others = [f"{rounds} at {shape}" for shape, rounds in said.items() if rounds != most]
    return f"{most} interleaved rounds" + (f" ({', '.join(others)})" if others else "")


def peers_of(environment: dict[str, Any]) -> str:
    packages = environment["packages"]
    return f"Liger {packages['liger-kernel']}, CCE {packages['cut-cross-entropy']}, TRL {packages['trl']}"


def short(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "H100"."""
    return device.removeprefix("NVIDIA ").split()[0]


def measured(report: dict[str, Any], mode: str, names: list[str] | None = None) -> list[dict[str, Any]]:
    """The shapes of a mode (None: all) at which something was timed."""
    return [
        entry
        for entry in report["shapes"]
        if entry["mode"] == mode and (names is None or entry["shape"] in names) and any(_timed([entry]))
    ]


def shapes(report: dict[str, Any]) -> str:
    """Markdown of forward and backward by method on scored rows: a column for each shape, their origin below.

    "" where nothing was timed.
    """
    entries, e = measured(report, "scored"), report["environment"]
    if not entries:
        return ""
    lines = _head(e, "forward + backward of the loss", entries)
    for method, rows in _timed(entries).items():
        lines.append(f"| {LABELS[method]} | {' | '.join(map(_time, rows))} |")
    text = (
        f"N x H x V, bfloat16, random weights; medians over {rounds_of(entries)}, ratios within a round. "
        f"`python -m benchmarks.gpu`, {origins(entries)}; {peers_of(e)}."
    )
    return "\n".join([*lines, "", text])


def peaked(report: dict[str, Any]) -> str:
    """The same at a peaked softmax, and what the routed backward kept; "" where nothing was timed."""
    entries = measured(report, "peaked")
    if not entries:
        return ""
    lines = _head(report["environment"], "a softmax of about 2 nats", entries)
    for method, rows in _timed(entries).items():
        cells = [_time(row) + _quartiles(row) for row in rows]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    lines.append("| entropy of the softmax, nats | " + " | ".join(f"{e['entropy']:.2f}" for e in entries) + " |")
    for field, label in (
        ("kept_share", "(token, block) pairs that `routed` kept"),
        ("mean_dropped_mass", "softmax mass that it left out, mean over tokens"),
    ):
        if any(field in entry for entry in entries):
            shares = [f"{entry[field]:.2%}" if field in entry else "-" for entry in entries]
            lines.append(f"| {label} | {' | '.join(shares)} |")
    brackets = (
        " [quartiles]" if any(map(_quartiles, (row for rows in _timed(entries).values() for row in rows))) else ""
    )
    text = (
        f"N x H x V, bfloat16, random weights scaled to that entropy, targets drawn from the softmax; medians over "
        f"{rounds_of(entries)}, ratios{brackets} within a round. `python -m benchmarks.gpu`, {origins(entries)}; "
        f"{peers_of(report['environment'])}."
    )
    return "\n".join([*lines, "", text])


def _head(environment: dict[str, Any], title: str, entries: list[dict[str, Any]]) -> list[str]:
    head = [f"{environment['device']}: {title}", *(e["shape"] for e in entries)]
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]


def _time(row: dict[str, Any]) -> str:
    if "seconds" not in row:
        return row["failed"] if row.get("failed") == "out of memory" else "-"
    return f"{row['seconds'] * 1e3:.1f} ms, {row['over_bound']:.2f} x"


def _quartiles(row: dict[str, Any]) -> str:
    low, high = row.get("over_bound_quartiles") or (None, None)
    return "" if low is None else f" [{low:.2f}, {high:.2f}]"


def headline(reports: dict[str, dict[str, Any]], shape: str, long: str) -> str:
    """Markdown of one shape on all devices, and a sentence on a long one, as README has it."""
    entries = {d: found for d, report in reports.items() if (found := measured(report, "scored", [shape]))}
    methods = [m for m in LABELS if any(m in _timed(found) for found in entries.values())]
    columns = [["forward + backward of the loss", *(LABELS[m] for m in methods)]]
    peaks = []
    for device, (entry,) in entries.items():
        rows = [entry["methods"].get(m, {}) for m in methods]
        timed = ["seconds" in row for row in rows]
        columns += [
            [f"{short(device)}, ms"]
            + [f"{row['seconds'] * 1e3:.1f}" if own else _time(row) for row, own in zip(rows, timed, strict=True)],
            ["over the bound"]
            + [
                f"{row['over_bound']:.2f} x{_quartiles(row)}" if own else "-"
                for row, own in zip(rows, timed, strict=True)
            ],
        ]
        if any(row.get("peak_bytes") for row in rows):
            cells = [f"{row['peak_bytes'] / GIB:.1f} GiB" if row.get("peak_bytes") else "-" for row in rows]
            columns.append(["peak above inputs", *cells])
            commits = sorted({row["peak_commit"] for row in rows if "peak_commit" in row})
            peaks.append(f"{short(device)}, commit {', '.join(commits)}")
    head, *lines = (f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))
    peers = dict.fromkeys(peers_of(report["environment"]) for report in reports.values())
    text = (
        f"N x H x V = {shape}, bfloat16, random weights; medians over "
        f"{rounds_of([e for found in entries.values() for e in found])}, ratios [quartiles] within a round. "
        f"`python -m benchmarks.gpu`: {'; '.join(map(origins, entries.values()))}; {' and '.join(peers)}."
    )
    if peaks:
        text += f" Peaks: {'; '.join(peaks)}."
    for device, report in reports.items():
        for entry in measured(report, "scored", [long]):
            said = [f"{label} {t}" for m, label in BRIEF.items() if (t := _time(entry["methods"].get(m, {}))) != "-"]
            text += (
                f"\n\n{long} on the {short(device)} ({rounds_of([entry])}, {origins([entry], brief=True)}): "
                f"{'; '.join(said)}."
            )
    return "\n".join([head, "|---" * len(columns) + "|", *lines, "", text])


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
        f"{_machine(report['environment'])}, {report['environment']['date']}."
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
