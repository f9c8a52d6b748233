"""`register`: an objective of somebody else's under its name."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

import pytest
import torch

from clha_fast import Objective, RankingInputs, SimPOOptions, linear_loss, ranking_loss
from clha_fast.hf import CLHAConfig
from clha_fast.objectives import OBJECTIVES, Group, Terms, decode, encode, register
from clha_fast.training.objective import as_mapping, make
from tests.support.helpers import make_case


@dataclasses.dataclass(frozen=True)
class BestOf(Objective):
    """-log of the target's share in its prompt, of exp(beta s)."""

    beta: float = 1.0
    name: ClassVar[str] = "best_of"

    def terms(self, group: Group) -> Terms:
        x = self.beta * group.scores
        total = torch.zeros(len(group.sizes), dtype=x.dtype, device=x.device).index_add(0, group.prompt, x.exp())
        loss = (total.log().sum() - group.of_targets(x).sum()) / group.totals.prompts
        return Terms(loss, torch.zeros_like(loss))


@dataclasses.dataclass(frozen=True)
class Centred(Objective):
    name: ClassVar[str] = "centred"

    def terms(self, group: Group) -> Terms:
        return Terms(((group.scores - group.scores.mean()) ** 2).sum(), group.scores.new_zeros(()))


@dataclasses.dataclass(frozen=True)
class Demanding(Objective):
    beta: float
    name: ClassVar[str] = "demanding"


@dataclasses.dataclass(frozen=True)
class Nameless(Objective):
    pass


class Undecorated(BestOf):
    gamma: float = 1.0
    name: ClassVar[str] = "undecorated"


@dataclasses.dataclass(frozen=True)
class Spaced(BestOf):
    name: ClassVar[str] = "best of"


@dataclasses.dataclass(frozen=True)
class Marked(BestOf):
    name: ClassVar[str] = "@best"


@dataclasses.dataclass(frozen=True)
class Doubled(SimPOOptions):
    pass


@dataclasses.dataclass(frozen=True)
class Taken(Objective):
    name: ClassVar[str] = "simpo"


