"""A pretend `cuda:0`: tensors that say they are on a GPU and obey its rules, while the CPU computes their numbers.

    with pretend_gpu() as GPU:
        to_gpu(model)                     in place, ties kept
        ...                                whatever runs on a GPU
    gpu.launches, gpu.syncs, GPU.copies

What a GPU refuses is refused: an operation that mixes tensors of both devices. What a GPU is slow at is counted:

- launches: every operation of ATen that computes something. A view or an allocation is none. One of torch's fused
  kernels (attention) and one program (`turret.ops.gpu.liger` and `.programs`) is one; a call that torch itself takes
  apart counts what is in it, so a matrix that is added to a product in a new tensor is two, and a list is several.
- syncs: a wait for a number (`.item()`, `.tolist()`, a copy to the CPU), for a size (`nonzero`, a mask as index), or
  for numbers on their way to the GPU from memory that is not pinned (`torch.tensor(list, device=...)`).
- copies to the GPU: all of them.
- allocations: new tensors on the GPU, and their bytes by operation.

Not pretended: streams, how a GPU rounds, and the programs themselves: torch's plain operations compute what they do, in
float32 too. `tests/ops/gpu` runs the programs by Triton's interpreter.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from types import TracebackType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from turret import quantized
from turret.ops import core
from turret.ops.core import REFERENCE, attention_by_rows, visible_keys
from turret.ops.gpu import ops as gpu_ops
from turret.ops.structs import AttentionRows, DropoutArguments, RMSNorm

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
MOVES = {"_to_copy", "copy_", "copy", "lift_fresh", "lift_fresh_copy"}  # may see both devices
TAKES_HOST_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
WITHOUT_LAUNCH = {
    *("alias", "as_strided", "chunk", "detach", "device", "diagonal", "empty", "empty_like", "empty_strided", "expand"),
    *("is_same_size", "lift_fresh", "new_empty", "new_empty_strided", "numel", "permute", "reshape", "resize_"),
    *("select", "set_", "slice", "split", "split_with_sizes", "squeeze", "sym_size", "t", "transpose", "unbind"),
    *("unfold", "unsqueeze", "view", "view_as", "_reshape_alias", "_unsafe_view", "_local_scalar_dense"),
}
SEES_HOW_MANY = {"nonzero", "masked_select", "unique", "_unique2", "unique_dim", "bincount", "equal"}
MAKES_ROOM = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
AT_ONCE = 64  # tensors that one launch of a `_foreach_` operation takes


class Counts:
    """What a run asked of the GPU, by name of the operation."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # to the GPU
        self.allocations: Counter[str] = Counter()  # new tensors
        self.allocated: Counter[str] = Counter()  # bytes of new tensors
        self.devices: set[tuple[str, str]] = set()  # that a thread has made its own
        self.silent = 0

    def clear(self) -> None:
        for each in (self.launches, self.syncs, self.copies, self.allocations, self.allocated):
            each.clear()

    def add(self, kind: Counter[str], name: str, count: int = 1) -> None:
        if not self.silent:
            kind[name] += count

    def allocates(self, name: str, tensor: Tensor) -> None:
        self.add(self.allocations, name)
        self.add(self.allocated, name, tensor.nbytes)

    def __enter__(self) -> None:
        self.silent += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.silent -= 1


COUNTS = Counts()


class OnCard(Tensor):
    """A tensor on the pretend GPU. Autograd sees its shape; `numbers` is the CPU's tensor with its values."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, requires_grad: bool = False) -> OnCard:
        shape = torch.empty_strided(numbers.size(), numbers.stride(), dtype=numbers.dtype, device="meta")
        made = Tensor._make_subclass(cls, shape, requires_grad, dispatch_device=True, device_for_backend_keys=GPU)
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def is_cuda(self) -> bool:
        return True

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.numbers = value.numbers if isinstance(value, OnCard) else value

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.numbers})"


def on_cpu(value: Any) -> Any:
    """The CPU's tensor behind one on the GPU; anything else as it is."""
    return value.numbers if isinstance(value, OnCard) else value


