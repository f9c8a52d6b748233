"""One prompt and its responses, best first: the only form of data that the rest of the library knows."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import numbers
import operator
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

Message = dict[str, Any]
Prompt = str | tuple[Message, ...]

# What may be known of every response beside its reward; keys of a canonical row, and of `RankedRecord.signals`.
SIGNALS = ("reference_logps", "reference_tokens", "advantages")
# Numbers travel as float32; a larger one would silently become infinite.
_LARGEST = 3.4028234663852886e38
_LONGEST_GOT = 100
# A number as it is written in half of the world; which of comma and point stand for thousands is not guessed.
_WITH_COMMA = re.compile(r"\s*[+-]?(?=[.,]*\d)[\d.]*,[\d.]*([eE][+-]?\d+)?\s*")
_QUOTED = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
_WORDS_OF_A_PROMPT = 3
# The way out of one bad record, for `RecordError.advised`.
SKIPS = "where others are good, skip_bad_records=True leaves it out"


class RecordError(ValueError):
    """A record that cannot be used: one sentence with the record, the field, what was expected and what came.

    Attributes:
        source: where the record is, such as "train.jsonl:17".
        field: name of the field at fault, or "" when the record as a whole is.
        has_way: whether the message names a way out of its own, such as a mapping of columns: what is wrong is then how
            all records are read, and to leave one out is none.
    """

    # One positional argument: data loader workers rebuild exceptions from their message alone.
    def __init__(self, message: str, *, source: str = "", field: str = "", has_way: bool = False) -> None:
        super().__init__(message)
        self.source = source
        self.field = field
        self.has_way = has_way

    @classmethod
    def of(cls, source: str, field: str, expected: str, got: object, has_way: bool = False) -> RecordError:
        """The error for `field` of the record at `source`; a text `got` is quoted, as any value is."""
        place = f"{source}: {field}" if field else source
        message = f"{place}: expected {expected}, got {shorten(got)}"
        if "number" in expected and isinstance(got, str) and _WITH_COMMA.fullmatch(got):
            message += "; a number is written with a decimal point and no comma (0.5)"
            has_way = True
        elif "number" in expected and isinstance(got, str) and _QUOTED.fullmatch(got):
            message += f"; a number stands without quotes ({got.strip()})"
        return cls(message, source=source, field=field, has_way=has_way)

    def advised(self, way: str) -> RecordError:
        """The same with a way out, where it is one record that is bad and the message names none (`has_way`)."""
        if not self.field or self.has_way:
            return self
        return RecordError(f"{self}; {way}", source=self.source, field=self.field, has_way=True)


def shorten(value: object) -> str:
    """repr(value), cut to a length that fits in one sentence."""
    text = repr(value)
    return text if len(text) <= _LONGEST_GOT else f"{text[:_LONGEST_GOT]}... ({len(text)} characters)"


@dataclass(frozen=True)
class RankedRecord:
    """A prompt and its candidates, best rank first. Checked when built, so an existing record is a valid one.

    Attributes:
        prompt: text, or the messages `{"role": ..., "content": ...}` before the response.
        completions: n >= 1 response texts, none empty; position is rank.
        rewards: n finite numbers (reward model's scores, any scale), or None. They need not follow the
            ranking.
        sft_index: position in `completions` of the response that the SFT term imitates.
        source: "file:line", named in every error; not part of equality.
        template: what the chat template gets beside the messages: `tools`, a list of them, and any variables of
            its own; for messages only.
        signals: n finite numbers by name, one a completion. `reference_logps`: summed log-probabilities under a frozen
            model, nats. `reference_tokens`: whole numbers that tell the tokens which those were summed over from any
            others (`batching.batch.token_checksum`); only beside `reference_logps`. `advantages`.
        subset: which part of a data set it is from, for figures by subset; the loss does not see it.

    Raises:
        RecordError: for anything else, naming source, field, what was expected and what came.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    sft_index: int = 0
    source: str = field(default="record", compare=False)
    template: Mapping[str, Any] = field(default_factory=dict)
    signals: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    subset: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _check_prompt(self.prompt, self.source))
        object.__setattr__(self, "completions", _check_completions(self.completions, self.source))
        size = len(self.completions)
        if self.rewards is not None:
            object.__setattr__(self, "rewards", _check_finite(self.rewards, size, self.source, "rewards"))
        object.__setattr__(self, "sft_index", _check_sft_index(self.sft_index, size, self.source))
        check_text(self.subset, self.source, "subset")
        if self.template and isinstance(self.prompt, str):
            name = "tools" if "tools" in self.template else "chat_template_kwargs"
            raise RecordError.of(self.source, name, "messages as prompt, for a chat template", self.prompt)
        object.__setattr__(self, "signals", _check_signals(self.signals, size, self.source))

    def as_dict(self) -> dict[str, Any]:
        """The canonical JSON object: rewards, signals, subset only where there are any, sft_index where it is not 0."""
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        out: dict[str, Any] = {"prompt": prompt, "completions": list(self.completions)}
        if self.rewards is not None:
            out["rewards"] = list(self.rewards)
        if self.sft_index:
            out["sft_index"] = self.sft_index
        if self.subset:
            out["subset"] = self.subset
        variables = dict(self.template)
        if "tools" in variables:
            out["tools"] = variables.pop("tools")
        if variables:
            out["chat_template_kwargs"] = variables
        return {**out, **{name: list(values) for name, values in self.signals.items()}}

    def in_order(self, order: Sequence[int]) -> RankedRecord:
        """The same record with its responses, and all that is known of each, in the places `order` [n] gives."""
        return dataclasses.replace(
            self,
            completions=tuple(self.completions[k] for k in order),
            rewards=None if self.rewards is None else tuple(self.rewards[k] for k in order),
            sft_index=list(order).index(self.sft_index),
            signals={name: tuple(values[k] for k in order) for name, values in self.signals.items()},
        )


