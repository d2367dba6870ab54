"""The settings and rates of a method that PEFT computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from turret.json_types import JsonMapping, JsonObject, JsonValue
from turret.methods.lora import LoRA
from turret.methods.method import Method

# IA3 (Liu et al. 2022) and VeRA (Kopiczko et al. 2024) train a few factors, at several times LoRA's rate. Prompt
# embeddings train at the rate of a prefix without its MLP. Other methods use LoRA's rate.
RATES = {"IA3": 3e-3, "VERA": 4e-3, "PROMPT_TUNING": 1e-2, "P_TUNING": 1e-3}


MIXED = ("LORA", "DORA", "RSLORA", "IA3", "VERA")  # these share a base with other adapters, see `mixing`
MORE_LORA = ("use_dora", "lora_bias")  # settings of PEFT's LoRA that `LoRA` does not have
# Keys of an `adapter_config.json` that describe the file and the base, or how the adapter started.
SAID = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("modules_to_save", "peft_version", "megatron_config", "megatron_core", "tokenizer_kwargs", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "init_lora_weights"),
}


class Peft(Method):
    """Any other method of PEFT. `peft_type` is PEFT's name for it; every other key is one of PEFT's configuration.

    The keys are checked by PEFT when the method is attached to a base; here they are plain values.
    """

    numbers_at: ClassVar[str] = "turret.methods.peft.numbers:PeftNumbers"
    wraps_modules: ClassVar[bool] = True
    shares_base: ClassVar[bool] = False  # except those in `MIXED`
    open_settings: ClassVar[bool] = True
    named_by: ClassVar[str | None] = "peft_type"
    named_as: ClassVar[str] = "method of PEFT by its name, such as peft:IA3 or peft:DORA,r=4"
    not_int8: ClassVar[str | None] = "is computed by PEFT"
    classify_steps: ClassVar[int] = 250

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: Literal["peft"] = "peft"
    peft_type: str = Field(min_length=1, max_length=60)  # IA3, DORA, VERA, PROMPT_TUNING, ...

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: JsonValue) -> JsonValue:
        """Drop keys that are None, and turn tuples into lists."""
        if not isinstance(value, dict):
            return value
        return {key: _listed(each) for key, each in value.items() if each is not None}

    @field_validator("peft_type")
    @classmethod
    def _capital(cls, value: str) -> str:
        return value.strip().upper().replace("-", "_")

    @property
    def summary(self) -> str:
        return f"{self.peft_type}, computed by PEFT with its default settings except those given"

    @classmethod
    def mixes(cls, settings: JsonMapping) -> bool:
        return settings.get("peft_type") in MIXED

    @classmethod
    def reads(cls, config: JsonMapping) -> bool:
        """The methods that mix, and PEFT's LoRA with a setting that `LoRA` does not have."""
        kind = config.get("peft_type")
        if kind == "LORA":
            return any(config.get(key) for key in MORE_LORA)
        return kind in MIXED

    @classmethod
    def from_peft(cls, config: JsonMapping, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        given = {key: value for key, value in config.items() if key not in SAID and value not in (None, {}, [])}
        return cls(peft_type=config["peft_type"], **given)

    @property
    def options(self) -> JsonObject:
        """The settings of PEFT's configuration that are set."""
        return dict(self.model_extra or {})

    def with_options(self, options: JsonObject) -> Self:
        return type(self)(peft_type=self.peft_type, **options)

    def rate(self, family_kind: str, large: bool) -> float:
        return RATES.get(self.peft_type) or LoRA().rate(family_kind, large)

    @property
    def head_lr_ratio(self) -> float | None:
        return None if self.peft_type in RATES else LoRA().head_lr_ratio


def _listed(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, (list, tuple)) else value
