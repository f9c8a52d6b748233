r"""Raw HH-RLHF: `{"chosen": "\n\nHuman: ...\n\nAssistant: ...", "rejected": ...}`, in a folder a subset."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from clha_fast.data.pairs import transcript_messages
from clha_fast.data.prepare import Dropped, RawFile, pair
from clha_fast.data.records import RankedRecord, RecordError

# Folders as published, and what their records' `subset` is.
SUBSETS = {
    "harmless-base": "harmless_base",
    "helpful-base": "helpful_base",
    "helpful-online": "helpful_online",
    "helpful-rejection-sampled": "helpful_rejection",
    "helpful-rejection": "helpful_rejection",
}
EXPECTED = f"train or test files of HH-RLHF (train.jsonl, test.jsonl.gz) in folders {', '.join(list(SUBSETS)[:4])}"
_NO_ANSWER = "no Assistant turn at the end"
_ROLES = ("Human", "Assistant")


def known_file(path: str, name: str) -> RawFile | None:
    """The file, by the names of itself and its folder."""
    *_, folder, last = os.path.abspath(path).replace("_", "-").lower().split(os.sep)
    subset = next((SUBSETS[part] for part in SUBSETS if part in f"{folder}/{last}"), None)
    splits = [split for split in ("train", "test") if split in last]
    if subset is None or len(splits) != 1 or ".json" not in last:
        return None
    return RawFile(path, name, subset, splits[0])


def read_clean(row: Mapping[str, Any], source: str, file: RawFile) -> RankedRecord:
    """The record with messages as prompt: every turn whole, both transcripts the same before the last one.

    Raises:
        Dropped: a transcript that is none, or that says nothing about which answer to one prompt is better.
    """
    sides = []
    for name in ("chosen", "rejected"):
        text = _text(row, name)
        if "\n\nAssistant:" not in text:
            raise Dropped(_NO_ANSWER)
        try:
            messages = transcript_messages(text, source, name)
        except RecordError as error:
            raise Dropped("a transcript that does not begin with a Human turn") from error
        roles = [message["role"] for message in messages]
        if roles[0] != "user":
            raise Dropped("a transcript that does not begin with a Human turn")
        if roles[-1] != "assistant":
            raise Dropped(_NO_ANSWER)
        if any(role == before for before, role in itertools.pairwise(roles)):
            raise Dropped("two turns of one speaker in a row")
        sides.append(messages)
    chosen, rejected = sides
    if len(chosen) != len(rejected):
        raise Dropped("different numbers of turns")
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("the transcripts disagree before the last turn")
    return pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], source, file.subset)


def read_published(row: Mapping[str, Any], source: str, file: RawFile) -> RankedRecord:
    r"""The record as the paper's pipeline reads it, with a text as prompt that ends in "\n\nAssistant:".

    Transcripts are split at blank lines, and of the pieces only those count that begin with a speaker, so that every
    paragraph of a turn but its first is lost. Pieces of one speaker in a row become one turn, a line each. The prompt
    is the chosen transcript's, whether or not the rejected one agrees. An answer follows after a blank.

    The pipeline keeps records here dropped whose answers are identical or empty, or whose last turn is Human's.

    Raises:
        Dropped: different numbers of turns, as there; and these.
    """
    chosen, rejected = (_first_paragraphs(_text(row, name)) for name in ("chosen", "rejected"))
    for turns in (chosen, rejected):
        if not turns or turns[0][0] != "Human":
            raise Dropped("a transcript that does not begin with a Human turn")
        if all(role == "Human" for role, _ in turns):
            raise Dropped(_NO_ANSWER)
    if len(chosen) != len(rejected):
        raise Dropped("different numbers of turns")
    if chosen[-1][0] != "Assistant":
        raise Dropped(_NO_ANSWER)
    prompt = "".join(f"\n\n{role}: {text}" for role, text in chosen[:-1]) + "\n\nAssistant:"
    return pair(prompt, f" {chosen[-1][1]}", f" {rejected[-1][1]}", source, file.subset)


def _text(row: Mapping[str, Any], name: str) -> str:
    text = row.get(name)
    if not isinstance(text, str):
        raise Dropped(f"{name} is not a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Dropped(f"{name} is not valid Unicode") from error
    return text.replace("\r\n", "\n")


def _first_paragraphs(text: str) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for piece in text.split("\n\n"):
        role = next((role for role in _ROLES if piece.startswith(f"{role}:")), None)
        if role is None:
            continue
        said = piece[len(role) + 2 :].strip()  # whatever character follows the colon
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{said}")
        else:
            turns.append((role, said))
    return turns
