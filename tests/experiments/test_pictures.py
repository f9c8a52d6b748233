"""What `table2`, `ablate` and `noise` say that they have drawn is what lies there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clha_fast.cli import experiments

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the plot extra)")

FOUND = {"value": 1.0, "low": 0.5, "high": 1.5}
LOG = [{"step": step, "loss": 1.0, "kept_pair_share": 0.5, "rewards/margins": 1.0} for step in (1, 2)]


def figures(name: str) -> dict[str, Any]:
    return {"length": "2", "label": "a", "corruption": None, "figures": {"Total": {name: FOUND}}}


FAILED = {"length": "2", "label": "a", "corruption": None, "error": "out of memory"}


def table(*trained: str) -> Any:
    """Of ranking lengths 2 and 3; `trained` are those at which a method has trained."""
    rows = [
        SimpleNamespace(
            method=SimpleNamespace(label="a", trains=True),
            cell=SimpleNamespace(length=length, corruption=None),
            outcomes=[SimpleNamespace(trained={"log": LOG, "kept_share": 0.5})] if length in trained else [],
        )
        for length in ("2", "3")
    ]
    return SimpleNamespace(comparison=SimpleNamespace(data={"2": None, "3": None}), rows=rows)


# Of an earlier call, whose cells are no longer there.
BEFORE = ("figures.png", "curves-n2.png", "curves-n3.png")


@pytest.mark.parametrize(
    ("rows", "trained", "names", "before"),
    [
        ([figures("accuracy")], ("2", "3"), ["figures.png", "curves-n2.png", "curves-n3.png"], BEFORE),
        ([FAILED, figures("nll")], (), ["figures.png"], BEFORE),
        ([FAILED], (), [], BEFORE),
        ([FAILED], ("3",), ["curves-n3.png"], BEFORE),
        ([FAILED], ("3",), ["curves-n3.png"], ()),
        ([figures("distinct_2")], ("2",), ["curves-n2.png"], BEFORE),  # a figure that is in no picture
        ([], (), [], BEFORE),
    ],
)
def test_names_are_those_of_files(
    tmp_path: Path, rows: Any, trained: tuple[str, ...], names: list[str], before: tuple[str, ...]
) -> None:
    for name in before:
        (tmp_path / name).write_bytes(b"old")
    assert experiments.draw(table(*trained), rows, str(tmp_path)) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).read_bytes()[:4] == b"\x89PNG" for name in names)
