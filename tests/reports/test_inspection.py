"""What a file holds: every figure by hand, tokens as the collator has them, and the page in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clha_fast.batching.collator import RankedCollator
from clha_fast.cli import main as cli
from clha_fast.data import RecordError, read_records
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.reports.inspection import SHARES, Token, inspect_file
from clha_fast.reports.inspection_text import inspection_page, inspection_text
from tests.support.browser import opened
from tests.support.command_line import one_sentence
from tests.support.reward_models import write
from tests.support.tiny import make_model, make_rows, make_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat", "completions": ["sat", "ran over", "fell"], "rewards": [5, 4, -4], "note": "x"},
    {"prompt": "a cat ", "completions": ["sat", "sat"], "rewards": [0, 0.5]},
    {"prompt": "a dog", "completions": ["ran"], "rewards": [1]},
]
TOKENIZER = make_tokenizer()


def test_figures_by_hand() -> None:
    found = inspect_file(ROWS, PUBLISHED, examples=1, progress=False)
    assert (found.unit, found.records, found.more, found.bad) == ("characters", 3, False, [])
    assert found.sizes == {1: 1, 2: 1, 3: 1}
    assert found.repeated_prompts == 1, "outer blanks do not count"
    assert found.repeated_answers == 1, "sat; what a record repeats itself is said apart"
    assert [(row.name, row.largest) for row in found.lengths] == [
        ("prompt", 6),
        ("response", 8),
        ("prompt and longest response", 13),
    ]
    assert found.lengths[1].mean == pytest.approx((3 + 8 + 4 + 3 + 3 + 3) / 6)
    # |gaps| 1, 9, 8 and 0.5; two of four are above 3.
    assert found.gaps is not None
    assert dict(zip(SHARES, found.gaps.quantiles, strict=True)) == {
        **{0.05: 0.5, 0.1: 0.5, 0.25: 0.5, 0.5: 1.0},
        **{0.75: 8.0, 0.9: 9.0, 0.95: 9.0},
    }
    assert found.gaps.kept == (0.75, 0.75, 0.75, 0.5, 0.25, 0.0, 0.0)
    assert (found.gaps.margin_kept, found.gaps.suggested) == (0.5, 3.0)
    assert (found.unequal_pairs, found.reversed_pairs) == (4, 1)
    assert (found.summary.pairs, found.summary.kept_pairs) == (4, 2)
    assert found.examples == []
    other = inspect_file(ROWS, CLHAOptions(reward_margin=8.5), progress=False).gaps
    assert other is not None
    assert (other.margin_kept, other.suggested, other.suggested_kept) == (0.25, 0.5, 0.75)
    assert found.first == {
        **{"repeated_prompts": "record 1", "repeated_answers": "record 1", "reversed_pairs": "record 1"},
    }
    text = inspection_text(found, PUBLISHED)
    for part in (
        "3 prompts, 6 responses (1 to 3 a prompt); pairs dropped as noise 2 (50%)",
        "pairs ranked against their rewards: 1 (25.0%)",
        "reward_margin 3 keeps 50.0% of the pairs: it fits",
        "nobody reads the columns note (1 of 3 records)",
        "1 of 3 records have two equal responses",
    ):
        assert part in text


def test_tokens_are_those_of_training() -> None:
    limits = {"max_prompt_length": 4, "max_completion_length": 2}
    rows = [*ROWS, {"prompt": "the cat sat on a mat and then a dog ran", "completions": ["a", "b"], "rewards": [1, 0]}]
    found = inspect_file(rows, PUBLISHED, TOKENIZER, limits=limits, examples=4, positions=5, progress=False)
    collator = RankedCollator(TOKENIZER, **limits)
    for example, record in zip(found.examples, read_records(rows), strict=True):
        feature = collator.tokenize_record(record)
        seen = [token for token in example.prompt if not token.cut]
        assert seen == tokens(feature["prompt_ids"])
        for candidate, ids, reward in zip(
            example.candidates, feature["completion_ids"], record.rewards or (), strict=True
        ):
            assert [token for token in candidate.tokens if not token.cut] == tokens(ids, scored=True)
            assert candidate.reward == reward
    assert any(token.cut for token in found.examples[3].prompt)
    assert found.examples[3].prompt[0] == Token("<s>", special=True), "BOS stays"
    assert found.cut_prompts == 1
    assert found.examples[0].candidates[0].target
    assert [candidate.inert for candidate in found.examples[0].candidates] == [False, False, False]
    assert [candidate.inert for candidate in found.examples[2].candidates] == [True], "n = 1: no pair, factor 0"
    assert any("are longer than the model's 5 positions; max_length=5 cuts them" in text for text in found.sentences)


def tokens(ids: Any, scored: bool = False) -> list[Token]:
    return [Token(TOKENIZER.decode([token]), token in TOKENIZER.all_special_ids, scored) for token in ids]


def test_a_letter_of_several_tokens_is_readable() -> None:
    rows = [{"prompt": "a \u732b", "completions": ["\U0001f30d sat"]}]
    (example,) = inspect_file(rows, PUBLISHED, TOKENIZER, progress=False).examples
    texts = [token.text for token in example.candidates[0].tokens]
    assert texts[:4] == ["\U0001f30d", "", "", ""], "four bytes, four tokens"
    assert "".join(texts) == "\U0001f30d sat</s>"
    assert "".join(token.text for token in example.prompt) == "<s>a \u732b"
    cut = inspect_file(rows, PUBLISHED, TOKENIZER, limits={"max_completion_length": 2}, progress=False).examples[0]
    assert [token.text for token in cut.candidates[0].tokens][:2] == ["\ufffd", "\ufffd"], "half a letter is none"


def test_of_long_texts_a_terminal_shows_both_ends() -> None:
    rows = [{"prompt": "a cat", "completions": [" ".join(["cat"] * 100), "sat"]}]
    found = inspect_file(rows, PUBLISHED, TOKENIZER, limits={"max_completion_length": 90}, progress=False)
    candidate = found.examples[0].candidates[0]
    scored, cut = (sum(map(kind, candidate.tokens)) for kind in (lambda t: t.scored, lambda t: t.cut))
    assert (scored, cut) == (90, len(candidate.tokens) - 90)
    shown = inspection_text(found, PUBLISHED)
    (line,) = [line.strip() for line in shown.splitlines() if line.strip().startswith("[cat|")]
    kept, away = line.removeprefix("[").split("]{")
    assert kept.count("|") == 52
    assert "| ... 38 more ... |" in kept
    assert away.endswith("</s>}"), "what is cut has brackets of its own"
    page = inspection_page(found, PUBLISHED)
    assert page.count('class="t scored"') >= 90, "the page has all of it"


def test_degenerate_files(tmp_path: Path) -> None:
    plain = inspect_file([{"prompt": "a", "completions": ["b", "c"]}], PUBLISHED, TOKENIZER, progress=False)
    assert plain.gaps is None
    assert "no rewards: all 1 pairs count" in inspection_text(plain, PUBLISHED)
    mixed = inspect_file([ROWS[0], {"prompt": "a", "completions": ["b"]}], PUBLISHED, progress=False)
    assert mixed.rewarded == 1
    assert "1 of 2 records have rewards (the first without: record 1): training refuses a mixture" in inspection_text(
        mixed, PUBLISHED
    )
    ties = inspect_file([{"prompt": "a", "completions": ["b", "c"], "rewards": [1, 1]}], PUBLISHED, progress=False)
    assert ties.gaps is not None
    assert (ties.gaps.suggested, ties.gaps.suggested_kept) == (0.0, 0.0)
    coarse = [{"prompt": "a", "completions": ["b", "c"], "rewards": [0.75, 0.25]}]
    equal = inspect_file(coarse, PUBLISHED, progress=False)
    assert equal.gaps is not None
    assert (equal.gaps.suggested, equal.gaps.suggested_kept) == (0.25, 1.0), "a margin of 0.5 would keep no pair"
    assert "reward_margin 0.25, half the lower quartile of the" in inspection_text(equal, PUBLISHED)
    # Many gaps of a third, all of which the nearest four digits would keep.
    for rewards, kept in (([1 / 3, 0, 1, 1 / 3], 50), ([1 / 3, 0, 1 / 3, 1, 1], 60), ([2 / 3, 1 / 3, 0, 1], 50)):
        thirds = [{"prompt": "a", "completions": list("bcdef")[: len(rewards)], "rewards": rewards}]
        advice = f"reward_margin 0.3334, the lower quartile of the reward gaps, which keeps {kept}.0%"
        assert advice in inspection_text(inspect_file(thirds, PUBLISHED, progress=False), PUBLISHED)
    # 3 in float32, as the loss subtracts, and above it in float64.
    rounded = [{"prompt": "a", "completions": ["b", "c"], "rewards": [0.1, -2.9]}]
    found = inspect_file(rounded, PUBLISHED, progress=False)
    assert found.gaps is not None
    assert (found.gaps.margin_kept, found.summary.kept_pairs) == (0, 0)
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"prompt": "a", "completions": [""]}])
    found = inspect_file(str(bad), PUBLISHED, progress=False)
    assert (found.records, len(found.bad)) == (3, 1)
    assert "bad.jsonl:4: completions[0]: expected a response that is not empty" in inspection_text(found, PUBLISHED)
    said = "bad records   1 (25.0%), left out here; training ends at the first, or leaves them out with "
    assert said in inspection_text(found, PUBLISHED)
    first = inspect_file(str(bad), PUBLISHED, most=2, progress=False)
    assert (first.records, first.more) == (2, True)
    assert "2 records, the first ones; the source has more" in inspection_text(first, PUBLISHED)
    assert "(1 of 2 records)" in " ".join(first.sentences), "counted over what was read"
    with pytest.raises(RecordError, match="expected a response that is not empty"):
        inspect_file([{"prompt": "a", "completions": [""]}], PUBLISHED, progress=False)


def test_no_more_is_read_than_was_asked_for() -> None:
    taken = []

    def rows() -> Iterator[dict[str, Any]]:
        while True:
            taken.append(1)
            yield {"prompt": f"say {len(taken)}", "completions": ["a cat", "a dog"], "rewards": [1, 0]}

    found = inspect_file(rows(), PUBLISHED, most=50, progress=False)
    assert (found.records, found.more) == (50, True)
    assert len(taken) <= 60


def test_the_page_stands_in_a_browser_and_runs_nothing(tmp_path: Path) -> None:
    rows = [
        {"prompt": "<b>a</b> & b", "completions": ["</script><script>document.body.remove()</script>", "it sat"]},
        {"prompt": "word " * 300, "completions": ["x" * 900, "a\nb"]},
    ]
    found = inspect_file(rows, PUBLISHED, TOKENIZER, limits={"max_prompt_length": 200}, progress=False)
    page = tmp_path / "page.html"
    page.write_text(inspection_page(found, PUBLISHED), encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in text
    wide = "document.documentElement.scrollWidth <= innerWidth"
    seen = opened(
        page,
        f"[{wide}, document.querySelectorAll('.tokens').length, document.querySelectorAll('.cut').length > 100, "
        "document.querySelector('.scored').textContent, document.querySelectorAll('b').length]",
        tmp_path,
    )
    assert seen.startswith("true,6,true,"), seen
    assert seen.endswith(",0"), "texts of the data are no HTML"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(len(TOKENIZER)).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = make_rows(20)
    file, page = str(write(tmp_path / "in.jsonl", rows)), str(tmp_path / "page.html")
    words = ("inspect", file, "--model", str(tmp_path / "model"))
    assert cli.main([*words, "--html", page, "--max_length", "30", "--records", "1"]) == 0
    said = capsys.readouterr().out
    assert f"source        {file}: 20 records\n" in said
    assert "length in tokens" in said
    assert f"{file}:1, as the model reads it" in said
    assert f"{file}:2, as the model reads it" not in said
    assert f"page          {page}" in said
    renamed = write(tmp_path / "named.jsonl", [{"q": "a", "one": "b", "two": "c"}])
    columns = ("--columns.prompt", "q", "--columns.completions", "[one, two]")
    assert cli.main(["inspect", str(renamed), *columns, "--limit", "5"]) == 0
    assert "length in characters" in capsys.readouterr().out
    for more, expected in (
        (("--html", page), "page.html: exists already"),
        (("--limit", "0"), "--limit: expected a positive whole number"),
        (("--records", "-1"), "--records: expected a whole number of at least 0"),
        (("--reward-margin", "-1"), "--reward-margin: expected"),
    ):
        assert cli.main([*words, *more]) == 2
        assert expected in one_sentence(capsys), more
    assert cli.main(["inspect", file, "--max-length", "5"]) == 2
    assert "--max-length: expected --model, whose tokens these are" in one_sentence(capsys)
    assert cli.main(["inspect", file, "--records", "1"]) == 2
    assert "--records: expected --model, whose tokens are shown" in one_sentence(capsys)
    assert json.loads(Path(file).read_text().splitlines()[0])["prompt"] == rows[0]["prompt"]


def test_bad_records_are_all_on_the_page() -> None:
    bad = [{"prompt": f"p{number}", "completions": ["a", ""]} for number in range(5)]
    found = inspect_file([ROWS[0], *bad], PUBLISHED, progress=False)
    text, page = inspection_text(found, PUBLISHED), inspection_page(found, PUBLISHED)
    assert "; the first 3 here, --html lists more" in " ".join(text.split())
    said = [f"record {number}: completions[1]" for number in range(1, 6)]
    assert [place in text for place in said] == [True] * 3 + [False] * 2
    assert all(place in page for place in said)
    three = inspect_file([ROWS[0], *bad[:3]], PUBLISHED, progress=False)
    assert "--html" not in inspection_text(three, PUBLISHED)
