"""What every test module needs before it imports anything: Triton's interpreter where there is no GPU."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


# Files of few tests that take half a minute or longer each, by themselves or for the processes that they start.
LONG = (
    "training/test_trainer_processes.py",
    "experiments/test_table.py",
    "models/test_sequence_parallel.py",
    "cli/test_shared_runs.py",
    "models/test_wrappers.py",
    "models/test_architectures.py",
    "cli/test_cli_parts.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`LONG` first: a worker that began one of them when the others were done would keep them waiting."""
    long = {path for path in {item.path for item in items} if any(path.match(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    """What is imported stays: accelerate collects garbage after every training, and need not look at all of it."""
    gc.enable()
    _keep()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Nor at what the files before have imported and kept: by the last file that is several times as much."""
    yield
    is_last = nextitem is None or nextitem.path != item.path
    if is_last and _collections() > _kept_at:
        _keep()


# Whole collections when what there was has last been kept.
_kept_at = 0


def _collections() -> int:
    return gc.get_stats()[2]["collections"]


def _keep() -> None:
    global _kept_at
    gc.collect()
    gc.freeze()
    _kept_at = _collections()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Workers fork their programs from the same servers."""
    from tests.support import forked

    node.workerinput["forked"] = forked.begin()


def pytest_configure(config: pytest.Config) -> None:
    # numpy warns of log(0) and inf - inf, which the kernels form on purpose where a GPU says nothing.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    # Workers wait for the process that only hands them tests, and torch takes seconds to import.
    if config.getoption("dist", "no") == "no" or hasattr(config, "workerinput"):
        gc.disable()  # nor at what there is so far, again and again while more is imported
        _interpret()
    if hasattr(config, "workerinput"):
        from tests.support import forked

        forked.address = config.workerinput["forked"]


def _interpret() -> None:
    import torch

    if not torch.cuda.is_available():
        # Triton reads it once, when it is first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        with contextlib.suppress(ModuleNotFoundError):  # there is no Triton but on Linux
            from clha_fast.backends.triton import softmax
            from tests.support import interpreter

            interpreter.mend()
            # Of more tokens no row is cut into parts, each a program: of fewer it is, as on a GPU.
            softmax._PROGRAMS = 64


@pytest.fixture(scope="session")
def pictures() -> Iterator[pytest.MonkeyPatch]:
    """What stands for a run's pictures: drawing the two takes several times as long as the training of most tests."""
    from tests.support import pictures

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clha_fast.evaluation.plots.loss_curve", pictures.loss_curve)
        patch.setattr("clha_fast.evaluation.plots.curves_svg", pictures.curves_svg)
        yield patch


@pytest.fixture(autouse=True)
def _drawn_where_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, pictures: object) -> None:
    if request.node.get_closest_marker("drawn"):
        from tests.support.pictures import DRAWN

        for name, function in DRAWN.items():
            monkeypatch.setattr(f"clha_fast.evaluation.plots.{name}", function)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (integers their largest value), so that an element nobody wrote shows in the result."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "torch no longer fills fresh memory"
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend's blocks and pieces of 128 words, the smallest there are, whatever the number of tokens."""
    monkeypatch.setattr("clha_fast.backends.torch.head._BLOCK_BYTES", 1)
    monkeypatch.setattr("clha_fast.backends.torch.head._PIECE_BYTES", 1)


@pytest.fixture
def bfloat16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels take bfloat16 where they are interpreted, too: see `tests.support.bfloat16`."""
    import torch

    if not torch.cuda.is_available():
        from tests.support import bfloat16

        bfloat16.mend(monkeypatch)
