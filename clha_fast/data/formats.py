"""The shapes in which ranked responses are published, each turned into a `RankedRecord`.

A parser takes one row (a mapping) and knows nothing about files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from clha_fast.data.records import (
    Message,
    Prompt,
    RankedRecord,
    RecordError,
    check_messages,
    check_text,
    is_sequence,
    make_record,
)

Row = Mapping[str, Any]
Parser = Callable[[Row, str, bool], RankedRecord]

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_PRO_TURN = re.compile(r"<\|(prompter|assistant|system)\|>", re.ASCII)
_PRO_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}
# Names people write for the canonical fields; ignoring one of these would train on the wrong ranking.
_MISNAMED = {
    "reward": "rewards",
    "score": "rewards",
    "scores": "rewards",
    "rank": "ranks",
    "ranking": "ranks",
    "labels": "ranks",
    "sft_idx": "sft_index",
}


def _get(row: Row, name: str, source: str) -> Any:
    if name not in row:
        raise RecordError(f"{source}: {name}: expected a value, got nothing", source=source, field=name)
    if row[name] is None:
        raise RecordError.of(source, name, "a value", None)
    return row[name]


def _items(row: Row, name: str, source: str) -> list[Any]:
    value = _get(row, name, source)
    if not is_sequence(value):
        raise RecordError.of(source, name, "a list", value)
    return list(value)


def _objects(row: Row, name: str, keys: tuple[str, str], source: str) -> tuple[list[Any], list[Any]]:
    """The two columns `keys` of the list of objects `row[name]`."""
    items = _items(row, name, source)
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise RecordError.of(source, f"{name}[{number}]", f"an object with {' and '.join(keys)}", item)
        for key in keys:
            if item.get(key) is None:
                raise RecordError.of(source, f"{name}[{number}].{key}", "a value", item.get(key))
    return [item[keys[0]] for item in items], [item[keys[1]] for item in items]


def _response(value: object, source: str, field: str) -> object:
    """A response's text: itself, or the content of the one assistant message that holds it."""
    if isinstance(value, str) or not is_sequence(value):
        return value
    messages = check_messages(value, source, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RecordError.of(source, field, "a text or one assistant message", value)
    return messages[0]["content"]


def _make_record(names: Mapping[str, str], *args: Any, **kwargs: Any) -> RankedRecord:
    """`make_record`, whose errors speak of the file's own fields: `names` by field, "{}" the place."""
    try:
        return make_record(*args, **kwargs)
    except RecordError as error:
        base, bracket, rest = error.field.partition("[")
        name = (names.get(error.field) or names.get(base, base + "{}")).format(bracket + rest)
        message = str(error).replace(f"{error.source}: {error.field}:", f"{error.source}: {name}:", 1)
        raise RecordError(message, source=error.source, field=name) from error


def parse_canonical(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "completions", "rewards"?, "ranks"?, "sft_index"?}`; other columns are ignored."""
    for name, meant in _MISNAMED.items():
        if name in row and meant not in row:
            raise RecordError(f'{source}: {name}: unknown field, expected "{meant}"', source=source, field=name)
    completions = [
        _response(item, source, f"completions[{number}]")
        for number, item in enumerate(_items(row, "completions", source))
    ]
    return make_record(
        _get(row, "prompt", source),
        completions,
        rewards=row.get("rewards"),
        ranks=row.get("ranks"),
        sft_index=row.get("sft_index"),
        rank_by_reward=rank_by_reward,
        source=source,
    )


def parse_trl(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"chosen", "rejected", "prompt"?, "score_chosen"?, "score_rejected"?}`, texts or messages.

    Without `prompt`, and where the conversations repeat it, what the two have in common is the prompt: for
    messages all but the last, for texts the common prefix up to its last whole word.
    """
    chosen, rejected, prompt = _get(row, "chosen", source), _get(row, "rejected", source), row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RecordError.of(source, "rejected", "the same form as chosen (text or messages)", rejected)
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = _split_texts(chosen, rejected, source)
    else:
        prompt, chosen, rejected = _split_messages(prompt, chosen, rejected, source)
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    return _make_record(
        {
            "completions[0]": "chosen",
            "completions[1]": "rejected",
            "rewards[0]": "score_chosen",
            "rewards[1]": "score_rejected",
            "rewards": "score_chosen",
        },
        prompt,
        [chosen, rejected],
        rewards=None if scores == [None, None] else scores,
        rank_by_reward=rank_by_reward,
        source=source,
    )


def _split_texts(chosen: str, rejected: str, source: str) -> tuple[str, str, str]:
    differs = (k for k, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right)
    prefix = chosen[: next(differs, min(len(chosen), len(rejected)))]
    cut = max((k + 1 for k, char in enumerate(prefix) if char.isspace()), default=0)
    if prefix[:cut].endswith(" "):  # byte-level tokenizers write the space with the word after it
        cut -= 1
    if not prefix[:cut].strip():
        raise RecordError.of(source, "prompt", "a prompt that chosen and rejected begin with", None)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _split_messages(prompt: Any, chosen: Any, rejected: Any, source: str) -> tuple[Prompt, Any, Any]:
    sides = {
        "chosen": check_messages(chosen, source, "chosen"),
        "rejected": check_messages(rejected, source, "rejected"),
    }
    for name, messages in sides.items():
        if messages[-1]["role"] != "assistant":
            raise RecordError.of(source, name, "an assistant message at the end", messages[-1]["role"])
    before = sides["chosen"][:-1]
    if sides["rejected"][:-1] != before:
        raise RecordError.of(source, "rejected", "the messages of chosen before the last one", sides["rejected"])
    if isinstance(prompt, str):
        # As in UltraFeedback's binarized form: the conversations are complete, `prompt` only repeats them.
        messages = before or ({"role": "user", "content": prompt},)
    elif prompt is None:
        messages = check_messages(before, source, "chosen before its last message")
    else:
        messages = check_messages(prompt, source, "prompt")
        if before not in ((), messages):
            raise RecordError.of(source, "chosen", "the messages of prompt before the last one", before)
    return messages, sides["chosen"][-1]["content"], sides["rejected"][-1]["content"]


def parse_pro(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prefix", "suffix", "reward"?, "sft_index"?}` of PRO and CLHA; the order given is the ranking.

    `prefix` holds one list of turns a candidate (all alike) or one list for all; the empty assistant turn
    that ends it is the place of the response and becomes no message.
    """
    prefix = _items(row, "prefix", source)
    if prefix and all(is_sequence(turns) for turns in prefix):
        for number, turns in enumerate(prefix):
            if turns != prefix[0]:
                raise RecordError.of(source, f"prefix[{number}]", "the turns of prefix[0] (one prompt)", turns)
        suffix = _items(row, "suffix", source)
        if len(prefix) != len(suffix):
            raise RecordError.of(source, "prefix", f"{len(suffix)} lists, one a suffix", len(prefix))
        prefix = list(prefix[0])
    messages: list[Message] = []
    for number, turn in enumerate(prefix):
        text = check_text(turn, source, f"prefix[{number}]")
        match = _PRO_TURN.match(text)
        if match is None:
            raise RecordError.of(
                source, f"prefix[{number}]", "a turn that begins with <|prompter|> or <|assistant|>", text
            )
        messages.append({"role": _PRO_ROLES[match[1]], "content": text[match.end() :]})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return _make_record(
        {"completions": "suffix{}", "rewards": "reward{}"},
        check_messages(messages, source, "prefix"),
        _items(row, "suffix", source),
        rewards=row.get("reward"),
        sft_index=row.get("sft_index"),
        rank_by_reward=rank_by_reward,
        source=source,
    )


def parse_rrhf(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"query", "responses", "scores"}` of RRHF: ranked by score, equal scores in the order given."""
    return _make_record(
        {"prompt": "query{}", "completions": "responses{}", "rewards": "scores{}"},
        _get(row, "query", source),
        _items(row, "responses", source),
        rewards=_get(row, "scores", source),
        rank_by_reward=True,
        source=source,
    )


def transcript_messages(text: str, source: str, field: str) -> tuple[Message, ...]:
    r"""The turns of a "\n\nHuman: ...\n\nAssistant: ..." transcript, each stripped of outer blanks."""
    parts = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if parts[0].strip() or len(parts) < 3:
        raise RecordError.of(source, field, r'a transcript that begins with "\n\nHuman:"', text)
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple({"role": _HH_ROLES[role], "content": content.strip()} for role, content in turns)


def parse_hh(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    r"""`{"chosen", "rejected"}` of HH-RLHF: two "\n\nHuman: ...\n\nAssistant: ..." transcripts.

    The last Assistant turn is the response; the turns before it must be the same in both.
    """
    sides = {}
    for name in ("chosen", "rejected"):
        sides[name] = transcript_messages(check_text(_get(row, name, source), source, name), source, name)
    prompt, chosen, rejected = _split_messages(None, sides["chosen"], sides["rejected"], source)
    return _make_record(
        {"completions[0]": "chosen", "completions[1]": "rejected"},
        prompt,
        [chosen, rejected],
        rank_by_reward=rank_by_reward,
        source=source,
    )


def parse_nectar(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "answers": [{"answer", "rank"}]}` of Nectar; a transcript as prompt becomes messages."""
    answers, ranks = _objects(row, "answers", ("answer", "rank"), source)
    prompt = check_text(_get(row, "prompt", source), source, "prompt")
    turns: Prompt = prompt
    if _is_transcript(prompt):
        messages = transcript_messages(prompt, source, "prompt")
        turns = messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    return _make_record(
        {"completions": "answers{}.answer", "ranks": "answers{}.rank"},
        turns,
        answers,
        ranks=ranks,
        rank_by_reward=rank_by_reward,
        source=source,
    )


def parse_ultrafeedback(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"instruction", "completions": [{"response", "overall_score"}]}` of UltraFeedback.

    Ranked by score, equal scores in the order given.
    """
    responses, scores = _objects(row, "completions", ("response", "overall_score"), source)
    instruction = _get(row, "instruction", source)
    return _make_record(
        {"prompt": "instruction{}", "completions": "completions{}.response", "rewards": "completions{}.overall_score"},
        instruction,
        responses,
        rewards=scores,
        rank_by_reward=True,
        source=source,
    )


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


PARSERS: dict[str, Parser] = {
    "canonical": parse_canonical,
    "trl": parse_trl,
    "pro": parse_pro,
    "rrhf": parse_rrhf,
    "hh": parse_hh,
    "nectar": parse_nectar,
    "ultrafeedback": parse_ultrafeedback,
}
FORMATS = tuple(PARSERS)

_KEYS = {
    "canonical": "prompt, completions",
    "trl": "chosen, rejected (prompt, score_chosen, score_rejected)",
    "pro": "prefix, suffix (reward, sft_index)",
    "rrhf": "query, responses, scores",
    "hh": "chosen, rejected as transcripts",
    "nectar": "prompt, answers",
    "ultrafeedback": "instruction, completions",
}


def detect_format(row: Row, source: str) -> str:
    """The format of a row, by its keys (and for chosen/rejected and completions by their first value).

    Raises:
        RecordError: no known format has these keys; the message lists both.
    """
    keys = {key for key, value in row.items() if value is not None}
    if {"prefix", "suffix"} <= keys:
        return "pro"
    if {"query", "responses"} <= keys:
        return "rrhf"
    if {"prompt", "answers"} <= keys:
        return "nectar"
    if {"chosen", "rejected"} <= keys:
        raw = "prompt" not in keys and _is_transcript(row["chosen"]) and _is_transcript(row["rejected"])
        return "hh" if raw else "trl"
    if {"instruction", "completions"} <= keys and "prompt" not in keys:
        return "ultrafeedback"
    if {"prompt", "completions"} <= keys:
        return "canonical"
    known = "; ".join(f"{name}: {fields}" for name, fields in _KEYS.items())
    seen = ", ".join(sorted(map(str, row))) or "none"
    raise RecordError(f"{source}: unknown format, its fields are: {seen}. Known formats are {known}", source=source)