def make_record(
    prompt: Any,
    completions: Any,
    *,
    rewards: Any = None,
    ranks: Any = None,
    sft_index: Any = None,
    rank_by_reward: bool = False,
    signals: Mapping[str, Any] | None = None,
    source: str = "record",
    subset: str = "",
) -> RankedRecord:
    """A `RankedRecord` from candidates in any order.

    Args:
        ranks: rank of each completion, a permutation of 0..n-1 or of 1..n, the smallest is best; whole floats
            count. Ties are refused: the loss needs an order and the file does not give one. None: the order
            given is the ranking.
        sft_index: position in the order *given*; follows its response to the new place. None: the best rank.
        rank_by_reward: order by decreasing reward instead; equal rewards keep their order (that of `ranks`,
            if any).
        signals: as `RankedRecord`, in the order given; None is none, and so is None for one of them.
        subset: as `RankedRecord` has it.

    Raises:
        RecordError: as `RankedRecord`; ranks that are no permutation; `rank_by_reward` without rewards.
    """
    target = 0 if sft_index is None else sft_index
    record = RankedRecord(prompt, completions, rewards, target, source, signals=signals or {}, subset=subset)
    size = len(record.completions)
    order = list(range(size))
    if ranks is not None:
        position = _check_ranks(ranks, size, source)
        order.sort(key=position.__getitem__)
    if rank_by_reward:
        if record.rewards is None:
            raise RecordError.of(source, "rewards", "rewards to rank by", None)
        order.sort(key=as_compared(record.rewards).__getitem__, reverse=True)  # a stable sort, reverse included
    if order == list(range(size)):
        return record
    ordered = record.in_order(order)
    return dataclasses.replace(ordered, sft_index=0) if sft_index is None else ordered


def as_compared(rewards: Iterable[float]) -> list[float]:
    """Rewards as losses compare them, rounded to float32: what only float64 keeps apart is a tie, wherever it is seen.

    What they are sorted, counted and paired by; `objectives.pairs.COMPARED` is the same of tensors.
    """
    return array("f", rewards).tolist()


def agreeing(given: Iterable[float], scores: Iterable[float]) -> tuple[float, int]:
    """(pairs that `scores` order as `given` does, pairs that `given` orders); of equal scores a pair is half right.

    n log n comparisons: of a thousand responses there are half a million pairs.
    """
    right, pairs = 0.0, 0
    better: list[float] = []  # ascending, the scores of all that are given as better
    for _, equal in itertools.groupby(sorted(zip(given, scores, strict=True), reverse=True), operator.itemgetter(0)):
        own = [score for _, score in equal]
        for score in own:
            lower, upto = bisect.bisect_left(better, score), bisect.bisect_right(better, score)
            right += len(better) - upto + 0.5 * (upto - lower)
        pairs += len(own) * len(better)
        for score in own:
            bisect.insort(better, score)
    return right, pairs


