"""Modules that PEFT trains whole, besides a method's own tensors: biases, norms, embeddings, tokens, output layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from turret import quantized
from turret.adapters.hooks import linear_at
from turret.adapters.layers import TokenLogits, TokenRows, unrouted, with_values
from turret.adapters.lora import ScaledLayer
from turret.errors import AdapterError
from turret.families import family_of
from turret.json_types import Plain
from turret.manifest import AdapterConfig
from turret.methods.peft import LORA_PREFIX, NORMS

if TYPE_CHECKING:
    from turret.transformer import Model

TOKENS = ".token_adapter.trainable_tokens_delta"
BASE_BIAS = ".base_layer.bias"  # of a layer that the method itself changes
Values = dict[str, Tensor]  # by name in the model


def with_biases(values: Mapping[str, Tensor], layers: dict[str, ScaledLayer], model: Model) -> Values:
    """Put the trained biases of linear layers into `layers`, as differences from the base's. Returns the other values.

    Args:
        values: by names in PEFT's model.
        layers: what the method itself does, by path; it is changed.
    """
    others: Values = {}
    for name, value in values.items():
        name = name.replace(NORMS, ".")
        path = name.removesuffix(BASE_BIAS) if name.endswith(BASE_BIAS) else name.removesuffix(".bias")
        layer = linear_at(model, path) if path != name else None
        if layer is None or not quantized.is_linear(layer):
            others[name] = value
            continue
        own = layer._parameters["bias"]
        if own is None or own.shape != value.shape:
            has = "no bias" if own is None else f"a bias of shape {tuple(own.shape)}"
            raise AdapterError(
                f"{name} has shape {tuple(value.shape)}, and the base has {has}: it belongs to another base"
            )
        change = value.to(own.device) - own.detach().float()
        before = layers.get(path, ScaledLayer())
        shift = change if before.shift is None else before.shift.to(own.device) + change
        layers[path] = ScaledLayer(before.factors, before.input, before.output, shift)
    return others


def tunes_linear(model: Model, names: Iterable[str]) -> bool:
    """Whether LN tuning trains linear layers, as it does on BERT by default. names: of the adapter's tensors."""
    paths = {name.removeprefix(LORA_PREFIX).partition(NORMS)[0] for name in names if NORMS in name}
    return any(quantized.is_linear(linear_at(model, path)) for path in paths)


def with_modules(values: Mapping[str, Tensor], settings: AdapterConfig, model: Model) -> dict[str, nn.Module]:
    """A frozen module for each that the values replace, by its path.

    Args:
        values: by names in the model; a module's missing parameters are the base's.
        settings: of PEFT's configuration.

    Raises:
        AdapterError: a module cannot be replaced for single rows, or the values do not fit.
    """
    whole: dict[str, nn.Module] = {}
    by_path: dict[str, Values] = {}
    for name, value in values.items():
        if name.endswith(TOKENS):
            whole |= _tokens(model, name.removesuffix(TOKENS), value, settings)
        else:
            path, _, key = name.rpartition(".")
            by_path.setdefault(path, {})[key] = value
    for path, own in by_path.items():
        module = _module(model, path)
        _require_shapes(path, module, own)
        whole[path] = with_values(module, own)
    if settings.get("ensure_weight_tying"):
        whole |= _tied_output(model, whole)
    return whole


def _module(model: Model, path: str) -> nn.Module:
    """The base's own module. Raises AdapterError unless it is a norm, an embedding or the output layer."""
    try:
        module = unrouted(model.get_submodule(path))
    except AttributeError:
        raise AdapterError(f"the base has no module {path!r}: the adapter belongs to another architecture") from None
    family = family_of(model.config)
    last = path.rpartition(".")[2]
    if path.partition(".")[0] in family.head_modules:
        raise AdapterError(
            f"{path} is a part of the classification head, which is trained as a whole: name the parts of the body in "
            "target_modules, such as layers.0.attn_norm, and train again"
        )
    if last in family.heads_first:
        raise AdapterError(
            f"{path} of one row cannot differ from that of another, because its input has heads before tokens: "
            "leave it out of target_modules, or merge the adapter with PEFT and use the result as a base"
        )
    alone = isinstance(module, (nn.Embedding, nn.LayerNorm)) or "norm" in type(module).__name__.lower()
    if (alone and last != family.position_module) or path == family.output_layer:
        return module
    raise AdapterError(
        f"the adapter replaces {path}; a row can have its own norms, embeddings and output layer, but no other module: "
        "merge the adapter with PEFT and use the result as a base"
    )


def _require_shapes(path: str, module: nn.Module, values: Values) -> None:
    expected = {name: tuple(each.shape) for name, each in module.named_parameters()}
    for name, value in values.items():
        if name not in expected:
            raise AdapterError(f"{path} of the base has no {name!r}: the adapter belongs to another base")
        if tuple(value.shape) == expected[name]:
            continue
        more = len(value) - expected[name][0]
        remedy = "it belongs to another base"
        if more > 0 and tuple(value.shape[1:]) == expected[name][1:]:
            remedy = f"it has {more} more tokens; save the resized base with its tokenizer and give it as --base"
        raise AdapterError(f"{path}.{name} has shape {tuple(value.shape)} and the base's {expected[name]}: {remedy}")


def _tokens(model: Model, path: str, vectors: Tensor, settings: AdapterConfig) -> dict[str, nn.Module]:
    """The embedding at a path with other vectors (n, D) for a few tokens, and every layer that is tied to it."""
    embedding, ids = _module(model, path), _token_ids(settings.get("trainable_token_indices"), path)
    weight = embedding.get_parameter("weight")
    rows, width = weight.shape
    if vectors.shape != (len(ids), width) or len(set(ids)) != len(ids) or not all(0 <= each < rows for each in ids):
        raise AdapterError(
            f"trainable_token_indices of {path}: expected {len(ids)} different tokens below {rows} and vectors "
            f"({len(ids)}, {width}), given vectors {tuple(vectors.shape)}: it belongs to another base"
        )
    own = TokenRows(embedding, ids, vectors)
    whole: dict[str, nn.Module] = {path: own}
    if not _ties(model) or embedding is not unrouted(model.get_input_embeddings()):
        return whole
    for name, module in model.named_modules(remove_duplicate=False):
        tied = name.removesuffix(".base_module")
        if module._parameters.get("weight") is weight and tied != path:
            another = isinstance(module, nn.Embedding)
            whole[tied] = TokenRows(module, ids, vectors) if another else TokenLogits(module, own)
    return whole


def _ties(model: Model) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _token_ids(value: Plain, path: str) -> list[int]:
    """The tokens of the embedding at a path: PEFT has a list for all, or one for each name."""
    if isinstance(value, Mapping):
        value = next((ids for name, ids in value.items() if path.endswith(name)), None)
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        raise AdapterError(f"trainable_token_indices names no tokens of {path}: save the adapter again with PEFT")
    return value


def _tied_output(model: Model, whole: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The output layer with the new embedding's weight, if the base ties both and the adapter has only one."""
    output, name = model.get_output_embeddings(), family_of(model.config).output_layer
    if output is None or not _ties(model) or name in whole:
        return {}
    inputs = unrouted(model.get_input_embeddings())
    path = next((path for path in whole if unrouted(model.get_submodule(path)) is inputs), None)
    if path is None or isinstance(whole[path], TokenRows):
        return {}
    return {name: with_values(unrouted(output), {"weight": whole[path].get_parameter("weight")})}
