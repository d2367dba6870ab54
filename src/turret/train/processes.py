"""What a process is among those that train together: its rank, its share of a batch, what it tells and hears.

Several processes are started from outside, by torchrun, and found in the environment; that they are all there is
counted, not believed. One process is `ALONE`: it starts nothing and pays nothing. Knows torch.distributed, refuses to
know what is trained. Every method that talks must be called by all processes, in the same order.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turret.errors import TrainingError
from turret.train.batches import Item

STEP = timedelta(minutes=30)  # longest time that a process is waited for within a step
MAIN = timedelta(days=1)  # ... and the main one while it plans, evaluates and proves; one that dies is noticed at once
GRACE = 10.0  # seconds to say why one ends, before SIGTERM ends it; torchrun kills after 30
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "torchrun --nproc-per-node 2 -m turret train ..."
TOLD = "turret/told"
PATIENCE = timedelta(seconds=5)  # a process that failed waits so long for the main one to say why

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process, and the way to the others. Rank 0 is the main one, which alone writes and speaks."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # its own GPU; None: wherever the base is
    talk: Any = None  # a gloo group, for all that is not a gradient
    board: Any = None  # a store that outlives every process

    @property
    def main(self) -> bool:
        return self.rank == 0

    def seed(self, seed: int) -> int:
        """This process's own seed; the main one's is the run's."""
        return (seed + self.rank * 0x9E3779B97F4A7C15) % (1 << 63)

    def share(self, batch: Sequence[Item]) -> Sequence[Item]:
        """What this process takes of a batch: every size-th of the items in order of length, so that all take as long.
        A short batch may leave nothing."""
        if self.size == 1:
            return batch
        return sorted(batch, key=lambda item: item.tokens)[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        """Put the sum over all processes into each of these tensors, with the same bits everywhere."""
        if self.size > 1:
            with self._connected():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is up in any process."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        with self._connected():
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.talk)
        return tuple(bool(each) for each in raised)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(values, value, group=self.talk)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What the main process makes; the others wait for it."""
        made = [make() if self.main else None]
        if self.size > 1:
            with self._connected():
                dist.broadcast_object_list(made, src=0, group=self.talk)
        return made[0]  # type: ignore[return-value]

    def main_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, after the main one has: it fills the caches."""
        if self.main:
            made = make()
            self.from_main(lambda: None)
            return made
        self.from_main(lambda: None)
        return make()

    def take_from_main(self, tensor: Tensor) -> Tensor:
        """This tensor, overwritten by the main process's."""
        if self.size > 1:
            with self._connected():
                dist.broadcast(tensor, src=0)
        return tensor

    def require_same(self, **values: object) -> None:
        """Raise where a process has other values than the main one."""
        expected, *gathered = self.gather(values)
        for rank, others in enumerate(gathered, start=1):
            for name, own in expected.items():
                given, wanted = str(others[name]), str(own)
                if given != wanted:
                    alike = next((i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), 0)
                    near = max(0, alike - 12)
                    raise TrainingError(
                        f"{name} of process {rank} of {self.size} is not that of process 0 ({_short(given[near:])}, "
                        f"expected {_short(wanted[near:])}): give all processes the same recipe, files and versions"
                    )

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"process {self.rank} of {self.size} lost the others: one of them ended or hangs "
                f"({_short(error, 120)}); start the same command again to go on"
            ) from error


ALONE = Processes()


def begin() -> Processes:
    """The processes that torchrun's environment promises, once they have all been counted; the first call connects."""
    promised = os.environ.get("WORLD_SIZE", "1")
    if not promised.isdigit() or int(promised) < 1:
        raise TrainingError(f"WORLD_SIZE is {promised!r}, expected a number of processes: start them with `{LAUNCH}`")
    started = dist.is_available() and dist.is_initialized()
    if int(promised) == 1 and not (started and dist.get_world_size() > 1):
        return ALONE
    return _connected_to(int(promised))


@cache
def _connected_to(promised: int) -> Processes:
    """Join the group, or take the one that the program has joined, and count who is there."""
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE promises {promised} processes, but {', '.join(missing)} is not set: start them with "
            f"`{LAUNCH}`, or unset WORLD_SIZE for one process"
        )
    device, board = _own_device(int(os.environ["LOCAL_RANK"])), None
    if not dist.is_initialized():
        from torch.distributed.rendezvous import rendezvous  # not there where torch was built without it

        try:
            board, rank, size = next(rendezvous("env://", timeout=STEP))
            backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=board, rank=rank, world_size=size, timeout=STEP)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the {promised} processes did not find each other ({_short(error, 160)}): start them all with one "
                f"`{LAUNCH}`"
            ) from error
        atexit.register(dist.destroy_process_group)
    talk = dist.new_group(backend="gloo", timeout=MAIN)
    here = Processes(dist.get_rank(), dist.get_world_size(), device, talk, board)
    ones = torch.ones((), device=device)
    here.sum(ones)  # on the way that the gradients will take
    present = int(ones)
    if not promised == here.size == present:
        raise TrainingError(
            f"WORLD_SIZE promises {promised} processes, the group has {here.size} and {present} answered: start them "
            f"all with one `{LAUNCH}`"
        )
    free = signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)  # no program's own
    if threading.current_thread() is threading.main_thread() and free:
        signal.signal(signal.SIGTERM, _end_soon)
    return here


def _end_soon(number: int, frame: FrameType | None) -> None:
    """torchrun sends SIGTERM to all that are left once one has ended: leave those time to say that they lost it."""
    timer = threading.Timer(GRACE, os._exit, [128 + number])
    timer.daemon = True
    timer.start()


def _own_device(local_rank: int) -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start "
            "one process a GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def tells() -> bool:
    """Of several processes that fail, whether this one says why: the main one, or the first where that fails later."""
    if not _connected_to.cache_info().currsize:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before they know each other: once a machine
    here = begin()
    if here.board is None:
        return here.main
    try:
        if not here.main:
            here.board.wait([TOLD], PATIENCE)
            time.sleep(0.3)  # torchrun ends all of them once one has ended: let that one finish its sentence
            return False
    except RuntimeError:
        pass  # nobody has said anything
    try:
        return bool(here.board.compare_set(TOLD, "", str(here.rank)) == str(here.rank).encode())
    except RuntimeError:  # the one that kept the board is gone
        return here.main


def _short(value: object, most: int = 40) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."
