"""Whether a GPU computes by the programs of this package: everything that they need, and a check against torch."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from turret.ops import formulas as reference
from turret.ops.gpu.operations import NAMES

# --- check ------------------------------------------------------------------------------------------------------------
# Compares every program of a GPU with its reference in torch, on small random tensors.


ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}  # of the largest number
Argument = Tensor | list[Tensor] | list[int] | float | None
N, R, D_IN, D_OUT, HEADS, KV_HEADS, DIM = 37, 8, 96, 160, 4, 2, 32  # no multiples of a program's block
SEED, SCALING, THRESHOLD = -1234, 0.5, 1 << 14  # of dropout, p = 0.25


class Case:
    """Arguments of every operation: the same numbers for every device."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator().manual_seed(0)

    def arguments(self, name: str) -> list[Argument]:
        """What the operation is called with."""
        made: list[Argument] = getattr(self, f"_{name}")()
        return made

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self._device, dtype or self._dtype)

    def _factors(self, shape: tuple[int, ...]) -> list[Tensor]:
        return [self._random(*shape, dtype=torch.float32) for _ in range(2)]

    def _whole(self, *numbers: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(numbers, dtype=dtype, device=self._device)

    def _rms_norm(self) -> list[Argument]:
        return [self._random(N, D_IN), self._random(D_IN), 1e-5]

    def _rms_norm_backward(self) -> list[Argument]:
        return [*self._rms_norm(), self._random(N, D_IN), self._random(N, D_IN)]

    def _rotate(self) -> list[Argument]:
        heads = [self._random(N, count, DIM) for count in (HEADS, KV_HEADS)]
        return [*heads, self._random(N, DIM), self._random(N, DIM), -1.0]

    def _swiglu(self) -> list[Argument]:
        return [self._random(N, D_OUT), self._random(N, D_OUT)]

    def _swiglu_backward(self) -> list[Argument]:
        return [*self._swiglu(), self._random(N, D_OUT)]

    def _outputs(self) -> list[Tensor]:
        return [self._random(N, D_OUT), self._random(N, D_OUT)]

    def _keys(self) -> Tensor:
        return torch.randint(-(1 << 62), 1 << 62, (N,), generator=self._generator).to(self._device)

    def _add_lora(self) -> list[Argument]:
        A, B = self._factors((R, D_IN)), self._factors((D_OUT, R))
        plus = self._random(N, D_OUT)
        return [self._outputs(), self._random(N, D_IN), A, B, plus, SCALING, self._keys(), SEED, THRESHOLD]

    def _lora_input_gradient(self) -> list[Argument]:
        A, B = self._factors((R, D_IN)), self._factors((D_OUT, R))
        return [self._random(N, D_IN), self._outputs(), A, B, SCALING, self._keys(), SEED, THRESHOLD]

    def _lora_factor_gradients(self) -> list[Argument]:
        A, B = self._factors((R, D_IN)), self._factors((D_OUT, R))
        inner = self._random(N, 2 * R), self._random(N, 2 * R)
        return [A, B, self._random(N, D_IN), *inner, self._outputs(), SCALING, self._keys(), SEED, THRESHOLD]

    def _add_mixed_lora(self) -> list[Argument]:
        flats, places = [], []
        for rank in (R, 2 * R):  # of two layers; the second adapter leaves the first layer out
            flats.append(self._random(rank * 2 * (D_IN + D_OUT)))
            starts = [0, rank * D_IN, rank * (D_IN + D_OUT), rank * (2 * D_IN + D_OUT)]
            places += starts if rank == R else [-1, -1, *starts[:2]]
        place = self._whole(*places).view(2, 2, 2)
        bases = self._whole(*(each.data_ptr() for each in flats))[:, None, None]
        addresses = (bases + place * self._dtype.itemsize).masked_fill(place < 0, 0)
        adapters = self._whole(*(number % 3 - 1 for number in range(N)))
        ranks = self._whole(R, 2 * R)
        numbers = [adapters, place, addresses, ranks]
        return [self._outputs(), self._random(N, D_IN), flats, *numbers, [0, 1], 2 * R, self._random(N, D_OUT)]

    def _attention(self) -> list[Argument]:
        """Two rows with 3 keys more than queries, and a window."""
        q, k, v = self._random(N, HEADS, DIM), self._random(N + 6, KV_HEADS, DIM), self._random(N + 6, KV_HEADS, DIM)
        starts = self._whole(0, 20, N, dtype=torch.int32), self._whole(0, 23, N + 6, dtype=torch.int32)
        return [q, k, v, *starts, 20, 23, True, 9, DIM**-0.5]

    def _attention_backward(self) -> list[Argument]:
        q, k, v, *others = self._attention()
        run = torch.ops.turret.attention  # its own result, as a pass would save it
        return [self._random(N, HEADS, DIM), q, k, v, *run(q, k, v, *others), *others]

    def _attend_step(self) -> list[Argument]:
        own = [self._random(3, count, DIM) for count in (HEADS, KV_HEADS, KV_HEADS)]
        cached = [self._random(3, KV_HEADS, 80, DIM) for _ in range(2)]
        lengths = self._whole(1, 70, 80), self._whole(0, 5, 0)
        return [*own, self._random(3, DIM), self._random(3, DIM), *cached, *lengths, 40, DIM**-0.5]


def largest_difference(name: str, program: Callable[..., object], device: torch.device, dtype: torch.dtype) -> float:
    """How far the program's results, and what it changes in place, are from the reference, over the largest number."""
    cpu = torch.device("cpu")
    expected, found = Case(cpu, dtype).arguments(name), Case(device, dtype).arguments(name)
    results = getattr(reference, name)(*expected), program(*found)
    worst = 0.0
    skipped = {"add_mixed_lora": 5}.get(name)  # addresses
    pairs = zip(_tensors([results[0], *expected], skipped), _tensors([results[1], *found], skipped), strict=True)
    for one, other in pairs:
        one, other = one.double(), other.to(cpu).double()
        if not bool(torch.isfinite(other).all()):
            return float("inf")
        worst = max(worst, float((one - other).abs().max()) / max(float(one.abs().max()), 1e-6))
    return worst


def _tensors(values: Sequence[object], without: int | None) -> list[Tensor]:
    found: list[Tensor] = []
    for place, each in enumerate(values):
        if place - 1 == without:
            continue
        found += [one for one in (each if isinstance(each, (list, tuple)) else [each]) if isinstance(one, Tensor)]
    return found


def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """The first operation that differs from its reference on this device, and by how much; None if all agree."""
    for name in NAMES:
        difference = largest_difference(name, getattr(torch.ops.turret, name), device, dtype)
        if difference > ALLOWED[dtype]:
            return f"{name} differs from torch by {difference:.1e} of its largest number, {ALLOWED[dtype]:.0e} allowed"
    return None


# --- available --------------------------------------------------------------------------------------------------------


log = logging.getLogger("turret")
OLDEST = (8, 0)  # compute capability of the first GPUs with FlashAttention 2: Ampere
DTYPES = (torch.bfloat16, torch.float16)  # FlashAttention takes no others


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this GPU computes by the base's modules; None if it computes by the programs.

    The first call for a GPU and a dtype compiles every program and compares it with torch, which takes some seconds.
    """
    if device.type != "cuda":
        return f"{device} is no GPU of NVIDIA or AMD"
    if dtype not in DTYPES:
        return f"the programs take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention for rows of different lengths"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
        return "the GPU is older than Ampere"
    try:
        found = fault(device, dtype)
    except Exception as error:  # a compiler, a driver, a build of torch: whatever they raise, the modules still compute
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
    if found is not None:
        log.warning("the fast paths of %s are off: %s", device, found)
    return found


def usable(*tensors: Tensor) -> bool:
    """Whether the operations take these tensors: on a GPU, of one dtype, with programs that passed the check."""
    first = tensors[0]
    if first.is_cpu or any(each.dtype != first.dtype for each in tensors):
        return False
    if first.is_meta:
        return _planned.get() and first.dtype in DTYPES
    return first.device.type == "cuda" and why_not(first.device, first.dtype) is None


_planned: ContextVar[bool] = ContextVar("planned", default=False)


@contextmanager
def planned(programs: bool) -> Iterator[None]:
    """Let passes on the meta device take the paths of a GPU for the length of the block.

    programs: whether the GPU computes by the programs.
    """
    token = _planned.set(programs)
    try:
        yield
    finally:
        _planned.reset(token)
