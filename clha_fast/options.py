"""Settings objects, which travel through the library unchanged and through operators as one string.

`HeadOptions` says how token log-probabilities come from hidden states (a property of the model); an objective (see
`objectives`) says what is done with them (a property of the training run).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

# Words of a vocabulary block that a routed backward keeps or leaves out as a whole.
ROUTE_WORDS = 128

_T = TypeVar("_T", bound="Settings")


def require(name: str, value: Any, ok: bool, expected: str) -> None:
    """ValueError that names a setting, what was expected and what came, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether a setting can be a float: Python's and numpy's numbers, no booleans, nothing beyond a double."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def require_positive(**settings: Any) -> None:
    """ValueError unless each is a positive finite number."""
    for name, value in settings.items():
        require(name, value, is_number(value) and 0 < value < math.inf, "a positive finite number")


def require_not_negative(**settings: Any) -> None:
    """ValueError unless each is a finite number of at least 0."""
    for name, value in settings.items():
        require(name, value, is_number(value) and 0 <= value < math.inf, "a finite number that is not negative")


def is_integer(value: Any) -> bool:
    """Whether a setting can be an integer of 64 bits, Python's or numpy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def count(name: str, value: Any, expected: str) -> int:
    """A setting that is a positive integer, Python's or numpy's, as Python's.

    Raises:
        ValueError: it is none; `expected` is what it says.
    """
    require(name, value, is_integer(value) and value > 0, expected)
    return int(value)


def as_python(value: Any) -> Any:
    """Numbers of others (numpy's, which pandas gives) as Python's; anything else as it is."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _plain(value: Any, kind: Any) -> Any:
    """A number as its field has it, so that 1 and 1.0 are one setting; anything else as it is."""
    declared = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    value = as_python(value)
    return float(value) if type(value) is int and declared.startswith("float") else value


@functools.lru_cache(maxsize=256)
def hints_of(cls: Any) -> dict[str, Any]:
    """The types that the fields of a class are declared with; none where one cannot be told."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):  # a name that only type checkers know
        return {}


def _shaped(value: Any, kind: Any) -> Any:
    """Lists, tuples and mappings as their field declares them, which JSON does not tell apart; undeclared: tuples."""
    if isinstance(value, (list, tuple)):
        kind = _member(kind, (tuple, list))
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is tuple and inner[1:] != (...,) and len(inner) == len(value):
            return tuple(map(_shaped, value, inner))
        found = [_shaped(item, inner[0] if inner else Any) for item in value]
        return found if kind is list or typing.get_origin(kind) is list else tuple(found)
    if isinstance(value, Mapping):
        inner = typing.get_args(_member(kind, (dict, Mapping))) or (Any, Any)
        return {_key(name, inner[0]): _shaped(item, inner[1]) for name, item in value.items()}
    return _plain(value, _member(kind, (float,)))


def _key(key: Any, kind: Any) -> Any:
    """A key of a mapping as it is declared, which JSON has as a text.

    Raises:
        TypeError, ValueError: it would come back from JSON as another one.
    """
    if kind in (int, float):
        if not (isinstance(key, str) or (is_integer(key) if kind is int else is_number(key))):
            raise TypeError
        return kind(key)
    if not isinstance(key, str):
        raise TypeError
    return key


def _member(kind: Any, wanted: tuple[Any, ...]) -> Any:
    """That part of a union which is one of the wanted kinds, else the whole."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    return next((part for part in parts if (typing.get_origin(part) or part) in wanted), kind)


@dataclass(frozen=True)
class Settings:
    """Frozen fields that are checked where they are made; `encoded` is the string that carries them.

    A list is a tuple where the field does not say `list`.

    Raises:
        ValueError: a value that no JSON holds.
    """

    # No field: `dataclasses.asdict` gives what the class takes.
    encoded: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (list, tuple, Mapping)):
                kind: Any = type(self)
                try:
                    value = _shaped(value, hints_of(kind).get(field.name, Any))
                except (TypeError, ValueError):
                    expected = "keys that are texts, or numbers where the field is declared so, as dict[int, float]"
                    raise ValueError(f"{field.name}: expected {expected}, got {value!r}") from None
            object.__setattr__(self, field.name, _plain(value, field.type))
        # Computed once: a compiled graph reads it as a constant, where json.dumps would break the graph.
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.init}
        try:
            object.__setattr__(self, "encoded", json.dumps(values, sort_keys=True))
        except TypeError:
            name = next(name for name, value in values.items() if not _in_json(value))
            expected = "numbers, texts, None, and tuples and mappings of them, which a string can carry"
            raise ValueError(f"{name}: expected {expected}, got {values[name]!r}") from None

    @classmethod
    def decode(cls: type[_T], encoded: str) -> _T:
        """The settings object whose `encoded` string is given (custom operators carry the string)."""
        kind: Any = cls
        made: _T = _decoded(kind, encoded)
        return made

    def replace(self: _T, **changes: Any) -> _T:
        """A copy with some fields changed; unknown names raise ValueError."""
        known = {field.name for field in dataclasses.fields(self) if field.init}
        for name in changes:
            require("option", name, name in known, f"one of {', '.join(sorted(known))}")
        return dataclasses.replace(self, **changes)


