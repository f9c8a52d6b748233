"""Several responses to a prompt, with scores or in a tree; and rows that hold no ranking at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clha_fast.data.fields import Reading, Row, columns_of, get, items, make_named, objects, response
from clha_fast.data.names import mapping_text
from clha_fast.data.records import RankedRecord, RecordError, check_text, is_number, is_sequence


def parse_stack_exchange(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"question", "answers": [{"text", "pm_score"}]}` of Stack-Exchange preferences.

    Ranked by score, equal scores in the order given.
    """
    texts, scores = objects(row, "answers", ("text", "pm_score"), source)
    return make_named(
        {"prompt": "question{}", "completions": "answers{}.text", "rewards": "answers{}.pm_score"},
        get(row, "question", source),
        texts,
        rewards=scores,
        rank_by_reward=True,
        source=source,
    )


def parse_generations(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"instruction" or "input" or "prompt", "generations", "ratings" or "rating"}` of distilabel.

    Ranked by rating, equal ratings in the order given. Responses without a rating are refused.
    """
    prompt = next((name for name in ("instruction", "prompt", "input") if row.get(name) is not None), "instruction")
    ratings = "ratings" if "ratings" in row else "rating"
    return make_named(
        {"prompt": prompt + "{}", "completions": "generations{}", "rewards": ratings + "{}"},
        get(row, prompt, source),
        items(row, "generations", source),
        rewards=items(row, ratings, source),
        rank_by_reward=True,
        source=source,
    )


def parse_simpo(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "all_generated_responses", "all_rm_scores"}` of SimPO's files, ranked by score.

    Their chosen and rejected are the first and the last of them.
    """
    texts = [
        response(row, item, source, f"all_generated_responses[{number}]")
        for number, item in enumerate(items(row, "all_generated_responses", source))
    ]
    for name in ("chosen", "rejected"):
        row.get(name)
    prompt = get(row, "prompt", source)
    return make_named(
        {"completions": "all_generated_responses{}", "rewards": "all_rm_scores{}"},
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) and is_sequence(row.get("chosen")) else prompt,
        texts,
        rewards=items(row, "all_rm_scores", source),
        rank_by_reward=True,
        source=source,
    )


def parse_oasst(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """A tree of OpenAssistant, `{"prompt": {"text", "replies"}}`, that asks for an order in one place only.

    `read_records` makes a record of every place (`tree_rows`).
    """
    columns = columns_of(row)
    if not is_tree(columns):
        return _of_node(row, source, rank_by_reward)
    found = [item for _, item in tree_rows(columns, source)]
    if len(found) != 1:
        raise RecordError.of(source, "prompt", "one message with ranked replies (read_records takes trees)", len(found))
    get(row, "prompt", source)
    return _of_node(found[0], source, rank_by_reward)


def _of_node(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    return make_named(
        {"completions": "replies{}.text", "ranks": "replies.rank"},
        get(row, "prompt", source),
        items(row, "completions", source),
        ranks=get(row, "ranks", source),
        rank_by_reward=rank_by_reward,
        source=source,
    )


def is_tree(row: object) -> bool:
    """Whether a row is a tree of messages."""
    prompt = row.get("prompt") if isinstance(row, Mapping) and not isinstance(row, Reading) else None
    return isinstance(prompt, Mapping) and is_sequence(prompt.get("replies"))


def tree_rows(row: Row, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every prompter's message in a tree with two or more ranked replies, in the canonical format.

    Ranks are counted anew where a reply among them has none.

    Raises:
        RecordError: a message without text.
    """
    roles = {"prompter": "user", "assistant": "assistant"}

    def walk(node: Any, before: list[dict[str, Any]], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if not isinstance(node, Mapping):
            raise RecordError.of(source, place, 'a message {"text": ..., "role": ..., "replies": [...]}', node)
        role = roles.get(node.get("role", "prompter"), "user")
        messages = [*before, {"role": role, "content": check_text(node.get("text"), source, f"{place}.text")}]
        replies = node.get("replies") or []
        if not is_sequence(replies):
            raise RecordError.of(source, f"{place}.replies", "a list of messages", replies)
        if role == "user":
            ranked = [reply for reply in replies if isinstance(reply, Mapping) and is_number(reply.get("rank"))]
            ranked.sort(key=lambda reply: reply["rank"])
            if len(ranked) > 1:
                texts = [check_text(reply.get("text"), source, f"{place}.replies.text") for reply in ranked]
                where = f"{source}: {node['message_id']}" if node.get("message_id") else f"{source}: {place}"
                yield where, {"prompt": messages, "completions": texts, "ranks": list(range(len(texts)))}
        for number, reply in enumerate(replies):
            yield from walk(reply, messages, f"{place}.replies[{number}]")

    yield from walk(row["prompt"], [], "prompt")


def parse_kto(row: Row, source: str, rank_by_reward: bool) -> RankedRecord:
    """`{"prompt", "completion", "label"}` of KTO: one response, and nothing to rank it against. Refused."""
    mapping = {"completions": "completion", "rewards": "label", "group_by": "prompt"}
    ways = " ".join(mapping_text(field, path).partition("(")[2].rstrip(")") for field, path in mapping.items())
    raise RecordError(
        f"{source}: completion: expected several responses of one prompt, which are ranked, got one with a label (rows "
        f"of KTO); rows of the same prompt are grouped by columns={mapping!r} ({ways}), with rank_by_reward",
        source=source,
        field="completion",
        has_way=True,
    )
