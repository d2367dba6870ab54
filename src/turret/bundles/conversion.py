"""Convert adapters of other PEFT methods to LoRA, so that they mix, train further and serve like any other.

| `peft_type` | how | exact |
| --- | --- | --- |
| LORA with `rank_pattern` or `alpha_pattern` | its factors, padded with zeros to the largest rank | yes |
| LORA with `bias = "lora_only"` | the difference from the base's bias, as `lora_bias` | yes |
| ADALORA | `B diag(E) A` | yes |
| LOHA, LOKR and others that PEFT converts | PEFT's `convert_to_lora` | no: small singular values are cut |
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turret import quantized
from turret.adapters.adapter import LORA_PREFIX
from turret.bundles.bundle import CONFIG, WEIGHTS
from turret.errors import BundleError
from turret.manifest import AdapterConfig, refuse_code, short_ascii
from turret.methods import METHODS

if TYPE_CHECKING:
    import peft

    from turret.families import Family
    from turret.transformer import Model

RANK = 32  # default rank of a conversion that cuts singular values
MOST_DEVIATION = 0.05  # of the largest output; a conversion with a larger deviation is refused
PATTERNS = ("rank_pattern", "alpha_pattern")
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT")
NOT_LOW_RANK = {  # methods whose change of the weights has no low rank, and why
    "TRAINABLE_TOKENS": "it changes embeddings of single tokens",
    "OFT": "it rotates whole layers",
    "BOFT": "it rotates whole layers",
    "HRA": "it rotates whole layers",
}
Factors = tuple[Tensor, Tensor]  # A (R, D_in), B (D_out, R) with its scaling


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    kind: str  # PEFT's name of the original method
    rank: int
    deviation: float  # largest change of an output by the conversion, over the largest output


def needs_conversion(config: AdapterConfig) -> bool:
    """Whether Turret can read the adapter of this `adapter_config.json` only after a conversion."""
    kind = config.get("peft_type")
    if kind == "LORA":
        variant = any(config.get(key) for key in PATTERNS) or config.get("bias") == "lora_only"
        return variant and not METHODS["peft"].reads(config)
    known = any(each.reads(config) for each in METHODS.values())
    return isinstance(kind, str) and not known and kind not in (*PROMPTS, *NOT_LOW_RANK)


def as_lora(
    folder: Path, target: Path, model: Model, family: Family, ids: Tensor, rank: int | None = None
) -> Converted:
    """Write a PEFT folder with a LoRA that changes the base like the adapter in `folder`.

    Args:
        folder: a PEFT folder: safetensors and a configuration.
        target: a new folder.
        model: the base with nothing attached; it is restored afterwards.
        ids: a few texts as token ids (B, T) int64, on which the deviation is measured.
        rank: of the LoRA, if the conversion cuts singular values; None: 32.

    Raises:
        BundleError: PEFT does not read or convert it, or its outputs would change by more than 5%.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    refuse_code(config)
    kind = str(config.get("peft_type"))
    if config.get("bias") == "all":
        raise BundleError(f'{kind} with bias = "all" is not converted: train it again as LoRA, whose biases are read')
    with _load_peft_model(folder, model, kind) as wrapped:
        original = _outputs(wrapped, ids)
        factors = dict(_factors(wrapped, kind, rank))
        saved = tuple(_trained_whole(wrapped))
    r = max(len(A) for A, _ in factors.values())
    stored = load_file(folder / WEIGHTS)
    tensors = {key: value for key, value in stored.items() if key.startswith(saved)}
    biases = _biases(stored, model, factors)
    tensors |= {f"{LORA_PREFIX}{path}.lora_B.bias": bias for path, bias in biases.items()}
    for path, (A, B) in factors.items():
        tensors[f"{LORA_PREFIX}{path}.lora_A.weight"] = nn.functional.pad(A.float(), (0, 0, 0, r - len(A))).contiguous()
        tensors[f"{LORA_PREFIX}{path}.lora_B.weight"] = nn.functional.pad(B.float(), (0, r - B.shape[1])).contiguous()
    copied = ("task_type", "base_model_name_or_path", "revision", "modules_to_save", "trainable_token_indices")
    lora = {key: config[key] for key in (*copied, "peft_version") if key in config}
    lora |= {"peft_type": "LORA", "r": r, "lora_alpha": r, "lora_dropout": 0.0, "inference_mode": True}
    lora |= {"target_modules": sorted(factors), "fan_in_fan_out": family.fan_in_fan_out, "bias": "none"}
    lora |= {"lora_bias": True} if biases else {}
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(lora, indent=2), encoding="utf-8")
    with _load_peft_model(target, model, "LORA") as wrapped:
        converted = _outputs(wrapped, ids)
    deviation = float((converted - original).abs().max() / original.abs().max().clamp(min=1e-12))
    if deviation > MOST_DEVIATION:
        raise BundleError(
            f"{kind} as LoRA of rank {r} would change outputs by {100 * deviation:.0f}% of the largest, at most "
            f"{100 * MOST_DEVIATION:.0f}% are allowed: give a larger --rank, or train it again as LoRA"
        )
    return Converted(kind, r, deviation)