def _on_gpu(value: Any) -> Any:
    return OnCard(value) if isinstance(value, Tensor) and not isinstance(value, OnCard) else value


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of ATen: check the devices, count it, and compute it on the CPU."""
    if func is torch.ops.prim.device.default:  # what torch's own C++ is told: it has no library for a GPU here
        return CPU
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with _Operations():  # inference mode does not take such operations apart
            return func.decompose(*args, **kwargs)
    name = func._schema.name.partition("::")[2]
    if name in ("pin_memory", "_pin_memory"):  # in a backward pass, where no mode sees the call of a method
        return args[0]
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "meta" and torch._C._current_graph_task_id() != -1:
        asked = GPU  # a backward pass makes zeros like a tensor whose shape alone autograd knows
    to_gpu = asked is not None and torch.device(asked).type == "cuda"
    leaves = tree_leaves((args, kwargs))
    gpus = [leaf for leaf in leaves if isinstance(leaf, OnCard)]
    if gpus and asked is not None and torch.device(asked).type == "cpu":  # torch's C++ means "where it is"
        asked, kwargs = None, {name: each for name, each in kwargs.items() if name != "device"}
    if name in ("index_put", "_index_put_impl_", "index_add", "slice_backward") and gpus:
        first = args[0]
        if not isinstance(first, OnCard) and not bool(first.any()):  # zeros of a backward pass, likewise
            args = (OnCard(first), *args[1:])
            leaves = tree_leaves((args, kwargs))
    hosts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnCard)]
    hosts = [leaf for leaf in hosts if leaf.dim() > 0 and leaf.device == CPU]
    if gpus and hosts and name not in MOVES:
        values = args[2] if "put" in name else None  # they must be on the GPU; an index need not be
        if name not in TAKES_HOST_INDEX or not isinstance(args[0], OnCard) or any(each is values for each in hosts):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu in {name}")
        COUNTS.add(COUNTS.copies, name)
    _count(name, args, bool(gpus), asked, to_gpu)
    settings = tree_map(on_cpu, kwargs)
    if "device" in settings and (to_gpu or asked is GPU):
        settings["device"] = CPU
    if settings.get("pin_memory") is None:
        settings.pop("pin_memory", None)
    if func is torch.ops.aten.mm.dtype_out:  # a product of 16 bits into float32, which a CPU does not have
        torch.mm(*(on_cpu(each).to(args[2]) for each in args[:2]), out=on_cpu(kwargs["out"]))
        return kwargs["out"]
    result = func(*tree_map(on_cpu, args), **settings)
    if name == "_local_scalar_dense":
        return result
    if isinstance(kwargs.get("out"), OnCard):
        return kwargs["out"]
    in_place = name.endswith("_") and func._schema.is_mutable  # `__rshift__` is not
    if in_place and args and isinstance(args[0], OnCard) and isinstance(result, Tensor):
        return args[0]
    stays = to_gpu or (bool(gpus) and asked is None)
    if name == "copy_":
        stays = isinstance(args[0], OnCard)
    if not stays:
        return result
    if name == "_to_copy" and gpus and result is gpus[0].numbers:
        result = result.view_as(result)
    if name in MAKES_ROOM or (name not in WITHOUT_LAUNCH and not in_place):
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                COUNTS.allocates(name, each)
    return tree_map(_on_gpu, result)


def _rows(starts: Tensor, key_starts: Tensor, causal: bool, settings: dict[str, Any]) -> AttentionRows:
    window = settings.get("window_size_left")
    bounds = (starts[:-1], starts.diff(), key_starts[:-1], key_starts.diff())
    return AttentionRows(*bounds, settings["scale"], causal, 0 if window is None else window + 1)


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, *rest: Any, **settings: Any) -> Any:
    """Torch's fused attention over rows. Its sums stay zero: the backward pass below computes the scores again."""
    _, _, p, causal, _ = rest
    assert p == 0.0
    y = attention_by_rows(_rows(starts, key_starts, causal, settings), q.float(), k.float(), v.float())
    return y.to(q.dtype), torch.zeros(q.shape[1], q.shape[0]), torch.zeros(2), torch.zeros(0), torch.zeros(0)


