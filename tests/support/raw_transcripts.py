"""Raw transcripts written for the tests: good ones, and every kind of those that are left out."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any] | str]


def talk(*turns: str) -> str:
    """Turns, Human's first, as a transcript."""
    return "".join(f"\n\n{'Assistant' if k % 2 else 'Human'}: {text}" for k, text in enumerate(turns))


def row(*turns: str, good: str = "A cake needs flour.", bad: str = "No idea.") -> dict[str, str]:
    """Two transcripts whose last answers differ."""
    return {"chosen": talk(*turns, good), "rejected": talk(*turns, bad)}


PARAGRAPHS = row(
    "How do I bake?\n\nI have flour.", "With an oven.\n\n\nHave you one?", "Yes", good="Heat it.\n\nThen mix."
)

# A reason why a record is left out, and a record; the same reasons under both parses but where a mark says otherwise.
LEFT_OUT: list[tuple[str, Any]] = [
    ("chosen is not a text", {"chosen": 3, "rejected": talk("a", "b")}),
    ("rejected is not a text", {"chosen": talk("a", "b")}),
    ("chosen is not valid Unicode", {"chosen": talk("a", "b \ud83d"), "rejected": talk("a", "c")}),
    ("no Assistant turn at the end", {"chosen": talk("a"), "rejected": talk("a", "b")}),
    ("no Assistant turn at the end", {"chosen": talk("a", "b", "c"), "rejected": talk("a", "b", "d")}),
    (
        "a transcript that does not begin with a Human turn",
        {"chosen": "\n\nAssistant: b\n\nHuman: a\n\nAssistant: c", "rejected": talk("a", "b", "c", "d")},
    ),
    ("different numbers of turns", {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "e")}),
    ("an empty answer", row("Hi", good="Hello", bad=" \n")),
    ("identical answers", row("Hi", good="Hello", bad="Hello ")),
    ("not a JSON object", "[1, 2]"),
    ("not JSON", '{"chosen": '),
]
DISAGREE = {
    "chosen": talk("How are you?", "Fine.", "And?", "Good."),
    "rejected": talk("Who are you?", "I.", "So?", "Bad."),
}
HUMAN_INSIDE = {"chosen": talk("a", "It says\n\nHuman: hello"), "rejected": talk("a", "It says nothing")}
TWICE = {
    "chosen": talk("a") + "\n\nAssistant: b\n\nAssistant: c",
    "rejected": talk("a") + "\n\nAssistant: b\n\nAssistant: d",
}


def write(path: Path, rows: Rows) -> Path:
    """JSON Lines, gzipped where the name says so; texts among the rows are lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in rows)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def questions(subset: str, count: int, start: int = 0) -> list[dict[str, str]]:
    return [row(f"Question {k} on {subset}?", good=f"Yes {k}.", bad=f"No {k}.") for k in range(start, start + count)]


def hh_folder(folder: Path, train: int = 40, test: int = 5) -> Path:
    """The four subsets in the published layout, some plain and some gzipped."""
    for subset, end in (("harmless-base", ".gz"), ("helpful-base", ""), ("helpful-online", ".gz")):
        write(folder / subset / f"train.jsonl{end}", questions(subset, train))
        write(folder / subset / f"test.jsonl{end}", questions(subset, test, train))
    write(folder / "helpful-rejection-sampled" / "train.jsonl.gz", questions("rejection", train))
    write(folder / "helpful-rejection-sampled" / "test.jsonl.gz", questions("rejection", test, train))
    return folder