@contextmanager
def _load_peft_model(folder: Path, model: Model, kind: str) -> Iterator[peft.PeftModel]:
    """PEFT's model of a folder. The base is restored after the block."""
    quantized.before_peft()
    import peft

    if kind in NOT_LOW_RANK:
        raise BundleError(f"{kind} cannot be a LoRA: {NOT_LOW_RANK[kind]}; train it again as LoRA")
    flags = {name: each.requires_grad for name, each in model.named_parameters()}
    modules = dict(model.named_modules())
    biases = {name: each.detach().clone() for name, each in model.named_parameters() if name.endswith(".bias")}
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder))
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise BundleError(
            f"PEFT does not read this adapter of type {short_ascii(kind)} ({' '.join(str(error).split())[:100]}): save "
            "it again on this base"
        ) from None
    try:
        yield wrapped.eval()
    finally:
        wrapped.unload()
        for path, module in modules.items():  # PEFT leaves what was trained whole, a head or a norm
            parent = modules.get(path.rpartition(".")[0])
            if path and parent is not None:
                parent._modules[path.rpartition(".")[2]] = module
        for name, each in model.named_parameters():
            each.requires_grad_(flags[name])
            if name in biases:  # PEFT overwrites the base's with trained ones
                each.data.copy_(biases[name])


@torch.no_grad()
def _outputs(wrapped: peft.PeftModel, ids: Tensor) -> Tensor:
    """Logits of a few texts, (B, C) or (B, T, V)."""
    more = {"decoder_input_ids": ids} if wrapped.config.is_encoder_decoder else {}
    logits: Tensor = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
    return logits.float()


@torch.no_grad()
def _factors(wrapped: peft.PeftModel, kind: str, rank: int | None) -> Iterator[tuple[str, Factors]]:
    """The factors of every adapted layer by its path in the base."""
    layers = {name.removeprefix(LORA_PREFIX): each for name, each in wrapped.named_modules() if _adapted(each)}
    if kind == "LORA":
        for path, layer in layers.items():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield path, (A.clone(), B * layer.scaling["default"])
        return
    if kind == "ADALORA":
        for path, layer in layers.items():
            scaling = layer.scaling["default"] / (layer.ranknum["default"] + 1e-5)
            yield path, (layer.lora_A["default"] * layer.lora_E["default"], layer.lora_B["default"] * scaling)
        return
    yield from _by_peft(wrapped, kind, rank).items()


def _trained_whole(wrapped: peft.PeftModel) -> Iterator[str]:
    """What the names of the tensors begin with that PEFT trains whole, in a head or in the body."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in wrapped.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield f"{name}."


def _adapted(module: nn.Module) -> bool:
    return "default" in getattr(module, "lora_A", ())


def _biases(tensors: Mapping[str, Tensor], model: Model, factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The differences of trained biases from the base's, by path; empty if none was trained."""
    ending = ".base_layer.bias"
    biases = {name: each for name, each in tensors.items() if name.endswith(ending)}
    trained = {name.removeprefix(LORA_PREFIX).removesuffix(ending): each for name, each in biases.items()}
    own = {path: model.get_submodule(path) for path in (factors if trained else ())}
    return {
        path: trained[path].float() - layer.bias.float() if path in trained else torch.zeros(layer.out_features)
        for path, layer in own.items()
        if isinstance(layer, nn.Linear)
    }


def _by_peft(wrapped: peft.PeftModel, kind: str, rank: int | None) -> Mapping[str, Factors]:
    from peft import convert_to_lora
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [each for each in wrapped.modules() if isinstance(each, BaseTunerLayer)]
    smallest = min(min(each.get_base_layer().weight.shape) for each in layers)
    chosen = min(int(rank or RANK), smallest)
    try:
        _, state = convert_to_lora(wrapped, chosen)
    except (TypeError, ValueError) as error:
        raise BundleError(
            f"PEFT does not convert {short_ascii(kind)} to LoRA ({' '.join(str(error).split())[:100]}): "
            "train it again as LoRA"
        ) from None
    names = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
    return {
        name.removeprefix(LORA_PREFIX): (state[f"{name}.lora_A.weight"].float(), state[f"{name}.lora_B.weight"].float())
        for name in sorted(names)
    }
