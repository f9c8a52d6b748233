"""Two responses in columns of their own, and a column that says which was preferred.

A tie has no order: such a record is refused, and `skip_bad_records` leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from clha_fast.data.fields import Row, get, make_named, objects
from clha_fast.data.pairs import split_messages
from clha_fast.data.records import RankedRecord, RecordError, check_messages, check_text, is_number, is_sequence


def _ranked(
    names: tuple[str, str],
    prompt: Any,
    responses: tuple[Any, Any],
    second: bool,
    rank_by_reward: bool,
    source: str,
    scores: tuple[Any, Any] | None = None,
    score_names: tuple[str, str] = ("", ""),
) -> RankedRecord:
    """The record of two responses, the second of which may be the better one; errors name their columns."""
    order = (1, 0) if second else (0, 1)
    named = {f"completions[{place}]": names[k] for place, k in enumerate(order)}
    named |= {f"rewards[{place}]": score_names[k] for place, k in enumerate(order)}
    return make_named(
        named,
        prompt,
        [responses[k] for k in order],
        rewards=None if scores is None else [scores[k] for k in order],
        rank_by_reward=rank_by_reward,
        source=source,
    )


def _tie(source: str, field: str, value: object) -> RecordError:
    return RecordError.of(
        source, field, "a preference for one of the two (a tie has no order; skip such records)", value
    )


def parse_shp(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B"}` of SHP; label 1 prefers A."""
    label = get(row, "labels", source)
    if label not in (0, 1):
        raise RecordError.of(source, "labels", "1 (A is preferred) or 0 (B is)", label)
    names = ("human_ref_A", "human_ref_B")
    scores = (row.get("score_A"), row.get("score_B"))
    return _ranked(
        names,
        get(row, "history", source),
        (get(row, names[0], source), get(row, names[1], source)),
        label == 0,
        rank_by_reward,
        source,
        None if scores == (None, None) else scores,
        ("score_A", "score_B"),
    )


