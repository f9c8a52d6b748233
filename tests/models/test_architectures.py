"""The fused head on transformers' causal language models, walked by `architectures.py` in processes of their own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.versions import lacks_type, older

# What each of the sample shows, and what has to be found behind its head.
SAMPLE = {
    "falcon_h1": "scale 0.6",
    "hyperclovax": "scale 1.9",  # multiplies where Granite divides
    # Its head has had no rows to spare since 5.24.
    "inkling2_text": "softcap 3.5, 91 of 96 rows" if older("transformers", "5.24") else "softcap 3.5",
    "xlnet": "bias",
    "minicpm3": "identity",  # hidden states divided before the head
    "prophetnet": "stream 0",
    "qwen3_moe": "identity",  # a router's loss
    "gemma4": "softcap 3.5",  # nested configurations
    "dory": "own forward",  # a scale for each word behind the linear map, in the head
}
REFUSED = {"gemma4_assistant", "gemma4_unified_assistant"}  # draft for another model, from that model's states
NOT_BUILDABLE = {"gemma4_assistant", "musicgen", "musicgen_melody"}


def walk(folder: Path, *arguments: str, timeout: int) -> list[dict[str, Any]]:
    """The harness's results; a process of its own, since it forks."""
    found = folder / "found.json"
    run = forked.run("train", "tests.support.architectures", "--json", str(found), *arguments, timeout=timeout)
    assert found.exists(), run.stdout + run.stderr
    return json.loads(found.read_text())


def test_sample(tmp_path: Path) -> None:
    sample = {name: transform for name, transform in SAMPLE.items() if not lacks_type(name)}
    results = walk(tmp_path, "--variants", "untied", "--types", *sample, timeout=120)
    assert [(r["model_type"], r["outcome"], r["reason"]) for r in results] == [(t, "right", "") for t in sample]
    assert {r["model_type"]: r["transform"] for r in results} == sample
    # The comparison would have seen a lost transform.
    felt = {r["model_type"]: r["felt"] for r in results if r["felt"] is not None}
    lost = ("scale", "softcap", "own forward")
    assert felt.keys() == {name for name, transform in sample.items() if any(what in transform for what in lost)}
    assert min(felt.values()) > 0.1
    assert {r["model_type"] for r in results if r["aux_loss"]} == {"qwen3_moe"}
    joined = {r["model_type"]: (r["packed"], r["shared"]) for r in results}
    for name in {"qwen3_moe", "minicpm3", "dory"} & joined.keys():
        assert joined[name] == ("right", "right"), name
    assert joined["xlnet"] == ("refused: no masks", "refused: no masks")
    assert "wrong" not in {value for pair in joined.values() for value in pair}


@pytest.mark.slow
def test_every_architecture(tmp_path: Path) -> None:
    page = tmp_path / "architectures.md"
    results = walk(tmp_path, "--write", str(page), timeout=3600)
    outcomes: dict[str, set[str]] = {}
    for result in results:
        assert bool(result["reason"]) == (result["outcome"] != "right")
        outcomes.setdefault(result["model_type"], set()).add(result["outcome"])
    # Its model counts its router's logits where it has none.
    broken = {"doge"} if older("transformers", "5.15") else set()
    assert {r["model_type"] for r in results if r["outcome"] == "wrong"} <= broken
    assert {name for name, seen in outcomes.items() if "refused" in seen} <= REFUSED
    missing = set() if importlib.util.find_spec("timm") else {"gemma3n"}
    assert {name for name, seen in outcomes.items() if seen == {"not buildable"}} <= NOT_BUILDABLE | missing
    assert len(outcomes) > 100
    for layout in ("packed", "shared"):
        found = [result[layout] for result in results if result["variant"] == "untied"]
        assert "wrong" not in found
        assert found.count("right") >= 120
    assert all(f"| {name} |" in page.read_text() for name in outcomes)
