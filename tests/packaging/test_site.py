"""The documentation site builds without a warning, and README's lines stay short."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from clha_fast import PRESETS
from tests.support.helpers import ROOT

NEEDED = ("mkdocs", "material", "mkdocstrings")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="the docs extra (mkdocs) is not installed"
)
def test_the_site_builds_with_warnings_as_errors(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "reference" / "index.html").read_text("utf-8")
    for name in ("linear_clha_loss", "RankedCollator", "CLHATrainer"):
        assert name in reference
    tutorials = (tmp_path / "tutorials" / "index.html").read_text("utf-8")
    assert "def reward_weighted" in re.sub("<[^>]*>", "", tutorials)
    # What pages link to outside of docs/ comes along.
    assert (tmp_path / "files" / "examples" / "bare_loop.py").read_text() == (
        ROOT / "examples" / "bare_loop.py"
    ).read_text()


REFERENCE = (ROOT / "docs" / "reference.md").read_text("utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in REFERENCE.split("\n## ")[1:]}
PUBLIC = ("", ".data", ".hf", ".objectives", ".generation", ".evaluation")


def test_every_public_name_is_in_the_reference() -> None:
    shown = {line.rpartition(".")[2] for line in REFERENCE.splitlines() if line.startswith("::: ")}
    named = {name for room in PUBLIC for name in importlib.import_module(f"clha_fast{room}").__all__}
    assert named - shown == {"FORMATS", "METRIC_NAMES", "OBJECTIVES", "PRESETS", "PUBLISHED", "__version__"}


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_every_name_of_the_reference_is_imported_as_it_says(section: str) -> None:
    """Each section's import lines give the names that it shows, all of them and nothing else."""
    code = "".join(re.findall(r"^```python\n(.*?)^```", section, re.M | re.S))
    lines = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    given = {alias.name: (str(line.module), alias.name) for line in lines for alias in line.names}
    shown = {path.rpartition(".")[2]: path.rpartition(".")[::2] for path in re.findall(r"^::: (\S+)$", section, re.M)}
    assert set(given) == set(shown)
    for name in given:
        assert found(*given[name]) == found(*shown[name])


def found(module: str, name: str) -> tuple[str, str]:
    """Where what a module has under a name was made; of one whose host is not installed, by its source."""
    try:
        value = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("clha_fast"):
            raise
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert re.search(rf"^(class|def) {name}\b", Path(spec.origin).read_text("utf-8"), re.M)
        return module, name
    return value.__module__, value.__qualname__


def test_readme_lines_are_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 140] == []


def test_the_table_of_presets_is_what_they_are() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text("utf-8")
    table = page.partition("### CLHA's settings")[2].partition("\n## ")[0]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in table.splitlines() if line.startswith("| `")]
    found: list[dict[str, str]] = [{}, {}, {}]
    for settings, *values, _ in rows:
        for preset, value in zip(found, values, strict=True):
            preset |= zip(re.findall(r"`(\w+)`", settings), value.replace("`", "").split(", "), strict=True)
    for name, preset in zip(("published", "paper", "sft_only"), found, strict=True):
        assert preset == {
            key: value if isinstance(value, str) else f"{value:g}" for key, value in asdict(PRESETS[name]).items()
        }
