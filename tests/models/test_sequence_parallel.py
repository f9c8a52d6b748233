"""Tokens of rows spread over two real processes: as in one, in float64; and what is refused."""

from __future__ import annotations

import pytest
import torch

import clha_fast
from clha_fast.models.sequence_parallel import SequenceParallel
from tests.support import forked
from tests.support.tiny import make_model

SAMPLE = ("padded", "much padding", "longer", "refusals")


def run(*names: str, processes: int = 2, module: str = "sequence_processes") -> str:
    done = forked.run("train", f"tests.support.{module}", *names, processes=processes, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def test_sample() -> None:
    run(*SAMPLE)


@pytest.mark.slow
def test_memory_of_one_process_within_a_forward_of_both() -> None:
    """It says so; nobody enters a collective that the others are not in."""
    assert "process 0: OutOfMemoryError\n" in run(module="spread_memory")


@pytest.mark.slow
def test_all() -> None:
    run()


@pytest.mark.slow
def test_four_processes() -> None:
    """Of four heads with two of keys, which are repeated; and two groups beside each other."""
    run("shared", "exact, padded", "much padding", "two groups", processes=4)


@pytest.mark.parametrize("group", ["world", 2, None])
def test_a_group_is_needed(group: object) -> None:
    if group is None:
        assert clha_fast.attach(make_model(300), sequence_parallel=None).layout == "padded"
        return
    with pytest.raises(ValueError, match="sequence_parallel: expected a process group that this process is in"):
        clha_fast.attach(make_model(300), sequence_parallel=group)  # type: ignore[arg-type]


def test_scored_tokens_are_in_one_slice_each() -> None:
    """Two rows of five tokens, three a process: columns 0 to 2, and 3 to 4 with one of padding."""
    found = []
    for rank in range(2):
        sequence = SequenceParallel.__new__(SequenceParallel)
        sequence.size, sequence.rank = 2, rank
        index = torch.tensor([0, 2, 3, 4, 5, 8, 9])
        found.append([part.tolist() for part in sequence.places(index, 7, torch.Size((2, 5)), torch.device("cpu"))])
    assert found == [[[0, 1, 4], [0, 2, 3]], [[2, 3, 5, 6], [0, 1, 3, 4]]]
