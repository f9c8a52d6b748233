"""An inspection as text for a terminal, and as a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

from clha_fast.evaluation.tables import margin_of, table
from clha_fast.objectives import CLHAOptions, Objective
from clha_fast.reports import page
from clha_fast.reports.data_summary import data_text
from clha_fast.reports.inspection import DIGITS, ENOUGH, SHARES, Candidate, Example, Inspection, Token

_MOST_BAD = (3, 100)  # errors that are shown in a terminal, and on a page
_MOST_TOKENS = (40, 12)  # of a run of scored, cut or other tokens, at its beginning and end, in a terminal
_LEGEND = (
    ("scored", "a token of a response that is scored"),
    ("special", "token"),
    ("cut", "away by the length limits: the model does not see it"),
)


def inspection_text(found: Inspection, objective: Objective) -> str:
    """All of it, for a terminal."""
    lines = [f"{name:<12}  {text}" for name, text in _facts(found, objective)]
    parts = ["\n".join(lines), _lengths(found)]
    if found.gaps is not None:
        parts.append(_gaps(found))
    parts += [_example_text(example) for example in found.examples]
    return "\n\n".join(parts)


def _facts(found: Inspection, objective: Objective) -> Iterator[tuple[str, str]]:
    read = f"{found.name}: {found.records:,} records"
    yield "source", f"{read}, the first ones; the source has more" if found.more else read
    yield "data", data_text(found.summary, objective)
    sizes = ((f"{size} response{'s' if size > 1 else ''}", count) for size, count in found.sizes.items())
    yield "per prompt", ", ".join(f"{size}: {count:,}" for size, count in sizes)
    answers = sum(size * count for size, count in found.sizes.items())
    yield (
        "duplicates",
        f"prompts that stand before: {_counted(found, 'repeated_prompts', found.records)}; responses that a record "
        f"before has: {_counted(found, 'repeated_answers', answers)}",
    )
    if found.unit == "tokens":
        yield (
            "cut",
            f"prompts {_share(found.cut_prompts, found.records)}, responses {_share(found.cut_completions, answers)}",
        )
    if found.unequal_pairs:
        yield "order", f"pairs ranked against their rewards: {_counted(found, 'reversed_pairs', found.unequal_pairs)}"
    if found.gaps is not None and isinstance(objective, CLHAOptions):
        yield "rewards", margin_advice(found, objective)
    for sentence in found.sentences:
        yield "note", sentence
    if found.bad:
        count, seen, most = len(found.bad), found.records + len(found.bad), _MOST_BAD[0]
        more = f"; the first {most} here, --html lists more" if count > most else ""
        yield (
            "bad records",
            f"{_share(count, seen)}, left out here; training ends at the first, or leaves them out with "
            f"--skip_bad_records{more}",
        )
        for error in found.bad[:most]:
            yield "", " ".join(str(error).split())


def _counted(found: Inspection, name: str, whole: int) -> str:
    share = _share(getattr(found, name), whole)
    return f"{share}, first: {found.first[name]}" if name in found.first else share


def margin_advice(found: Inspection, objective: CLHAOptions) -> str:
    """Whether the reward margin fits the rewards, and one that does."""
    gaps = found.gaps
    assert gaps is not None
    own = f"reward_margin {objective.reward_margin:g} keeps {_percent(gaps.margin_kept)} of the pairs"
    if gaps.margin_kept >= ENOUGH:
        return f"{own}: it fits"
    part = "" if gaps.suggested >= gaps.quantiles[SHARES.index(0.25)] else "half "
    return (
        f"{own}; suggested: reward_margin {gaps.suggested:.{DIGITS}g}, {part}the lower quartile of the reward gaps, "
        f"which keeps {_percent(gaps.suggested_kept)}"
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({_percent(part / whole if whole else math.nan)})"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}%"


def _names() -> list[str]:
    return [f"{100 * share:g}%" for share in SHARES]


def _length_rows(found: Inspection) -> list[list[str]]:
    return [
        [row.name, *(f"{value:,.0f}" for value in row.quantiles), f"{row.largest:,}", f"{row.mean:,.1f}"]
        for row in found.lengths
    ]


def _lengths(found: Inspection) -> str:
    return table([f"length in {found.unit}", *_names(), "most", "mean"], _length_rows(found))


def _gap_rows(found: Inspection) -> list[list[str]]:
    gaps = found.gaps
    assert gaps is not None
    return [
        [name, margin_of(value, DIGITS), _percent(kept)]
        for name, value, kept in zip(_names(), gaps.quantiles, gaps.kept, strict=True)
    ]


def _gaps(found: Inspection) -> str:
    return table(["quantile of |r_i - r_j|", "reward gap", "pairs above it"], _gap_rows(found))


def _example_text(example: Example) -> str:
    lines = [f"{example.source}, as the model reads it ([...] scored, {{...}} cut away)"]
    lines += [f"  prompt      {_plain(example.prompt)}"]
    for rank, candidate in enumerate(example.candidates):
        lines += [f"  {_candidate_name(rank, candidate)}", f"              {_plain(candidate.tokens)}"]
    return "\n".join(lines)


def _candidate_name(rank: int, candidate: Candidate) -> str:
    scored = sum(token.scored for token in candidate.tokens)
    parts = [f"response {rank + 1}: {scored:,} scored tokens"]
    if candidate.reward is not None:
        parts.append(f"reward {candidate.reward:g}")
    if candidate.target:
        parts.append("SFT target")
    if candidate.inert:
        parts.append("not run in training: the loss does not depend on it")
    return ", ".join(parts)


def _plain(tokens: tuple[Token, ...]) -> str:
    """Tokens with bars between, runs of scored and of cut ones in brackets; of long runs the beginning and the end."""
    out = []
    for (cut, scored), group in itertools.groupby(tokens, key=lambda token: (token.cut, token.scored)):
        texts = [token.text.replace("\n", "\\n") for token in group]
        first, last = _MOST_TOKENS
        left_out = len(texts) - first - last
        if left_out > 0:
            texts[first:-last] = [f" ... {left_out:,} more ... "]
        opening, closing = ("{", "}") if cut else ("[", "]") if scored else ("", "")
        out.append(f"{opening}{'|'.join(texts)}{closing}")
    return "".join(out)


def inspection_page(found: Inspection, objective: Objective) -> str:
    """All of it, as one page of HTML."""
    facts = [(name, text) for name, text in _facts(found, objective) if name not in ("note", "bad records", "")]
    warnings = [*found.sentences, *(" ".join(str(error).split()) for error in found.bad[: _MOST_BAD[1]])]
    if len(found.bad) > _MOST_BAD[1]:
        warnings.append(f"{len(found.bad):,} records could not be used in all")
    parts = [
        page.section("Summary", page.facts(facts), *(page.paragraph(w, "warn") for w in warnings)),
        page.section(
            "Lengths",
            page.table(["", *_names(), "most", "mean"], _length_rows(found), f"in {found.unit}, quantiles"),
        ),
    ]
    if found.gaps is not None:
        rows = _gap_rows(found)
        advice = margin_advice(found, objective) if isinstance(objective, CLHAOptions) else ""
        parts.append(
            page.section(
                "Reward gaps",
                page.paragraph(advice),
                page.table(
                    ["quantile", "reward gap", "pairs above it"],
                    rows,
                    "a reward margin set to one of these gaps keeps the pairs above it",
                    bars=found.gaps.kept,
                ),
            )
        )
    total = sum(found.sizes.values())
    parts.append(
        page.section(
            "Responses per prompt",
            page.table(
                ["responses", "records"],
                [[str(size), f"{count:,}"] for size, count in found.sizes.items()],
                bars=[count / total for count in found.sizes.values()],
            ),
        )
    )
    if found.examples:
        legend = ", ".join(
            f'<span class="{kind}">{page.escape(kind)}</span> {page.escape(text)}' for kind, text in _LEGEND
        )
        parts.append(page.section("As the model reads it", f"<p>{legend}</p>", *map(_example_html, found.examples)))
    return page.page(f"Ranked responses in {found.name}", parts)


def _example_html(example: Example) -> str:
    parts = [f"<h3>{page.escape(example.source)}</h3>", "<p class=note>prompt</p>", _tokens_html(example.prompt)]
    for rank, candidate in enumerate(example.candidates):
        parts += [page.paragraph(_candidate_name(rank, candidate), "note"), _tokens_html(candidate.tokens)]
    return "\n".join(parts)


def _tokens_html(tokens: tuple[Token, ...]) -> str:
    out = []
    for token in tokens:
        kinds = [name for name in ("scored", "special", "cut") if getattr(token, name)]
        text = page.escape(token.text.replace("\n", "\u23ce\n"))
        out.append(f'<span class="{" ".join(["t", *kinds])}">{text}</span>')
    return f'<div class="tokens" tabindex="0" role="region" aria-label="tokens">{"".join(out)}</div>'
