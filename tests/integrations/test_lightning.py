"""The recipe for Lightning in docs/integrations.md, run as it is written, against a bare loop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import clha_fast
from clha_fast.data import read_records
from clha_fast.hf import RankedCollator, RankedDataset
from tests.support.helpers import ROOT
from tests.support.tiny import make_model, make_rows, make_tokenizer


def recipe(host: str) -> str:
    """The block of code behind the host's mark in docs/integrations.md."""
    text = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- recipe: {host} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.filterwarnings("ignore")
def test_two_steps_are_those_of_a_bare_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = make_rows(4)
    Path("ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    names: dict[str, Any] = {}
    exec(compile(recipe("lightning"), "recipe", "exec"), names)
    assert names["trainer"].global_step == 2

    objective = clha_fast.SimPOOptions()
    collator = RankedCollator(tokenizer, objective)
    dataset = RankedDataset(read_records("ranked.jsonl"), collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with clha_fast.attach(model.train(), objective):
        for first in (0, 2):
            model(**collator([dataset[first], dataset[first + 1]])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    trained = dict(names["module"].model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter, rtol=0, atol=1e-7)
