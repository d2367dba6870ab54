"""How PEFT's methods change each layer, computed from the stored tensors, so that they mix with others in a batch.

PEFT's own modules compute every method that is not in `METHODS`, one adapter at a time (`through_peft`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from turret.adapters import scaled
from turret.adapters.adapter import LORA_PREFIX, linear_at
from turret.adapters.scaled import ScaledLayer
from turret.errors import AdapterError

if TYPE_CHECKING:
    from turret.json_types import JsonMapping
    from turret.transformer import Model

Layers = dict[str, ScaledLayer]  # by path
Parts = Mapping[str, Mapping[str, Tensor]]  # layer -> the last part of a tensor's name -> the tensor


def layers_of(kind: str, settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Layers | None:
    """The change of each layer, or None for a method that only PEFT computes.

    Args:
        kind: PEFT's `peft_type`.
        settings: of PEFT's configuration.
        tensors: by PEFT's names.

    Raises:
        AdapterError: the tensors do not fit the model.
    """
    compute = METHODS.get(kind)
    if compute is None:
        return None
    layers = dict(compute(settings, tensors, model))
    if not layers:
        raise AdapterError(f"the {kind} holds no tensor of a layer: save it again")
    return layers


def _by_layer(tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors by layer and mark: `base_model.model.<path>.<mark>[.weight]`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith(LORA_PREFIX):
            continue
        path, mark = _split(name.removeprefix(LORA_PREFIX))
        layers.setdefault(path, {})[mark] = tensor.float()
    return layers


def _split(name: str) -> tuple[str, str]:
    """(layer, mark): `a.b.query.lora_A.weight` is (`a.b.query`, `lora_A`)."""
    if name.endswith(".lora_B.bias"):
        return name.removesuffix(".lora_B.bias"), "lora_B.bias"
    path, _, mark = name.removesuffix(".weight").rpartition(".")
    return path, mark


def _layer(model: Model, path: str) -> nn.Linear:
    layer = linear_at(model, path)
    if not isinstance(layer, nn.Linear):
        raise AdapterError(f"{path} is a {type(layer).__name__}: only linear layers mix; export it merged")
    return layer


def _lora(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """The variants of LoRA that the method `lora` does not have: DoRA, ranks and alphas by pattern, biases."""
    for path, parts in _by_layer(tensors).items():
        layer = _layer(model, path)
        A, B = parts.get("lora_A"), parts.get("lora_B")
        if A is None or B is None:
            raise AdapterError(f"LoRA of {path} needs lora_A and lora_B: save it again")
        B = B * _scaling(settings, path, len(A))
        if (magnitude := parts.get("lora_magnitude_vector")) is not None:
            yield path, scaled.dora(layer, A, B, magnitude)
            continue
        bias = parts.get("lora_B.bias")
        yield path, ScaledLayer((A, B), shift=None if bias is None else bias * _scaling(settings, path, len(A)))


def _scaling(settings: JsonMapping, path: str, r: int) -> float:
    """alpha / r or alpha / sqrt(r) of a layer, with PEFT's `alpha_pattern`."""
    from peft.utils.other import get_pattern_key

    alphas = settings.get("alpha_pattern") or {}
    key = get_pattern_key(alphas, path)
    alpha = alphas[key] if key in alphas else settings.get("lora_alpha", 8)
    return float(alpha) / (r**0.5 if settings.get("use_rslora") else r)


def _ia3(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """(1, D_in) scales a feed-forward layer's input, (D_out, 1) another layer's output (Liu et al. 2022)."""
    for path, parts in _by_layer(tensors).items():
        gain = parts["ia3_l"]
        inputs = gain.shape[0] == 1 and gain.shape[1] == _layer(model, path).in_features
        yield path, ScaledLayer(input=gain.flatten()) if inputs else ScaledLayer(output=gain.flatten())


def _vera(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """diag(b) B diag(d) A, where all layers share A and B (Kopiczko et al. 2024)."""
    A, B = (tensors.get(f"base_model.{name}") for name in ("vera_A", "vera_B"))
    if A is None or B is None:
        raise AdapterError("this VeRA was saved without its projection: save it with save_projection=True")
    for path, parts in _by_layer(tensors).items():
        layer = _layer(model, path)
        down = parts["vera_lambda_d"][:, None] * A[:, : layer.in_features].float()
        up = parts["vera_lambda_b"][:, None] * B[: layer.out_features].float()
        yield path, ScaledLayer((down, up))


Compute = Callable[["JsonMapping", Mapping[str, Tensor], "Model"], Iterator[tuple[str, ScaledLayer]]]
METHODS: dict[str, Compute] = {
    "LORA": _lora,
    "DORA": _lora,
    "RSLORA": _lora,
    "IA3": _ia3,
    "VERA": _vera,
}