def _flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, *rest: Any, **settings: Any
) -> Any:
    starts, key_starts, _, _, p, causal, *_ = rest
    assert p == 0.0
    rows, groups = _rows(starts, key_starts, causal, settings), q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.zeros(each.shape) for each in (q, k, v))
    bounds = (rows.query_starts, rows.query_lengths, rows.key_starts, rows.key_lengths)
    for start, T, key_start, S in zip(*(each.tolist() for each in bounds), strict=True):
        here, there = slice(start, start + T), slice(key_start, key_start + S)
        queries, own = (each[here].float().transpose(0, 1) for each in (q, dy))  # (H, T, D)
        keys, values = (each[there].float().repeat_interleave(groups, 1).transpose(0, 1) for each in (k, v))
        scores = rows.scaling * queries @ keys.mT
        P = scores.masked_fill(~visible_keys(rows, T, S), -torch.inf).softmax(-1)  # (H, T, S)
        dP = own @ values.mT
        dS = rows.scaling * P * (dP - (dP * P).sum(-1, keepdim=True))
        dq[here] = (dS @ keys).transpose(0, 1)
        for whole, part in ((dk, dS.mT @ queries), (dv, P.mT @ own)):  # summed over the queries that share keys
            whole[there] = part.view(-1, groups, *part.shape[1:]).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


_on_a_cpu = torch.library.Library("aten", "IMPL")  # torch has these two for GPUs alone
_on_a_cpu.impl("_flash_attention_forward", _flash, "CPU")
_on_a_cpu.impl("_flash_attention_backward", _flash_backward, "CPU")


class _Programs:
    """The programs of `turret.ops.gpu`: one launch each, by torch's operations on the CPU, in the same memory."""

    @staticmethod
    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return _Programs._one("rms_norm", REFERENCE.rms_norm(x.numbers, RMSNorm(weight.numbers, eps)))

    @staticmethod
    def rms_norm_backward(x: Any, weight: Any, r: Any, dy: Any) -> Any:
        return _Programs._one(
            "rms_norm_backward",
            REFERENCE.rms_norm_backward(x.numbers, RMSNorm(weight.numbers, 0.0), r.numbers, dy.numbers),
        )

    @staticmethod
    def rotate(q: Any, k: Any, cos: Any, sin: Any, sign: float) -> Any:
        turned = REFERENCE.rotate(q.numbers, k.numbers, cos.numbers, sin.numbers, sign)
        assert all(torch.equal(*each.chunk(2, dim=-1)) for each in (cos.numbers, sin.numbers)), "both halves are alike"
        _Programs._one("rotate", ())
        return tuple(_Programs._into(each, new) for each, new in zip((q, k), turned, strict=True))

    @staticmethod
    def swiglu(gate: Any, up: Any) -> Any:
        return _Programs._one("swiglu", REFERENCE.swiglu(gate.numbers, up.numbers))

    @staticmethod
    def swiglu_backward(gate: Any, up: Any, dy: Any) -> Any:
        found = REFERENCE.swiglu_backward(gate.numbers, up.numbers, dy.numbers)
        _Programs._one("swiglu_backward", ())
        return tuple(_Programs._into(each, new) for each, new in zip((gate, up), found, strict=True))

    @staticmethod
    def dropout(x: Any, keys: Any, seed: int, threshold: int, scale: float) -> Any:
        dropped = DropoutArguments(seed, threshold, scale, keys.numbers)
        return _Programs._one("dropout", REFERENCE.dropout(x.numbers, dropped, scale))

    @staticmethod
    def _one(name: str, results: Any) -> Any:
        COUNTS.add(COUNTS.launches, name)
        for each in tree_leaves(results):
            COUNTS.allocates(name, each)
        return tree_map(_on_gpu, results)

    @staticmethod
    def _into(place: Any, new: Tensor) -> Any:
        assert place.numbers.is_contiguous()
        place.numbers.copy_(new)
        return place


