"""`sequence_parallel_size` of the trainer: processes that share each row's tokens train as one process does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

from clha_fast.training.sequence import check_sequence, share_batches
from tests.support import forked
from tests.support.trainers import config
from tests.support.versions import needs
from tests.training.test_trainer_processes import check, start

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dpo": {"objective": "dpo", "normalizer": "global", "log_token_statistics": True},
    "means of micro-batches": {"normalizer": "batch", "max_grad_norm": 2.0, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process's run of each kind, made when it is asked for."""
    made: dict[str, Any] = {}

    class Lazy(dict[str, Any]):
        def __missing__(self, run: str) -> Any:
            folder = tmp_path_factory.mktemp("alone")
            self[run] = start("ddp", folder, 1, MORE_SETTINGS=json.dumps(RUNS[run]))
            return self[run]

    return Lazy(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "layout", "run"),
    [
        (2, "padded", "plain"),
        (2, "shared", "plain"),
        (4, "packed", "plain"),
        (2, "shared", "dpo"),
        (4, "shared", "dpo"),
        (2, "shared", "means of micro-batches"),
    ],
)
def test_as_in_one_process(alone: Any, tmp_path: Path, processes: int, layout: str, run: str) -> None:
    """Weights, log, evaluation, samples and a resumed end, in one group of two and in two of them."""
    more = {"SEQUENCE_PARALLEL": "2", "ROW_LAYOUT": layout, "MORE_SETTINGS": json.dumps(RUNS[run])}
    found = start("ddp", tmp_path, processes, **more)
    assert found["model"] == "DistributedDataParallel"
    assert "resumed" in found
    check(found, alone[run])


@pytest.mark.slow
def test_fsdp2(alone: Any, tmp_path: Path) -> None:
    """Weights in parts over both groups."""
    needs("accelerate", "1.6", "knows no FSDP2")
    found = start("fsdp", tmp_path, 4, SEQUENCE_PARALLEL="2", ROW_LAYOUT="shared")
    assert found["model"] == "FSDPLlamaForCausalLM"
    assert found["sharded"]
    assert "resumed" in found
    check(found, alone["plain"])


@pytest.mark.slow
def test_under_a_budget_of_tokens(tmp_path: Path) -> None:
    """Batches of the sampler are counted by groups, too."""
    more = {"MORE_SETTINGS": json.dumps({"max_tokens_per_batch": 150}), "ROW_LAYOUT": "shared"}
    one = start("ddp", tmp_path / "one", 1, **more)
    check(start("ddp", tmp_path / "two", 2, SEQUENCE_PARALLEL="2", **more), one)


@pytest.mark.slow
def test_other_runs() -> None:
    """Adapters, streams, refusals and layouts given up, in two processes beside each other and in one group."""
    run()


def test_auto_goes_on_with_padded_rows() -> None:
    """Not slow, for it is the only run of its kind that is no refusal; and what a frozen copy then compares."""
    run("given up, of a frozen copy too", "other slices")


def run(*names: str) -> None:
    done = forked.run("train", "tests.support.sequence_runs", *names, processes=2, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("size", [0, -2, True, 2.0, "2"])
def test_a_size_is_a_whole_number(tmp_path: Path, size: Any) -> None:
    least = " of at least 1" if type(size) is int else ""
    with pytest.raises(ValueError, match=f"^sequence_parallel_size: expected a whole number{least}, got {size!r}"):
        config(tmp_path, sequence_parallel_size=size)


def test_a_size_divides_the_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"divides the 1 process there is \(1\), got 2; torchrun --nproc-per-node"):
        config(tmp_path, sequence_parallel_size=2)
    with pytest.raises(ValueError, match=r"divides the 6 processes there are \(1, 2, 3, 6\), got 4"):
        check_sequence(_settings(4, world_size=6))
    check_sequence(_settings(3, world_size=6))


def _settings(size: int, **changes: Any) -> SimpleNamespace:
    none = {"deepspeed": None, "torch_compile": False, "bf16_full_eval": False, "fp16_full_eval": False}
    none |= {"max_dropped_mass": None, "neftune_noise_alpha": None}
    loading = SimpleNamespace(use_seedable_sampler=changes.pop("use_seedable_sampler", True))
    given = {"sequence_parallel_size": size, "include_num_input_tokens_seen": "no", **none, **changes}
    return SimpleNamespace(accelerator_config=loading, **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deepspeed", "zero3.json"),
        ("torch_compile", True),
        ("max_dropped_mass", 0.0),
        ("neftune_noise_alpha", 5.0),
        ("bf16_full_eval", True),
        ("include_num_input_tokens_seen", "all"),
        ("use_seedable_sampler", False),
    ],
)
def test_what_does_not_run_beside_it(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*: expected none with sequence_parallel_size=2 \("):
        check_sequence(_settings(2, world_size=4, **{name: value}))
    check_sequence(_settings(1, world_size=4, **{name: value}))


def test_what_an_environment_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="deepspeed: expected none with sequence_parallel_size=2"):
        check_sequence(_settings(2, world_size=4))


def test_fsdp_is_the_newer_one() -> None:
    older = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1)))
    with pytest.raises(ValueError, match="fsdp: expected FSDP2 with sequence_parallel_size=2, got the older"):
        share_batches(older, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_processes_of_a_group_are_given_one_batch(stream: bool) -> None:
    """Ten numbers in batches of two, over two groups of two: five batches, and one that fills up."""

    class Numbers(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(10))

    found = []
    for rank in range(4):
        kind = type("One", (Accelerator,), {"num_processes": 4, "process_index": rank})
        # As the trainer has it: a batch of candidates cannot be cut.
        accelerator: Any = kind(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=False))
        share_batches(accelerator, 2)
        loader = accelerator.prepare(DataLoader(Numbers() if stream else list(range(10)), batch_size=2))  # type: ignore[arg-type]
        assert accelerator.prepare(loader) is loader
        found.append([batch.tolist() for batch in loader])
    assert found[0] == found[1] == [[0, 1], [4, 5], [8, 9]]
    assert found[2] == found[3] == [[2, 3], [6, 7], [0, 1]]
