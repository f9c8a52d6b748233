"""CandidateBatch, packing and the inert mask, against brute force and against the reference loss."""

import dataclasses
import math

import pytest
import torch
from accelerate.utils import send_to_device
from hypothesis import given
from hypothesis import strategies as st

from clha_fast import RankingInputs, ranking_loss, reference
from clha_fast.batching.batch import CandidateBatch, inert_mask, pack_candidates
from clha_fast.objectives.clha import PUBLISHED, CLHAOptions
from clha_fast.options import HeadOptions


def feature(prompt, completions, rewards=None, sft_index=0, source="f:1"):
    return {
        "prompt_ids": prompt,
        "completion_ids": completions,
        "rewards": rewards,
        "sft_index": sft_index,
        "source": source,
    }


def pack(*features, **settings):
    return pack_candidates(features, pad_token_id=0, **settings)


def test_packing_by_hand():
    batch = pack(feature([1, 2], [[3], [4, 5, 6]], source="a"), feature([7], [[8, 9]], source="b"), drop_inert=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0], [1, 2, 4, 5, 6], [7, 8, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [3, 4, 5, 6, 8, 9]
    assert batch.row_index.tolist() == [1, 6, 7, 8, 10, 11]
    assert batch.candidate_lengths.tolist() == [1, 3, 2]
    assert batch.candidates_per_prompt.tolist() == [2, 1]
    assert batch.sft_index.tolist() == [0, 0]
    assert batch.rewards is None
    assert batch.num_inert == 0


def test_dropping_by_hand():
    # Rewards 5, 4, -1 at margin 3: candidates 0 and 1 pair with 2. Rewards -1, -2: no pair, gate closed.
    prompts = [feature([1], [[2], [3, 4], [5]], [5.0, 4.0, -1.0]), feature([6], [[7], [8] * 9], [-1.0, -2.0])]
    batch = pack(*prompts)
    assert batch.input_ids.tolist() == [[1, 2, 0], [1, 3, 4], [1, 5, 0]]
    assert batch.candidate_lengths.tolist() == [1, 2, 1, 0, 0]
    assert batch.candidates_per_prompt.tolist() == [3, 2]
    assert batch.rewards.tolist() == [5.0, 4.0, -1.0, -1.0, -2.0]
    assert batch.targets.tolist() == [2, 3, 4, 5]
    assert batch.num_inert == 2
    open_gate = pack(prompts[0], {**prompts[1], "rewards": [-2.0, 1.0], "sft_index": 1})
    assert open_gate.candidate_lengths.tolist() == [1, 2, 1, 0, 9]
    assert open_gate.num_inert == 1


def test_all_inert_leaves_one_row_and_no_token():
    batch = pack(feature([1, 2], [[3], [4]], [-1.0, -2.0]), pad_to_multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 0, 0, 0]]
    assert (batch.targets.shape, batch.targets.dtype) == ((0,), torch.int64)
    assert (batch.row_index.shape, batch.row_index.dtype) == ((0,), torch.int64)
    assert batch.candidate_lengths.tolist() == [0, 0]
    assert batch.num_inert == 2


@pytest.mark.parametrize(("step", "width"), [(None, 5), (1, 5), (5, 5), (8, 8), (3, 6)])
def test_padding_to_a_multiple(step, width):
    batch = pack(feature([1, 2], [[3], [4, 5, 6]]), pad_to_multiple_of=step)
    assert batch.input_ids.shape == (2, width)
    assert batch.input_ids.flatten()[batch.row_index + 1].tolist() == [3, 4, 5, 6]
    assert int(batch.attention_mask.sum()) == 8


ids = st.lists(st.integers(1, 99), min_size=1, max_size=5)
REWARDS = st.sampled_from([-4.0, -1.0, 0.0, 0.5, 2.0, 3.0, 3.5, 7.0])


