"""Links of pages and README lead to files that are there, and to headings that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.M)


def anchors(text: str) -> set[str]:
    """What a site and a repository's pages call the headings of a page, a repeated one with a number behind it."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", words).strip().lower())
        while name in found:
            stem, _, number = name.rpartition("_")
            name = f"{stem}_{int(number) + 1}" if number.isdigit() and stem else f"{name}_1"
        found.add(name)
    return found


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere: no such file, or no such heading in it."""
    bad = []
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (heading and heading not in anchors(path.read_text("utf-8"))):
            bad.append(link)
    return bad


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text("utf-8")) == []


def test_what_is_broken_is_seen() -> None:
    text = "# One\n## Two, `three`\n[a](#two-three) [b](#one) [c](#four) [d](nowhere.md) [e](https://x.org/#f)\n"
    assert anchors(text) == {"one", "two-three"}
    page = ROOT / "docs" / "index.md"
    assert broken(page, text.replace("(#", f"({page.name}#").replace("index.md#two-three", "design.md#rooms")) == [
        "index.md#one",
        "index.md#four",
        "nowhere.md",
    ]


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[2]
    assert set(re.findall(r": (\S+\.md)$", nav, re.M)) == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_scripts_that_pages_show_are_there() -> None:
    """As blocks of three lines: a formatter takes the notation in one line for Python, and spreads it."""
    marks = [line for page in PAGES for line in page.read_text("utf-8").splitlines() if "8<" in line.replace(" ", "")]
    assert set(marks) == {"--8<--"}
    shown = re.findall(r"^--8<--\n(\S+)\n--8<--$", (ROOT / "docs" / "tutorials.md").read_text("utf-8"), re.M)
    assert len(shown) * 2 == len(marks)
    assert [path for path in shown if not (ROOT / path).is_file()] == []
