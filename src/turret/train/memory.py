"""What the process and the machine hold, in bytes, and what a training step will need. Knows /proc, psutil and sizes.

Refuses to know recipes and data: `plan` hands it numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from turret import heap

_PEAK_IS_MINE = Path("/proc/self/clear_refs")  # writing 5 here sets the peak back to what is resident now


def resident() -> int:
    """Bytes of this process in physical memory now."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> None:
    """Start measuring the peak anew where the system can (Linux); elsewhere it stays the peak since the start."""
    try:
        _PEAK_IS_MINE.write_text("5")
    except OSError:
        return


def peak() -> int:
    """Most bytes of this process in physical memory since `reset_peak`."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows, which has no /proc either
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


@dataclass
class Grown:
    """How many bytes a passage took at its peak; 0 where the system does not tell."""

    bytes: int = 0


@contextmanager
def grown() -> Iterator[Grown]:
    """Measure by how much the process grows within the block, from what it needs at its beginning."""
    heap.give_back()
    found, before = Grown(), resident()
    reset_peak()
    told = peak() < before + (16 << 20)  # a peak that cannot be set back is that of some earlier passage
    yield found
    if told:
        found.bytes = max(0, peak() - before)


def available(device: torch.device) -> int:
    """Bytes that training may still take: free on the card, or the machine's under a container's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    limit = _container_room()
    return free if limit is None else min(free, limit)


def _container_room() -> int | None:
    """Bytes left under the control group's limit, None where there is none."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            most = Path(limit).read_text(encoding="ascii").strip()
            if most.isdigit() and int(most) < 1 << 60:
                return max(0, int(most) - int(Path(used).read_text(encoding="ascii")))
        except OSError:
            continue
    return None


@dataclass(frozen=True)
class Prediction:
    """Bytes a training will take, by component; `total` is the peak of the process that the base brings it to."""

    weights: int  # the frozen base
    trainable: int  # adapter, prefix MLP, head, or the copy of a full fine-tuning
    gradients: int
    optimiser: int  # two moments
    activations: int  # what passes take at their peak: kept for backward, temporaries, holes in the heap
    runtime: int  # the program itself
    rounded: int = 0  # the frozen matrices in 8 bits, with train.int8 and a small base
    prepared: int = 0  # what examples and libraries took since the base was loaded, and what is done between steps

    @property
    def above_base(self) -> int:
        return self.trainable + self.gradients + self.optimiser + self.activations + self.rounded + self.prepared

    @property
    def total(self) -> int:
        return self.weights + self.above_base + self.runtime

    def to_json(self) -> dict[str, int]:
        own = {name: int(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**own, "above_base": self.above_base, "total": self.total}

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = ", ".join(
            f"{name} {mega(size)}" for name, size in sizes.items() if size or name not in ("rounded", "prepared")
        )
        return f"{mega(self.total)} ({parts})"


def mega(size: float) -> str:
    """Bytes for reading: `87 MB`, `1.2 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def trainable_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """float32 bytes of all trained weights; the gradients take as much, the two moments twice as much."""
    return 4 * sum(parameter.numel() for parameter in parameters.values())


class SavedForBackward:
    """Counts the bytes a forward pass keeps for its backward pass, each storage once, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
        self._kept: dict[int, Any] = {}  # address -> storage: held, so that no address is used twice
        self.bytes = 0
        self.largest = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._known and address not in self._kept:
            self._kept[address] = storage
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor.detach()  # itself would keep the graph that it is kept for, and that the model, for good

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self._kept.clear()
