"""`adapter_config.json`: a method in PEFT's words, and back. Knows the keys; refuses to know files and models."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from torch import Tensor

from turret.adapters import through_peft
from turret.adapters.adapter import LORA_PREFIX, PROMPT, Adapter
from turret.errors import BundleError
from turret.families import FAMILIES
from turret.methods import LoRA, Method, Peft, Prefix
from turret.tasks import stored_task

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
    "loftq_config": ({}, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False, None),
}

# Keys of PEFT that say what the tensors say as well, where the adapter came from, or how it was trained.
SAID = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("init_weights", "encoder_hidden_size"),
}
CODE = ("auto_map", "auto_mapping")
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # the ways to start a LoRA that leave the base whole
TYPES = {"lora": "LORA", "prefix": "PREFIX_TUNING"}


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
            "fan_in_fan_out": _is_transposed(adapter),
            "bias": "none",
            "modules_to_save": head or None,
        }
    if isinstance(method, Peft):
        made = through_peft.config_of(method)
        config |= through_peft.kept(made) | {"peft_type": made.peft_type.value}
        if head:
            config["modules_to_save"] = head
    if isinstance(method, Prefix):
        config |= _prefix_shape(adapter) | {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
    return config


def _task_type(adapter: Adapter) -> str | None:
    if adapter.head or not stored_task(adapter.task).generates:
        return TASK_TYPES["classify"]
    family = adapter.base.family
    if family is None:
        return None
    known = FAMILIES.get(family)
    return TASK_TYPES["encoder-decoder" if known is not None and known.is_encoder_decoder else "decoder"]


def _is_transposed(adapter: Adapter) -> bool:
    known = FAMILIES.get(adapter.base.family or "")
    return known is not None and known.fan_in_fan_out


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


def check_config(config: dict[str, Any]) -> None:
    """Refuse what we do not compute, what we do not know, and what would choose code.

    A key that is not known passes only with an empty value: PEFT writes every option it has, used or not.
    """
    for key in CODE:
        if config.get(key) is not None:
            raise BundleError(
                f"adapter_config.json carries {key}, which names code: no code from outside is run; remove it"
            )
    for key, allowed in NEUTRAL.items():
        if config.get(key) not in allowed:
            raise BundleError(
                f"adapter_config.json sets {key} to {_short(config[key])}, which is not supported: merge it first"
            )
    if config.get("init_lora_weights") not in KEPT_BASE:
        raise BundleError(
            f"adapter_config.json has init_lora_weights {_short(config['init_lora_weights'])}, whose base has other "
            "weights: save it with PEFT's path_initial_model_for_weight_conversion, or merge it first"
        )
    for key, value in config.items():
        if key not in SAID and key not in NEUTRAL and value not in (None, False, {}, []):
            raise BundleError(f"adapter_config.json has an unknown key {_short(key)}: remove it, or merge it first")


def check_agreement(config: dict[str, Any], method: Method) -> None:
    """The configuration beside a manifest says the manifest's method, so that PEFT computes what we do."""
    said: dict[str, Any] = {"peft_type": TYPES.get(method.kind)}
    if isinstance(method, LoRA):
        said |= {"r": method.r, "lora_alpha": method.lora_alpha, "use_rslora": method.use_rslora}
    for key, expected in said.items():
        if config.get(key) != expected:
            raise BundleError(
                f"adapter_config.json and manifest.json disagree on {key} ({_short(config.get(key))} and "
                f"{expected!r}): export it again"
            )


def check_through_peft(config: dict[str, Any], method: Peft) -> None:
    """The same for a method of PEFT's own: what PEFT makes of the manifest's method, and no code."""
    for key in CODE:
        if config.get(key) is not None:
            raise BundleError(f"adapter_config.json carries {key}, which names code: no code from outside is run")
    made = through_peft.config_of(method)
    for key, expected in (through_peft.kept(made) | {"peft_type": made.peft_type.value}).items():
        if config.get(key) != expected:
            raise BundleError(
                f"adapter_config.json and manifest.json disagree on {key} ({_short(config.get(key))} and "
                f"{_short(expected)}): export it again"
            )


def belongs(method: Peft, name: str) -> bool:
    """Whether a tensor is the method's own, by the mark that PEFT gives its names, and not the head's."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    made = through_peft.config_of(method)
    mark = PEFT_TYPE_TO_PREFIX_MAPPING.get(made.peft_type)
    if made.is_prompt_learning:
        return name == PROMPT["decoder"]
    shared = not name.startswith(LORA_PREFIX)  # what all layers read, such as VeRA's matrices
    return shared or bool(mark and mark in name)


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:56]}…"


def method_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> Method:
    """The method a PEFT folder holds. Raises BundleError for what we do not compute."""
    check_config(config)
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
    raise BundleError(
        f"adapter_config.json has peft_type {_short(kind)}: expected LORA or PREFIX_TUNING; merge it first"
    )