def _in_json(value: Any) -> bool:
    try:
        return bool(json.dumps(value, sort_keys=True))
    except TypeError:
        return False


@functools.lru_cache(maxsize=256)
def _decoded(kind: Any, encoded: str) -> Any:
    return kind(**json.loads(encoded))


@dataclass(frozen=True)
class HeadOptions(Settings):
    """How logits come from hidden states: z = softcap(scale * (hidden . weight^T + bias)) / temperature.

    Attributes:
        scale: factor on the raw logits (Cohere's `logit_scale`, Granite's 1 / `logits_scaling`).
        softcap: c of c * tanh(z / c), applied after `scale` (Gemma 2's `final_logit_softcapping`); None for none.
        temperature: divisor of the logits, applied last.
        ignore_index: target value of a token that is not scored.
        workspace_bytes: memory that logits may take at a time, whatever the number of tokens. None chooses for the
            torch backend about a quarter of the weight's float32 size (at least 16 MiB), and the size of the gradient
            of rows of hidden that no token reads, which comes last; in it stand the logits of prompts until they are
            ranked, beside the memory of the weight's gradient before that is needed (more spares large prompts a
            second pass); 64 MiB for the Triton backend; and for the workspace backend max(64 MiB, the weight's float32
            size), or 256 MiB where the weight has no gradient (a single prompt may take more).
        max_dropped_mass: None for exact gradients. A number d in [0, 1) lets each token's gradient leave out the
            vocabulary blocks of `ROUTE_WORDS` words in which its softmax has least mass, as long as they hold at most
            d of it together; the target's own block always counts. Weight and bias get nothing of such a block; hidden
            gets its exact mass times the mean of its rows, and is off by at most |dL/dlogp| * d * the largest distance
            of a row from the mean of its block (times scale / temperature; with a softcap see
            `backends.torch.routing`). Loss and log-probabilities stay exact.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignore_index: int = -100
    workspace_bytes: int | None = None
    max_dropped_mass: float | None = None

    def __post_init__(self) -> None:
        require("scale", self.scale, is_number(self.scale) and math.isfinite(self.scale), "a finite number")
        cap = self.softcap
        require("softcap", cap, cap is None or (is_number(cap) and 0 < cap < math.inf), "a positive number")
        temperature = self.temperature
        require(
            "temperature",
            temperature,
            is_number(temperature) and 0 < temperature < math.inf,
            "a positive number",
        )
        ignored = self.ignore_index
        require("ignore_index", ignored, is_integer(ignored) and ignored < 0, "a negative integer of 64 bits")
        budget = self.workspace_bytes
        ok = budget is None or (is_integer(budget) and budget > 0)
        require("workspace_bytes", budget, ok, "a positive number of bytes or None (64 bits)")
        mass = self.max_dropped_mass
        ok = mass is None or (is_number(mass) and 0 <= mass < 1)
        require("max_dropped_mass", mass, ok, "a number in [0, 1) or None")
        super().__post_init__()
