"""`adapter_config.json`: a method in PEFT's words, and back. Knows the keys; refuses to know files and models."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import Tensor

from turret.adapters.adapter import LORA_PREFIX, PROMPT, Adapter
from turret.errors import BundleError
from turret.families import FAMILIES
from turret.methods import LoRA, Method, Prefix

TASK_TYPES = {"classify": "SEQ_CLS", "encoder-decoder": "SEQ_2_SEQ_LM", "decoder": "CAUSAL_LM"}

# Options of PEFT that change the numbers and that we do not compute: anything but these values is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "alora_invocation_tokens": (None,),
    "prefix_projection": (False, None),
    "auto_mapping": (None,),
    "auto_map": (None,),
}


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The JSON object PEFT reads. Paths of layers are whole, so that no suffix can hit another layer."""
    method = adapter.method
    head = sorted({name.split(".")[0] for name in adapter.head})
    config: dict[str, Any] = {
        "peft_type": None,
        "task_type": _task_type(adapter),
        "base_model_name_or_path": adapter.base.id,
        "inference_mode": True,
    }
    if isinstance(method, LoRA):
        paths = {name.removeprefix(LORA_PREFIX).rsplit(".lora_", 1)[0] for name in adapter.tensors}
        config |= {
            "peft_type": "LORA",
            "r": method.r,
            "lora_alpha": int(method.lora_alpha) if method.lora_alpha == int(method.lora_alpha) else method.lora_alpha,
            "lora_dropout": method.lora_dropout,
            "target_modules": sorted(paths),
            "use_rslora": method.use_rslora,
            "fan_in_fan_out": adapter.base.family == "gpt2",
            "bias": "none",
            "modules_to_save": head or None,
        }
    if isinstance(method, Prefix):
        config |= _prefix_shape(adapter) | {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
    return config


def _task_type(adapter: Adapter) -> str | None:
    if adapter.task.get("kind") == "classify" or adapter.head:
        return TASK_TYPES["classify"]
    family = adapter.base.family
    if family is None:
        return None
    known = FAMILIES.get(family)
    return TASK_TYPES["encoder-decoder" if known is not None and known.kind == "encoder-decoder" else "decoder"]


def _prefix_shape(adapter: Adapter) -> dict[str, Any]:
    """How PEFT spells the shape (L, 2, H, P, D) of the decoder's prefix, or of an encoder's where it is alone."""
    layers, _, heads, tokens, dim = adapter.tensors[PROMPT["decoder"]].shape
    return {
        "num_virtual_tokens": tokens,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "num_transformer_submodules": 2 if len(adapter.tensors) > 1 else 1,
    }


def method_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    """The method a PEFT folder holds. Raises BundleError for what we do not compute."""
    for key, allowed in NEUTRAL.items():
        if config.get(key) not in allowed:
            raise BundleError(
                f"adapter_config.json sets {key} to {config[key]!r}, which is not supported: merge it first"
            )
    kind = config.get("peft_type")
    try:
        if kind == "LORA":
            names = ("r", "lora_alpha", "lora_dropout", "use_rslora")
            return LoRA(**{name: config[name] for name in names if name in config})
        if kind == "PREFIX_TUNING":
            prompt = tensors.get(PROMPT["decoder"])
            if prompt is None:
                raise BundleError(f"the prefix has no tensor {PROMPT['decoder']!r}: save it again with PEFT")
            return Prefix(num_virtual_tokens=prompt.shape[0], encoder=False, reparametrize=False)
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(
            f"adapter_config.json has an unusable {'.'.join(map(str, first['loc']))} ({first['msg']}): train it again"
        ) from None
    raise BundleError(f"adapter_config.json has peft_type {kind!r}: expected LORA or PREFIX_TUNING; merge it first")