@st.composite
def prompts(draw, with_rewards):
    completions = draw(st.lists(ids, min_size=1, max_size=5))
    size = len(completions)
    rewards = draw(st.lists(REWARDS, min_size=size, max_size=size)) if with_rewards else None
    return feature(draw(ids), completions, rewards, draw(st.integers(0, size - 1)))


options = st.builds(
    CLHAOptions,
    reward_margin=st.sampled_from([0.0, 0.5, 3.0]),
    noise_rule=st.sampled_from(["abs", "signed", "none"]),
    reduction=st.sampled_from(["sum", "distance_mean", "pair_mean"]),
    rank_weight=st.sampled_from([0.0, 1.0]),
    sft=st.sampled_from(["sum", "mean"]),
    sft_weight=st.sampled_from([0.0, 0.05]),
    sft_factor=st.sampled_from(["squared", "one"]),
    reward_floor=st.sampled_from([0.0, 2.0, -math.inf]),
)
batches = st.booleans().flatmap(lambda given: st.lists(prompts(given), min_size=1, max_size=4))


@given(batches, st.booleans(), options, st.sampled_from([None, 4]))
def test_every_kept_row_holds_prompt_and_response(features, drop, option, step):
    batch = pack(*features, drop_inert=drop, objective=option, pad_to_multiple_of=step)
    width = batch.input_ids.shape[1]
    rows = iter(batch.input_ids.tolist())
    tokens = iter(zip(batch.row_index.tolist(), batch.targets.tolist(), strict=True))
    lengths = iter(batch.candidate_lengths.tolist())
    number = 0
    for one in features:
        for completion in one["completion_ids"]:
            length = next(lengths)
            if length:
                assert length == len(completion)
                row = [*one["prompt_ids"], *completion]
                assert next(rows) == row + [0] * (width - len(row))
                assert batch.attention_mask[number].tolist() == [1] * len(row) + [0] * (width - len(row))
                for position, token in enumerate(completion, len(one["prompt_ids"]) - 1):
                    assert next(tokens) == (number * width + position, token)
                number += 1
    assert next(tokens, None) is None
    assert batch.num_inert == int((batch.candidate_lengths == 0).sum())
    if number:
        assert next(rows, None) is None


def brute_force(features, option):
    """The spec's sentences, one candidate at a time."""
    inert = []
    for one in features:
        rewards, size = one["rewards"], len(one["completion_ids"])

        def kept(i, j, rewards=rewards):
            if rewards is None or option.noise_rule == "none":
                return True
            gap = rewards[i] - rewards[j]
            return (abs(gap) if option.noise_rule == "abs" else gap) > option.reward_margin

        for k in range(size):
            pairs = [(k, j) for j in range(k + 1, size)] + [(i, k) for i in range(k)]
            ranked = option.rank_weight > 0 and any(kept(i, j) for i, j in pairs)
            is_open = rewards is None or rewards[k] > option.reward_floor
            counts = option.sft_weight > 0 and (option.sft_factor == "one" or size > 1)
            inert.append(not ranked and not (k == one["sft_index"] and is_open and counts))
    return inert


def shape(features):
    sizes = torch.tensor([len(one["completion_ids"]) for one in features])
    rewards = [r for one in features for r in one["rewards"] or ()]
    return torch.tensor(rewards) if rewards else None, sizes, torch.tensor([one["sft_index"] for one in features])


@given(batches, options)
def test_inert_mask_against_brute_force(features, option):
    assert inert_mask(*shape(features), option).tolist() == brute_force(features, option)