def parse_webgpt(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"question": {"full_text"}, "answer_0", "answer_1", "score_0", "score_1"}` of WebGPT; the higher is better."""
    question = get(row, "question", source)
    if isinstance(question, Mapping):
        question = question.get("full_text")
    scores = (get(row, "score_0", source), get(row, "score_1", source))
    for number, score in enumerate(scores):
        if not is_number(score):
            raise RecordError.of(source, f"score_{number}", "a number", score)
    if scores[0] == scores[1]:
        raise _tie(source, "score_0", scores)
    responses = (get(row, "answer_0", source), get(row, "answer_1", source))
    names = ("answer_0", "answer_1")
    better = scores[1] > scores[0]
    text = check_text(question, source, "question.full_text")
    return _ranked(names, text, responses, better, rank_by_reward, source, scores, ("score_0", "score_1"))


def parse_helpsteer(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """HelpSteer 3 (`context`, `response1`, `response2`, `overall_preference`) and 2 (`prompt`, `response_1`, ...).

    The preference goes from -3 (the first is much better) to 3; its strength is not used as a reward.
    """
    third = "response1" in row
    names = ("response1", "response2") if third else ("response_1", "response_2")
    field = "overall_preference" if third else "preference_strength"
    preference = get(row, field, source)
    if not is_number(preference):
        raise RecordError.of(source, field, "a number from -3 to 3", preference)
    if preference == 0:
        raise _tie(source, field, preference)
    prompt = get(row, "context" if third else "prompt", source)
    if is_sequence(prompt):
        prompt = check_messages(prompt, source, "context")
    responses = (get(row, names[0], source), get(row, names[1], source))
    return _ranked(names, prompt, responses, preference > 0, rank_by_reward, source)


def parse_arena(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """Chatbot Arena: `{"conversation_a", "conversation_b", "winner"}`, whose turns before the last must be the same.

    Or `{"prompt", "response_a", "response_b"}`, texts or JSON lists of one turn, with `winner` or `winner_model_a`,
    `winner_model_b`, `winner_tie`.
    """
    second = _arena_winner(row, source)
    if "conversation_a" in row:
        names = ("conversation_a", "conversation_b")
        sides = (get(row, names[0], source), get(row, names[1], source))
        prompt, *responses = split_messages(row, None, *sides, source, names)
    else:
        names = ("response_a", "response_b")
        prompt = _one_turn(get(row, "prompt", source), source, "prompt")
        responses = [_one_turn(get(row, name, source), source, name) for name in names]
    return _ranked(names, prompt, (responses[0], responses[1]), second, rank_by_reward, source)


def _arena_winner(row: Row, source: str) -> bool:
    if row.get("winner") is not None:
        winner = row["winner"]
        if winner in ("model_a", "model_b"):
            return bool(winner == "model_b")
        raise _tie(source, "winner", winner)
    won = {}
    for side in "ab":
        name = f"winner_model_{side}"
        if row.get(name) not in (None, 0, 1):  # a text would be true, whatever it says
            raise RecordError.of(source, name, "1 or 0", row[name])
        won[side] = bool(row.get(name))
    tie = row.get("winner_tie")
    if won["a"] == won["b"]:
        raise _tie(source, *(("winner_tie", tie) if tie else ("winner_model_a and winner_model_b", int(won["a"]))))
    return won["b"]


def _one_turn(value: Any, source: str, field: str) -> Any:
    if not isinstance(value, str) or not value.startswith("["):
        return value
    try:
        turns = json.loads(value)
    except ValueError:
        return value
    if not is_sequence(turns) or not all(turn is None or isinstance(turn, str) for turn in turns):
        return value
    if len(turns) != 1 or turns[0] is None:  # a model that said nothing
        expected = "one turn (what was said between several differs between the two)"
        raise RecordError.of(source, field, expected, turns)
    return turns[0]


def parse_tldr(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    r"""`{"info": {"post", "title", "subreddit"}, "summaries": [{"text"}], "choice"}` of the TL;DR comparisons.

    The prompt is the one they were written for: "SUBREDDIT: r/...\n\nTITLE: ...\n\nPOST: ...\n\nTL;DR:"; of news, the
    article.
    """
    info = get(row, "info", source)
    if not isinstance(info, Mapping):
        raise RecordError.of(source, "info", "an object with a post", info)
    if info.get("post") is not None:
        parts = [f"{name}{info[key]}" for key, name in _TLDR.items() if info.get(key)]
    else:
        parts = [f"Article: {check_text(info.get('article'), source, 'info.article')}"]
    texts, _ = objects(row, "summaries", ("text", "text"), source)
    choice = get(row, "choice", source)
    if len(texts) != 2 or choice not in (0, 1):
        raise RecordError.of(source, "choice", "0 or 1, of two summaries", choice)
    names = ("summaries[0].text", "summaries[1].text")
    prompt = "\n\n".join([*parts, "TL;DR:"])
    return _ranked(names, prompt, (texts[0], texts[1]), choice == 1, rank_by_reward, source)


_TLDR = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: "}


def parse_pku(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "response_0", "response_1", "better_response_id"}` of PKU-SafeRLHF, ranked by help."""
    better = get(row, "better_response_id", source)
    if better not in (0, 1):
        raise _tie(source, "better_response_id", better)
    names = ("response_0", "response_1")
    responses = (get(row, names[0], source), get(row, names[1], source))
    return _ranked(names, get(row, "prompt", source), responses, better == 1, rank_by_reward, source)


def parse_stack_paired(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"question", "response_j", "response_k"}` of Stack-Exchange paired; j is the better one."""
    names = ("response_j", "response_k")
    responses = (get(row, names[0], source), get(row, names[1], source))
    return _ranked(names, get(row, "question", source), responses, False, rank_by_reward, source)
