"""Load a base whose layers lie in parts on several processes: `train.shard`, by torch's FSDP2.

Every process keeps some rows of each linear layer's weight, and everything else whole: embeddings, norms, biases, the
output layer and the head. Before a layer computes, the processes gather its weights; after it they free them, forward
and backward. A process reads its own rows from the files, so it never has a whole copy of the layers.

Gathering needs all processes: they must make the same passes in the same order.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from turret.adapters.hooks import layer_paths
from turret.bases.base import (
    INITIALIZED,
    Base,
    Dtype,
    LoadingInfo,
    cache_fingerprint,
    cached_fingerprint,
    cast_weights,
    dtype_on,
    explain_out_of_memory,
    fresh_parameters,
    known_fingerprint,
    listed_family,
    notes_on,
    read_tokenizer,
    require_task,
)
from turret.bases.device import ChosenDevice, gigabytes, use_quick_float32
from turret.bases.fingerprints import is_within
from turret.bases.meta_model import skeleton
from turret.bases.quantized import Checkpoint, checkpoint_fingerprint
from turret.bases.source import BaseSource, resolve
from turret.errors import BaseModelError
from turret.families import Family
from turret.families.family import HeadKind
from turret.quantized import is_linear
from turret.transformer import Model

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PARTS = "turret_parts"  # an attribute of a model: in how many parts its layers are


def parts_of(model: nn.Module) -> int:
    """In how many parts the layers of a model lie; 1 if they are whole."""
    return int(getattr(model, PARTS, 1))


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows of a divided tensor, or a whole tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of the bytes that this process has of a tensor, in hex digits."""
    data = own_part(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(data).hexdigest()


def divided_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights are divided, by path: those inside the layers."""
    inside = tuple(f"{each}." for each in layer_paths(model))
    return {path: each for path, each in model.named_modules() if path.startswith(inside) and is_linear(each)}


def load_in_parts(
    base: str,
    *,
    task: HeadKind,
    mesh: DeviceMesh,
    device: ChosenDevice,
    num_labels: int | None = None,
    dtype: Dtype = "auto",
    seed: int = 42,
) -> Base:
    """Load a base with this process's part of its layers. See `load` for the other arguments and errors.

    Nothing is communicated here. `gather_once` must follow, in all processes.

    Args:
        mesh: all processes, in one dimension.

    Raises:
        BaseModelError: the base cannot be divided, because it is quantized, not listed, or named otherwise.
    """
    source = resolve(base)
    family = listed_family(source)
    why = None if family is not None else f"its architecture {source.config.get('model_type')} is not listed"
    why = f"it is quantized ({source.quantization})" if source.quantization is not None else why
    if family is None or why is not None:
        raise BaseModelError(
            f"base {base!r} cannot be read in parts: {why}; leave train.shard out, or give another base"
        )
    require_task(source, family, task)
    torch_dtype = dtype_on(device.device, dtype)
    if torch_dtype == torch.float32 and device.device.type == "cpu":
        use_quick_float32()
    model, checkpoint = skeleton(source, task, num_labels), Checkpoint(source.weights)
    stored = _stored_dtype(source, checkpoint)
    cast_weights(model, stored)
    paths = divided_layers(model)
    loading = _fill(model, checkpoint, {f"{path}.weight" for path in paths}, seed)
    if loading["missing_keys"] and loading["unexpected_keys"] and not _of_task_only(model, loading, family):
        first = min(loading["unexpected_keys"])
        raise BaseModelError(
            f"base {base!r} cannot be read in parts: its files name tensors otherwise than the model, the first is "
            f"{first}; leave train.shard out, or write it anew with save_pretrained()"
        )
    fresh = fresh_parameters(source, family, model, loading)
    digest = cached_fingerprint(source.weights) or checkpoint_fingerprint(source, model, family)
    assert digest is not None, "every tensor has been found"
    cache_fingerprint(source.weights, digest)
    cast_weights(model, torch_dtype)
    whole = [each for each in (*model.parameters(), *model.buffers()) if not each.is_meta]
    with explain_out_of_memory(base, sum(each.nbytes for each in whole), device.device):
        for each in whole:
            each.data = each.data.to(device.device)
        _divide(model, mesh)
        for path in paths:
            _read_rows(model, path, checkpoint, mesh, stored, device.device)
    setattr(model, PARTS, mesh.size())
    tokenizer, notes = read_tokenizer(source, model)
    _read_generation(source, model)
    model.requires_grad_(False).eval()
    size = sum(own_part(each).nbytes for each in (*model.parameters(), *model.buffers()))
    notes.append(
        f"each of {mesh.size()} processes keeps its part of {len(paths)} matrices: {gigabytes(size)} of the base"
    )
    every = (*notes_on(source, family, model, loading), *notes, *device.notes)
    found = Base.of(source, model, tokenizer, family, digest, torch_dtype)
    return replace(found, fresh=fresh, bytes=size, notes=every)


def load_without_weights(base: str) -> Base:
    """A base that another program computes: tokenizer, configuration and fingerprint, and a model on the meta device.

    Raises:
        BaseModelError: the base is not listed, generates no text, or has no tokenizer.
    """
    source = resolve(base)
    family = listed_family(source)
    if family is None:
        kind = source.config.get("model_type")
        raise BaseModelError(f"base {base!r} cannot be served by another engine: its architecture {kind} is not listed")
    require_task(source, family, "generate")
    model = skeleton(source, "generate")
    stored = _stored_dtype(source, Checkpoint(source.weights))
    cast_weights(model, stored)
    digest = known_fingerprint(source, model, family, verify=False, packed=True)
    tokenizer, notes = read_tokenizer(source, model)
    _read_generation(source, model)
    return replace(Base.of(source, model, tokenizer, family, digest, stored), notes=tuple(notes))


@torch.no_grad()
def gather_once(model: Model) -> None:
    """Make one pass of one token in all processes: FSDP2 then knows the body as the root of its layers."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)


def _stored_dtype(source: BaseSource, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which transformers loads a checkpoint by itself."""
    named = source.config.get("dtype") or source.config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    return next(each for key in checkpoint if (each := checkpoint.rows(key, 0, 1).dtype).is_floating_point)


def _fill(model: Model, checkpoint: Checkpoint, later: set[str], seed: int) -> LoadingInfo:
    """Give a model on the meta device its tensors, but for the parameters `later`. The seed makes the new ones."""
    prefix = model.base_model_prefix
    loading = LoadingInfo(missing_keys=set(), unexpected_keys=set(checkpoint), mismatched_keys=set())
    computed = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        key = None if name in computed else checkpoint.key(name.removeprefix(f"{prefix}."), prefix)
        loading["unexpected_keys"].discard(key or "")
        shape = None if key is None else checkpoint.shape(key)
        if key is not None and shape == tuple(tensor.shape):
            if name in later:
                setattr(tensor, INITIALIZED, True)
            else:
                setattr(_put(model, name, checkpoint.read(key, tensor.dtype)), INITIALIZED, True)
            continue
        if shape is not None:
            loading["mismatched_keys"].add((name, shape, tuple(tensor.shape)))
        elif isinstance(tensor, nn.Parameter):
            loading["missing_keys"].add(name)
        if name not in later:
            _put(model, name, torch.empty_like(tensor, device="cpu"))
    model.tie_weights()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
    return loading


def _put(model: Model, name: str, value: Tensor) -> Tensor:
    """Replace a parameter or buffer."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._buffers:
        module._buffers[own] = value
        return value
    module._parameters[own] = parameter = nn.Parameter(value, requires_grad=False)
    return parameter


def _of_task_only(model: Model, loading: LoadingInfo, family: Family) -> bool:
    """Whether a checkpoint lacks nothing but a head or a pooler, which may be new."""
    names = (name.removeprefix(f"{model.base_model_prefix}.") for name in loading["missing_keys"])
    return all(is_within(name, (*family.head_modules, *family.body_excludes)) for name in names)


def _divide(model: Model, mesh: DeviceMesh) -> None:
    """Let FSDP2 divide the weights of the linear layers in the layers, which are on the meta device still."""
    from torch.distributed.fsdp import fully_shard  # missing in builds of torch without distributed

    whole = {each for each in model.parameters() if not each.is_meta}
    for path in layer_paths(model):
        fully_shard(model.get_submodule(path), mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    fully_shard(model.base_model, mesh=mesh, ignored_params=whole)


@torch.no_grad()
def _read_rows(
    model: Model, path: str, checkpoint: Checkpoint, mesh: DeviceMesh, stored: torch.dtype, device: torch.device
) -> None:
    """Read this process's rows of a divided weight."""
    from torch.distributed.tensor import DTensor, Shard

    layer = model.get_submodule(path)
    empty, prefix = layer.get_parameter("weight"), model.base_model_prefix
    key = checkpoint.key(f"{path}.weight".removeprefix(f"{prefix}."), prefix)
    assert key is not None
    rows = -(-empty.shape[0] // mesh.size())
    start, stop = (min(empty.shape[0], place * rows) for place in (mesh.get_local_rank(), mesh.get_local_rank() + 1))
    own = checkpoint.rows(key, start, stop).to(stored).to(empty.dtype)
    if own.dtype == torch.float16 and not bool(torch.isfinite(own).all()):
        raise BaseModelError("the base has weights beyond the range of float16: give it another dtype, such as float32")
    # a copy: the rows are a view of the mapped file, all of which could stay in memory with them
    part = DTensor.from_local(
        own.to(device, copy=True), mesh, [Shard(0)], run_check=False, shape=empty.shape, stride=empty.stride()
    )
    layer.weight = nn.Parameter(part, requires_grad=False)


def _read_generation(source: BaseSource, model: Model) -> None:
    """The settings of generation that came with the base."""
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
