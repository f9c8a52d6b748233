"""Answers behind words that say how good they are, one or two in a text: what Chain of Hindsight trains on."""

from __future__ import annotations

from clha_fast.data.records import Prompt, RankedRecord, RecordError

Markers = tuple[str, str]

_BETWEEN = "\n\n"  # in front of a chain's second marker


def record_chains(record: RankedRecord, markers: Markers) -> list[tuple[str, ...]]:
    """The chains of a record's best and worst answer, by rank: good alone, bad alone, good then bad, bad then good.

    Each is the text of one assistant turn in parts, marker and answer in turn, to be joined as they are; the answers
    (every second part) are scored. An answer begins with a blank, its own or one that is put there. Answers between the
    best and the worst are in no chain, and rewards and `sft_index` play no part. A record of one answer has one chain,
    the good marker's.

    Raises:
        RecordError: the best or the worst answer is blanks alone.
    """
    good, bad = markers
    best = (good, _answer(record, 0))
    last = len(record.completions) - 1
    if not last:
        return [best]
    worst = (bad, _answer(record, last))
    then_worst, then_best = ((_BETWEEN + marker.lstrip(), answer) for marker, answer in (worst, best))
    return [best, worst, (*best, *then_worst), (*worst, *then_best)]


def chain_count(responses: int) -> int:
    """How many chains a record of so many responses has."""
    return 4 if responses > 1 else 1


def _answer(record: RankedRecord, number: int) -> str:
    text = record.completions[number]
    if not text.strip():
        raise RecordError.of(record.source, f"completions[{number}]", "an answer that is more than blanks", text)
    return text if text[0].isspace() else f" {text}"


def ask(prompt: Prompt, marker: str) -> Prompt:
    """The prompt with the answer begun by the good marker: how a model that learnt from chains is asked.

    Messages get an assistant message to be continued (a final one that is there already gets the marker behind it), a
    text gets the marker behind it. What a model answers begins after a blank.
    """
    if isinstance(prompt, str):
        return prompt + marker
    last = prompt[-1]
    if last["role"] == "assistant":
        return (*prompt[:-1], {**last, "content": last["content"] + marker})
    return (*prompt, {"role": "assistant", "content": marker})
