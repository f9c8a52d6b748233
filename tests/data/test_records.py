"""Records: what is accepted, how it is ordered, and that every refusal names record, field, expected and got."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clha_fast.data import RankedRecord, RecordError, make_record, read_records

WORST_FIRST = ["worst", "middle", "best"]


def test_given_order_is_the_ranking():
    record = make_record("p", ["a", "b"], rewards=[-1.0, 2], sft_index=1)
    assert record == RankedRecord("p", ("a", "b"), (-1.0, 2.0), 1)


@pytest.mark.parametrize("ranks", [[2, 1, 0], [3, 2, 1], [3.0, 2.0, 1.0]])
def test_ranks_reorder_rewards_and_sft_target(ranks):
    record = make_record("p", WORST_FIRST, rewards=[1.0, 5.0, 3.0], ranks=ranks, sft_index=0)
    assert record.completions == ("best", "middle", "worst")
    assert record.rewards == (3.0, 5.0, 1.0)
    assert record.completions[record.sft_index] == "worst"


def test_a_subset_stays_with_a_record_that_is_ordered():
    record = make_record("p", ["a", "b"], rewards=[1, 2], rank_by_reward=True, subset="s")
    assert (record.completions, record.subset) == (("b", "a"), "s")


def test_without_sft_index_the_best_rank_is_the_target():
    assert make_record("p", WORST_FIRST, ranks=[2, 1, 0]).sft_index == 0


def test_rank_by_reward_is_stable():
    record = make_record("p", ["a", "b", "c", "d"], rewards=[1.0, 2.0, 1.0, 2.0], rank_by_reward=True)
    assert record.completions == ("b", "d", "a", "c")


def test_rank_by_reward_keeps_the_order_of_ranks_among_equals():
    record = make_record("p", ["a", "b", "c"], rewards=[1, 1, 2], ranks=[2, 1, 3], rank_by_reward=True)
    assert record.completions == ("c", "b", "a")


@given(st.permutations(range(6)), st.sampled_from([0, 1]), st.integers(0, 5))
def test_any_permutation_puts_rank_k_in_place_k(ranks, base, target):
    texts = [f"rank {rank}" for rank in ranks]
    record = make_record("p", texts, ranks=[rank + base for rank in ranks], sft_index=target)
    assert record.completions == tuple(f"rank {rank}" for rank in range(6))
    assert record.completions[record.sft_index] == texts[target]


def test_messages_lose_only_their_empty_keys():
    record = make_record([{"role": "user", "content": "hi", "name": None, "date": "today"}], ["a"])
    assert record.prompt == ({"role": "user", "content": "hi", "date": "today"},)


def test_lists_become_tuples_and_source_is_no_part_of_equality():
    record = RankedRecord("p", ["a"], [1], source="x:1")  # type: ignore[arg-type]
    assert record == RankedRecord("p", ("a",), (1.0,), source="y:2")
    assert isinstance(record.completions, tuple)


def test_as_dict_leaves_out_what_is_default():
    assert RankedRecord("p", ("a",)).as_dict() == {"prompt": "p", "completions": ["a"]}
    full = RankedRecord(({"role": "user", "content": "q"},), ("a", "b"), (1.0, 0.0), 1, subset="s").as_dict()
    assert full == {
        "prompt": [{"role": "user", "content": "q"}],
        "completions": ["a", "b"],
        "rewards": [1.0, 0.0],
        "sft_index": 1,
        "subset": "s",
    }


TWO = ["a", "b"]
BAD = [
    ("prompt", 3, TWO, {}, "prompt", "a text or a list of messages", "3"),
    ("empty prompt list", [], TWO, {}, "prompt", "at least one message", "[]"),
    ("message", ["hi"], TWO, {}, "prompt[0]", "message", "'hi'"),
    ("message without role", [{"content": "x"}], TWO, {}, "prompt[0]", '"role"', "['content']"),
    ("message without text", [{"role": "user", "content": None}], TWO, {}, "prompt[0].content", "a text", "None"),
    ("surrogate", "cut \ud83d", TWO, {}, "prompt", "valid Unicode", "'cut \\ud83d'"),
    ("no completions", "p", [], {}, "completions", "at least one response", "[]"),
    ("completions text", "p", "text", {}, "completions", "a list of texts", "'text'"),
    ("completion type", "p", ["a", 1], {}, "completions[1]", "a text", "1"),
    ("empty completion", "p", ["a", ""], {}, "completions[1]", "not empty", "''"),
    ("rewards short", "p", TWO, {"rewards": [1.0]}, "rewards", "2 numbers", "1"),
    ("rewards type", "p", TWO, {"rewards": 1.0}, "rewards", "a list of numbers", "1.0"),
    ("rewards none inside", "p", TWO, {"rewards": [1.0, None]}, "rewards[1]", "a number", "None"),
    ("rewards bool", "p", TWO, {"rewards": [True, 1]}, "rewards[0]", "a number", "True"),
    ("nan", "p", TWO, {"rewards": [0.0, math.nan]}, "rewards[1]", "finite", "nan"),
    ("inf", "p", TWO, {"rewards": [-math.inf, 0.0]}, "rewards[0]", "finite", "-inf"),
    ("beyond float32", "p", TWO, {"rewards": [1e39, 0.0]}, "rewards[0]", "float32", "1e+39"),
    ("beyond float64", "p", TWO, {"rewards": [10**400, 0.0]}, "rewards[0]", "finite", "1000"),
    ("tie", "p", TWO, {"ranks": [1, 1]}, "ranks", "permutation of 0..1 or 1..2", "[1, 1]"),
    ("gap", "p", TWO, {"ranks": [0, 2]}, "ranks", "permutation", "[0, 2]"),
    ("mixed bases", "p", ["a", "b", "c"], {"ranks": [0, 1, 3]}, "ranks", "permutation", "[0, 1, 3]"),
    ("half rank", "p", TWO, {"ranks": [0.5, 1]}, "ranks", "permutation", "[0.5, 1]"),
    ("nan rank", "p", TWO, {"ranks": [math.nan, 1]}, "ranks", "permutation", "[nan, 1]"),
    ("ranks long", "p", TWO, {"ranks": [0, 1, 2]}, "ranks", "2 numbers", "3"),
    ("target outside", "p", TWO, {"sft_index": 2}, "sft_index", "from 0 to 1", "2"),
    ("target negative", "p", TWO, {"sft_index": -1}, "sft_index", "from 0 to 1", "-1"),
    ("target half", "p", TWO, {"sft_index": 0.5}, "sft_index", "from 0 to 1", "0.5"),
    ("target bool", "p", TWO, {"sft_index": True}, "sft_index", "from 0 to 1", "True"),
    ("subset number", "p", TWO, {"subset": 3}, "subset", "a text", "3"),
    ("nothing to rank by", "p", TWO, {"rank_by_reward": True}, "rewards", "rewards to rank by", "None"),
]


@pytest.mark.parametrize(
    ("prompt", "completions", "more", "field", "expected", "got"), [c[1:] for c in BAD], ids=[c[0] for c in BAD]
)
def test_refusals_name_record_field_expected_and_got(prompt, completions, more, field, expected, got):
    with pytest.raises(RecordError) as caught:
        make_record(prompt, completions, source="train.jsonl:7", **more)
    start, _, end = str(caught.value).partition(", got ")
    assert start.startswith(f"train.jsonl:7: {field}: expected ")
    assert expected in start
    assert end.startswith(got)
    assert (caught.value.source, caught.value.field) == ("train.jsonl:7", field)
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(RecordError) as caught:
        make_record("p", ["a"], rewards="x" * 10_000)
    assert len(str(caught.value)) < 250


def test_errors_survive_the_way_out_of_a_worker():
    error = RecordError.of("f:1", "rewards", "numbers", None)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.source, copy.field) == (str(error), "f:1", "rewards")
    assert str(RecordError(str(error))) == str(error)  # what torch's data loader does with it


WAY = "where others are good, leave it out"
SCORES = ("reward_chosen", "reward_rejected", "rating_chosen", "rating_rejected")
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("source", "prompt", "rewards"),
    [
        ("train.jsonl:7", "p", "columns={'rewards': 'score'}"),
        ("train.jsonl:7", "p", [1.0, "columns.rewards"]),
        ("train.jsonl:7", {": expected a column for ": 1}, None),
        ("my_columns.jsonl:7", "p", [1.0]),
    ],
)
def test_a_bad_record_is_left_out_whatever_its_words(source, prompt, rewards):
    with pytest.raises(RecordError) as caught:
        make_record(prompt, TWO, rewards=rewards, source=source)
    advised = caught.value.advised(WAY)
    assert str(advised) == f"{caught.value}; {WAY}"
    assert (advised.source, advised.field) == (source, caught.value.field)
    again = pickle.loads(pickle.dumps(advised)).advised(WAY)
    assert str(again) == str(advised), "once"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "p", "completions": TWO, "scores": [1, 0]}, None),
        ({"prompt": "p", "completions": TWO, "my_reward": [1, 0]}, None),
        ({"prompt": "p", "completions": TWO, "system": "s"}, None),
        ({"prompt": "p", "completion": "a", "label": True}, None),
        ({"question": "p", "good": "a"}, None),
        ({"question": "p", "chosen": "a b", "rejected": "a c"}, None),
        ({"prompt": "other", "chosen": MESSAGES, "rejected": [*MESSAGES[:1], {**MESSAGES[1], "content": "c"}]}, None),
        ({"prompt": "p", "chosen": "a", "rejected": "b", **dict.fromkeys(SCORES, 1)}, None),
        ({"q": "p", "chosen": "a", "rejected": "b"}, {"prompt": "question"}),
        ({"q": "p", "chosen": "a", "rejected": "b", "s": 1}, {"prompt": "q", "sft_index": "s"}),
    ],
)
def test_no_record_is_left_out_where_all_are_read_wrong(row, columns):
    with pytest.raises(RecordError) as caught:
        read_records([row], columns=columns)
    assert caught.value.has_way, str(caught.value)
    assert str(caught.value.advised(WAY)) == str(caught.value)
