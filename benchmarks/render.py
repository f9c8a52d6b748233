"""Renders the tables of README.md and docs/benchmarks.md and the plots: `python -m benchmarks.render`.

`--check` only compares the tables. The plots need matplotlib and the figures of `python -m benchmarks.cpu --scaling`.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import render_gpu, render_kernels
from benchmarks.measure import cpu_kind

ROOT = Path(__file__).resolve().parent.parent
# README's CPU; every other kind has a file cpu-KIND.json beside it, and a table in docs/benchmarks.md.
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
TRAINED = RESULTS.with_name("alpacaeval.json")
START, END = "<!-- cpu-table: rendered by benchmarks/render.py -->", "<!-- /cpu-table -->"
SCALING = ("<!-- cpu-scaling: rendered by benchmarks/render.py -->", "<!-- /cpu-scaling -->")
HELD_OUT = ("<!-- held-out: rendered by benchmarks/render.py -->", "<!-- /held-out -->")
CHOOSING = ("<!-- choosing: rendered by benchmarks/render.py -->", "<!-- /choosing -->")
GPU = {
    name: (f"<!-- gpu-{name}: rendered by benchmarks/render.py -->", f"<!-- /gpu-{name} -->")
    for name in ("shapes", "peaked", "modes", "kept", "kernels", "compared", "step", "parts")
}
# The shapes that README shows: one as a table, one in a sentence.
FIRST_SHAPE, LONG_SHAPE = "8192 x 4096 x 128256", "65536 x 4096 x 128256"
PLOTS = RESULTS.parent
LABELS = {
    "clha_fast_torch": "**clha-fast, torch backend**",
    "clha_fast_routed": "**clha-fast, torch backend, routed gradients**",
    "eager": "eager, scored tokens only",
    "eager_compiled": "eager under `torch.compile`",
    "cce_torch_compile": "CCE (`torch_compile`), then the ranking loss",
    "torch_linear_cross_entropy": "`F.linear_cross_entropy`, then the ranking loss",
    "torch_linear_cross_entropy_chunked": "`F.linear_cross_entropy(options=)`, then the ranking loss",
    "trl_chunked": "TRL's chunked log-probabilities, then the ranking loss",
    "published": "published code's way: all tokens, one forward a candidate",
    "bare_gemms": "three bare matrix products, no loss at all (the bound)",
}

MODELS = {
    "clha": "**CLHA**",
    "sft_only": "likelihood alone (`sft_only`), same steps",
    "untrained": "untrained",
    "longer_characters": "the longer answer wins, characters",
    "longer_tokens": "the longer answer wins, tokens as cut for the model",
}


def _routed(methods: dict[str, Any]) -> str:
    """What routed gradients left out and how wrong they were, a sentence."""
    text = ""
    for row in (row for row in methods.values() if "kept_block_share" in row):
        text += (
            f" Routed, `max_dropped_mass={row['max_dropped_mass']:g}`: {row['kept_block_share']:.1%} of the (token, "
            f"block) pairs kept, dhidden off by {row['dhidden_error']:.1e} and dweight by {row['dweight_error']:.1e} "
            "of their norm."
        )
    return text


def wrapped(text: str) -> str:
    """Its lines at most 140 characters long; rows of tables stay whole."""
    lines = text.split("\n")
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 140) for line in lines)


def _ratio(row: dict[str, Any], base: str) -> str:
    """The median over the rounds, and the quartiles where the run wrote them down."""
    median, quartiles = row[f"over_{base}"], row.get(f"over_{base}_quartiles")
    return f"{median:.2f} x" + (f" [{quartiles[0]:.2f}, {quartiles[1]:.2f}]" if quartiles else "")


def render(report: dict[str, Any], names: list[str]) -> str:
    """Markdown of the report: one table for each of the workloads `names`, their origin below."""
    parts = []
    for name, workload in ((name, report["workloads"][name]) for name in names):
        methods = workload["methods"]
        seconds = any("fastest" in row for row in methods.values())
        tokens, entropy = workload["scored_tokens"], workload["softmax_entropy"]
        size = workload["gradient_bytes"] / 1e6
        lines = [
            f"{name}: {workload['shape']}, {tokens} scored tokens; mean softmax entropy {entropy:.2f} nats; the "
            f"gradients alone are {size:.0f} MB.{_routed(methods)}",
            "",
            "| forward + backward of the loss | time over eager | time over the bound | "
            + ("fastest | " if seconds else "")
            + "peak memory above inputs |",
            "|---|---|---|---|" + "---|" * seconds,
        ]
        for method, row in ((method, methods[method]) for method in LABELS if method in methods):
            if "status" in row:
                lines.append(f"| {LABELS[method]} | {row['status']} | - | - |" + " - |" * seconds)
                continue
            memory = f"{row['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in row else "-"
            cells = [_ratio(row, "eager"), _ratio(row, "bare_gemms"), memory]
            if seconds:
                cells.insert(2, f"{row['fastest']:.2f} s")
            lines.append(f"| {LABELS[method]} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    e = report["environment"]
    rounds = report["workloads"][names[0]]["rounds"]
    clock = ", CPU time of the process (others used the machine)" if e.get("clock") == "cpu" else ""
    quartiles = any("over_eager_quartiles" in row for row in report["workloads"][names[0]]["methods"].values())
    ordered = any("fastest" in row for row in report["workloads"][names[0]]["methods"].values())
    origin = (
        f"Measured by `make bench-cpu` on {e['date']}: {cpu_kind(e)}, {e['threads']} threads, torch {e['torch']}, "
        f"commit {e['commit']}; medians{' [quartiles]' if quartiles else ''} of the ratios within each of {rounds} "
        f"interleaved rounds{', in an order of its own each' if ordered else ''}{clock}."
    )
    return "\n\n".join([*parts, origin])


def every_kind(reports: list[dict[str, Any]]) -> str:
    """`render` of all workloads of each kind of CPU, under a heading each."""
    parts = [
        f"### {cpu_kind(report['environment'])}\n\n{render(report, list(report['workloads']))}" for report in reports
    ]
    return "\n\n".join(parts)


def scaling_origin(scaling: dict[str, Any]) -> str:
    """Where the plots come from, and the longest input."""
    rounds = scaling["rounds"]
    text = (
        f"Over the sizes at V 32000, and over the kept share at V 128256; {rounds} interleaved "
        f"round{'s' if rounds > 1 else ''}, commit {scaling['environment']['commit']}."
    )
    for row in scaling.get("long", []):
        peak, gradients = (row[name] / 1e6 for name in ("peak_bytes", "gradient_bytes"))
        text += (
            f" {row['tokens']} scored tokens in one call: {peak:.0f} MB above inputs, of which {gradients:.0f} MB are "
            "gradients."
        )
    return text


def _figure(row: dict[str, Any], name: str, digits: int = 3) -> str:
    """A value and its interval; "-" where there is none."""
    if name not in row:
        return "-"
    low, high = row[name]["interval"]
    return f"{row[name]['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def held_out(report: dict[str, Any], against_length: bool = False, only: tuple[str, ...] = ()) -> str:
    """Markdown of `benchmarks.heldout`'s report: every model's figures on the test file, and where they come from.

    Args:
        only: the columns to show; all by default.
    """
    counts, models, seeds = report["test"], report["models"], ", ".join(map(str, report["seeds"]))
    columns = {
        "accuracy": (f"ranking accuracy, {counts['kept']} kept pairs", 3, "0.5"),
        "accuracy_all": (f"all {counts['ordered']} ordered pairs", 3, "0.5"),
        "kendall_tau": ("Kendall's tau", 3, "0"),
        "margin": ("margin, nats a token", 2, "-"),
        "nll": ("NLL of the best answer, nats a token", 2, "-"),
    }
    if against_length:
        shorter = f"{counts['against']} kept pairs whose better answer is the shorter"
        columns["accuracy_against_length"] = (shorter, 3, "0.5")
    columns = {name: column for name, column in columns.items() if not only or name in only}
    titles, digits, chance = zip(*columns.values(), strict=True)
    lines = [f"| {counts['prompts']} prompts held out | {' | '.join(titles)} |", f"|---|{'---|' * len(columns)}"]
    for name, label in MODELS.items():
        runs = len(models[name]["accuracy"]["seeds"])
        cells = [_figure(models[name], *column) for column in zip(columns, digits, strict=True)]
        lines.append(f"| {label}{f', {runs} seeds' if runs > 1 else ''} | {' | '.join(cells)} |")
    lines.append(f"| chance | {' | '.join(chance)} |")
    above = [
        f"{_figure(models['clha'], f'accuracy_above_longer_{unit}')} ({unit})" for unit in ("characters", "tokens")
    ]
    chosen, e = report["choosing"]["chosen"], report["environments"][-1]
    commits = ", ".join(dict.fromkeys(one["commit"] for one in report["environments"]))
    threads = f"{e['threads']} thread{'s' if e['threads'] > 1 else ''}"
    origin = (
        f"Values over all prompts and over seeds {seeds}, 95% bootstrap intervals over prompts and seeds; equal scores "
        f"are half right. CLHA's accuracy on kept pairs less that of length: {' and '.join(above)}. "
        f"`python -m benchmarks.heldout`, setting `{chosen}`, {e['date']}: {e['cpu']}, {threads}, "
        f"torch {e['torch']}, transformers {e['versions']['transformers']}, commit {commits}."
    )
    return "\n".join([*lines, "", origin])


def brief(report: dict[str, Any]) -> str:
    """`held_out` as README has it: three figures, short lines."""
    return wrapped(held_out(report, only=("accuracy", "kendall_tau", "nll")))


def choosing(report: dict[str, Any]) -> str:
    """Markdown of how the settings were chosen, and of each seed's figures afterwards."""
    choice = report["choosing"]
    prompts = choice["prompts"]
    lines = [
        f"| trained on {prompts['train']} prompts, seed {choice['seed']} | accuracy on {choice['kept_pairs']} kept "
        f"pairs of {prompts['held_out']} other prompts of the training file | Kendall's tau | NLL of the best answer |",
        "|---|---|---|---|",
    ]
    for name, row in choice["settings"].items():
        label = f"**{name}** (chosen)" if name == choice["chosen"] else name
        cells = (_figure(row, "accuracy"), _figure(row, "kendall_tau"), _figure(row, "nll", 2))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    characters, tokens = (choice["lengths"][f"longer_{unit}"] for unit in ("characters", "tokens"))
    lines += [
        f"| the longer answer wins | {characters:.3f} (characters), {tokens:.3f} (tokens as cut for the model) | | |",
        "",
        f"| seed | {' | '.join(map(str, report['seeds']))} |",
        f"|---|{'---|' * len(report['seeds'])}",
    ]
    for model in ("clha", "sft_only"):
        for figure, label in (("accuracy", "accuracy on kept pairs"), ("kendall_tau", "Kendall's tau")):
            values = (f"{value:.3f}" for value in report["models"][model][figure]["seeds"])
            lines.append(f"| {MODELS[model].split(',')[0]}, {label} | {' | '.join(values)} |")
    return "\n".join(lines)


