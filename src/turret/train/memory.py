"""Memory in bytes, of the process or of its tensors on a GPU, and the predicted memory of a training.

On the CPU the memory of a training is that of the whole process. On a GPU it is that of the tensors there, as torch's
allocator counts them; CUDA's context comes on top.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from turret import adapters, process, quantized
from turret.adapters import packed
from turret.adapters.hooks import layer_paths
from turret.bases.base import cast_weights
from turret.bases.device import CPU, gigabytes, gpu_memory
from turret.bases.meta_model import CONTEXT
from turret.bases.sharded import divided_layers
from turret.engine.cache import capacity
from turret.errors import OutOfMemory, memory_ran_out
from turret.families import family_of
from turret.families.family import VECTORS, head_of
from turret.methods import Method
from turret.ops.core import FunctionContext, Gradients, apply_function
from turret.ops.table import gpu_paths_on_meta
from turret.recipe import Recipe
from turret.train.adamw import moment_bytes
from turret.train.batches import CACHE_TOKENS, GENERATED_ROWS, EncodedRow, micro_batches, pass_tokens
from turret.train.training_plan import Prediction
from turret.transformer import Model

_CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the peak to the current resident size


def resident_bytes(device: torch.device = CPU) -> int:
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
def measure_growth(device: torch.device = CPU) -> Iterator[Grown]:
    """Measure the growth of `resident_bytes` within the block. The result is complete when the block ends."""
    process.release_memory()
    result, before = Grown(), resident_bytes(device)
    reset_peak(device)
    was_reset = peak(device) < before + (16 << 20)  # else the peak is an earlier one
    yield result
    if was_reset:
        result.bytes = max(0, peak(device) - before)


def available(device: torch.device) -> int:
    """Free bytes of a GPU, or of the machine within its container's limit."""
    return gpu_memory(device)[0] if device.type == "cuda" else process.free_memory()


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


# --- a training on a GPU ----------------------------------------------------------------------------------------------
# Predicts the memory of a training on a GPU, by component, before a byte of the base is read.
#
# The base is built on torch's meta device, where tensors have shapes and no numbers. The adapter is attached there, and
# one pass runs as in a training: its paths are those that a GPU takes, and saved-tensor hooks count what they save.


TARGET = 128  # tokens of a target, unless the recipe says otherwise
LOGITS = 16  # bytes a logit: in the base's precision, in float32, their softmax, and the gradients of both
TEMPORARIES = 3  # of the largest tensor: what a backward pass makes besides the saved tensors
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, 8 bits a block of 64, 32 bits for 256 blocks
GATHERED = 3  # layers that are whole at a time: the one that computes, the next one, and the buffer of a gather
ROUNDED = 8  # tokens: lengths of real batches are rounded up to a multiple
FRAGMENTS = 1.1  # an allocator keeps holes


@dataclass(frozen=True)
class Work:
    """The largest pass of a training, and of the evaluation after it.

    Args:
        rows: texts in a pass.
        source: tokens of each.
        target: tokens of each target; 0 for a classifier.
        written: tokens that each row generates in an evaluation; 0 for none.
        longest: tokens of the longest text that an evaluation continues, if it is longer than `source`.
    """

    rows: int
    source: int
    target: int = 0
    written: int = 0
    longest: int = 0

    @classmethod
    def of(cls, recipe: Recipe, model: Model) -> Work:
        """The work of a recipe whose texts are all as long as it allows."""
        limit = family_of(model.config).position_limit(model.config)
        source = recipe.task.max_tokens if limit is None else min(recipe.task.max_tokens, limit)
        generates = model.get_output_embeddings() is not None
        target = (recipe.task.max_target_tokens or TARGET) if generates else 0
        rows = pass_tokens(recipe.train, model.config) // (source + target)
        written = (recipe.task.max_new_tokens or target) if generates else 0
        return cls(max(1, min(recipe.train.batch_size, rows)), source, target, written)

    @classmethod
    def of_items(cls, recipe: Recipe, batches: Sequence[Sequence[EncodedRow]], most_tokens: int) -> Work:
        """The work of real batches: its largest pass, with texts of the same mean length.

        Lengths are rounded up, so that trainings on the same data share a prediction.

        Args:
            most_tokens: of one pass.
        """
        pieces = [piece for batch in batches for piece in micro_batches(batch, most_tokens)]
        piece = max(pieces, key=lambda items: sum(item.tokens for item in items))
        rows = len(piece)
        source = _rounded_mean_length(sum(len(item.source) for item in piece), rows)
        targets = [len(item.target) for item in piece if item.target is not None]
        target = max(ROUNDED, _rounded_mean_length(sum(targets), rows)) if targets else 0
        longest = _rounded_mean_length(max(len(item.source) for batch in batches for item in batch), 1)
        written = (recipe.task.max_new_tokens or recipe.task.max_target_tokens or TARGET) if target else 0
        return cls(rows, source, target, written, longest)


