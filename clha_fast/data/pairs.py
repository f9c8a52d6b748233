"""Pairs: one answer that was preferred to another, in columns of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clha_fast.data.fields import Reading, Row, columns_of, get, make_named, note_message
from clha_fast.data.names import mapping_text, pair_scores, prompt_suspects, suggested_prompt
from clha_fast.data.records import (
    Message,
    Prompt,
    RankedRecord,
    RecordError,
    check_messages,
    check_only_content,
    check_text,
    is_sequence,
)

# The format's own; they win where several pairs of columns look like scores.
_SCORES = ("score_chosen", "score_rejected")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
# Where a response may begin without a blank in front: behind "<|im_sep|>", "[/INST]", "ASSISTANT:"; not in "12:30", "https://".
_MARKS = re.compile(r"[>\]\s]|(?<!\d)[:\uff1a](?!/)")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_trl(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"chosen", "rejected", "prompt"?, "score_chosen"?, "score_rejected"?}`, texts or messages.

    Scores are read under any name that says side and score (`names.pair_scores`), or as `rewards`, a list of two.

    Without `prompt`, and where the conversations repeat it, what the two have in common is the prompt: for
    messages all but the last, for texts the common prefix up to its last whole word, or the last mark behind which a
    chat template lets a response begin ("<|im_sep|>", "[/INST]", "ASSISTANT:"). That is refused where a column that
    nobody reads may hold the prompt.
    """
    chosen, rejected, prompt = get(row, "chosen", source), get(row, "rejected", source), row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError.of(source, "rejected", "the same form as chosen (text or messages)", rejected)
    rewards, names = _scores(row, source)
    if prompt is None:
        _check_prompt_is_nowhere_else(row, chosen, {*names, "chosen", "rejected"}, source)
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected, source)
    else:
        prompt, chosen, rejected = split_messages(row, prompt, chosen, rejected, source)
    return make_named(
        {
            "completions[0]": "chosen",
            "completions[1]": "rejected",
            **({"rewards[0]": names[0], "rewards[1]": names[1], "rewards": names[0]} if names else {}),
        },
        prompt,
        [chosen, rejected],
        rewards=rewards,
        rank_by_reward=rank_by_reward,
        source=source,
    )


def _scores(row: Row, source: str) -> tuple[Any, tuple[str, ...]]:
    """The rewards of chosen and rejected, None where there are none, and the two columns they stand in."""
    if row.get("rewards") is not None:
        return row["rewards"], ()
    found = pair_scores(columns_of(row))
    names = next((pair for pair in found if pair == _SCORES), found[0] if found else None)
    if names is None:
        return None, ()
    if len(found) > 1 and names != _SCORES:
        message = (
            f"{source}: {names[0]}: expected one pair of columns with scores, got {' and '.join(map(str, found))}; "
            f"name the one to read: {mapping_text('rewards', names)}"
        )
        raise RecordError(message, source=source, field=names[0], has_way=True)
    return [row.get(name) for name in names], names


def _check_prompt_is_nowhere_else(row: Row, chosen: Any, own: set[str], source: str) -> None:
    """RecordError where the prompt would be what two answers have in common while a column may hold it."""
    columns = columns_of(row)
    if isinstance(row, Reading) and "prompt" in row.mapped:
        return
    suspects = prompt_suspects(columns, {*own, "tools", "subset"})
    if is_sequence(chosen):
        # Whole conversations bring their prompt along; other messages than theirs may be what came before it.
        texts = _contents(chosen)
        if len(texts) > 1:
            suspects = [name for name in suspects if not isinstance(columns[name], str)]
            suspects = [name for name in suspects if not _contents(columns[name]) <= texts]
    if suspects:
        raise RecordError(
            f"{source}: prompt: expected a column of that name, got {', '.join(suspects)}, which nobody reads; if the "
            f"prompt stands there, {mapping_text('prompt', suggested_prompt(suspects))}; if chosen and rejected begin "
            f"with it, {mapping_text('prompt', None)}",
            source=source,
            field="prompt",
            has_way=True,
        )


