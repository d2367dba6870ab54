"""Choose the device on which a base computes. Every verb makes this one decision; all else asks the loaded model.

`auto` takes the GPU with the most free memory if what is needed fits there, else the CPU. It never takes `mps`,
because nothing has been run there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from turret.arguments import DEVICES, is_device
from turret.errors import DeviceError, one_line, quote

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
        raise DeviceError(f"device {quote(name)} is not known: expected {DEVICES}")
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
    return Machine(tuple(_describe_gpu(number) for number in range(torch.cuda.device_count())), mps=mps)


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


def _describe_gpu(number: int) -> Gpu:
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


# --- numerics ---------------------------------------------------------------------------------------------------------
# Whether a device computes bfloat16 natively, and which library multiplies float32 fastest without rounding.


TRUE_FLOAT32 = 2e-6  # relative error against float64; a product of factors rounded to bfloat16 has 2e-3
QUICKER = 1.3  # the speedup from which oneDNN is used: far from 1.0 (Zen 4) and 2.0 (Zen 5), so noise does not decide
_ONEDNN: Any = torch.backends.mkldnn  # torch has no types for it
SHAPES = ((16, 384, 384), (37, 384, 30), (130, 96, 70), (224, 1536, 384), (512, 64, 2048))  # T, D_in, D_out


@cache
def native_bfloat16(device: torch.device = CPU) -> bool:
    """Whether a device computes bfloat16 natively. Emulation is several times slower than float32."""
    if device.type == "cuda":  # NVIDIA's GPUs since Ampere, which has compute capability 8.0; all that ROCm supports
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16"))


@dataclass(frozen=True)
class Float32Products:
    """A measurement of oneDNN's float32 products on this processor."""

    error: float  # largest relative error of oneDNN against float64; NaN if this torch has no oneDNN
    faster: float | None  # speedup of oneDNN over the default; None if it was not measured

    @property
    def take_onednn(self) -> bool:
        """Whether oneDNN does not round and is clearly faster."""
        return self.faster is not None and self.faster >= QUICKER

    def __str__(self) -> str:
        if math.isnan(self.error):
            return "torch's default; this torch has no oneDNN"
        if self.error > TRUE_FLOAT32:
            return f"torch's default; oneDNN rounds here (error {self.error:.0e})"
        if not self.take_onednn:
            return "torch's default; oneDNN is no faster here"
        return f"oneDNN, {self.faster:.1f}x faster than torch's default (error {self.error:.0e})"


@cache
def float32_products() -> Float32Products:
    """Compare oneDNN's float32 products with torch's default. torch's settings do not change.

    torch computes float32 products by MKL, which is slow on some processors (Zen 5). `fp32_precision = "bf16"` selects
    oneDNN and allows it to round. On a processor for which oneDNN has no rounding kernel, it computes in full float32.
    So the error is measured first, and the speed only if there is no rounding.
    """
    if not _ONEDNN.is_available():
        return Float32Products(float("nan"), None)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        error = max(_errors())
        return Float32Products(error, _speed() if error <= TRUE_FLOAT32 else None)


def use_quick_float32() -> None:
    """Select oneDNN for the float32 products of this process if it does not round and is faster.

    This changes a setting of torch, unless the program has set it already.
    """
    if _ONEDNN.matmul.fp32_precision == "none" and float32_products().take_onednn:
        _ONEDNN.matmul.fp32_precision = "bf16"


@contextmanager
def _by_onednn() -> Iterator[None]:
    precision = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = precision


def _errors() -> Iterator[float]:
    """The relative errors of the products in a forward and a backward pass, and of batched products."""
    for tokens, d_in, d_out in SHAPES:
        x, weight = torch.randn(tokens, d_in), torch.randn(d_out, d_in)
        y = torch.randn(tokens, d_out)
        heads = torch.randn(4, tokens, 64)
        for left, right in ((x, weight.t()), (y, weight), (y.t(), x), (heads, heads.transpose(1, 2))):
            yield relative_error(left, right)


def relative_error(left: Tensor, right: Tensor) -> float:
    """|L R - exact| / |exact| in Frobenius norms, where oneDNN computes L R and exact is the float64 product."""
    exact = left.double() @ right.double()
    with _by_onednn():
        product = left @ right
    return float((product.double() - exact).norm() / exact.norm())


def _speed() -> float:
    """The speedup of oneDNN over the default, by the shortest times of products that run in turns."""
    x, weight = torch.randn(512, 384), torch.randn(1536, 384)

    def seconds() -> float:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        return time.perf_counter() - began

    default, onednn = [], []
    for _ in range(8):
        default.append(seconds())
        with _by_onednn():
            onednn.append(seconds())
    return min(default) / min(onednn)