def _count(name: str, args: Any, has_gpu: bool, asked: Any, to_gpu: bool) -> None:
    if name == "_to_copy":
        if has_gpu and asked is not None and not to_gpu:
            COUNTS.add(COUNTS.syncs, "to the CPU")
            return
        if not has_gpu and to_gpu:
            COUNTS.add(COUNTS.copies, name)
            return
    if name == "copy_":
        into, of = isinstance(args[0], OnCard), isinstance(args[1], OnCard)
        if into and not of:
            COUNTS.add(COUNTS.copies, name)
            return
        if of and not into:
            COUNTS.add(COUNTS.syncs, "to the CPU")
            return
    if name == "repeat_interleave" and has_gpu and (len(args) < 2 or args[1] is None):
        COUNTS.add(COUNTS.syncs, name)  # the CPU waits for the size
    if name == "_local_scalar_dense" and has_gpu:
        COUNTS.add(COUNTS.syncs, "a number")
    elif name in SEES_HOW_MANY and has_gpu:
        COUNTS.add(COUNTS.syncs, name)
    elif name == "index" and has_gpu:
        masks = [each for each in args[1] if each is not None and each.dtype == torch.bool]
        if masks:
            COUNTS.add(COUNTS.syncs, "a mask as index")
    if (has_gpu or to_gpu) and (asked is None or to_gpu) and name not in WITHOUT_LAUNCH:
        COUNTS.add(COUNTS.launches, name, _launches(name, args))


def _launches(name: str, args: Any) -> int:
    """How many kernels an operation is."""
    if name.startswith("_foreach_"):
        return -(-len(args[0]) // AT_ONCE)
    # the matrix is copied to the result first; a bias, and what is added to in place, are not
    return 2 if name in ("addmm", "baddbmm") and args[0].dim() > 1 else 1


class _Operations(TorchDispatchMode):
    """Sees the operations that make a tensor on the GPU from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Attention(torch.autograd.Function):
    """Fused attention, whose choice of a kernel would ask a real GPU."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, settings: dict[str, Any]) -> Tensor:
        ctx.settings = settings
        COUNTS.add(COUNTS.launches, "attention")
        y = OnCard(_attend(q.numbers, k.numbers, v.numbers, on_cpu(mask), settings))
        sums = OnCard(torch.zeros(q.shape[:-1]))  # a fused kernel keeps one number a query instead of its scores
        ctx.save_for_backward(q, k, v, mask, y, sums)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, mask, *_ = ctx.saved_tensors
        COUNTS.add(COUNTS.launches, "attention backward")
        inputs = [each.numbers.detach().requires_grad_() for each in (q, k, v)]
        with torch.enable_grad():
            y = _attend(*inputs, on_cpu(mask), ctx.settings)
        return (*map(OnCard, torch.autograd.grad(y, inputs, gradients[0].numbers)), None, None)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, settings: dict[str, Any]) -> Tensor:
    with COUNTS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)


