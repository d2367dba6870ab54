"""Data-parallel training in several processes: ranks, shares of a batch, sums, and values from the main process.

torchrun starts the processes, and the environment describes them. A sum over all of them checks that they are there.
A single process is `ALONE`, which communicates nothing. All processes must call the methods that communicate, in the
same order.
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
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from turret.errors import TrainingError, one_line
from turret.train.batches import EncodedRow

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store  # torch.distributed exports it, but not to type checkers
    from torch.distributed.device_mesh import DeviceMesh

STEP = timedelta(minutes=30)  # longest wait for another process within a step
MAIN = timedelta(
    days=1
)  # longest wait for the main process while it plans, evaluates and proves; a death shows at once
GRACE = 10.0  # seconds between SIGTERM and the end, to report an error; torchrun kills after 30
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCH = "torchrun --nproc-per-node 2 -m turret train ..."
REPORTED = "turret/told"  # the store's key of the rank that reports the error
BACKENDS = ("gloo", "NCCL")  # in the errors of communication
PATIENCE = timedelta(seconds=5)  # how long a process that failed waits for the main one to report

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process and its connection to the others. Rank 0 is the main process: it alone writes files and output."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None  # its own GPU; None: the base's device
    group: dist.ProcessGroup | None = None  # gloo, for everything but gradients
    store: Store | None = None  # in torchrun, which outlives every process

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, batch: Sequence[EncodedRow]) -> Sequence[EncodedRow]:
        """This process's items of a batch: every size-th in order of length, so that all take equally long.

        A small batch may leave it none.
        """
        return self.shares(batch)[self.rank]

    def shares(self, batch: Sequence[EncodedRow]) -> list[Sequence[EncodedRow]]:
        """The items of every process, by rank."""
        if self.size == 1:
            return [batch]
        ordered = sorted(batch, key=lambda item: item.tokens)
        return [ordered[rank :: self.size] for rank in range(self.size)]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, bit-equal in all of them."""
        if self.size > 1:
            with self._explain_lost():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set in any process."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        with self._explain_lost():
            dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(each) for each in raised)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with self._explain_lost():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """The main process's result of `make`, in all processes. The others wait for it."""
        results: list[tuple[T, ...]] = [(make(),) if self.main else ()]
        if self.size > 1:
            with self._explain_lost():
                dist.broadcast_object_list(results, src=0, group=self.group)
        (result,) = results[0]
        return result

    def main_first(self, make: Callable[[], T]) -> T:
        """This process's own result of `make`. The main process goes first and fills the caches for the others."""
        if self.main:
            result = make()
            self.from_main(lambda: None)
            return result
        self.from_main(lambda: None)
        return make()

    def take_from_main(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the main process's."""
        if self.size > 1:
            with self._explain_lost():
                dist.broadcast(tensor, src=0)
        return tensor

    def require_same(self, **values: str | int) -> None:
        """Raise TrainingError if a process has other values than the main one."""
        expected, *gathered = self.gather(values)
        for rank, others in enumerate(gathered, start=1):
            for name, own in expected.items():
                given, wanted = str(others[name]), str(own)
                if given != wanted:
                    alike = next((i for i, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b), 0)
                    near = slice(max(0, alike - 12), max(0, alike - 12) + 40)
                    raise TrainingError(
                        f"{name} of process {rank} of {self.size} differs from process 0 ({one_line(given[near])}, "
                        f"expected {one_line(wanted[near])}): give all processes the same recipe, files and versions"
                    )

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Report errors of communication inside passes, such as those of a base in parts, in one line."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and (isinstance(error, dist.DistError) or any(each in str(error) for each in BACKENDS)):
                raise self._lost_error(error) from error
            raise

    @contextmanager
    def _explain_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise self._lost_error(error) from error

    def _lost_error(self, error: RuntimeError) -> TrainingError:
        return TrainingError(
            f"process {self.rank} of {self.size} lost the others: one of them ended or hangs "
            f"({one_line(str(error), 120)}); start the same command again to resume"
        )


ALONE = Processes()


def begin() -> Processes:
    """The processes that torchrun's environment describes. The first call connects them and checks that all are there.

    Raises:
        TrainingError: the environment is incomplete, or processes are missing.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdigit() or int(world_size) < 1:
        raise TrainingError(f"WORLD_SIZE is {world_size!r}, expected a number of processes: start them with `{LAUNCH}`")
    started = dist.is_available() and dist.is_initialized()
    if int(world_size) == 1 and not (started and dist.get_world_size() > 1):
        return ALONE
    return _connected_to(int(world_size))


@cache
def _connected_to(world_size: int) -> Processes:
    """Join the process group, or use the one that the program has joined, and count its members."""
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise TrainingError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start the processes with "
            f"`{LAUNCH}`, or unset WORLD_SIZE for one process"
        )
    device, store = _own_device(int(os.environ["LOCAL_RANK"])), None
    if not dist.is_initialized():
        from torch.distributed.rendezvous import rendezvous  # missing in builds of torch without distributed

        try:
            store, rank, size = next(rendezvous("env://", timeout=STEP))
            backend = "gloo" if device is None else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the {world_size} processes did not find each other ({one_line(str(error), 160)}): start them all "
                f"with one `{LAUNCH}`"
            ) from error
        atexit.register(dist.destroy_process_group)
    group = dist.new_group(backend="gloo", timeout=MAIN)
    here = Processes(dist.get_rank(), dist.get_world_size(), device, group, store)
    ones = torch.ones((), device=device)
    here.sum(ones)  # by the backend that will sum the gradients
    present = int(ones)
    if not world_size == here.size == present:
        raise TrainingError(
            f"WORLD_SIZE is {world_size}, the group has {here.size} processes and {present} answered: start them all "
            f"with one `{LAUNCH}`"
        )
    unset = signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.default_int_handler)
    if threading.current_thread() is threading.main_thread() and unset:
        signal.signal(signal.SIGTERM, _end_soon)
    return here


@cache
def mesh() -> DeviceMesh:
    """All processes in one dimension, for a base in parts. All must call it at the same time."""
    from torch.distributed.device_mesh import init_device_mesh  # missing in builds of torch without distributed

    here = begin()
    return init_device_mesh("cpu" if here.device is None else "cuda", (here.size,))


def _end_soon(number: int, frame: FrameType | None) -> None:
    """torchrun sends SIGTERM to the other processes once one has ended: give them time to report that they lost it."""
    timer = threading.Timer(GRACE, os._exit, [128 + number])
    timer.daemon = True
    timer.start()


def _own_device(local_rank: int) -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start "
            "one process per GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def reports_error() -> bool:
    """Whether this process reports the error of a run that failed in several: the main one, or the first to fail."""
    if not _connected_to.cache_info().currsize:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # not connected yet: one process per machine
    here = begin()
    if here.store is None:
        return here.main
    try:
        if not here.main:
            here.store.wait([REPORTED], PATIENCE)
            time.sleep(0.3)  # torchrun ends all processes once one has ended: let the other one finish its report
            return False
    except RuntimeError:
        pass  # no process has reported yet
    try:
        return bool(here.store.compare_set(REPORTED, "", str(here.rank)) == str(here.rank).encode())
    except RuntimeError:  # the process that holds the store is gone
        return here.main