def _fill(text: str, marks: tuple[str, str], content: str) -> str:
    """`text` with `content` between the two marks."""
    before, rest = text.split(marks[0])
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{rest.split(marks[1])[1]}"


def gpu_tables(readme: bool) -> dict[str, str]:
    """Markdown of what was measured on a GPU, by the marks it stands between."""
    tiles, step, compared, parts = (
        json.loads(RESULTS.with_name(f"gpu-{name}.json").read_text())
        for name in ("tiles", "step", "h100-kernels", "routed")
    )
    devices = render_gpu.by_device(RESULTS.parent)
    found = {
        "shapes": render_gpu.headline(devices, FIRST_SHAPE, LONG_SHAPE)
        if readme
        else "\n\n".join(filter(None, map(render_gpu.shapes, devices.values()))),
        "peaked": "\n\n".join(filter(None, map(render_gpu.peaked, devices.values()))),
        "modes": "\n\n".join(filter(None, map(render_gpu.modes, devices.values()))),
        "kept": "\n\n".join(filter(None, map(render_gpu.kept, devices.values()))),
        "kernels": render_kernels.kernels(tiles),
        "compared": render_kernels.compared(compared),
        "step": render_kernels.step(step),
        "parts": render_kernels.routed_parts(parts),
    }
    return {name: wrapped(text) if readme else text for name, text in found.items()}


