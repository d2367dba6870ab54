"""Further models of one base: each with modules of its own, all with the same weights in memory.

Hooks replace modules and never write to weights. So each model can be attached, trained and detached without the others
noticing, and costs its modules only: a few megabytes.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from turret.adapters.lifecycle import require_bare
from turret.bases.base import Base
from turret.bases.fingerprints import within
from turret.bases.meta_model import model_of
from turret.families.family import take_head_off
from turret.transformer import Model

LABELS, INITIALIZED = "num_labels", "_is_hf_initialized"  # attributes of transformers' models, modules and tensors


def share(base: Base, *, num_labels: int | None = None, seed: int = 42, headless: bool = False) -> Base:
    """Another model on a base's weights, equal to what `load` with these arguments gives, bit for bit.

    Args:
        base: nothing is attached to it.
        num_labels: outputs of the classification head. None: the base's.
        seed: initialises the parameters that the checkpoint lacks, as in `load`.
        headless: a classifier's head is taken off.

    Raises:
        AdapterError: something is attached to the base.
    """
    own, model = base.model, spare(base.model)
    fresh = set(base.fresh)
    if headless:
        take_head_off(model, base.family)
        fresh = set()
    if num_labels is not None and num_labels != getattr(own.config, LABELS, None):
        fresh |= _with_outputs(model, base, num_labels)
    if fresh:
        _draw(model, fresh, seed, base.drawn_in)
    for name in fresh:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(own.device, own.get_parameter(name).dtype)
    model.requires_grad_(False).eval()
    return replace(base, model=model, fresh=tuple(sorted(fresh)))


def spare(model: Model) -> Model:
    """Modules of its own with the same weights in memory. Raises AdapterError if something is attached to the model."""
    return copy.deepcopy(require_bare(model), _kept(model))


def _kept(model: Model) -> dict[int, Tensor]:
    """What a copy of a model does not copy, by its address: tensors, and the scales of quantized ones."""
    kept: dict[int, Tensor] = {id(each): each for each in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) or hasattr(value, "absmax"):  # of bitsandbytes
                kept[id(value)] = value
    return kept


def _with_outputs(model: Model, base: Base, num_labels: int) -> set[str]:
    """Give the head of a model other outputs. Returns the names of its new parameters, which have no values yet."""
    family, dtype = base.family, base.drawn_in
    for each in (model.config, model):  # some architectures read it here, some there
        if hasattr(each, LABELS):
            setattr(each, LABELS, num_labels)
    shapes = {name: each.shape for name, each in model_of(model.config, base.head).named_parameters()}
    head = {name: each for name, each in model.named_parameters() if within(name, family.head_modules)}
    new = {name for name, each in head.items() if each.shape != shapes[name]}
    for name in new:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, key, nn.Parameter(torch.empty(shapes[name], dtype=dtype)))
        if isinstance(owner, nn.Linear) and key == "weight":
            owner.out_features = num_labels
    return new


def _draw(model: Model, fresh: set[str], seed: int, dtype: torch.dtype) -> None:
    """Initialise the fresh parameters as transformers does when it loads a checkpoint without them."""
    for each in (*model.parameters(), *model.buffers()):
        setattr(each, INITIALIZED, True)  # transformers leaves such tensors as they are
    for name in fresh:
        path, _, key = name.rpartition(".")
        owner = model.get_submodule(path)
        setattr(owner, key, nn.Parameter(torch.empty(owner.get_parameter(key).shape, dtype=dtype)))
    for module in model.modules():
        setattr(module, INITIALIZED, False)  # look at each of its tensors
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()
