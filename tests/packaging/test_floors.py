"""The oldest releases that the package asks for are those that `make test-oldest` runs."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.helpers import ROOT


def requirements() -> dict[str, str]:
    """Name -> specifier of everything in pyproject.toml that has one, dependency or extra."""
    found: dict[str, str] = {}
    for text in re.findall(r'"([A-Za-z][\w-]*[<>=][^"]*)"', (ROOT / "pyproject.toml").read_text("utf-8")):
        requirement = Requirement(text)
        found[requirement.name] = ",".join(filter(None, [found.get(requirement.name), str(requirement.specifier)]))
    return found


@pytest.mark.parametrize("package", ["transformers", "accelerate", "peft"])
def test_the_oldest_releases_are_tested(package: str) -> None:
    lines = (ROOT / "tests" / "packaging" / "oldest.txt").read_text("utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    specifier = requirements()[package]
    assert specifier.startswith(">=")
    assert "<" not in specifier, "the newest release is tested, too: make test-newest"
    assert Version(oldest[package]) == Version(specifier.removeprefix(">="))
