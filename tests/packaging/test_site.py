"""The documentation site builds without a warning, and README's lines stay short."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clha_fast import __all__ as names
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
    # What pages link to outside of docs/ comes along.
    assert (tmp_path / "files" / "examples" / "bare_loop.py").read_text() == (
        ROOT / "examples" / "bare_loop.py"
    ).read_text()


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    shown = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert set(names) - shown == {"METRIC_NAMES", "PRESETS", "PUBLISHED", "__version__"}


def test_readme_lines_are_short() -> None:
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 140] == []


def test_the_tutorials_show_their_scripts() -> None:
    """A formatter that takes the marker for Python writes `--8 < --`, which no page includes."""
    page = (ROOT / "docs" / "tutorials.md").read_text("utf-8")
    shown = re.findall(r'^--8<-- "(examples/.*)"$', page, flags=re.MULTILINE)
    assert len(shown) == page.count("\n## ") == page.count("--8")
    assert all((ROOT / name).is_file() for name in shown)