def _rounded_mean_length(tokens: int, rows: int) -> int:
    """The mean length of rows, rounded up."""
    return -(-tokens // (rows * ROUNDED)) * ROUNDED


def predict_on_gpu(
    model: Model,
    method: Method,
    work: Work,
    dtype: torch.dtype,
    *,
    nf4: bool = False,
    optimizer: str | None = None,
    checkpointed: bool = False,
    attention: bool = True,
) -> Prediction:
    """The memory of a training on a GPU, by component.

    Args:
        model: a base on the meta device, see `bases.meta_model`. It is cast to `dtype`.
        method: what is trained.
        work: the largest pass.
        dtype: the precision of the base.
        nf4: whether the linear layers of the body are kept in 4 bits, and unpacked for a product.
        optimizer: `train.optimizer`, which keeps the moments.
        checkpointed: whether each layer keeps its input alone and is computed again: `train.checkpoint_layers`.
        attention: whether the GPU has attention over rows in this dtype.
    """
    cast_weights(model, dtype)
    weights, unpacked = _weights(model, nf4)
    with _Shapes():
        adapters.attach(model, method, generator=torch.Generator().manual_seed(0))
    try:
        model.train()
        trainable = trainable_bytes(adapters.trainable_parameters(model))
        with _Shapes(), gpu_paths_on_meta(attention):
            saved, states, outputs = saved_by(model, work)
        logits = LOGITS * outputs
        cached = _cache_bytes(model, work, dtype)
    finally:
        adapters.detach(model)
        model.eval()
    kept = saved.bytes
    if checkpointed:
        layers, tokens = model.config.num_hidden_layers, work.rows * (work.source + work.target)
        kept = kept // layers + layers * tokens * model.config.hidden_size * dtype.itemsize
    backward = kept + max(TEMPORARIES * saved.largest, logits) + states
    return Prediction(
        weights=weights,
        trainable=trainable,
        gradients=trainable,
        optimiser=moment_bytes(optimizer, trainable // 4),
        activations=round(FRAGMENTS * max(backward, cached + logits)) + unpacked,
        runtime=CONTEXT,
    )


def in_parts(predicted: Prediction, model: Model, parts: int) -> Prediction:
    """The memory of one of several processes that keep the layers of the base in so many parts.

    Args:
        predicted: of one process with the whole base.
        model: the base on the meta device, in its precision.
    """
    weights = {path: layer.get_parameter("weight").nbytes for path, layer in divided_layers(model).items()}
    own = sum(weights.values())
    layers = [f"{each}." for each in layer_paths(model)]
    largest = max(sum(size for path, size in weights.items() if path.startswith(layer)) for layer in layers)
    return replace(
        predicted,
        weights=predicted.weights - own + -(-own // parts),
        activations=predicted.activations + GATHERED * largest,
    )


def refusal(predicted: Prediction, free: int, base: str, device: str) -> str | None:
    """Why a training cannot start on a GPU, in one line; None if its weights and states fit.

    What a pass needs can be lowered, so it alone does not refuse.

    Args:
        free: bytes of the GPU.
    """
    fixed = predicted.total - predicted.activations
    if fixed <= free:
        return None
    states = predicted.trainable + predicted.gradients + predicted.optimiser
    return (
        f"{base} does not fit on {device} with {gigabytes(free)} free: its weights take "
        f"{gigabytes(predicted.weights)}, the adapter and its states {gigabytes(states)}; give a smaller base, "
        'set base_quantization to "nf4", or train.device to "cpu"'
    )


def _weights(model: Model, nf4: bool) -> tuple[int, int]:
    """Bytes of the base's weights, and of the largest one that is unpacked for a product."""
    whole = quantized.stored_bytes(model)
    if not nf4:
        return whole, 0
    packed_weights = [
        model.get_submodule(path).get_parameter("weight") for path in adapters.target_paths(model, "all-linear")
    ]
    saved = sum(each.nbytes - round(NF4 * each.numel()) for each in packed_weights)
    return whole - saved, max(each.nbytes for each in packed_weights)


def saved_by(model: Model, work: Work) -> tuple[SavedForBackward, int, int]:
    """One pass with gradients on an attached model, up to the output layer of a generator.

    Returns:
        What it saved for its backward pass, the bytes of its result, and how many logits are computed at a time.
    """
    saved = SavedForBackward(model)
    sources = [torch.zeros(work.source, dtype=torch.long)] * work.rows
    with saved.counting():
        if not work.target:
            rows = [(source, torch.arange(len(source))) for source in sources]
            if head_of(model) in VECTORS:
                logits = packed.pooled_states(model, sources, "mean")  # (B, D)
            else:
                logits = packed.head_logits(model, rows)  # (B, C)
            return saved, logits.nbytes, logits.numel()
        targets = [torch.zeros(work.target, dtype=torch.long)] * work.rows
        states = packed.target_states(model, sources, targets)  # (N, D)
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    return saved, states.nbytes, min(len(states), packed.targets_at_once(model)) * vocabulary


def _cache_bytes(model: Model, work: Work, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of the rows that an evaluation generates at a time."""
    if not work.written:
        return 0
    sites = [site for site in adapters.attachment(model).sites if site.group != "encoder"]
    each = sum(2 * site.kv_heads * site.head_dim for site in sites) * dtype.itemsize  # of one token
    tokens = capacity(max(work.source, work.longest) + work.written)
    rows = max(1, min(GENERATED_ROWS, CACHE_TOKENS // tokens))
    return (1 << (rows - 1).bit_length()) * tokens * each  # a block of the cache has room for a power of two


class _Fused(torch.autograd.Function):
    """Attention as a GPU's fused kernel saves it: inputs, output, and one number a query instead of its scores."""

    @staticmethod
    def forward(ctx: FunctionContext, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, bias, y, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return y

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        raise AssertionError("only shapes are computed here")


class _Shapes(TorchFunctionMode):
    """Lets a pass run on the meta device as it runs on a GPU.

    Meta tensors would take torch's plain attention, which saves all scores; a GPU takes a fused kernel. A mask is
    asked whether it hides nothing, and the masks of these passes hide nothing.
    """

    def __torch_function__(
        self,
        func: Callable[..., Tensor | bool],
        types: Sequence[type],
        args: tuple[Tensor, ...] = (),
        kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor | bool:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return apply_function(_Fused, args[0], args[1], args[2], kwargs.get("attn_mask"))
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        return func(*args, **kwargs)


# --- out of memory ----------------------------------------------------------------------------------------------------


@contextmanager
def explain_out_of_memory(
    most_tokens: int, batch: Sequence[EncodedRow], step: int, predicted: Prediction | None
) -> Iterator[None]:
    """Turn the errors that torch raises when memory runs out into OutOfMemory, which names the setting to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory_ran_out(error):
            raise
        pieces = micro_batches(batch, most_tokens)
        most = max(sum(item.tokens for item in piece) for piece in pieces)
        longest = max(item.tokens for item in batch)
        if most > longest:
            remedy = f"set train.micro_batch_tokens to {max(longest, most // 2)} (now {most_tokens})"
        else:
            remedy = f"lower task.max_tokens (this text alone has {longest} tokens)"
        plan = f"; the plan predicted {predicted}" if predicted else ""
        raise OutOfMemory(f"out of memory at step {step}, in a pass of {most} tokens: {remedy}{plan}") from error
