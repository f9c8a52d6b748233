"""The tables of what GPUs measured of the loss, by method, for `benchmarks.render`."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

# Runs of `benchmarks.gpu` in benchmarks/results, of all devices, oldest first: of the same device, shape, mode and
# method the last one counts.
FILES = ("gpu-first.json", "gpu.json", "gpu-h100.json", "gpu-h200.json")
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
    "published": "published code's way: all tokens, one forward a candidate",
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
GIB = 2**30
# Of the routed backward over its kept share.
KEPT_SHAPE = "8192 x 4096 x 128256"


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

    Kept shares are those of the last run that has some, and `kept_share_run` is its environment.
    A peak that a later run did not take stays, with the commit that it is of; a row that has nothing else is added to
    the time of the run before.
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
                has_time = "seconds" in row or "failed" in row
                new = row | {"run": report["environment"]} if has_time else before | row
                if row.get("peak_bytes"):
                    new["peak_commit"] = entry.get("peaks_commit", report["environment"]["commit"])
                elif "peak_commit" in before:
                    new |= {name: before[name] for name in ("peak_bytes", "peak_commit")}
                kept["methods"][name] = new
    told: dict[str, Any] = {}
    for report in reports:
        rows = report.get("extras", {}).get("over_kept_share")
        if isinstance(rows, list) and rows:
            told = {"over_kept_share": rows, "kept_share_run": report["environment"]}
    return {**reports[-1], "shapes": list(entries.values()), **told}


def origin(environment: dict[str, Any]) -> str:
    """Device, releases and commit of a run."""
    return f"{machine(environment)}, {environment['date']}, commit {environment['commit']}"


def machine(environment: dict[str, Any]) -> str:
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


def peak_origins(rows: dict[str, dict[str, Any]]) -> str:
    """Which commit most methods' peaks are of, and which are of others."""
    commits: dict[str, list[str]] = {}
    for method, row in rows.items():
        if row.get("peak_bytes"):
            commits.setdefault(row["peak_commit"], []).append(LABELS[method].strip("*"))
    main = max(commits, key=lambda commit: len(commits[commit]))
    others = [f" (commit {commit}: {'; '.join(labels)})" for commit, labels in commits.items() if commit != main]
    return f"commit {main}{''.join(others)}"


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
    forwards = {
        e["shape"]: row
        for e in report["shapes"]
        if e["mode"] == "scored" and (row := e["methods"].get("fused_forward"))
    }
    shares = [break_even(entry, forwards.get(entry["shape"], {})) for entry in entries]
    if any(shares):
        cells = [f"{share:.0%}" if share else "-" for share in shares]
        lines.append(f"| at this share as long as `workspace`, by a line through the forward | {' | '.join(cells)} |")
    brackets = (
        " [quartiles]" if any(map(_quartiles, (row for rows in _timed(entries).values() for row in rows))) else ""
    )
    text = (
        f"N x H x V, bfloat16, random weights scaled to that entropy, targets drawn from the softmax; medians over "
        f"{rounds_of(entries)}, ratios{brackets} within a round. `python -m benchmarks.gpu`, {origins(entries)}; "
        f"{peers_of(report['environment'])}."
    )
    return "\n".join([*lines, "", text])


def break_even(entry: dict[str, Any], forward: dict[str, Any]) -> float | None:
    """The kept share at which routed gradients take as long as `workspace`, by a line through the measured share.

    Args:
        entry: a shape with a peaked softmax. forward: the row of that shape's `fused_forward`, which is what routed
            gradients take at a share of 0. None where a time or the share is missing, or of another run, and where kept
            pairs took no time.
    """
    exact, routed = (entry["methods"].get(name, {}) for name in ("workspace", "routed"))
    rows = (exact, routed, forward)
    if "kept_share" not in entry or not all("seconds" in row for row in rows):
        return None
    begin = forward["seconds"]
    if len({row["run"]["commit"] for row in rows}) > 1 or routed["seconds"] <= begin:
        return None
    return float(entry["kept_share"] * (exact["seconds"] - begin) / (routed["seconds"] - begin))


def crossing(points: list[tuple[float, float]], level: float) -> float | None:
    """Where the line through points (x, y), in their order, first rises above a level; None where it does not."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 <= level < y1:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def modes(report: dict[str, Any]) -> str:
    """The same on padded batches and of pairs, a column a mode and shape; "" where nothing was timed."""
    entries = [entry for mode in ("padded", "pairs") for entry in measured(report, mode)]
    if not entries:
        return ""
    columns = [{"shape": f"{e['mode']}: {e['shape']}, of {e['rows']:,} rows"} for e in entries]
    lines = _head(report["environment"], "whole batches", columns)
    for method, rows in _timed(entries).items():
        cells = [_time(row) + _quartiles(row) for row in rows]
        lines.append(f"| {LABELS[method]} | {' | '.join(cells)} |")
    text = (
        f"N x H x V: N rows are scored; bfloat16, random weights; medians over {rounds_of(entries)}, ratios "
        "[quartiles] to the products of the scored rows within a round. `python -m benchmarks.gpu`, "
        f"{origins(entries)}; {peers_of(report['environment'])}."
    )
    return "\n".join([*lines, "", text])


def kept(report: dict[str, Any]) -> str:
    """Markdown of routed gradients over the share of pairs that they keep; "" where it was not measured."""
    rows = report.get("over_kept_share")
    if not rows:
        return ""
    lines = [
        f"| {report['environment']['device']}: entropy, nats | `max_dropped_mass` | pairs kept | mass left out | "
        "routed over the bound | fused over the bound |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = [row["methods"].get(name, {}).get("over_bound") for name in ("routed", "fused")]
        over = ["-" if ratio is None else f"{ratio:.2f} x" for ratio in found]
        lines.append(
            f"| {row['entropy']:.1f} | {row['dropped_mass']:g} | {row['kept_share']:.1%} | "
            f"{row['mean_dropped_mass']:.2%} | {' | '.join(over)} |"
        )
    rounds = rounds_of([{"shape": KEPT_SHAPE, **row} for row in rows])
    text = (
        f"{KEPT_SHAPE}, bfloat16, random weights scaled to that entropy; medians over {rounds}. "
        f"`python -m benchmarks.gpu`, {origin(report['kept_share_run'])}."
    )
    timed = [(row["kept_share"], row["methods"].get("routed", {})) for row in rows]
    points = sorted((share, row["over_bound"]) for share, row in timed if "over_bound" in row)
    for entry in measured(report, "peaked", [KEPT_SHAPE]):
        row = entry["methods"].get("workspace", {})
        same = row.get("run", {}).get("commit") == report["kept_share_run"]["commit"]
        exact = row.get("over_bound") if same else None
        if exact is not None and (share := crossing(points, exact)) is not None:
            text += f" By a line between neighbours as long as `workspace` ({exact:.2f} x) at {share:.0%} kept."
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
            peaks.append(f"{short(device)}, {peak_origins(dict(zip(methods, rows, strict=True)))}")
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
