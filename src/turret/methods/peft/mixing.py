"""How PEFT's methods change each layer, computed from the stored tensors, so that they mix with others in a batch.

PEFT's own modules compute every method that is not in `METHODS`, one adapter at a time (`through_peft`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from turret.adapters import scaled
from turret.adapters.adapter import LORA_PREFIX, Parts, linear_at
from turret.adapters.lora import sizes
from turret.adapters.scaled import ScaledLayer
from turret.errors import AdapterError
from turret.methods.peft.spec import MARKS, beside
from turret.methods.peft.whole import with_biases, with_modules

if TYPE_CHECKING:
    from turret.json_types import JsonMapping
    from turret.transformer import Model

MORE = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}  # setting of LoRA -> mark of its tensor
Layers = dict[str, ScaledLayer]  # by path
ByLayer = Mapping[str, Mapping[str, Tensor]]  # layer -> the last part of a tensor's name -> the tensor


def parts_of(kind: str, settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Parts | None:
    """The change of each layer and the modules that are replaced, or None for a method that only PEFT computes.

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
    extra = beside(tensors, MARKS[kind])
    layers = dict(compute(settings, {name: each for name, each in tensors.items() if name not in extra}, model))
    values = {name.removeprefix(LORA_PREFIX): tensors[name].float() for name in extra}
    values = with_biases(values, layers, model)
    whole = with_modules(values, settings, model)
    if not layers and not whole:
        raise AdapterError(f"the {kind} holds no tensor of a layer: save it again")
    return Parts(layers=layers, whole=whole)


def _by_layer(tensors: Mapping[str, Tensor]) -> ByLayer:
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


def _layer(model: Model, path: str) -> nn.Module:
    """A linear layer, or GPT-2's Conv1D. Raises AdapterError for another module."""
    layer = linear_at(model, path)
    sizes(layer)
    return layer


def _lora(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """The variants of LoRA that the method `lora` does not have: DoRA, ranks and alphas by pattern, biases."""
    wanted = {"lora_A", "lora_B"} | {mark for key, mark in MORE.items() if settings.get(key)}
    for path, parts in _by_layer(tensors).items():
        layer = _layer(model, path)
        _require_marks(path, parts, wanted)
        A, B = parts["lora_A"], parts["lora_B"]
        d_in, d_out = sizes(layer)
        if A.shape[1:] != (d_in,) or B.shape != (d_out, len(A)):
            raise AdapterError(
                f"LoRA of {path} has shapes {tuple(A.shape)} and {tuple(B.shape)}: expected (r, {d_in}) and "
                f"({d_out}, r); it belongs to another base"
            )
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
        _require_marks(path, parts, {"ia3_l"})
        gain, (d_in, _) = parts["ia3_l"], sizes(_layer(model, path))
        inputs = gain.shape[0] == 1 and gain.shape[1] == d_in
        yield path, ScaledLayer(input=gain.flatten()) if inputs else ScaledLayer(output=gain.flatten())


def _vera(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """diag(b) B diag(d) A, where all layers share A and B (Kopiczko et al. 2024)."""
    A, B = (tensors.get(f"base_model.{name}") for name in ("vera_A", "vera_B"))
    if A is None or B is None:
        raise AdapterError("this VeRA was saved without its projection: save it with save_projection=True")
    for path, parts in _by_layer(tensors).items():
        _require_marks(path, parts, {"vera_lambda_d", "vera_lambda_b"})
        d_in, d_out = sizes(_layer(model, path))
        down = parts["vera_lambda_d"][:, None] * A[:, :d_in].float()
        up = parts["vera_lambda_b"][:, None] * B[:d_out].float()
        yield path, ScaledLayer((down, up))


def _ln_tuning(settings: JsonMapping, tensors: Mapping[str, Tensor], model: Model) -> Iterator[tuple[str, ScaledLayer]]:
    """Norms alone, which `with_modules` replaces (Zhao et al. 2023)."""
    yield from ()


def _require_marks(path: str, parts: Mapping[str, Tensor], known: set[str]) -> None:
    """Raises AdapterError unless a layer has these tensors, so that none is left out in silence."""
    if odd := sorted(set(parts) ^ known):
        word = "lacks" if odd[0] in known else "has"
        raise AdapterError(f"{path} {word} {odd[0]}, unlike what its configuration says: save the adapter again")


Compute = Callable[["JsonMapping", Mapping[str, Tensor], "Model"], Iterator[tuple[str, ScaledLayer]]]
METHODS: dict[str, Compute] = {
    "LORA": _lora,
    "DORA": _lora,
    "RSLORA": _lora,
    "IA3": _ia3,
    "VERA": _vera,
    "LN_TUNING": _ln_tuning,
}
