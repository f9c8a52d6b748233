"""What an older transformers or accelerate lacks: a test of it is skipped with the reason."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.version import Version
from transformers import CONFIG_MAPPING

# The release whose models the tests name; an older one may lack some of them.
MODELS_OF = "5.24"


def older(package: str, version: str) -> bool:
    """Whether the package that is installed is older than `version`."""
    return Version(importlib.metadata.version(package)) < Version(version)


def needs(package: str, version: str, why: str) -> None:
    """Skips the test that calls it where `package` is older; `why` is what that one lacks."""
    if older(package, version):
        pytest.skip(f"needs {package} {version} or newer: {importlib.metadata.version(package)} {why}")


def lacks_type(kind: str) -> bool:
    """Whether this is a model type of `MODELS_OF` that an older transformers does not have."""
    return kind not in CONFIG_MAPPING and older("transformers", MODELS_OF)
