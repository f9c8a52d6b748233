"""`report.html` of a real run: its figures are the model card's, and it stands in a real browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clha_fast.cli import main as cli
from clha_fast.evaluation import plots
from clha_fast.evaluation.tables import evaluation_result
from clha_fast.reports.run_page import run_page
from tests.support.browser import opened
from tests.support.command_line import command

pytestmark = pytest.mark.drawn

ROW = r'<th scope="row">{}</th><td>([^<]*)</td><td>([^<]*)</td>'


def test_a_run_leaves_a_page_with_the_cards_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "eval_samples": 2, "eval_sample_tokens": 4}
    assert cli.main(command(tmp_path, **settings, save_steps=6)) == 0
    page, card = tmp_path / "run" / "report.html", (tmp_path / "run" / "README.md").read_text()
    assert f"report          {page}\n" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    for name in (
        "ranking accuracy (kept pairs)",
        "margin (nats a token)",
        "log-probability of the better side (nats a token)",
        "log-probability of the worse side (nats a token)",
        "loss",
    ):
        found = re.search(ROW.format(re.escape(name)), text)
        assert found is not None, name
        assert f"| {name} | {found[2]} |" in card, name
    assert "pairs dropped as noise" in text
    assert ">max_steps</dt><dd>6</dd>" in text
    assert ">eval_samples</dt><dd>2</dd>" in text, "what may differ when a run is resumed was given all the same"
    assert ">report_to<" not in text, "a default of the command line"
    assert text.count("after step 0") == text.count("after step 6") == 2, "both ends of each prompt's answers"
    assert "shows what lies between" not in text
    assert "<script" not in text
    assert "src=" not in text
    seen = opened(
        page,
        "[document.documentElement.scrollWidth <= innerWidth, document.querySelectorAll('svg').length, "
        "document.querySelector('svg').getBoundingClientRect().height > 200, document.querySelectorAll('h2').length]",
        tmp_path,
    )
    assert seen == "true,1,true,5"
    assert cli.main(command(tmp_path, "--overwrite", max_steps=1, eval_fraction=0, hub_token="hf_secret")) == 0
    shown = [path for path in (tmp_path / "run").rglob("*") if path.suffix in (".html", ".json", ".md", ".jsonl")]
    assert len(shown) > 3
    assert not [path for path in shown if "hf_secret" in path.read_text(encoding="utf-8")]
    text = page.read_text(encoding="utf-8")
    assert "No held-out set: not evaluated." in text
    assert "eval_samples: 3 writes them" in text


def test_without_matplotlib_the_log_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    log = [{"step": step, "loss": 1.0 / step, "rewards/margins": float(step)} for step in range(1, 101)]
    before, after = {"eval_loss": 2.0}, {"eval_loss": 1.0}
    result = evaluation_result(before, after)
    page = run_page("<run>", [("model", "<m> & n")], {"a": [1]}, result, before, after, log)
    assert "&lt;run&gt;" in page
    assert "&lt;m&gt; &amp; n" in page
    assert '<th scope="row">100</th><td>0.01</td>' in page
    assert 30 < page.count('<th scope="row">') < 60, "a long log is thinned"
    assert "Drawn where matplotlib is installed" in page
    assert "<svg" not in page


def test_two_evaluations_are_said_to_be_two() -> None:
    log = [{"step": 4, "loss": 1.0}]
    before, after = {"eval_loss": 2.0}, {"eval_loss": 1.0, "eval_step": 2}
    page = run_page("run", [], {}, evaluation_result(before, after), before, after, log)
    assert "eval_strategy: steps shows what lies between" in page
    assert "after (best, step 2)" in page