def repeats_prompt(prompt: Prompt) -> Callable[[str], bool]:
    """Whether a response begins with a text prompt of three words or more, which it will not do by chance."""
    text = prompt if isinstance(prompt, str) and len(prompt.split()) >= _WORDS_OF_A_PROMPT else None
    return lambda response: text is not None and response.startswith(text)


def without_repeated_prompt(record: RankedRecord) -> tuple[RankedRecord, bool]:
    """The record whose responses do not begin with its text prompt once more, and whether they all did.

    They would be trained on as an answer to themselves. A prompt of less than three words may begin an answer by
    chance ("Hi"): it is left there.

    Raises:
        RecordError: nothing is left of a response.
    """
    prompt = record.prompt
    if not isinstance(prompt, str) or not prompt.strip():
        return record, False
    if not all(text.startswith(prompt) for text in record.completions):
        return record, False
    if len(prompt.split()) < _WORDS_OF_A_PROMPT:
        return record, True
    return dataclasses.replace(record, completions=tuple(text[len(prompt) :] for text in record.completions)), True


def is_sequence(value: object) -> bool:
    """A list-like value: what JSON arrays and table columns come as; texts and mappings are not."""
    # Concrete types first, here and below: an abstract class is slow to ask, and every text and message is asked of.
    return not isinstance(value, (str, bytes)) and isinstance(value, (list, Sequence))


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_text(value: object, source: str, field: str) -> str:
    """`value` as a text that can be encoded; RecordError otherwise."""
    if not isinstance(value, str):
        raise RecordError.of(source, field, "a text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # Cut emoji leave lone surrogates behind; tokenizers fail on them far from the file.
        raise RecordError.of(source, field, "valid Unicode (no lone surrogate)", value) from error
    return value


def check_messages(value: object, source: str, field: str) -> tuple[Message, ...]:
    """`value` as a tuple of one or more messages, texts as "role" and "content"; RecordError otherwise.

    Content in parts, `[{"type": "text", "text": ...}]`, becomes their joined text. Tables give every message every key
    that any message has, and a call's arguments those of all other calls, as None: these are taken out, and a null
    that somebody wrote into the arguments of a call stays.
    """
    if not isinstance(value, Iterable) or not is_sequence(value):
        raise RecordError.of(source, field, "a list of messages", value)
    messages = []
    for number, message in enumerate(value):
        name = f"{field}[{number}]"
        if not isinstance(message, (dict, Mapping)):
            raise RecordError.of(source, name, 'a message {"role": ..., "content": ...}', message)
        for key in ("role", "content"):
            if key not in message:
                raise RecordError.of(source, name, f'a message with "{key}"', sorted(map(str, message)))
        content = _joined_parts(message["content"], source, f"{name}.content")
        if content is None and any(message.get(key) for key in _STANDS_FOR_CONTENT):
            content = ""
        check_text(message["role"], source, f"{name}.role")
        check_text(content, source, f"{name}.content")
        messages.append({**{str(key): item for key, item in message.items() if item is not None}, "content": content})
    if not messages:
        raise RecordError.of(source, field, "at least one message", value)
    if _is_of_table(list(value)):
        messages = [{key: without_none(item) for key, item in message.items()} for message in messages]
    return tuple(messages)


def _is_of_table(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message that is no assistant's has the calls that another one makes, as None, and all have like keys.

    Whoever writes such a null into JSON says no more than by leaving it out, and seldom gives every message, and every
    call's arguments, the keys of all others.
    """
    others = (message for message in messages if message["role"] != "assistant")
    filled = {key for message in others for key in SAID[:2] if key in message and message[key] is None}
    return any(message.get(key) for message in messages for key in filled) and _alike(messages)


def _alike(values: Iterable[Any]) -> bool:
    """Whether the mappings that stand at one place among `values`, however deep, have the same keys."""
    given = [value for value in values if value is not None]
    mappings = [value for value in given if isinstance(value, Mapping)]
    items = [item for value in given if is_sequence(value) for item in value]
    if len({frozenset(value) for value in mappings}) > 1 or (items and not _alike(items)):
        return False
    return all(_alike([value[key] for value in mappings]) for key in (mappings[0] if mappings else ()))


def without_none(value: Any, kept: Sequence[str] = ()) -> Any:
    """A value of JSON's kinds without the keys of its mappings that hold None, but for those named `kept`."""
    if isinstance(value, Mapping):
        pairs = ((str(name), item) for name, item in value.items())
        return {name: without_none(item, kept) for name, item in pairs if item is not None or name in kept}
    return [without_none(item, kept) for item in value] if is_sequence(value) else value


# Keys of a message that are part of what is said, beside its content; the first three stand in for it.
SAID = ("tool_calls", "function_call", "audio", "reasoning_content", "reasoning", "thinking", "refusal")
_STANDS_FOR_CONTENT = SAID[:3]


def check_only_content(message: Message, source: str, field: str) -> str:
    """The content of a response's message, which must be all that is said in it; RecordError otherwise."""
    for key in SAID:
        if message.get(key):
            expected = "a response of content alone (write it into content, as the model's chat template does)"
            raise RecordError.of(source, f"{field}.{key}", expected, message[key])
    return str(message["content"])


def _joined_parts(content: object, source: str, field: str) -> object:
    if isinstance(content, str) or not isinstance(content, Iterable) or not is_sequence(content):
        return content
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RecordError.of(source, f"{field}[{number}]", 'a part {"type": "text", "text": ...}', part)
        texts.append(check_text(part.get("text"), source, f"{field}[{number}].text"))
    return "".join(texts)


def _check_prompt(prompt: object, source: str) -> Prompt:
    if isinstance(prompt, str):
        return check_text(prompt, source, "prompt")
    if not is_sequence(prompt):
        raise RecordError.of(source, "prompt", "a text or a list of messages", prompt)
    return check_messages(prompt, source, "prompt")


def _check_completions(completions: object, source: str) -> tuple[str, ...]:
    if not isinstance(completions, Iterable) or not is_sequence(completions):
        raise RecordError.of(source, "completions", "a list of texts", completions)
    texts = []
    for number, text in enumerate(completions):
        name = f"completions[{number}]"
        texts.append(check_text(text, source, name))
        if not text:
            raise RecordError.of(source, name, "a response that is not empty", text)
    if not texts:
        raise RecordError.of(source, "completions", "at least one response", completions)
    return tuple(texts)


def _check_finite(values: object, size: int, source: str, name: str) -> tuple[float, ...]:
    found = _numbers(values, size, source, name)
    for number, value in enumerate(found):
        if not abs(value) <= _LARGEST:
            raise RecordError.of(source, f"{name}[{number}]", "a finite number (float32)", value)
    return tuple(float(value) for value in found)


def _check_signals(signals: object, size: int, source: str) -> dict[str, tuple[float, ...]]:
    if not isinstance(signals, Mapping):
        raise RecordError.of(source, "signals", f"a mapping with some of {', '.join(SIGNALS)}", signals)
    found: dict[str, tuple[float, ...]] = {}
    for name, values in signals.items():
        if name not in SIGNALS:
            raise RecordError.of(source, "signals", f"names among {', '.join(SIGNALS)}", name)
        if values is not None:
            found[name] = _check_finite(values, size, source, name)
    if "reference_tokens" in found:
        whole = tuple(int(value) for value in found["reference_tokens"])
        if whole != found["reference_tokens"]:
            raise RecordError.of(source, "reference_tokens", "whole numbers", found["reference_tokens"])
        if "reference_logps" not in found:
            raise RecordError.of(source, "reference_tokens", "reference_logps beside it", None)
        found["reference_tokens"] = whole
    return found


def _check_ranks(ranks: object, size: int, source: str) -> list[int]:
    values = _numbers(ranks, size, source, "ranks")
    if sorted(values) not in (list(range(size)), list(range(1, size + 1))):
        expected = f"a permutation of 0..{size - 1} or 1..{size} (a tie has no order)"
        raise RecordError.of(source, "ranks", expected, list(values))
    return [int(value) for value in values]


def _check_sft_index(value: object, size: int, source: str) -> int:
    if not is_number(value) or value not in range(size):
        raise RecordError.of(source, "sft_index", f"a position from 0 to {size - 1}", value)
    return int(value)


def _numbers(values: object, size: int, source: str, name: str) -> list[float]:
    if not isinstance(values, Iterable) or not is_sequence(values):
        raise RecordError.of(source, name, "a list of numbers", values)
    found = list(values)
    for number, value in enumerate(found):
        if not is_number(value):
            raise RecordError.of(source, f"{name}[{number}]", "a number", value)
    if len(found) != size:
        raise RecordError.of(source, name, f"{size} numbers, one a completion", len(found))
    return found
