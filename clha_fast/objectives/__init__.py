"""Losses of token log-probabilities: one small file each, and the table that names them."""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from clha_fast.objectives.base import WATCHED_MARK, Group, Objective, Plan, Terms, Totals
from clha_fast.objectives.clha import CLHAOptions
from clha_fast.objectives.coh import CoHOptions
from clha_fast.objectives.cpo import CPOOptions
from clha_fast.objectives.dpo import DPOOptions
from clha_fast.objectives.hinge import HingeOptions
from clha_fast.objectives.ipo import IPOOptions
from clha_fast.objectives.orpo import ORPOOptions
from clha_fast.objectives.policy import PolicyOptions
from clha_fast.objectives.pro import PROOptions
from clha_fast.objectives.rrhf import RRHFOptions
from clha_fast.objectives.sft import SFTOptions
from clha_fast.objectives.simpo import SimPOOptions
from clha_fast.types import COUNTS

__all__ = [
    "OBJECTIVES",
    "CLHAOptions",
    "CPOOptions",
    "CoHOptions",
    "DPOOptions",
    "Group",
    "HingeOptions",
    "IPOOptions",
    "ORPOOptions",
    "Objective",
    "PROOptions",
    "Plan",
    "PolicyOptions",
    "RRHFOptions",
    "SFTOptions",
    "SimPOOptions",
    "Terms",
    "Totals",
    "as_objective",
    "register",
]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls
    for cls in (
        CLHAOptions,
        PROOptions,
        RRHFOptions,
        DPOOptions,
        SimPOOptions,
        IPOOptions,
        HingeOptions,
        ORPOOptions,
        CPOOptions,
        SFTOptions,
        CoHOptions,
        PolicyOptions,
    )
}

# Those that stand in the reference, too, and are tested against it.
BUILT_IN = frozenset(OBJECTIVES.values())

# Objectives that no string can carry; they live as long as the call that brought them.
_LIVE: weakref.WeakValueDictionary[str, Objective] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class FromFunction(Objective):
    """A function of a `Group` as an objective: it returns the loss of these prompts, a scalar."""

    function: Callable[[Group], Tensor] | None = None

    name: ClassVar[str] = "function"
    # It has no place to say which.
    divides_by: ClassVar[tuple[str, ...]] = COUNTS

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoded", "")

    @property
    def label(self) -> str:
        return getattr(self.function, "__name__", self.name)

    def terms(self, group: Group) -> Terms:
        assert self.function is not None
        loss = self.function(group)
        return Terms(loss, torch.zeros_like(loss) if isinstance(loss, Tensor) else loss)


_C = TypeVar("_C", bound=type[Objective])


def register(cls: _C) -> _C:
    """Gives an `Objective` of your own its name, for `CLHAConfig(objective=name)` and the command line; a decorator.

    Under a module's own class it holds in every process that imports the module.

    Raises:
        ValueError: it is no dataclass of `Objective` with a `name` that is free and a default for each setting.
    """
    subclass = isinstance(cls, type) and issubclass(cls, Objective)
    if not subclass or "__dataclass_fields__" not in vars(cls):  # its own: those it inherits know no setting of it
        way = "; @dataclass(frozen=True) stands below @register" if subclass else ""
        raise ValueError(f"register: expected a dataclass that subclasses Objective, got {cls!r}{way}")
    name = vars(cls).get("name")
    if isinstance(name, str) and name and not re.fullmatch(r"\w[\w.-]*", name):  # `decode` takes it up to a blank
        raise ValueError(f"name: expected letters, digits, _, - and . alone, got {name!r} of {cls.__name__}")
    taken = OBJECTIVES.get(name, cls) if isinstance(name, str) else None
    if not name or taken is None or (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"name: expected one that no objective has ({', '.join(OBJECTIVES)} are taken), got {name!r} of "
            f"{cls.__name__}"
        )
    none = (dataclasses.MISSING, dataclasses.MISSING)
    if lacking := [f.name for f in dataclasses.fields(cls) if f.init and (f.default, f.default_factory) == none]:
        raise ValueError(f"{lacking[0]}: expected a default of each setting of {cls.__name__}, got none")
    OBJECTIVES[name] = cls
    return cls


def as_objective(objective: Objective | Callable[[Group], Tensor]) -> Objective:
    """An objective as it is; a function of a `Group` as one.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(objective, Objective):
        return objective
    if not callable(objective) or isinstance(objective, type):
        cls: Any = OBJECTIVES.get(objective) if isinstance(objective, str) else objective
        way = f"; give {cls.__name__}()" if isinstance(cls, type) and issubclass(cls, Objective) else ""
        raise ValueError(
            f"objective: expected one of {', '.join(c.__name__ for c in OBJECTIVES.values())}, an Objective of your "
            f"own or a function of a Group, got {objective!r}{way}"
        )
    return FromFunction(objective)


def encode(objective: Objective) -> str:
    """The string that carries an objective through an operator: its settings, or where it is to be found."""
    if OBJECTIVES.get(objective.name) is type(objective):
        return objective.encoded
    place = f"@{id(objective)}"
    _LIVE[place] = objective
    return place


def decode(encoded: str) -> Objective:
    """The objective of `encode`."""
    if encoded.startswith(WATCHED_MARK):
        return decode(encoded.removeprefix(WATCHED_MARK)).watched()
    if encoded.startswith("@"):
        return _LIVE[encoded]
    return OBJECTIVES[encoded.partition(" ")[0]].decode(encoded)