@given(batches, options)
def test_dropping_changes_neither_loss_nor_gradients(features, option):
    rewards, sizes, sft_index = shape(features)
    inert = inert_mask(rewards, sizes, sft_index, option)
    lengths = torch.tensor([len(ids) for one in features for ids in one["completion_ids"]])
    # Scores that rise with the rank number, so that all pairs are out of order and no gradient cancels by accident.
    base = torch.randn(int(lengths.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logps = base * 0.01 + owner
    results = []
    for dropped in (torch.zeros_like(inert), inert):
        kept = ~dropped[owner]
        leaf = logps.clone().requires_grad_()
        loss, metrics, _ = reference.clha_loss(
            leaf[kept],
            torch.ones(int(kept.sum()), dtype=torch.int64),
            lengths.masked_fill(dropped, 0),
            sizes,
            rewards,
            sft_index,
            None,
            None,
            HeadOptions(),
            option,
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics))
    (full, gradient, _), (less, less_gradient, _) = results
    assert torch.equal(full, less)
    torch.testing.assert_close(gradient, less_gradient, rtol=0, atol=1e-15)
    assert bool((gradient[inert[owner]] == 0).all())


def test_inert_mask_defaults():
    assert inert_mask(None, torch.tensor([2, 1])).tolist() == [False, False, True]
    published = inert_mask(torch.tensor([5.0, 1.0, 0.5]), torch.tensor([2, 1]), objective=PUBLISHED)
    assert published.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("rewards", "option"),
    [
        # 4.82 - 1.82 in float32 rounds to 3, in float64 it is 3.0000001.
        ([4.82, 1.82], CLHAOptions(sft_weight=0.0)),
        # 0.1 as float32 is above 0.1 in float64 and equal to it in float32.
        ([0.1], CLHAOptions(reward_floor=0.1, sft_factor="one")),
    ],
)
def test_a_candidate_that_would_count_in_float64_alone_is_dropped(rewards, option):
    """No loss compares rewards in float64."""
    rewards = torch.tensor(rewards)
    sizes = torch.tensor([len(rewards)])
    wide = rewards.double()
    assert bool((wide[0] - wide[-1] > 3) | (wide[0] > option.reward_floor))
    for values in (rewards, wide):
        assert inert_mask(values, sizes, None, option).all()
        inputs = RankingInputs(torch.ones(len(rewards), dtype=torch.long), sizes, values)
        loss, _ = ranking_loss(-torch.ones(len(rewards), dtype=torch.float64), inputs, option)
        assert loss == 0
    more = torch.nextafter(rewards, torch.full_like(rewards, 9.0)) + torch.tensor([2.0**-20, 0.0])[: len(rewards)]
    assert not inert_mask(more, sizes, None, option).any()


def test_inert_mask_refuses_what_does_not_fit():
    with pytest.raises(
        ValueError, match="candidates_per_prompt: expected counts of 3 candidates in all, got rewards for 2"
    ):
        inert_mask(torch.zeros(2), torch.tensor([3]))
    with pytest.raises(ValueError, match="sft_index: expected a position from 0 to 1, got 2"):
        inert_mask(None, torch.tensor([2]), torch.tensor([2]))


GOOD = feature([1], [[2], [3]], [1.0, 0.0], source="f:1")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {"rewards": None},
            r"f:2: rewards: expected all records of a batch to have rewards or none to, got none while f:1",
        ),
        ({"rewards": [1.0]}, r"f:2: rewards: expected 2 numbers, one a completion, got 1"),
        ({"rewards": [1.0, float("nan")]}, r"f:2: rewards: expected finite numbers \(float32\), got nan"),
        ({"rewards": [1e39, 1.0]}, r"f:2: rewards: expected finite numbers \(float32\), got 1e\+39"),
        ({"sft_index": 2}, r"f:2: sft_index: expected a position from 0 to 1, got 2"),
        ({"sft_index": -1}, r"f:2: sft_index: expected a position from 0 to 1, got -1"),
        ({"prompt_ids": []}, r"f:2: prompt_ids: expected at least one token, got none"),
        ({"completion_ids": []}, r"f:2: completion_ids: expected at least one response, got none"),
        ({"completion_ids": [[2], []]}, r"f:2: completion_ids\[1\]: expected at least one token, got none"),
    ],
)
@pytest.mark.parametrize("drop_inert", [True, False])
def test_packing_refuses_by_record(bad, message, drop_inert):
    with pytest.raises(ValueError, match=message):
        pack(GOOD, {**GOOD, "source": "f:2", **bad}, drop_inert=drop_inert)