@dataclasses.dataclass(frozen=True)
class Weighted(BestOf):
    """Settings of several values each."""

    steps: tuple[float, ...] = (1.0, 0.5)
    spans: tuple[tuple[int, int], ...] | None = None
    pair: Optional[tuple[str, tuple[float, float]]] = None  # noqa: UP045
    several: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    by_size: Mapping[int, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    by_name: dict[str, float] | None = None
    whole: Any = None
    name: ClassVar[str] = "weighted"


@dataclasses.dataclass(frozen=True)
class Unknown(BestOf):
    steps: tuple[Nowhere, ...] = (1.0, 0.5)  # type: ignore[name-defined]  # noqa: F821
    name: ClassVar[str] = "unknown"


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("best_of", "centred", "weighted", "unknown"):
        monkeypatch.setitem(OBJECTIVES, name, BestOf)  # and taken out again afterwards
        del OBJECTIVES[name]


@pytest.mark.parametrize("backend", ["torch", "workspace", "triton", "reference"])
def test_it_is_the_same_loss_on_every_backend(backend: Any) -> None:
    case = make_case([2, 3, 1], [2, 1], dtype=torch.float32)

    def found() -> list[torch.Tensor]:
        leaves = case.leaves()
        loss, _ = linear_loss(*leaves, case.targets, case.ranking, BestOf(beta=2.0), backend=backend)
        return [loss, *torch.autograd.grad(loss, leaves)]

    before = found()
    assert register(BestOf) is BestOf
    for got, want in zip(found(), before, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    assert before[0] > 0


def test_its_name_stands_in_configurations(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"'best_of', a loss of your own, .* clha_fast.objectives.register gives"):
        as_mapping(BestOf())
    register(BestOf)
    for given in ({"name": "best_of", "beta": 2.0}, BestOf(beta=2.0)):
        args = CLHAConfig(output_dir=str(tmp_path), objective=given, use_cpu=True)
        assert args.objective == {"name": "best_of", "beta": 2.0}
        assert make(as_mapping(args.objective)) == BestOf(beta=2.0)
    with pytest.raises(ValueError, match=r"unknown setting 'betta'; did you mean 'beta'"):
        as_mapping({"name": "best_of", "betta": 1})
    assert pickle.loads(pickle.dumps(BestOf(beta=3.0))) == BestOf(beta=3.0)
    assert register(BestOf) is BestOf, "again, as when its module is imported again"


@pytest.mark.parametrize(
    ("field", "value", "listed"),
    [
        ("steps", (1, 2.5), [1, 2.5]),
        ("steps", (), []),
        ("spans", ((1, 2), (3, 4)), [[1, 2], [3, 4]]),
        ("spans", None, None),
        ("pair", ("a", (1, 2.0)), ["a", [1, 2.0]]),
        ("several", [(1, 2), (3,)], [[1, 2], [3]]),
        ("by_size", {2: (1.0, 0.5), 3: (0.25,)}, {"2": [1, 0.5], "3": [0.25]}),
        ("by_name", {"a": 1}, {"a": 1}),
        ("whole", ((1, "a"), {"x": (2.5,)}), [[1, "a"], {"x": [2.5]}]),
    ],
)
def test_settings_of_several_values_come_back_as_they_were(tmp_path: Any, field: str, value: Any, listed: Any) -> None:
    register(Weighted)
    made = Weighted(**{field: value})
    assert getattr(made, field) == value
    for again in (decode(encode(made)), pickle.loads(pickle.dumps(made)), Weighted(**{field: listed})):
        assert again == made
        assert repr(again) == repr(made), "types too"
        assert again.encoded == made.encoded
    given = [{"name": "weighted", field: listed}, made]
    configs = [CLHAConfig(output_dir=str(tmp_path), objective=one, use_cpu=True).objective for one in given]
    assert configs[0] == configs[1]
    for config in (configs[0], json.loads(json.dumps(configs[0]))):
        assert make(as_mapping(config)) == made


def test_where_an_annotation_is_unknown_a_list_is_a_tuple() -> None:
    register(Unknown)
    made = Unknown(steps=[1, [2, 3]])  # type: ignore[arg-type]
    assert made.steps == decode(encode(made)).steps == (1, (2, 3))  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [{1.5, 2.5}, torch.ones(2), (1.0, object())])
def test_what_no_string_can_carry_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps: expected numbers, texts, None, and tuples and mappings of them, "):
        Weighted(steps=value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("whole", {1: "a"}),
        ("whole", ({"b": {2.5: 1}},)),
        ("by_name", {True: 1.0}),
        ("by_name", {"a": 1.0, 7: 1.0}),
        ("by_size", {"a": (1.0,)}),
        ("by_size", {2.5: (1.0,)}),
        ("by_size", {None: (1.0,)}),
    ],
)
def test_keys_that_would_come_back_as_others_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"^{field}: expected keys that are texts, or numbers where .* got {re.escape(repr(value))}"
    ):
        Weighted(**{field: value})


def test_it_has_to_add_up_all_the_same() -> None:
    register(Centred)
    given = RankingInputs(torch.tensor([2, 3]), torch.tensor([2]))
    for _ in range(2):
        with pytest.raises(ValueError, match="objective 'centred': expected a loss that adds up over prompts"):
            ranking_loss(-torch.ones(5), given, Centred())


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Taken, r"name: expected one that no objective has \(clha, .* are taken\), got 'simpo' of Taken"),
        (Doubled, "name: expected one that no objective has .*, got None of Doubled"),
        (Nameless, "name: expected one that no objective has .*, got None of Nameless"),
        (Demanding, "beta: expected a default of each setting of Demanding, got none"),
        (Undecorated, r"got <class '.*Undecorated'>; @dataclass\(frozen=True\) stands below @register"),
        (Spaced, "name: expected letters, digits, _, - and . alone, got 'best of' of Spaced"),
        (Marked, "name: expected letters, digits, _, - and . alone, got '@best' of Marked"),
        (BestOf(), "register: expected a dataclass that subclasses Objective, got BestOf"),
        (dict, "register: expected a dataclass that subclasses Objective, got <class 'dict'>"),
    ],
)
def test_what_is_not_registered(cls: Any, said: str) -> None:
    known = dict(OBJECTIVES)
    with pytest.raises(ValueError, match=said):
        register(cls)
    assert known == OBJECTIVES


def test_a_function_has_no_name() -> None:
    with pytest.raises(ValueError, match=r"got <function .*; clha_fast.attach\(model, function\) trains a function"):
        as_mapping(lambda group: group.scores.sum())
