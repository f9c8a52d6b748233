"""`clha-fast score`: what it takes and what it prints."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from clha_fast.cli.columns import COLUMNS_HELP, take_columns
from clha_fast.cli.generate import model_text
from clha_fast.cli.guard import guarded, launched, parse
from clha_fast.cli.reading import read, use
from clha_fast.cli.scoring import LIMITS, add_scoring_arguments, read_alone
from clha_fast.cli.text import Parser, check_positive, rows_text
from clha_fast.data import RankedRecord
from clha_fast.evaluation import plots
from clha_fast.evaluation import tables as report
from clha_fast.files import try_folder_of
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.objectives.pairs import gap_quartiles
from clha_fast.processes import Processes
from clha_fast.rewards.noise import NoiseCounts, NoiseReport, measure_noise
from clha_fast.rewards.policy import load_policy, score_policy
from clha_fast.rewards.reward_model import load_reward_model
from clha_fast.rewards.scoring import ScoreResult, check_destination, score_file

DESCRIPTION = (
    "Add the rewards of a reward model to ranked or unranked responses, and report how they disagree; or with --policy "
    "the log-probabilities that a frozen language model gives them, which training compares with."
)
# Options that one of the two has, by attribute.
_REWARDS = ("label", "rank_by_reward", "reward_margin", "reward_floor", "plot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `clha-fast score`."""
    parser.add_argument(
        "source", metavar="SRC", help="JSON Lines, a JSON list, csv, tsv, parquet or arrow, a glob or a folder"
    )
    parser.add_argument(
        "destination", metavar="DST", help="the JSON Lines file to write, with rewards or with reference_logps"
    )
    parser.add_argument(
        "--reward-model", metavar="PATH", help="a sequence classifier: its folder, or its name on the Hub"
    )
    parser.add_argument(
        "--policy",
        metavar="PATH",
        help="a causal language model instead: writes reference_logps, each response's summed log-probability, for "
        "clha-fast train --reference file",
    )
    add_scoring_arguments(
        *(parser, "response", "DST", "--policy"),
        "default: the checkpoint's own, auto; of --policy float32, as in training",
    )
    parser.add_argument("--rank-by-reward", action="store_true", help="write each record's responses best first")
    parser.add_argument("--reward-margin", type=float, metavar="R", help="of the noise rule (default 3)")
    parser.add_argument("--reward-floor", type=float, metavar="R", help="of the SFT gate (default 0)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a histogram of the reward gaps of all pairs")


def score(words: Sequence[str]) -> int:
    """`clha-fast score`: the exit status, see `run`."""
    parser = Parser(prog="clha-fast score", description=DESCRIPTION, epilog=COLUMNS_HELP)
    add_arguments(parser)
    with launched():
        words, columns = take_columns(words)
        parser.set_defaults(columns=columns)
        return run(parse(parser, words))


def run(args: argparse.Namespace) -> int:
    """Exit status: 0 done, 1 failed while scoring, 130 interrupted; then one sentence says what is kept.

    Raises:
        ValueError, OSError: a user error, in one sentence.
    """
    with launched() as processes:
        return guarded("score", lambda: _run(args, processes))