def test_packing_refuses_nothing_and_late_rewards():
    with pytest.raises(ValueError, match="features: expected at least one prompt, got none"):
        pack()
    with pytest.raises(ValueError, match=r"f:2: rewards: .* got some while f:1 has none"):
        pack({**GOOD, "rewards": None}, {**GOOD, "source": "f:2"})


@pytest.mark.parametrize("rewards", [None, [1.0, 0.0]])
def test_dictionary_round_trip_and_loss_inputs(rewards):
    batch = pack({**GOOD, "rewards": rewards})
    fields = batch.as_dict()
    assert ("rewards" in fields) == (rewards is not None)
    again = CandidateBatch.from_dict({**fields, "labels": 1})
    assert again.as_dict().keys() == fields.keys()
    for name, value in fields.items():
        assert value is again.as_dict()[name]
    inputs = batch.loss_inputs()
    assert set(inputs) == {"targets", "candidate_lengths", "candidates_per_prompt", "rewards", "sft_index", "row_index"}
    assert all(value is getattr(batch, name) for name, value in inputs.items())
    assert set(batch.model_inputs()) == {"input_ids", "attention_mask"}


def test_to_moves_every_tensor_and_keeps_the_rest():
    moved = pack(GOOD).to("meta")
    values = [getattr(moved, f.name) for f in dataclasses.fields(moved)]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.num_inert == pack(GOOD).num_inert
    assert pack({**GOOD, "rewards": None}).to("meta").rewards is None


def test_the_host_keeps_its_copy_of_the_sizes():
    """By `to`, and by accelerate, which moves a dictionary's tensors and knows nothing else."""
    batch = pack(feature([1], [[2, 4], [3]]), feature([1], [[2], [3], [5]]))
    there = CandidateBatch.from_dict(send_to_device(batch.as_dict(), "meta"))
    for moved in (batch.to("meta"), there, there.to("meta")):
        assert moved.candidate_lengths.device.type == "meta"
        given = moved.loss_inputs()
        assert given["candidate_lengths"].tolist() == [2, 1, 1, 1, 1]
        assert given["candidates_per_prompt"].tolist() == [2, 3]
        assert given["targets"].device.type == "meta"
    # Sizes replaced on the CPU are believed, of other shapes on the device the copy is not.
    other = dataclasses.replace(batch, candidate_lengths=torch.tensor([1, 2, 1, 1, 1]))
    assert other.loss_inputs()["candidate_lengths"].tolist() == [1, 2, 1, 1, 1]
    one = torch.empty(1, dtype=torch.int64, device="meta")
    fewer = dataclasses.replace(there, candidates_per_prompt=one, sft_index=one)
    assert fewer.host_sizes is None
    assert fewer.loss_inputs()["candidate_lengths"].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets: expected torch.int64 with 1 dim"),
        ({"input_ids": torch.zeros(2, dtype=torch.int64)}, "input_ids: expected torch.int64 with 2 dim"),
        ({"rewards": torch.zeros(2, dtype=torch.float64)}, "rewards: expected torch.float32 with 1 dim"),
        ({"rewards": torch.zeros(3)}, r"rewards: expected the shape \(2,\) of candidate_lengths, got \(3,\)"),
        ({"row_index": torch.zeros(1, dtype=torch.int64)}, r"row_index: expected the shape \(2,\) of targets"),
        ({"sft_index": torch.zeros(2, dtype=torch.int64)}, r"sft_index: expected the shape \(1,\) of candidates_per"),
    ],
)
def test_batches_check_shapes_and_dtypes(change, message):
    batch = pack({**GOOD, "rewards": [9.0, 0.0]})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch, **change)


def test_missing_field_is_named():
    fields = pack(GOOD).as_dict()
    del fields["targets"]
    with pytest.raises(
        ValueError, match="targets: expected in a batch, got the keys attention_mask, candidate_lengths"
    ):
        CandidateBatch.from_dict(fields)
