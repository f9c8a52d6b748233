"""The page of the table shows the figures that are kept, and its configuration is the example's."""

from __future__ import annotations

import json

import yaml

from benchmarks.table2 import MARKS, PAGE, RESULT, page
from tests.support.helpers import ROOT


def test_the_page_shows_what_is_kept():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    begin, end = MARKS
    assert text.partition(begin)[2].partition(end)[0].strip() == page(found).strip()
    example = yaml.safe_load((ROOT / "examples" / "table2_cpu.yaml").read_text(encoding="utf-8"))
    assert found["config"] == json.loads(json.dumps(example))  # JSON has no keys but texts
