"""DDP, FSDP2, tensor parallelism and people's loops in two real processes: the same loss and gradients as in one."""

from __future__ import annotations

import pytest

from tests.support.wrappers import Result, case_names, render, run

SAMPLE = (
    "DDP, gradient accumulation, uneven",
    "DDP, a process without prompts",
    "FSDP2, tied, gradient checkpointing",
    "FSDP2, head sharded by itself",
    "Vocabulary-parallel operator, float64",
    "Tensor parallel, uneven vocabulary",
)


def check(results: list[Result]) -> None:
    wrong = [result for result in results if not result.right]
    assert not wrong, "\n".join(f"{r.name}: {r.loss:.2e} {r.gradients:.2e} {r.reason}" for r in wrong)


def test_sample() -> None:
    results = run(SAMPLE)
    assert [result.name for result in results] == list(SAMPLE)
    check(results)


def test_the_table_tells_wrong_from_right() -> None:
    good, bad = Result("one", 1e-7, 1e-7, 1e-5), Result("two", 1e-7, 1e-3, 1e-5)
    hung = Result("three", reason="hung: no result after 9 s")
    assert [result.right for result in (good, bad, hung)] == [True, False, False]
    table = render([good, bad, hung])
    assert "**1 of 3 right.**" in table
    assert "| three | | |  | **wrong** hung: no result after 9 s |" in table


@pytest.mark.slow
def test_the_whole_matrix() -> None:
    check(run([name for name in case_names() if name not in SAMPLE]))
