"""Memory in bytes, of the process or of its tensors on a GPU, and the predicted memory of a training.

On the CPU the memory of a training is that of the whole process. On a GPU it is that of the tensors there, as torch's
allocator counts them; CUDA's context comes on top.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from turret import process
from turret.bases.device import gigabytes, gpu_memory

_CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the peak to the current resident size


CPU = torch.device("cpu")


def resident(device: torch.device = CPU) -> int:
    """Bytes of this process in physical memory now, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return int(psutil.Process().memory_info().rss)


def reset_peak(device: torch.device = CPU) -> None:
    """Reset the peak on Linux or of a GPU. Elsewhere it stays the peak since the process started."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def peak(device: torch.device = CPU) -> int:
    """Most bytes of this process in physical memory, or of its tensors on a GPU, since `reset_peak`.

    Metal tells no peak: there it is what the driver has given to this process now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows, which has no /proc either
        return int(psutil.Process().memory_info().peak_wset)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


@dataclass
class Grown:
    """Bytes by which the process grew at its peak; 0 if the system cannot tell."""

    bytes: int = 0


@contextmanager
def grown(device: torch.device = CPU) -> Iterator[Grown]:
    """Measure the growth of `resident` within the block. The result is complete when the block ends."""
    process.release()
    result, before = Grown(), resident(device)
    reset_peak(device)
    was_reset = peak(device) < before + (16 << 20)  # else the peak is an earlier one
    yield result
    if was_reset:
        result.bytes = max(0, peak(device) - before)


def available(device: torch.device) -> int:
    """Free bytes of a GPU, or of the machine within its container's limit."""
    return gpu_memory(device)[0] if device.type == "cuda" else process.free_memory()


@dataclass(frozen=True)
class Prediction:
    """Bytes that a training will need, by component; `total` is the predicted peak of the process, or on a GPU."""

    weights: int  # of the frozen base
    trainable: int  # adapter, prefix MLP, head, or the copy of full fine-tuning
    gradients: int
    optimiser: int  # two moments
    activations: int  # peak of the passes: saved for backward, temporaries, holes in the heap
    runtime: int  # Python and its libraries; on a GPU CUDA's context, if nothing was measured there
    prepared: int = 0  # examples and libraries that were loaded after the base, checkpoint and curve

    @property
    def above_base(self) -> int:
        """Bytes that the training needs besides the loaded base."""
        return self.trainable + self.gradients + self.optimiser + self.activations + self.prepared

    @property
    def total(self) -> int:
        return self.weights + self.above_base + self.runtime

    def to_json(self) -> dict[str, int]:
        own = {name: int(getattr(self, name)) for name in self.__dataclass_fields__}
        return {**own, "above_base": self.above_base, "total": self.total}

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes.items() if size or name != "prepared")
        return f"{gigabytes(self.total)} ({parts})"


def trainable_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """float32 bytes of all trained weights. Gradients take as much, the two moments twice as much."""
    return 4 * sum(parameter.numel() for parameter in parameters.values())


class SavedForBackward:
    """Counts the bytes that a forward pass saves for its backward pass: each storage once, without parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {_address(each.untyped_storage()) for each in (*model.parameters(), *model.buffers())}
        self._saved: dict[int, torch.UntypedStorage] = {}  # by address; kept alive, so that no address is used twice
        self.bytes = 0
        self.largest = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = _address(storage)
        if address not in self._known and address not in self._saved:
            self._saved[address] = storage
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor.detach()  # the tensor itself would make a cycle with its graph, which keeps the model alive

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the passes in this block save."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self._saved.clear()


def _address(storage: torch.UntypedStorage) -> int:
    """A number that identifies a storage: the address of its bytes, or its own on the meta device, without bytes."""
    return storage.data_ptr() or storage._cdata
