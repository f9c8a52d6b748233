"""The comparisons of summarize-from-feedback: two summaries of a Reddit post, and which one was preferred."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from clha_fast.data.comparisons import parse_tldr
from clha_fast.data.prepare import Dropped, RawFile, pair
from clha_fast.data.records import RankedRecord

SUBSET = "tldr"
EXPECTED = "JSON Lines of the TL;DR comparisons (info, summaries, choice), plain or .gz"


def known_file(path: str, name: str) -> RawFile | None:
    """The file; rows say themselves whether they are to train on, else its name does ("valid" and "test" are not)."""
    last = os.path.basename(path).lower()
    if ".json" not in last:
        return None
    return RawFile(path, name, SUBSET, "test" if "test" in last or "valid" in last else "train")


def read(row: Mapping[str, Any], source: str, file: RawFile) -> RankedRecord:
    """The record as `comparisons.parse_tldr` reads it; each summary stands behind one blank.

    Raises:
        Dropped: the row is of a news article, or says no preference. RecordError: a field that is not as published.
    """
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    if isinstance(info, Mapping) and not info.get("post"):
        raise Dropped("an article, not a post")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise Dropped("no choice between two summaries")
    if isinstance(summaries, list) and any(isinstance(s, Mapping) and s.get("text") == "" for s in summaries):
        raise Dropped("an empty answer")
    record = parse_tldr(row, source, False)
    better, worse = (f" {text.strip()}" for text in record.completions)
    return pair(record.prompt, better, worse, source, file.subset)