def _run(args: argparse.Namespace, processes: Processes) -> int:
    # Whatever can be wrong with the options is said before a model is loaded or hours are spent.
    if (args.reward_model is None) == (args.policy is None):
        got = "neither" if args.policy is None else "both"
        raise ValueError(f"--reward-model: expected either --reward-model or --policy, got {got}")
    ours, others = ("--reward-model", LIMITS[1:]) if args.policy is None else ("--policy", _REWARDS)
    for name in others:
        value = getattr(args, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')}: expected none beside {ours}, got {value}")
    check_positive(args, ("batch_size", *LIMITS))
    processes.choose_device(args.device)
    return _score_rewards(args, processes) if args.policy is None else _score_policy(args, processes)


def _read(args: argparse.Namespace) -> list[RankedRecord]:
    check_destination(args.destination, resume=args.resume, overwrite=args.overwrite)
    return read(args, args.source, args.format, args.columns)


def _say_source(args: argparse.Namespace, records: Sequence[RankedRecord]) -> None:
    candidates = sum(len(record.completions) for record in records)
    print(f"source        {args.source}: {len(records):,} prompts, {candidates:,} responses", flush=True)


def _how(args: argparse.Namespace, processes: Processes) -> dict[str, Any]:
    return {**{name: getattr(args, name) for name in ("batch_size", "resume", "overwrite")}, "processes": processes}


def _score_policy(args: argparse.Namespace, processes: Processes) -> int:
    records = _read(args)
    layout = args.layout or "padded"
    policy = load_policy(args.policy, device=args.device, dtype=args.dtype or "float32", layout=layout)
    print(f"policy        {model_text(policy.model, args.policy)}{rows_text(layout, policy.layout)}")
    _say_source(args, records)
    limits = {name: getattr(args, name) for name in LIMITS}
    how = {**limits, **_how(args, processes)}
    result = use(
        args,
        args.source,
        records,
        lambda records: score_policy(records, args.destination, policy, **how),
        read_alone(policy, limits),
    )
    parts = []
    if result.resumed:
        parts.append(f"{result.resumed:,} responses had been scored before")
    if result.truncated:
        parts.append(f"{result.truncated:,} prompts were cut to the limits, which training needs as well")
    if result.replaced:
        parts.append(f"{result.replaced:,} prompts had other reference_logps")
    more = f" ({'; '.join(parts)})" if parts else ""
    print(f"written       {args.destination}{more}")
    print(
        f"reference     {result.tokens:,} tokens of responses, mean log-probability {result.mean_logp:.4g} nats a token"
    )
    return 0


def _score_rewards(args: argparse.Namespace, processes: Processes) -> int:
    margin = PUBLISHED.reward_margin if args.reward_margin is None else args.reward_margin
    floor = PUBLISHED.reward_floor if args.reward_floor is None else args.reward_floor
    CLHAOptions(reward_margin=margin, reward_floor=floor)
    plot = _check_plot(args.plot)
    records = _read(args)
    reward_model = load_reward_model(
        args.reward_model,
        label=args.label,
        device=args.device,
        dtype=args.dtype or "auto",
        layout=args.layout or "padded",
    )
    said = rows_text(args.layout, reward_model.layout)
    print(f"reward model  {model_text(reward_model.model, args.reward_model)}{said}")
    _say_source(args, records)
    limits = {"max_length": args.max_length}
    how = {**limits, "rank_by_reward": args.rank_by_reward, **_how(args, processes)}
    result = use(
        args,
        args.source,
        records,
        lambda records: score_file(records, args.destination, reward_model, **how),
        read_alone(reward_model, limits),
    )
    if processes.rank:
        return 0  # the first one reports and draws
    print(f"written       {args.destination}{_result_text(result)}\n")
    noise = measure_noise(result.records, margin, floor)
    print(noise_table(noise, args.source))
    if args.rank_by_reward:
        closed = measure_noise(result.written, margin, floor).total
        share = _share(closed.closed_gates, closed.prompts)
        print(f"\n{args.destination} is ranked by these rewards: no pair is reversed, {share} of the gates are closed")
    if plot:
        gap_histogram(noise, plot)
        print(f"\nhistogram     {plot}")
    return 0


def _check_plot(path: str | None) -> str | None:
    """The picture to draw, None when none is asked for or matplotlib is missing."""
    if path is None:
        return None
    if not path.lower().endswith(".png"):
        raise ValueError(f"--plot: expected a name that ends in .png, got {path!r}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"--plot: expected an existing folder, got {os.path.dirname(path)!r}")
    try_folder_of(path)
    if not plots.can_plot():
        print("no histogram: it needs matplotlib (pip install 'clha-fast[plot]')")
        return None
    return path


def _result_text(result: ScoreResult) -> str:
    parts = []
    if result.resumed:
        parts.append(f"{result.resumed:,} responses had been scored before")
    if result.truncated:
        parts.append(f"{result.truncated:,} prompts were cut to {result.max_length:,} tokens")
    if result.replaced:
        parts.append(f"{result.replaced:,} prompts had other rewards")
    return f" ({'; '.join(parts)})" if parts else ""


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"


def noise_table(noise: NoiseReport, source: str) -> str:
    """Shares of noise by the number of responses, and what the columns mean."""

    def row(name: str, counts: NoiseCounts) -> list[str]:
        pairs = (counts.reversed, counts.inside_margin, counts.reversed_outside)
        return [
            name,
            f"{counts.prompts:,}",
            f"{counts.pairs:,}",
            *(_share(part, counts.pairs) for part in pairs),
            _share(counts.closed_gates, counts.prompts),
        ]

    header = ["responses", "prompts", "pairs", "reversed", "inside margin", "reversed outside", "closed gates"]
    rows = [*(row(str(counts.size), counts) for counts in noise.by_size), row("all", noise.total)]
    return "\n".join(
        [
            f"The order of {source} against these rewards (reward margin {noise.reward_margin:g}, "
            f"reward floor {noise.reward_floor:g}):",
            report.table(header, rows),
            "reversed: the worse-ranked response has the higher reward; inside margin: noise, dropped by the abs rule;",
            "reversed outside: wrong by more than the margin, kept by abs and dropped by signed;",
            "closed gates: prompts whose SFT target is not above the floor.",
            *filter(None, [report.margin_text(gap_quartiles(noise.gaps), "a --reward-margin")]),
        ]
    )


def gap_histogram(noise: NoiseReport, path: str) -> None:
    """Draw r_i - r_j of all pairs (i ranked better) as a PNG, with the margin shaded.

    Raises:
        ImportError: matplotlib is not installed. OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    margin, total = noise.reward_margin, noise.total
    inside = _share(total.inside_margin, total.pairs)
    wrong = _share(total.reversed, total.pairs)
    axes.axvspan(-margin, margin, color="0.85", zorder=0, label=f"inside the margin: {inside}")
    if total.pairs:
        axes.hist(noise.gaps.numpy(), bins=60)
    axes.axvline(0, color="black", linewidth=1, label=f"left of it, reversed: {wrong}")
    axes.set_xlabel("reward of the better-ranked response minus reward of the other")
    axes.set_ylabel("pairs")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
