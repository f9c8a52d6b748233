"""One run of a file shared out over the processes that `torchrun` or `accelerate launch` has started.

Each does some of the batches and keeps them in a journal of its own. They wait for one another three times: before
the batches, so that all know what is left; behind them, to exchange values; and until the first has written. In between
nobody waits: one that fails says why and ends, and the launcher ends the others.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clha_fast.files import Journal

# Shares differ in length, so the first who is done may wait for hours; one that has ended is noticed at once.
_PATIENCE = datetime.timedelta(days=30)


# What gloo, NCCL and torch's store say where the other end of a connection is gone; none has a class of its own for it.
_GONE = re.compile(
    r"connection (was likely )?closed|connection reset by peer|broken pipe|ncclRemoteError|remote process exit",
    re.IGNORECASE,
)


class ProcessError(RuntimeError):
    """Another process of the run has ended early."""


def waited_for_another(error: BaseException | None) -> str:
    """A sentence's beginning, where `error`, or what led to it, came of another process that has ended; else ""."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    while error is not None:
        if isinstance(error, RuntimeError) and _GONE.search(str(error)):
            return _waited(dist.get_rank(), dist.get_world_size())
        error = error.__cause__ or error.__context__
    return ""


def _waited(rank: int, world: int) -> str:
    return (
        f"process {rank} of {world} waited for another that has ended; what that one, or the launcher, printed says why"
    )


@dataclass(frozen=True)
class Processes:
    """The processes of a run; `Processes()` is one alone. `join` finds them.

    Attributes:
        rank: of this process; the first one, 0, writes and prints. world: how many there are.
        local_rank: among those of the machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, in the order of ranks; waits for all.

        Raises:
            ProcessError: one has ended.
        """
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(found, value, group=self.group)
        except RuntimeError as error:
            raise ProcessError(_waited(self.rank, self.world)) from error
        return found

    def share(self, journal: Journal) -> list[int]:
        """Numbers of the batches that this process does, of those that no journal of the run has; waits for all.

        Every `world`-th of what is left, whoever did the others, so a run may go on in another number of processes.
        Files of a run that is not resumed are deleted.

        Raises:
            ValueError: the processes do not have the same run before them, or not the same journals. ProcessError.
        """
        if not self.rank and not journal.resume:
            journal.remove()
        (first, done), *others = self.gather((journal.identity, journal.finished))
        for rank, (identity, finished) in enumerate(others, 1):
            changed = identity.differences(first.as_dict())
            if not changed and finished != done:
                changed = ["it finds other batches finished; all must see the destination's folder"]
            if changed:
                raise ValueError(
                    f"processes: expected the same run in all, got another in process {rank} than in process 0 "
                    f"({'; '.join(changed)}); give all the same files, settings and kind of device"
                )
        left = [number for number in range(len(journal.batches)) if number not in journal.finished]
        return left[self.rank :: self.world]

    def collect(self, journal: Journal) -> None:
        """Has the values of all processes in `journal.values`; waits for all.

        Raises:
            ProcessError: one has ended.
        """
        for values in self.gather(journal.values):
            journal.values.update(values)

    def choose_device(self, device: str) -> None:
        """Makes the accelerator of this process's number the one that "auto", or a device without a number, means.

        Raises:
            ValueError: the machine has more processes than accelerators.
        """
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        if self.world == 1 or found is None or device not in ("auto", found.type):
            return
        count = torch.accelerator.device_count()
        if self.local_rank >= count:
            raise ValueError(
                f"device: expected a {found.type} device a process, got process {self.local_rank} of a machine with "
                f"{count}; start {count} a machine, or name the device that all share, such as {found.type}:0 or cpu"
            )
        torch.accelerator.set_device_index(self.local_rank)

    def first_to_say(self, text: str) -> bool:
        """Whether no other process has asked this about the same text as often: what all find out is said once.

        What they find out again, in a later command of the same launcher, is said again.
        """
        name = hashlib.sha256(text.encode()).hexdigest()
        try:
            store = _meeting_place() if self.store is None else self.store
            if store is None:
                return True
            times = store.add(f"{name}/by/{os.environ.get('RANK', self.rank)}", 1)
            return bool(store.add(f"{name}/{times}", 1) == 1)
        except RuntimeError:  # the process that holds the store has ended
            return True


def _meeting_place() -> Any:
    """A store that the processes which a launcher has started on this machine share, where they have not joined.

    That of torchrun, which is there from the start, or of torch.distributed, once they have met; None without either.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    place = "/".join(os.environ.get(name, "0") for name in ("GROUP_RANK", "TORCHELASTIC_RESTART_COUNT"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        import torch.distributed as dist

        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=datetime.timedelta(seconds=10))
    elif dist is not None and dist.is_available() and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    else:
        return None
    return dist.PrefixStore(f"clha_fast/said/{place}", store)


def all_stop(asked: bool, step: int, run: str) -> bool:
    """Whether the processes that train together are to stop at the end of this step.

    Alone a process stops where it is asked to. Of several, the first that is asked names the next step, at whose end
    all have heard of it: none ends a step in which it has not taken part.

    Args:
        run: its name, the same in all.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return asked
    store = dist.PrefixStore("clha_fast/stop", dist.distributed_c10d._get_default_store())
    if asked and not store.check([run]):
        store.compare_set(run, "", str(step + 1))
    return bool(store.check([run])) and step >= int(store.get(run))


ALONE = Processes()
_joined = ALONE


def join() -> Processes:
    """This process among those that a launcher has started; `ALONE` where it has started one, or there is none.

    Read from RANK, WORLD_SIZE and LOCAL_RANK. Waits until all have joined. They speak over gloo, whatever the devices.

    Raises:
        ValueError: the others do not come; MASTER_ADDR or MASTER_PORT, which launchers set too, is missing.
    """
    global _joined
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and "RANK" in os.environ and _joined is ALONE:
        import torch.distributed as dist

        rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
        if dist.is_initialized():
            _joined = Processes(rank, world, local, dist.new_group(backend="gloo", timeout=_PATIENCE))
        else:
            try:
                store, *_ = next(dist.rendezvous("env://"))  # waits for all, half an hour at most
                meeting = dist.PrefixStore("clha_fast/group", store)
                dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=_PATIENCE)
            except RuntimeError as error:
                place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise ValueError(
                    f"processes: expected WORLD_SIZE={world} of them to meet at {place}, got {error}; start all with "
                    "torchrun or accelerate launch, or unset WORLD_SIZE to run in one"
                ) from error
            atexit.register(_leave)
            _joined = Processes(rank, world, local, None, dist.PrefixStore("clha_fast/said", store))
    return _joined


def _leave() -> None:
    """Ends the group before the interpreter does: gloo's thread still drops tensors, and would abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def joined() -> Processes:
    """What `join` has found, `ALONE` before."""
    return _joined
