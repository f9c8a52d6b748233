"""Signals in batches: one number a candidate or a token, none of a token that does not run, never one for the other."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from clha_fast import Objective
from clha_fast.batching.batch import CandidateBatch, first_prompts, pack_candidates
from clha_fast.batching.collator import RankedCollator, RankedDataset
from clha_fast.batching.signals import pack_signal, signals_of, token_checksum, unmistakable
from clha_fast.layout import Layout
from clha_fast.types import SIGNALS
from tests.support.tiny import make_rows, make_tokenizer

TOKENIZER = make_tokenizer()


class Reading(Objective):
    """Reads all signals; the first candidate of a prompt is inert."""

    name = "reading"
    reads: ClassVar[tuple[str, ...]] = SIGNALS

    def inert(self, layout: Layout, rewards: Any, sft_index: Any) -> torch.Tensor:
        return layout.rank == 0


READING = Reading()
# Prompts of 2 and 3 candidates, with 2, 1 and 3, 2, 1 tokens.
FEATURES: list[Any] = [
    {
        "prompt_ids": [5],
        "completion_ids": [[6, 7], [8]],
        "rewards": None,
        "sft_index": 0,
        "source": "f:1",
        "reference_logps": [-10.0, -20.0],
        "advantages": [1.0, -1.0],
        "old_logps": [[-0.5, -0.25], [-2.0]],
        "token_weights": [[1, 2], [3]],
    },
    {
        "prompt_ids": [5, 9],
        "completion_ids": [[6, 7, 8], [6, 7], [8]],
        "rewards": None,
        "sft_index": 0,
        "source": "f:2",
        "reference_logps": [-30.0, -40.0, -50.0],
        "advantages": [2.0, 0.0, -2.0],
        "old_logps": [[-1, -2, -3], [-4, -5], [-6]],
        "token_weights": [[4, 5, 6], [7, 8], [9]],
    },
]


def pack(*features: Any, **settings: Any) -> CandidateBatch:
    return pack_candidates(features, pad_token_id=2, **{"objective": READING, "drop_inert": False, **settings})


def test_every_candidate_runs() -> None:
    batch = pack(*FEATURES)
    assert batch.reference_logps is not None
    assert batch.reference_logps.tolist() == [-10, -20, -30, -40, -50]
    assert batch.advantages.tolist() == [1, -1, 2, 0, -2]
    assert batch.old_logps.tolist() == [-0.5, -0.25, -2, -1, -2, -3, -4, -5, -6]
    assert batch.token_weights.tolist() == list(range(1, 10))
    assert all(value.dtype == torch.float32 for value in batch.signals().values())


def test_dropped_candidates_have_no_tokens_and_keep_their_place() -> None:
    batch = pack(*FEATURES, drop_inert=True)
    assert batch.candidate_lengths.tolist() == [0, 1, 0, 2, 1]
    assert batch.reference_logps.tolist() == [-10, -20, -30, -40, -50]
    assert batch.old_logps.tolist() == [-2, -4, -5, -6]
    assert batch.token_weights.tolist() == [3, 7, 8, 9]


def test_as_many_tokens_as_candidates_are_not_taken_for_each_other() -> None:
    """Lengths 0, 2, 1: a number a candidate would be read as one a token, and the first token as the dropped one's."""
    feature = {**FEATURES[1], "completion_ids": [[6, 7, 8], [6, 7], [8]]}
    batch = pack(feature, drop_inert=True, signals=("reference_logps", "advantages"))
    assert batch.candidate_lengths.tolist() == [0, 2, 1]
    assert batch.reference_logps.tolist() == [-20, -20, -50]  # a token's part: the sums are -40 and -50
    assert batch.advantages.tolist() == [0, 0, -2]
    ones = torch.ones(2, dtype=torch.int64)
    values = torch.tensor([-3.0, -4.0])
    assert unmistakable("reference_logps", values, ones, 2) is values
    # The same of the first prompts of a batch in which they could be told apart.
    whole = pack(feature, FEATURES[0], drop_inert=True, signals=("reference_logps", "advantages"))
    assert whole.reference_logps.shape == whole.candidate_lengths.shape == (5,)
    part = first_prompts(whole, 1)
    assert part.reference_logps.tolist() == batch.reference_logps.tolist()
    assert part.advantages.tolist() == batch.advantages.tolist()


def test_first_prompts() -> None:
    part = first_prompts(pack(*FEATURES), 1)
    assert part.reference_logps.tolist() == [-10, -20]
    assert part.old_logps.tolist() == [-0.5, -0.25, -2]
    assert part.token_weights.tolist() == [1, 2, 3]


def test_dictionaries_and_devices() -> None:
    batch = pack(*FEATURES)
    fields = batch.as_dict()
    assert set(SIGNALS) <= fields.keys()
    again = CandidateBatch.from_dict(fields)
    assert all(getattr(again, name) is fields[name] for name in SIGNALS)
    assert {name: batch.loss_inputs()[name] for name in SIGNALS} == batch.signals()
    assert batch.to("meta").old_logps.device.type == "meta"
    bare = pack(*FEATURES, signals=())
    assert not set(SIGNALS) & {*bare.as_dict(), *bare.loss_inputs()}
    assert CandidateBatch.from_dict(bare.as_dict()).advantages is None


