"""Each configuration of a table that is shipped names files that its own recipe writes, with what its methods read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from clha_fast.data import RankedRecord, make_record
from clha_fast.experiments.comparison import Comparison, parse_comparison
from clha_fast.experiments.methods import with_quantiles
from clha_fast.training.objective import as_mapping, make, settings_of
from tests.support.helpers import ROOT

TABLES = sorted((ROOT / "examples").glob("table2*.yaml"))
PAIRS = ROOT / "docs" / "table2.md"
LOOP = re.compile(r"for (\w+) in ([\w ]+); do[^\n]*\n(.*?)\ndone", re.S)


def written(recipe: str) -> dict[str, bool]:
    """The files that the commands of a shell's text write, and whether their records have rewards.

    Of `prepare ranked` they have those of the files it is given, which the words around it must promise.
    """
    for loop in LOOP.finditer(recipe):
        name, values, body = loop.groups()
        recipe = recipe.replace(loop[0], "\n".join(body.replace(f"${name}", value) for value in values.split()))
    found: dict[str, bool] = {}
    for line in recipe.splitlines():
        if not line.strip().startswith("clha-fast "):
            continue
        _, command, *words = shlex.split(line, comments=True)
        flags = [word for word in words if word.startswith("--")]
        places = words[: words.index(flags[0])] if flags else words
        if command == "prepare":
            rewards = places[0] == "ranked" and "files have rewards" in recipe
            found |= {f"{places[-1]}/{part}.jsonl": rewards for part in ("train", "dev", "test")}
        elif command == "score":
            assert places[0] in found, f"{line}: no command before it writes {places[0]}"
            found[places[1]] = "--reward-model" in flags
    return found


def recipe_of(path: Path) -> str:
    lines = path.read_text("utf-8").splitlines()
    return "\n".join(line.removeprefix("#").removeprefix("   ") for line in lines if line.startswith("#"))


def lacking(comparison: Comparison, files: dict[str, bool]) -> list[str]:
    """Methods, by file, that do not find what they read in it."""
    bad = []
    for places in comparison.data.values():
        for path in (places.train, places.dev, places.test):
            records = [record(files[path])]
            for method in comparison.methods:
                try:
                    settings = with_quantiles(method.settings, records)
                except ValueError as error:
                    bad.append(f"{method.name} of {path}: {error}")
                    continue
                objective = as_mapping(settings["objective"])
                own = {key: settings[key] for key in settings_of(objective["name"]) if key in settings}
                # Advantages of the answers that it samples are no file's.
                if not method.rollout and "rewards" in make({**own, **objective}).needs and not files[path]:
                    bad.append(f"{method.name} of {path}: rewards")
    return bad


def record(rewards: bool) -> RankedRecord:
    return make_record("Why?", ["Because.", "No."], rewards=[2.0, 0.5] if rewards else None)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_methods_find_what_they_read(path: Path) -> None:
    comparison = parse_comparison(yaml.safe_load(path.read_text("utf-8")))
    files = written(recipe_of(path))
    assert {place for data in comparison.data.values() for place in (data.train, data.dev, data.test)} <= set(files)
    assert lacking(comparison, files) == []
    assert f"clha-fast table2 --config examples/{path.name}" in recipe_of(path)


def test_what_is_lacking_is_seen() -> None:
    given = yaml.safe_load((ROOT / "examples" / "table2_gpu.yaml").read_text("utf-8"))
    comparison = parse_comparison(given)
    files = dict.fromkeys(written(recipe_of(ROOT / "examples" / "table2_gpu.yaml")), False)
    methods = {line.partition(" ")[0] for line in lacking(comparison, files)}
    assert methods == {"rrhf", "pro", "clha"}


def test_the_page_prepares_what_the_configurations_read() -> None:
    text = PAIRS.read_text("utf-8")
    files = written("".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)))
    assert files["runs/hh/train.jsonl"] is False
    assert all(files[f"runs/hh/{part}.scored.jsonl"] for part in ("train", "dev", "test"))
