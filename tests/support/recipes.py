"""The recipes of docs/integrations.md, to be run as they are written, and the bare loop that each is compared with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import clha_fast
from clha_fast.data import read_records
from clha_fast.hf import RankedCollator, RankedDataset
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer

OBJECTIVE = clha_fast.SimPOOptions()


def recipe(host: str) -> str:
    """The block of code behind the host's mark."""
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- recipe: {host} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def run(host: str, folder: Path) -> dict[str, Any]:
    """The names that a recipe leaves, which finds `model` and four prompts in `ranked.jsonl` in the working folder."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(4)), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(recipe(host), "recipe", "exec"), names)
    return names


def bare_loop(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """The weights after the two steps of an epoch: AdamW with these `settings`, 1e-3, no more."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    collator = RankedCollator(make_tokenizer(), OBJECTIVE)
    dataset = RankedDataset(read_records(folder / "ranked.jsonl"), collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **settings)
    with clha_fast.attach(model.train(), OBJECTIVE):
        for first in (0, 2):
            model(**collator([dataset[first], dataset[first + 1]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(found: Any, expected: dict[str, Tensor], atol: float = 1e-7) -> None:
    """Of a model's weights."""
    trained = dict(found.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(trained[name].detach().cpu(), value, rtol=0, atol=atol)