class _Functions(TorchFunctionMode):
    """Sees calls that would ask for a real GPU before any operation is dispatched."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnCard):
            mask = kwargs.get("attn_mask")
            settings = {name: kwargs[name] for name in ("dropout_p", "is_causal", "scale") if name in kwargs}
            return _Attention.apply(*args[:3], mask, settings)
        if func is Tensor.tolist and isinstance(args[0], OnCard):
            COUNTS.add(COUNTS.syncs, "a list")
            return args[0].numbers.tolist()
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _moved(func, args, kwargs)
        if func is Tensor.pin_memory:
            return args[0]
        kwargs = {name: each for name, each in kwargs.items() if name != "pin_memory"}
        device = kwargs.get("device")
        makes = device is not None and torch.device(device).type == "cuda"
        if makes and not any(isinstance(each, OnCard) for each in args):
            made = func(*args, **{**kwargs, "device": CPU})
            if isinstance(made, Tensor) and not isinstance(made, OnCard):
                kind = func.__name__
                given = kind in ("tensor", "as_tensor")
                if kind not in MAKES_ROOM:
                    COUNTS.add(COUNTS.copies if given else COUNTS.launches, kind)
                if given:
                    COUNTS.add(COUNTS.syncs, "numbers that are not pinned")
                COUNTS.allocates(kind, made)
                return OnCard(made)
            return made
        return func(*args, **kwargs)


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`x.to(...)`, `x.cpu()` and `x.cuda()`: across the devices without a gradient, or a change of the dtype alone."""
    x, *rest = args
    if func is Tensor.to:
        rest = [each.device if isinstance(each, OnCard) else each for each in rest]
        found = [torch.device(each) for each in (*rest, kwargs.get("device")) if isinstance(each, (str, torch.device))]
        target = found[0] if found else None
        rest = [CPU if isinstance(each, (str, torch.device)) else each for each in rest]
        kwargs = {name: CPU if name == "device" and each is not None else each for name, each in kwargs.items()}
    else:
        target, func = (CPU if func is Tensor.cpu else GPU), Tensor.to
        rest, kwargs = [CPU], {}
    there = isinstance(x, OnCard)
    if target is None or target.type == "meta" or there == (target.type == "cuda"):
        if target is not None and target.type == "meta":
            return func(x.numbers if there else x, "meta")
        rest = [each for each in rest if not isinstance(each, torch.device)]
        kwargs = {name: each for name, each in kwargs.items() if name != "device"}
        dtypes = [each for each in (*rest, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
        return func(x, *rest, **kwargs) if dtypes else x
    assert not (torch.is_grad_enabled() and x.requires_grad and not x.is_leaf), "a copy across devices with a gradient"
    COUNTS.add(COUNTS.syncs if there else COUNTS.copies, "to the CPU" if there else "_to_copy")
    if not there and not kwargs.get("non_blocking"):
        COUNTS.add(COUNTS.syncs, "numbers that are not pinned")
    if there:
        moved = func(x.numbers.detach(), *rest, **kwargs)
        return moved.clone() if moved is x.numbers else moved
    return OnCard(func(x.detach(), *rest, **kwargs))


@contextmanager
def pretend_gpu(programs: bool = True) -> Iterator[Counts]:
    """A machine with one GPU, for the length of the block.

    programs: whether it has every feature of `turret.ops.gpu`; else torch's plain operations compute all.
    """
    COUNTS.clear()
    if find_spec("bitsandbytes") is not None:
        quantized.library()  # PEFT imports it, and at its import it asks torch for a real GPU
    torch._C._ensureCUDADeviceGuardSet()
    lift = torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    driver = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "a pretend GPU",
        "get_device_capability": lambda device=None: (8, 0),
        "synchronize": lambda device=None: None,
        "set_device": lambda device: COUNTS.devices.add((threading.current_thread().name, str(device))),
        "Stream": lambda device=None: MagicMock(spec=["wait_stream", "synchronize"]),
        "current_stream": lambda device=None: None,
        "stream": lambda stream: nullcontext(),
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "mem_get_info": lambda device=None: (8_000_000_000, 8_000_000_000),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }
    try:
        reason, has = (None, gpu_ops.FEATURES) if programs else ("triton is not installed", ())
        told = {
            "why_not": lambda feature, device, dtype: reason,
            "_ops_on": lambda device, dtype: gpu_ops.ops_with(frozenset(has)),
        }
        with (
            patch.multiple(torch.cuda, **driver),
            patch.multiple(gpu_ops, **told),
            patch.object(gpu_ops, "_module", lambda name: _Programs),
            patch.object(core, "real_gpu", lambda device: device.type == "cuda"),
            _Operations(),
            _Functions(),
        ):
            yield COUNTS
    finally:
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def to_gpu(model: nn.Module) -> Any:
    """Move a model to the pretend GPU in place; shared weights stay shared."""
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, OnCard):
                continue
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(OnCard(parameter.detach()), requires_grad=parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not isinstance(buffer, OnCard):
                module._buffers[name] = OnCard(buffer)
    return model
