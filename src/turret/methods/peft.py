"""The settings and rates of a method that PEFT computes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from turret.families.family import Family
from turret.json_types import JsonObject, Plain
from turret.manifest import AdapterConfig, MethodSpec
from turret.methods.lora import LoRA
from turret.methods.method import Method, Operation

# IA3 (Liu et al. 2022) and VeRA (Kopiczko et al. 2024) train a few factors, at several times LoRA's rate. Prompt
# embeddings train at the rate of a prefix without its MLP. Other methods use LoRA's rate.
RATES = {"IA3": 3e-3, "VERA": 4e-3, "PROMPT_TUNING": 1e-2, "P_TUNING": 1e-3}

MARKS = {  # the methods that are computed from their stored tensors, and how PEFT marks these
    "LORA": "lora_",
    "DORA": "lora_",
    "RSLORA": "lora_",
    "IA3": "ia3_",
    "VERA": "vera_",
    "LN_TUNING": "ln_tuning_layers_",  # marks none: all of its tensors replace norms
}
PROMPTS = ("PROMPT_TUNING", "P_TUNING")  # virtual tokens before a decoder's text
WRAPPED = (  # an engine calls PEFT's own module in each linear layer; all that it needs is in the stored tensors
    *("BEFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "LOHA", "LOKR", "MISS"),
    *("OFT", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "TINYLORA", "VBLORA", "WAVEFT"),
)
SLOW = {"HRA": "r products of the whole weight in every pass"}  # asked alone on a base
MIXED = (*MARKS, *(kind for kind in WRAPPED if kind not in SLOW), *PROMPTS)  # share a base with other adapters
REMEDY = "if PEFT can merge it, export it merged and serve it as a base"
# The largest values of settings that cost time in every pass, or draw at random: they would hold up others.
MOST = {"r": 256, "num_cayley_neumann_terms": 32, "psoft_svd_lowrank_niter": 32, "sample_at_inference": 0}
# Settings that choose layers by patterns. An engine reads the layers from the names of the stored tensors instead.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
PLAIN = re.compile(r"[\w. -]*")  # a name, which PEFT may read as a pattern
LINEAR_ONLY = ("LOHA", "LOKR", "OFT")  # PEFT has them for nn.Linear, not for GPT-2's Conv1D
MORE_LORA = ("use_dora", "lora_bias", "trainable_token_indices")  # settings of PEFT's LoRA that `LoRA` does not have
LORA_PREFIX = "base_model.model."  # PEFT puts it before the name of a layer's tensor
NORMS = ".ln_tuning_layers."  # in the names of norms that LN tuning trains
OUTPUT = "lm_head"
REPEATED = ("original_module", "modules_to_save")  # in the names of what PEFT saves twice with bias = "all"
# Keys of an `adapter_config.json` that describe the file and the base, or how the adapter started.
SAID = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("modules_to_save", "peft_version", "megatron_config", "megatron_core", "tokenizer_kwargs", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "init_lora_weights"),
}


class Peft(Method):
    """Any other method of PEFT. `peft_type` is PEFT's name for it; every other key is one of PEFT's configuration.

    The keys are checked by PEFT when the method is attached to a base; here they are plain values.

    Args:
        peft_type: PEFT's name of the method: `IA3`, `VERA`, `LOHA`, `OFT`, `PROMPT_TUNING`, …; `DORA` is LoRA with
            `use_dora`, at Turret's own rank, alpha and dropout
    """

    tuner_at: ClassVar[str] = "turret.adapters.tuners.peft:PeftTuner"
    unsharded: ClassVar[str | None] = "is computed by PEFT"
    wraps_modules: ClassVar[bool] = True
    shares_base: ClassVar[bool] = False  # except those in `MIXED`
    open_settings: ClassVar[bool] = True
    named_by: ClassVar[str | None] = "peft_type"
    named_as: ClassVar[str] = "method of PEFT by its name, such as peft:IA3 or peft:DORA,r=4"

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: Literal["peft"] = "peft"
    peft_type: str = Field(min_length=1, max_length=60)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Plain) -> Plain:
        """Drop keys that are None, and turn tuples into lists."""
        if not isinstance(value, dict):
            return value
        return {key: _tuples_to_lists(each) for key, each in value.items() if each is not None}

    @field_validator("peft_type")
    @classmethod
    def _capital(cls, value: str) -> str:
        return value.strip().upper().replace("-", "_")

    @property
    def summary(self) -> str:
        return f"{self.peft_type}, computed by PEFT with its default settings except those given"

    def refusal(self, operation: Operation, family: Family, generates: bool) -> str | None:
        """The same as in `Method`. PEFT itself may refuse more when it sees the model."""
        kind = self.peft_type
        if kind in PROMPTS and not (generates and family.decoder_only):
            return f"{kind} puts virtual tokens before the text of a generating decoder: use the method prefix"
        if kind in LINEAR_ONLY and family.fan_in_fan_out:
            return f"PEFT has no {kind} for the layers of {family.name}, which are no nn.Linear: use the method lora"
        told = {"target_modules", "feedforward_modules"} <= self.options.keys()
        if kind == "IA3" and not told and not family.has_ia3_layers:
            return (
                f"PEFT does not know the layers of {family.name} for IA3: set method.target_modules and "
                "method.feedforward_modules, or use the method lora"
            )
        if operation != "mix":
            return None
        if kind in SLOW:
            return f"{kind} computes {SLOW[kind]}, which would hold up others on its base: {REMEDY}"
        return self.why_unanswered(family, generates)

    def why_unanswered(self, family: Family, generates: bool) -> str | None:
        kind = self.peft_type
        if (reason := self.refusal("train", family, generates)) is not None:
            return reason
        if kind not in (*MIXED, *SLOW):
            return f"{kind} is computed by PEFT, one adapter at a time, so its base cannot serve others: {REMEDY}"
        for key, value in self.options.items() if kind in WRAPPED else ():
            if isinstance(value, (int, float)) and value > MOST.get(key, value):
                return f"{kind} with {key} = {value} would hold up others on its base (at most {MOST[key]}): {REMEDY}"
            if key not in CHOOSING and not all(map(PLAIN.fullmatch, _texts(value))):
                return f"method.{key} of this {kind} is a pattern, and a base that serves others takes names: {REMEDY}"
            if key == "bias" and value != "none":
                return f"{kind} with bias = {str(value)[:20]!a} trains the base's own biases: {REMEDY}"
        return None

    @classmethod
    def mixes(cls, settings: MethodSpec) -> bool:
        return settings.get("peft_type") in MIXED

    @classmethod
    def reads(cls, config: AdapterConfig, names: Iterable[str] = ()) -> bool:
        """Whether `MARKS` has it, or it is PEFT's LoRA with settings or tensors that `LoRA` does not have."""
        kind = config.get("peft_type")
        if kind == "LORA":
            more = any(config.get(key) for key in MORE_LORA) or config.get("bias") == "all"
            return more or bool(other_trained_tensors(names, MARKS["LORA"]))
        return isinstance(kind, str) and kind in MARKS

    @classmethod
    def from_peft(cls, config: AdapterConfig, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        given = {key: value for key, value in config.items() if key not in SAID and value not in (None, {}, [])}
        return cls.model_validate({"peft_type": config["peft_type"], **given})

    @property
    def options(self) -> JsonObject:
        """The settings of PEFT's configuration that are set."""
        return dict(self.model_extra or {})

    def with_options(self, options: MethodSpec) -> Self:
        return type(self).model_validate({"peft_type": self.peft_type, **options})

    def rate(self, family_kind: str, large: bool) -> float:
        return RATES.get(self.peft_type) or LoRA().rate(family_kind, large)

    @property
    def head_lr_ratio(self) -> float | None:
        return None if self.peft_type in RATES else LoRA().head_lr_ratio


def other_trained_tensors(names: Iterable[str], mark: str) -> set[str]:
    """The tensors of norms, embeddings, biases and the output layer that are trained whole, besides a method's own.

    Only tensors of the body and the output layer count. The names of the method's own tensors show how names of the
    body begin. A head does not count, nor does a pooler that is trained whole.

    Args:
        names: of a file's tensors.
        mark: of the method's own.
    """
    names = [name for name in names if name.startswith(LORA_PREFIX)]
    own = {name for name in names if any(part.startswith(mark) for part in name.split("."))}
    norms = {name for name in names if NORMS in name}
    roots = {name.removeprefix(LORA_PREFIX).partition(".")[0] for name in own | norms} | {OUTPUT}
    body = {name for name in names if name.removeprefix(LORA_PREFIX).partition(".")[0] in roots}
    pooler = {name for name in body - own if ".pooler." in name}
    return body - own - (pooler if any(name.endswith(".weight") for name in pooler) else set())


def without_repeated(names: Iterable[str]) -> set[str]:
    """The names without those that PEFT saves a second time."""
    return {name for name in names if not any(part in REPEATED for part in name.split("."))}


def _tuples_to_lists(value: Plain) -> Plain:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(each) for key, each in value.items()}
    return [_tuples_to_lists(each) for each in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Plain) -> Iterator[str]:
    """The texts in a setting, the keys of tables among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