def test_which_are_carried() -> None:
    class Some(Objective):
        name = "some"
        reads: ClassVar[tuple[str, ...]] = ("old_logps",)

        @property
        def needs(self) -> tuple[str, ...]:
            return ("rewards", "advantages")

    assert signals_of(Some()) == ("old_logps", "advantages")
    assert pack(*FEATURES, objective=Some()).signals().keys() == {"old_logps", "advantages"}
    without = [{name: value for name, value in feature.items() if name != "advantages"} for feature in FEATURES]
    assert pack(*without).advantages is None
    assert pack(*({**feature, "advantages": None} for feature in FEATURES)).advantages is None


LISTS = {"advantages": [[1.0] * 3, [1.0] * 2, [1.0]]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {},
            {"advantages": None},
            "^f:2: advantages: expected all records of a batch to have .*, got none while f:1 has",
        ),
        ({"advantages": None}, {}, "^f:2: advantages: expected all records .*, got some while f:1 has none$"),
        ({}, {"advantages": [1.0]}, "^f:2: advantages: expected 3 entries, one a completion, got 1$"),
        ({}, LISTS, "^f:2: advantages: expected a number a completion, as f:1 has, got a list$"),
        (
            {"advantages": [[1.0] * 2, [1.0]]},
            {},
            "^f:2: advantages: expected a list a completion, as f:1 has, got a numb",
        ),
        (
            {"old_logps": [-1.0, -2.0]},
            {},
            "^f:1: old_logps: expected a list a completion, one number a token, got a num",
        ),
        (
            {},
            {"old_logps": [[-1.0, -2.0], [-3.0, -4.0], [-5.0]]},
            r"^f:2: old_logps\[0\]: expected 3 numbers, one a tok",
        ),
        ({}, {"reference_logps": [0.0, float("nan"), 0.0]}, "^f:2: reference_logps: expected finite .*, got nan$"),
    ],
)
def test_features_that_are_refused(first: dict[str, Any], second: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack({**FEATURES[0], **first}, {**FEATURES[1], **second})
    # What no batch carries is not looked at.
    assert not pack({**FEATURES[0], **first}, {**FEATURES[1], **second}, signals=()).signals()


def test_one_number_a_token_for_all() -> None:
    batch = pack({**FEATURES[0], "advantages": [[1.0, 2.0], [3.0]]}, {**FEATURES[1], **LISTS}, drop_inert=True)
    assert batch.advantages.tolist() == [3, 1, 1, 1]


def test_beyond_float32() -> None:
    with pytest.raises(ValueError, match=r"^advantages: expected finite numbers, got one beyond float32$"):
        pack_signal("advantages", [{"source": "f:1", "advantages": [1e39]}], torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("advantages", 4, r"^advantages: expected the shape \(9,\) or \(5,\), got \(4,\)$"),
        ("old_logps", 5, r"^old_logps: expected the shape \(9,\), got \(5,\)$"),
    ],
)
def test_batches_check_shapes(name: str, shape: int, message: str) -> None:
    fields = pack(*FEATURES).as_dict()
    with pytest.raises(ValueError, match=message):
        CandidateBatch.from_dict({**fields, name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=f"^{name}: expected torch.float32 with 1 dim"):
        CandidateBatch.from_dict({**fields, name: torch.zeros(9, dtype=torch.float64)})


def test_a_checksum_tells_tokens_and_where_the_response_begins() -> None:
    told = token_checksum([1, 2], [3, 4])
    assert 0 <= told < 2**32
    assert told == token_checksum((1, 2), [3, 4])
    others = [
        ([1], [2, 3, 4]),
        ([1, 2, 3], [4]),
        ([2, 1], [3, 4]),
        ([1, 2], [3]),
        ([0, 1, 2], [3, 4]),
        ([1, 2], [3, 5]),
    ]
    assert told not in {token_checksum(*other) for other in others}


def with_signals(count: int) -> list[dict[str, Any]]:
    return [
        {**row, "advantages": list(range(len(row["completions"]))), "reference_logps": [-1.0] * len(row["completions"])}
        for row in make_rows(count)
    ]


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("table", [False, True])
def test_records_and_tables_bring_what_the_collator_carries(table: bool, num_proc: int | None) -> None:
    rows: Any = with_signals(4)
    if table:
        rows = pytest.importorskip("datasets").Dataset.from_list(rows)
    found = RankedDataset(rows, RankedCollator(TOKENIZER, READING, signals=("advantages",)), num_proc=num_proc)
    for feature, row in zip(found, with_signals(4), strict=False):
        assert list(feature["advantages"]) == row["advantages"]
        assert "reference_logps" not in feature
    batch = RankedCollator(TOKENIZER, READING)(list(found))
    assert "reference_logps" not in batch
    assert batch["advantages"].tolist() == [value for row in with_signals(4) for value in row["advantages"]]


def test_what_is_left_out_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    collator = RankedCollator(TOKENIZER)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            assert not set(SIGNALS) & collator(with_signals(2)).keys()
            RankedDataset(with_signals(2), collator)
        collator([{**collator.tokenize_record(make_rows(1)[0]), "token_weights": [[1.0]]}])
    for name in ("advantages", "reference_logps", "token_weights"):
        assert (
            caplog.text.count(f"records: their {name} are left out, for the objective 'clha' does not read them") == 1
        )
    with pytest.raises(ValueError, match=r"^signals: expected names among reference_logps, .*, got 'rewards'$"):
        RankedCollator(TOKENIZER, signals=("rewards",))
