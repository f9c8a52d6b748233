"""One self-contained page of HTML: no script, nothing that is fetched; every text that comes from data is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from string import Template

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; background: #fff; color: #1c2430;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #c9d1dc; }
h3 { font-size: 1rem; margin-bottom: .25rem; overflow-wrap: anywhere; }
p, li { max-width: 48rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1rem; }
dt { color: #4a5667; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) { dl { grid-template-columns: minmax(0, 1fr); } dd { margin: 0 0 .5rem; } }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #4a5667; padding-bottom: .25rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #dfe4ea; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { color: #4a5667; font-weight: 600; }
tbody th { font-weight: 400; }
.bar { display: block; height: .7rem; min-width: 1px; background: #2f6db3; }
td.bars { width: 12rem; min-width: 6rem; vertical-align: middle; }
.tokens { font: .9rem/1.9 ui-monospace, "Cascadia Mono", Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; background: #f6f8fa; border: 1px solid #dfe4ea; border-radius: .3rem; padding: .4rem .6rem;
  max-height: 24rem; overflow-y: auto; margin: .25rem 0 .75rem; }
.t { border-right: 1px solid #c3ccd6; }
.scored { background: #d3ecd9; border-bottom: 2px solid #1c7a3b; }
.special { font-style: italic; color: #6a3c00; }
.cut { color: #8a1f1f; text-decoration: line-through; background: #fbe6e6; }
.note { color: #4a5667; }
.warn { border-left: .3rem solid #b36b00; padding-left: .7rem; }
.wide > svg { width: 100%; min-width: 50rem; height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


def escape(text: object) -> str:
    """Text as HTML, in an element or in an attribute's quotes."""
    return html.escape(str(text))


def page(title: str, parts: Iterable[str]) -> str:
    """The document; `parts` are HTML already, the title is not."""
    return _PAGE.substitute(title=escape(title), body="\n".join(parts))


def section(heading: str, *parts: str) -> str:
    """A heading, escaped, over HTML; "" where there is none."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>" if body else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of escaped text; `kind` is "note" or "warn"."""
    return f"<p{f' class={kind}' if kind else ''}>{escape(text)}</p>" if text else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with what is to be said of each, escaped."""
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", bars: Sequence[float] = ()) -> str:
    """Escaped cells, the first of each row its heading; `bars` [rows], 0 to 1, are drawn in a last column."""
    lines = []
    for number, (first, *rest) in enumerate(rows):
        cells = f'<th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        if bars:
            width = 100 * min(max(bars[number], 0.0), 1.0)
            cells += f'<td class="bars" aria-hidden="true"><span class="bar" style="width:{width:.1f}%"></span></td>'
        lines.append(f"<tr>{cells}</tr>")
    if not lines:
        return ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    names += '<td aria-hidden="true"></td>' if bars else ""
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(lines)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption or header[0] or "table")}">'
        f"<table>{head}<thead><tr>{names}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )
