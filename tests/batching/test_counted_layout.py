"""Whether shared rows pay, counted by hand; and the layout of a batch that is counted."""

from __future__ import annotations

import logging

import pytest

from clha_fast.batching import segments
from clha_fast.batching.batch import pack_candidates
from clha_fast.batching.collator import RankedCollator
from clha_fast.batching.segments import RowTokens
from clha_fast.models.layout_probe import candidates_of
from tests.support import forked
from tests.support.tiny import WORDS, make_tokenizer


@pytest.mark.parametrize(
    ("prompts", "padded", "shared", "layout"),
    [
        ([(2, [3, 1])], 2 * (2 + 3), 2 + 4, "shared"),
        ([(1, [10, 10])], 22, 21, "padded"),  # a short prompt leaves 95%
        ([(40, [5, 5, 5, 5])], 180, 60, "shared"),  # a long one a third
        ([(2, [8, 8])], 20, 18, "shared"),  # nine tenths
        ([(1, [8, 8])], 18, 17, "padded"),
        ([(50, [7])], 57, 57, "padded"),  # one response: nothing is shared
        ([(50, [7]), (3, [20])], 80, 80, "padded"),
        ([(50, [7]), (3, [20, 10])], 57 + 46, 57 + 33, "shared"),  # together 87%
        ([(4, [])], 0, 0, "padded"),
        ([], 0, 0, "padded"),
    ],
)
def test_by_hand(prompts: list[tuple[int, list[int]]], padded: int, shared: int, layout: str) -> None:
    found = RowTokens.of(prompts)
    assert (found, found.layout) == ((padded, shared), layout)


@pytest.mark.parametrize(
    ("prompt", "answers", "layout"),
    [(30, [4, 6, 5], "shared"), (1, [9, 9], None), (30, [9], None)],
)
def test_a_batch_is_of_the_layout_that_pays(prompt: int, answers: list[int], layout: str | None) -> None:
    feature = candidates_of(range(3, 3 + prompt), [range(3, 3 + size) for size in answers])
    batch = pack_candidates([feature], pad_token_id=0, drop_inert=False, layout="auto")
    assert (batch.segments and batch.segments.layout) == layout
    told = pack_candidates([feature], pad_token_id=0, drop_inert=False, layout=layout or "padded")
    assert batch.input_ids.tolist() == told.input_ids.tolist()
    assert batch.row_index.tolist() == told.row_index.tolist()


def test_inert_candidates_do_not_count() -> None:
    """Of three equal rewards below the floor nothing is left, of the second prompt all: its answers hardly differ."""
    long = candidates_of(range(3, 33), [[4, 5], [6, 7], [8, 9]])
    short = candidates_of([3], [range(3, 60), range(4, 61)])
    features = [{**long, "rewards": [-5.0, -5.0, -5.0]}, {**short, "rewards": [9.0, 2.0]}]
    batch = pack_candidates(features, pad_token_id=0, layout="auto")  # type: ignore[arg-type]
    assert batch.num_inert == 3
    assert batch.segments is None
    assert pack_candidates(features, pad_token_id=0, drop_inert=False, layout="auto").segments  # type: ignore[arg-type]


def test_what_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_SAID", set())
    collator = RankedCollator(make_tokenizer(), layout="auto", drop_inert=False)
    long = {"prompt": " ".join(WORDS), "completions": ["a cat", "a dog"]}
    short = {"prompt": "a", "completions": [" ".join(WORDS), " ".join(WORDS[::-1])]}
    with caplog.at_level(logging.WARNING, logger="clha_fast"):
        batches = [collator([row]) for row in (long, long, short, short)]
    assert ["segments" in batch for batch in batches] == [True, True, False, False]
    said = [text for text in caplog.messages if text.startswith("layout auto")]
    assert len(said) == 2
    tokens = batches[0]["input_ids"].numel()
    assert said[0].startswith(f"layout auto: shared for this batch (shared rows run {tokens} tokens where padded ones")
    assert said[1].startswith("layout auto: padded for this batch (shared rows run ")
    assert f"padded ones run {batches[2]['input_ids'].numel()}, 9" in said[1]


LOADER = """
import sys
from torch.utils.data import DataLoader
from clha_fast.batching.collator import RankedCollator
from tests.support.tiny import WORDS, make_tokenizer

rows = [{"prompt": " ".join(WORDS), "completions": ["a cat", "a dog"]}] * 12
collator = RankedCollator(make_tokenizer(), layout="auto", drop_inert=False)
for workers in (2, 0):
    loader = DataLoader(rows, batch_size=1, collate_fn=collator, num_workers=workers)
    print(sum("segments" in batch for batch in loader))
    print("the end of", workers, "workers", file=sys.stderr, flush=True)
"""


def test_a_script_hears_it_but_not_from_every_worker() -> None:
    """Without any setting of logging, as in a script of a user's own."""
    done = forked.run("train", "-c", LOADER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "12"]
    of_two, of_none = done.stderr.split("the end of 2 workers\n")
    said = "layout auto: shared for this batch (shared rows run "
    assert (of_two.count(said), of_none.count(said)) == (0, 1)