def plot(scaling: dict[str, Any], folder: Path) -> None:
    """Time and memory over the sizes, time over the kept share: one PNG each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    def save(name: str, x_label: str, y_label: str, lines: dict[str, tuple[list[float], list[float]]]) -> None:
        figure, axes = plt.subplots(figsize=(4.8, 3.2), dpi=100)
        for label, (x, y) in lines.items():
            axes.plot(x, y, marker="o", label=label)
        axes.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
        if len(lines) > 1:
            axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"cpu-{name}.png")
        plt.close(figure)

    bound = "time over three bare products"
    tokens, candidates = scaling["tokens"], scaling["candidates"]
    x = [row["tokens"] for row in tokens]
    save("time-over-tokens", "scored tokens", bound, {"": (x, [row["over_bare_gemms"] for row in tokens])})
    beside = [(row["peak_bytes"] - row["gradient_bytes"]) / 1e6 for row in tokens]
    save("memory-over-tokens", "scored tokens", "MB above inputs and gradients", {"": (x, beside)})
    n = [row["candidates"] for row in candidates]
    save("time-over-candidates", "candidates a prompt", bound, {"": (n, [r["over_bare_gemms"] for r in candidates])})
    shares = {}
    for name, kept in scaling["kept_share"].items():
        rows = sorted(
            (r["kept_block_share"], r["over_bare_gemms"]) for r in kept["rows"].values() if "dropped_mass" in r
        )
        shares[f"{name}, {kept['softmax_entropy']:.1f} nats"] = ([r[0] for r in rows], [r[1] for r in rows])
    save("time-over-kept-share", "kept share of (token, block) pairs", bound, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the README is not what would be rendered")
    args = parser.parse_args()
    report, trained = (json.loads(path.read_text()) for path in (RESULTS, TRAINED))
    others = [json.loads(path.read_text()) for path in sorted(RESULTS.parent.glob("cpu-*.json"))]
    for page in ("README.md", "docs/benchmarks.md", "docs/kernels.md"):
        path = ROOT / page
        text = path.read_text()
        readme = page == "README.md"
        first = wrapped(render(report, list(report["workloads"])[:1]))
        new = text
        if START in text:
            new = _fill(new, (START, END), first if readme else every_kind([report, *others]))
        if SCALING[0] in text and "scaling" in report:
            new = _fill(new, SCALING, scaling_origin(report["scaling"]))
        if HELD_OUT[0] in text:
            new = _fill(new, HELD_OUT, brief(trained) if readme else held_out(trained, against_length=True))
        if CHOOSING[0] in text:
            new = _fill(new, CHOOSING, choosing(trained))
        for name, content in gpu_tables(readme).items():
            if GPU[name][0] in text:
                new = _fill(new, GPU[name], content)
        if args.check and new != text:
            raise SystemExit(f"{page}: a table is not the one that the figures in benchmarks/results render to")
        path.write_text(new)
    if "scaling" in report and not args.check:
        plot(report["scaling"], PLOTS)


if __name__ == "__main__":
    main()
