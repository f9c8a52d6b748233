"""The shapes in which ranked responses are published, each turned into a `RankedRecord`.

A parser takes one row (a mapping) and knows nothing about files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from clha_fast.data.answers import (
    is_tree,
    parse_generations,
    parse_kto,
    parse_oasst,
    parse_simpo,
    parse_stack_exchange,
)
from clha_fast.data.comparisons import (
    parse_arena,
    parse_helpsteer,
    parse_pku,
    parse_shp,
    parse_stack_paired,
    parse_tldr,
    parse_webgpt,
)
from clha_fast.data.fields import Parser, Row, get, items, make_named, objects, response
from clha_fast.data.names import mapping_text
from clha_fast.data.pairs import is_transcript, parse_hh, parse_trl, transcript_messages
from clha_fast.data.records import (
    SIGNALS,
    Message,
    Prompt,
    RankedRecord,
    RecordError,
    check_messages,
    check_text,
    is_sequence,
    make_record,
)

_PRO_TURN = re.compile(r"<\|(prompter|assistant|system)\|>", re.ASCII)
_MOST_SEEN = 50  # names of columns in an error
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


def parse_canonical(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "completions", "rewards"?, "ranks"?, "sft_index"?}` and `SIGNALS`."""
    for name, meant in _MISNAMED.items():
        if name in row and meant not in row:
            message = f'{source}: {name}: unknown field, expected "{meant}", or {mapping_text(meant, name)}'
            raise RecordError(message, source=source, field=name, has_way=True)
    completions = [
        response(row, item, source, f"completions[{number}]")
        for number, item in enumerate(items(row, "completions", source))
    ]
    return make_record(
        get(row, "prompt", source),
        completions,
        rewards=row.get("rewards"),
        ranks=row.get("ranks"),
        sft_index=row.get("sft_index"),
        rank_by_reward=rank_by_reward,
        signals={name: row.get(name) for name in SIGNALS},
        source=source,
    )


