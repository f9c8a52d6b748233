"""The wheel, built from a copy of the sources, installed elsewhere and used from outside the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clha_fast.version import __version__
from tests.support.helpers import ROOT

SOURCES = ("clha_fast", "csrc_triton", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    clone = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, clone / name)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(clone)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (built,) = out.glob("*.whl")
    return built


def test_it_is_pure_and_complete(wheel):
    assert wheel.name == f"clha_fast-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = archive.read(metadata).decode().split("\n\n")[0]
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    sources = {
        path.relative_to(ROOT).as_posix() for top in ("clha_fast", "csrc_triton") for path in (ROOT / top).rglob("*.py")
    }
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "clha_fast" / "demo").glob("*.[jy]*")}
    assert any(name.endswith(".jsonl") for name in data)
    assert packed == sources | data | {"clha_fast/py.typed"}
    assert "clha-fast = clha_fast.cli.main:main" in entry_points
    for extra in ("flash-attn", "eval", "peft", "plot", "ray", "docs", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in headers


def test_it_works_from_outside_the_clone(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=300)
    source = """
import importlib.resources
import clha_fast, csrc_triton, torch
from pathlib import Path

print(Path(clha_fast.__file__).parents[1], Path(csrc_triton.__file__).parents[1])
hidden = torch.zeros(2, 3, requires_grad=True)
loss, _ = clha_fast.linear_clha_loss(
    hidden, torch.zeros(5, 3), torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([2])
)
loss.backward()
print(round(float(loss), 4))
package = importlib.resources.files("clha_fast")
print((package / "py.typed").is_file())
print(any(f.name.endswith(".jsonl") and f.read_text(encoding="utf-8").strip() for f in (package / "demo").iterdir()))
"""
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", source]
    out = subprocess.run(command, cwd=elsewhere, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    # Uniform over five words: h = 3, SFT 0.05 * log 5 = 0.0805.
    assert out.splitlines() == [f"{target} {target}", "3.0805", "True", "True"]
