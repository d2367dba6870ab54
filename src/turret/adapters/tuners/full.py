"""The tensors of a full fine-tuning: every weight of the base, on a copy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from turret import quantized
from turret.adapters.adapter import Adapter, Extracted, Parts, cpu_copy
from turret.adapters.hooks import AdapterInit, HookedModel, put_back
from turret.adapters.tuners.tuner import Tuner, fill_parameters
from turret.errors import AdapterError
from turret.families import family_of
from turret.manifest import AdapterConfig
from turret.methods.full import UNMIXED, Full
from turret.ops.core import FunctionContext, Gradients, apply_function
from turret.ops.structs import kept_gradient
from turret.transformer import Model


class _Rows(torch.autograd.Function):
    """W[ids]. If W keeps its `grad`, the gradient is added to the rows of `ids` in place.

    torch's own gradient of an embedding is as large as W, nearly all of it zero. W: (V, D), ids: any shape.
    padding: the row that gets no gradient, or None.
    """

    @staticmethod
    def forward(ctx: FunctionContext, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.parameter, ctx.padding = weight, padding
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: FunctionContext, *gradients: Tensor) -> Gradients:
        weight, ids = ctx.parameter, ctx.saved_tensors[0].flatten()
        dy = gradients[0].reshape(len(ids), -1)
        if ctx.padding is not None:
            dy = dy.masked_fill((ids == ctx.padding)[:, None], 0.0)
        if (kept := kept_gradient(weight)) is not None:
            kept.index_add_(0, ids, dy)
            return None, None, None
        return torch.zeros_like(weight).index_add_(0, ids, dy), None, None


class FullTuner(Tuner[Full]):
    """Trained copies that replace all weights."""

    def start(self, model: Model, attached: HookedModel, beginning: AdapterInit) -> None:
        _swap(model, attached, {})
        words = model.get_input_embeddings().weight
        for module in model.modules():
            # on a GPU `index_add_` has no fixed order of summation, and the large gradient costs little
            if module._parameters.get("weight") is words and words.device.type == "cpu" and _is_plain(module):
                attached.undo.append(module.register_forward_hook(look_up).remove)

    def extract(self, attached: HookedModel, slot: int) -> Extracted:
        names = tuple(f"{name}." for name in attached.family.head_modules)
        tensors = {name: cpu_copy(value) for name, value in attached.full.items()}
        head = {name: value for name, value in tensors.items() if name.startswith(names)}
        return Extracted({name: each for name, each in tensors.items() if name not in head}, head, self.method)

    def fill(self, model: Model, attached: HookedModel, adapter: Adapter, generator: torch.Generator | None) -> None:
        fill_parameters(attached.full, {**adapter.tensors, **adapter.head})

    def stored_tensors(self, adapter: Adapter) -> dict[str, Tensor]:
        return {**adapter.tensors, **adapter.head}

    def read(self, tensors: dict[str, Tensor], config: AdapterConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return tensors, {}

    def merged_weights(self, model: Model, adapter: Adapter) -> dict[str, Tensor]:
        return adapter.tensors

    def parts(self, model: Model, adapter: Adapter) -> Parts:
        raise AdapterError(UNMIXED)

    def mount(self, model: Model, attached: HookedModel, adapter: Adapter, slot: int) -> None:
        if attached.methods:
            raise AdapterError("full fine-tuning replaces every weight: mount it alone, on a model without adapters")
        values = {**adapter.tensors, **adapter.head}
        _check_names(model, values)
        _swap(model, attached, values)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is an embedding that only looks rows up. A subclass may scale them."""
    if type(module) is not nn.Embedding:
        return False
    return not (module.max_norm or module.scale_grad_by_freq or module.sparse)


def look_up(module: nn.Embedding, args: tuple[Tensor], output: Tensor) -> Tensor:
    """The output of an embedding, through `_Rows`."""
    return apply_function(_Rows, module.weight, args[0], module.padding_idx)


def _swap(model: Model, attached: HookedModel, values: dict[str, Tensor]) -> None:
    """Replace every parameter by a copy, or by its entry in `values`. Ties are kept; `undo` restores the originals."""
    if quantized.any_packed(model):
        raise AdapterError(
            "full fine-tuning replaces the weights, and those of this base are quantized: "
            "use lora, prefix or head, or load it with base_quantization none"
        )
    copies: dict[int, nn.Parameter] = {}
    names = {id(each): name for name, each in model.named_parameters()}
    for module in list(model.modules()):
        for key, original in list(module._parameters.items()):
            if original is None:
                continue
            if id(original) not in copies:
                value = values.get(names[id(original)], original).detach().to(original.device)
                copies[id(original)] = nn.Parameter(value.float().clone(), requires_grad=not values)
                attached.full[names[id(original)]] = copies[id(original)]
            module._parameters[key] = copies[id(original)]
            attached.swapped.append((module._parameters, key, original, copies[id(original)]))
    attached.undo.append(functools.partial(put_back, attached.swapped))


def _check_names(model: Model, values: dict[str, Tensor]) -> None:
    expected = {name: tuple(each.shape) for name, each in model.named_parameters()}
    head = family_of(model.config).head_modules
    for name, value in values.items():
        fits = name in expected and (expected[name] == tuple(value.shape) or name.startswith(head))
        if not fits:
            raise AdapterError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this base: load its own base"
            )
    if missing := sorted(set(expected) - set(values)):
        raise AdapterError(f"full fine-tuning needs every weight, and {missing[0]!r} is missing: train it again")