def parse_pro(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prefix", "suffix", "reward"?, "sft_index"?}` of PRO and CLHA; the order given is the ranking.

    `prefix` holds one list of turns a candidate (all alike) or one list for all; the empty assistant turn
    that ends it is the place of the response and becomes no message.
    """
    prefix = items(row, "prefix", source)
    if prefix and all(is_sequence(turns) for turns in prefix):
        for number, turns in enumerate(prefix):
            if turns != prefix[0]:
                raise RecordError.of(source, f"prefix[{number}]", "the turns of prefix[0] (one prompt)", turns)
        suffix = items(row, "suffix", source)
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
    return make_named(
        {"completions": "suffix{}", "rewards": "reward{}"},
        check_messages(messages, source, "prefix"),
        items(row, "suffix", source),
        rewards=row.get("reward"),
        sft_index=row.get("sft_index"),
        rank_by_reward=rank_by_reward,
        source=source,
    )


def parse_rrhf(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"query", "responses", "scores"}` of RRHF: ranked by score, equal scores in the order given."""
    return make_named(
        {"prompt": "query{}", "completions": "responses{}", "rewards": "scores{}"},
        get(row, "query", source),
        items(row, "responses", source),
        rewards=get(row, "scores", source),
        rank_by_reward=True,
        source=source,
    )


def parse_nectar(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "answers": [{"answer", "rank"}]}` of Nectar; a transcript as prompt becomes messages."""
    answers, ranks = objects(row, "answers", ("answer", "rank"), source)
    prompt = check_text(get(row, "prompt", source), source, "prompt")
    turns: Prompt = prompt
    if is_transcript(prompt):
        messages = transcript_messages(prompt, source, "prompt")
        turns = messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages
    return make_named(
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
    responses, scores = objects(row, "completions", ("response", "overall_score"), source)
    instruction = get(row, "instruction", source)
    return make_named(
        {"prompt": "instruction{}", "completions": "completions{}.response", "rewards": "completions{}.overall_score"},
        instruction,
        responses,
        rewards=scores,
        rank_by_reward=True,
        source=source,
    )


class _Format(NamedTuple):
    """A format: its parser, and the columns that tell it from the others; none where `_TESTS` does."""

    parser: Parser
    keys: tuple[str, ...] = ()


_FORMATS = {
    "pro": _Format(parse_pro, ("prefix", "suffix")),
    "rrhf": _Format(parse_rrhf, ("query", "responses")),
    "nectar": _Format(parse_nectar, ("prompt", "answers")),
    "stack_exchange": _Format(parse_stack_exchange, ("question", "answers")),
    "simpo": _Format(parse_simpo, ("all_generated_responses", "all_rm_scores")),
    "shp": _Format(parse_shp, ("history", "human_ref_A", "human_ref_B")),
    "webgpt": _Format(parse_webgpt, ("answer_0", "answer_1", "score_0", "score_1")),
    "tldr": _Format(parse_tldr, ("info", "summaries", "choice")),
    "pku": _Format(parse_pku, ("response_0", "response_1", "better_response_id")),
    "stack_paired": _Format(parse_stack_paired, ("response_j", "response_k")),
    "helpsteer": _Format(parse_helpsteer),
    "arena": _Format(parse_arena),
    "oasst": _Format(parse_oasst),
    "hh": _Format(parse_hh),
    "trl": _Format(parse_trl, ("chosen", "rejected")),
    "generations": _Format(parse_generations),
    "ultrafeedback": _Format(parse_ultrafeedback),
    "canonical": _Format(parse_canonical, ("prompt", "completions")),
    "kto": _Format(parse_kto, ("completion", "label")),
}
PARSERS: dict[str, Parser] = {name: found.parser for name, found in _FORMATS.items()}
# Rows of KTO are told only to be refused.
FORMATS = ("canonical", *(name for name in PARSERS if name not in ("canonical", "kto")))


def _is_hh(row: Row, keys: set[str]) -> bool:
    pair = {"chosen", "rejected"} <= keys and "prompt" not in keys
    return pair and is_transcript(row["chosen"]) and is_transcript(row["rejected"])


# What keys alone do not tell.
_TESTS: dict[str, Callable[[Row, set[str]], bool]] = {
    "hh": _is_hh,
    "helpsteer": lambda row, keys: (
        {"response1", "response2", "overall_preference"} <= keys
        or {"response_1", "response_2", "preference_strength"} <= keys
    ),
    "arena": lambda row, keys: (
        ({"conversation_a", "conversation_b"} <= keys or {"response_a", "response_b"} <= keys)
        and ("winner" in keys or {"winner_model_a", "winner_model_b"} <= keys)
    ),
    "oasst": lambda row, keys: is_tree(row),
    "generations": lambda row, keys: "generations" in keys and bool({"ratings", "rating"} & keys),
    "ultrafeedback": lambda row, keys: {"instruction", "completions"} <= keys and "prompt" not in keys,
}


def detect_format(row: Row, source: str) -> str:
    """The format of a row, by its keys (and for chosen/rejected and completions by their first value).

    Raises:
        RecordError: no known format has these keys; the message lists both.
    """
    keys = {key for key, value in row.items() if value is not None}
    for name, found in _FORMATS.items():
        if (set(found.keys) <= keys) if found.keys else _TESTS[name](row, keys):
            return name
    paths = _paths(row)
    more = f", ... ({len(paths):,} in all)" if len(paths) > _MOST_SEEN else ""
    seen = ", ".join(paths[:_MOST_SEEN]) + more or "none"
    raise RecordError(
        f"{source}: unknown format, its fields are: {seen}. Say which is which: columns={{'prompt': column, "
        "'completions': [column, column], 'rewards': [column, column]} (--columns.prompt COLUMN --columns.completions "
        "'[COLUMN, COLUMN]', or one column that holds a list; --columns.completions COLUMN --columns.group_by COLUMN "
        "where each row has one response). docs/data.md shows the formats that are read as they are: "
        f"{', '.join(FORMATS)}",
        source=source,
        has_way=True,
    )


def _paths(row: Row) -> list[str]:
    """The names of a row's columns, nested ones as a mapping of columns has them."""
    found = []
    for name, value in sorted(row.items(), key=lambda item: str(item[0])):
        inner = value[0] if isinstance(value, list) and value else value
        nested = inner if isinstance(inner, Mapping) and not {"role", "content"} <= set(inner) else {}
        found += [f"{name}.{key}" for key in sorted(map(str, nested))] or [
            f"{name}{' (empty)' if value is None else ''}"
        ]
    return found
