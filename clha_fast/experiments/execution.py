"""Many tasks one after another, or as Ray tasks on several machines; one that fails does not lose the others."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Failure:
    """What a task that raised leaves: one sentence, and where it was raised."""

    message: str
    trace: str


def run_all(
    tasks: Sequence[_T],
    work: Callable[[_T], Any],
    *,
    ray: bool = False,
    address: str | None = None,
    use_cpu: bool = False,
) -> Iterator[tuple[_T, Any]]:
    """(task, its result or a `Failure`) of every task; with Ray in the order in which they end.

    Args:
        work: what is done for a task; with `ray` it and the tasks must pickle, and every node must see the same
            folders. address: of a Ray cluster; None is the one of the environment, or one on this machine. Where the
            cluster has GPUs, each task has one for itself, unless `use_cpu`: Ray hides those that nobody asked for.

    Raises:
        ImportError: `ray` without Ray. KeyboardInterrupt: at once; what is done is done.
    """
    if not ray:
        for task in tasks:
            yield task, guarded(work, task)
        return
    yield from _with_ray(tasks, work, address, use_cpu)


def guarded(work: Callable[[_T], Any], task: _T) -> Any:
    """`work(task)`, or a `Failure` for whatever it raises but an interruption."""
    try:
        return work(task)
    # Everything: a method that cannot be trained (out of memory, a model's own bug) is a hole in a table, and the
    # other cells are hours of work.
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return Failure(text, traceback.format_exc())


def gpus_a_task(cluster: Mapping[str, float], use_cpu: bool) -> int:
    """How many GPUs a task asks for, of a cluster's resources (as `ray.cluster_resources` gives them)."""
    return 1 if cluster.get("GPU", 0) >= 1 and not use_cpu else 0


def _with_ray(
    tasks: Sequence[_T], work: Callable[[_T], Any], address: str | None, use_cpu: bool
) -> Iterator[tuple[_T, Any]]:
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray: expected to be installed for --ray (pip install 'clha-fast[ray]')") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    try:
        gpus = gpus_a_task(ray.cluster_resources(), use_cpu)
        run = ray.remote(max_retries=0, num_gpus=gpus)(guarded)
        waiting = {run.remote(work, task): task for task in tasks}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            task = waiting.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayError as error:  # a worker that died: killed for memory, say
                result = Failure(" ".join(str(error).split()), str(error))
            yield task, result
    finally:
        if started:
            ray.shutdown()