def _contents(messages: Any) -> set[str]:
    return {repr(item.get("content")) if isinstance(item, Mapping) else repr(item) for item in messages}


def _split_texts(chosen: str, rejected: str, source: str) -> tuple[str, str, str]:
    differs = (k for k, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right)
    prefix = chosen[: next(differs, min(len(chosen), len(rejected)))]
    # A mark at the end of one of them is its own.
    most = min(len(chosen), len(rejected)) - 1
    cut = max((end for mark in _MARKS.finditer(prefix) if (end := mark.end()) <= most or mark[0].isspace()), default=0)
    if prefix[:cut].endswith(" "):  # byte-level tokenizers write the space with the word after it
        cut -= 1
    if not prefix[:cut].strip():
        raise RecordError.of(source, "prompt", "a prompt that chosen and rejected begin with", None)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def split_messages(
    row: Row,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    source: str,
    names: tuple[str, str] = ("chosen", "rejected"),
) -> tuple[Prompt, Any, Any]:
    """(prompt, response, response) of two conversations in the columns `names`, whose turns before the last agree."""
    first, second = names
    sides = {first: check_messages(chosen, source, first), second: check_messages(rejected, source, second)}
    for name, messages in sides.items():
        if messages[-1]["role"] != "assistant":
            raise RecordError.of(source, name, "an assistant message at the end", messages[-1]["role"])
    before = sides[first][:-1]
    if sides[second][:-1] != before:
        raise RecordError.of(source, second, f"the messages of {first} before the last one", sides[second])
    if isinstance(prompt, str):
        # As in UltraFeedback's binarized form: the conversations are complete, `prompt` only repeats them.
        messages = before or ({"role": "user", "content": prompt},)
        texts = [str(message["content"]) for message in messages]
        if not any(prompt.strip() in text or text.strip() in prompt for text in texts):
            way = mapping_text("prompt", None)
            expected = f"a text that the messages of {first} repeat (the prompt as messages, or {way})"
            raise RecordError.of(source, "prompt", expected, prompt, has_way=True)
    elif prompt is None:
        messages = check_messages(before, source, f"{first} before its last message")
    else:
        messages = check_messages(prompt, source, "prompt")
        if before not in ((), messages):
            raise RecordError.of(source, first, "the messages of prompt before the last one", before)
    for name, found in sides.items():
        note_message(row, found[-1], name)
    texts = [check_only_content(found[-1], source, f"{name}[{len(found) - 1}]") for name, found in sides.items()]
    return messages, texts[0], texts[1]


def transcript_messages(text: str, source: str, field: str) -> tuple[Message, ...]:
    r"""The turns of a "\n\nHuman: ...\n\nAssistant: ..." transcript, each stripped of outer blanks."""
    text = text.replace("\r\n", "\n")
    parts = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise RecordError.of(source, field, r'a transcript that begins with "\n\nHuman:"', text)
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple({"role": _HH_ROLES[role], "content": content.strip()} for role, content in turns)


def is_transcript(value: object) -> bool:
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return "\n\nAssistant:" in value.replace("\r\n", "\n")


def parse_hh(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    r"""`{"chosen", "rejected"}` of HH-RLHF: two "\n\nHuman: ...\n\nAssistant: ..." transcripts.

    The last Assistant turn is the response; the turns before it must be the same in both.
    """
    sides = {}
    for name in ("chosen", "rejected"):
        sides[name] = transcript_messages(check_text(get(row, name, source), source, name), source, name)
    prompt, chosen, rejected = split_messages(row, None, sides["chosen"], sides["rejected"], source)
    return make_named(
        {"completions[0]": "chosen", "completions[1]": "rejected"},
        prompt,
        [chosen, rejected],
        rank_by_reward=rank_by_reward,
        source=source,
    )
