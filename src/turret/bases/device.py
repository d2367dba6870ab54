"""Choose the device on which a base computes. Every verb makes this one decision; all else asks the loaded model.

`auto` takes the GPU with the most free memory if what is needed fits there, else the CPU. It never takes `mps`,
because nothing has been run there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from turret.arguments import DEVICES, is_device
from turret.bases.numerics import native_bfloat16
from turret.errors import DeviceError, one_line, shown

CPU, MPS = torch.device("cpu"), torch.device("mps")
Needed = Callable[[torch.device], int]  # the bytes that are needed on a device, whose precision may differ


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use, by the name `cuda:N` (NVIDIA's, or AMD's with torch for ROCm)."""

    device: torch.device
    name: str
    free: int  # bytes, those that torch keeps for this process included
    total: int

    def __str__(self) -> str:
        return f"{self.device} ({self.name}, {gigabytes(self.free)} of {gigabytes(self.total)} free)"


@dataclass(frozen=True)
class Machine:
    """The devices of a machine besides its CPU."""

    gpus: tuple[Gpu, ...] = ()
    missing: str = "this machine has no GPU"  # why there is no GPU
    mps: bool = False  # whether torch computes on Apple's GPU


@dataclass(frozen=True)
class ChosenDevice:
    """A device, and why it was chosen."""

    device: torch.device
    reason: str
    decided: bool = True  # whether there was anything to decide; False: the only device of this machine

    def __str__(self) -> str:
        return f"{self.device}: {self.reason}"

    @property
    def notes(self) -> tuple[str, ...]:
        """One note for the user; none if the machine has no other device."""
        return (f"computes on {self}",) if self.decided else ()


def choose_device(name: str = "auto", needed: Needed | None = None, machine: Machine | None = None) -> ChosenDevice:
    """The device that a name means here.

    Args:
        name: auto, cpu, cuda (the first GPU), cuda:N or mps.
        needed: the bytes that must be free; None: any GPU will do. It is called only if there is a GPU.
        machine: the devices to choose from; None: those of this machine.

    Raises:
        DeviceError: the name is not known, or the device is not there.
    """
    if not is_device(name):
        raise DeviceError(f"device {shown(name)} is not known: expected {DEVICES}")
    if name == "cpu":
        return ChosenDevice(CPU, "as asked for", decided=False)
    machine = this_machine() if machine is None else machine
    if name == "mps":
        if not machine.mps:
            raise DeviceError(f"device mps is not there: {_no_mps()}; give --device cpu")
        return ChosenDevice(MPS, "as asked for, in float32")
    if name != "auto":
        gpu = _gpu(name, machine)
        return ChosenDevice(gpu.device, f"as asked for, {gpu}")
    if not machine.gpus:
        apple = "; auto does not take mps, where nothing was run: ask for --device mps" if machine.mps else ""
        return ChosenDevice(CPU, machine.missing + apple, decided=machine.mps)
    gpu = max(machine.gpus, key=lambda each: each.free)
    wanted = 0 if needed is None else needed(gpu.device)
    if wanted > gpu.free:
        return ChosenDevice(
            CPU, f"about {gigabytes(wanted)} are needed, and the GPU with the most free memory is {gpu}"
        )
    return ChosenDevice(gpu.device, f"{gpu}" + (f", about {gigabytes(wanted)} are needed" if wanted else ""))


def this_machine() -> Machine:
    """The GPUs that torch can use now.

    Where NVIDIA's library of the driver can be asked (`pynvml`, of `turret[gpu]`), no GPU is touched. Else asking for
    free memory starts CUDA in this process on every one, which takes some hundred MB of each.
    """
    mps = torch.backends.mps.is_available()
    if not torch.cuda.is_available():
        return Machine(missing=_no_cuda(), mps=mps)
    return Machine(tuple(_described(number) for number in range(torch.cuda.device_count())), mps=mps)


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision of `dtype = "auto"`: bfloat16 where the device computes it natively.

    A GPU that only emulates bfloat16 gets float16, with loss scaling in training. Everything else gets float32.
    """
    if device.type == "mps":
        return torch.float32
    if native_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed everything submitted to it. A GPU computes while Python continues."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Free and all bytes of a GPU. What torch keeps for this process and does not use counts as free."""
    free, total = _told_by_the_driver(device) or torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), int(total)


def _told_by_the_driver(device: torch.device) -> tuple[int, int] | None:
    """Free and all bytes of a GPU without starting CUDA on it; None if that is not possible, such as on AMD's."""
    if torch.version.cuda is None or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError:  # such as of a part of a GPU
        return None
    return int(memory.free), int(memory.total)


def gigabytes(size: float) -> str:
    """Bytes as text: `87 MB`, `11.5 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _described(number: int) -> Gpu:
    device = torch.device("cuda", number)
    try:
        free, total = gpu_memory(device)
    except RuntimeError as error:
        raise DeviceError(
            f"{device} cannot be used: {one_line(str(error), 120)}; give --device cpu, or end the programs that use it"
        ) from error
    return Gpu(device, torch.cuda.get_device_name(device), free, total)


def _gpu(name: str, machine: Machine) -> Gpu:
    if not machine.gpus:
        raise DeviceError(f"device {name} is not there: {machine.missing}; give --device cpu")
    number = int(name.partition(":")[2] or 0)
    if number >= len(machine.gpus):
        there = " and ".join(f"{gpu.device} ({gpu.name})" for gpu in machine.gpus)
        raise DeviceError(f"device {name} is not there: this machine has {there}; give one of them, or auto")
    return machine.gpus[number]


def _no_cuda() -> str:
    """Why torch finds no GPU."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError) as error:  # such as a missing or too old driver
        first = str(error).partition(". ")[0]
        return f"torch is built for CUDA and finds no GPU ({one_line(first, 120)})"
    return "torch is built for CUDA and finds no GPU"


def _no_mps() -> str:
    built = torch.backends.mps.is_built()
    return "this machine has no Apple GPU that torch can use" if built else "this torch is built without Metal"
