"""What the JSON files of a bundle say: its manifest, and PEFT's configuration.

A manifest of today's turret has every key. One from elsewhere may lack some, so the sections are read by `task_in` and
the like, which give an empty one for what is missing or no object.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias, TypedDict

from turret.errors import BundleError
from turret.json_types import Plain

if TYPE_CHECKING:
    from turret.tasks.shapes import Generation, TaskSpec


MethodSpec: TypeAlias = Mapping[str, Plain]  # the fields of a `Method`
AdapterConfig: TypeAlias = Mapping[str, Plain]  # `adapter_config.json`; each method of PEFT has keys of its own


class FileEntry(TypedDict):
    """A file of a bundle."""

    bytes: int
    sha256: str


BaseKey = Literal["id", "fingerprint", "family", "revision", "quantization"]


class BaseSpec(TypedDict, total=False):
    """The base that an adapter was trained on."""

    id: str
    fingerprint: str | None
    family: str | None
    revision: str | None
    quantization: str | None


class FlatLossSpec(TypedDict):
    """The level of a loss that is no better than guessing."""

    loss: float
    guessing: float


class ImportedFiles(TypedDict, total=False):
    """Where an imported adapter is from."""

    sha256: dict[str, str]  # of its files
    peft_version: str
    hub_commit: str


class Merge(TypedDict):
    """How versions were merged."""

    how: str
    weights: list[float]
    density: float


class Lineage(TypedDict, total=False):
    """What the weights depend on. parent, reference: digests of versions."""

    recipe: str
    data: str
    base: str
    tokenizer: str
    world_size: int
    device: str
    parent: str
    reference: str
    seed: int
    libraries: dict[str, str]
    steps: int
    lr: float
    head_start: dict[str, float]
    flat_loss: FlatLossSpec
    kept_step: int
    promise: Mapping[str, Plain]  # the fields of `turret.store.promises.Terms`, and `sureness`
    imported: ImportedFiles
    parents: list[str]
    merge: Merge


class Manifest(TypedDict, total=False):
    """The file `manifest.json` of a bundle."""

    format: int
    method: MethodSpec
    task: TaskSpec
    generation: Generation
    base: BaseSpec
    lineage: Lineage
    files: dict[str, FileEntry]
    digest: str


def base_in(manifest: Manifest) -> BaseSpec:
    """The section `base`."""
    found = manifest.get("base")
    return found if isinstance(found, Mapping) else {}


def method_in(manifest: Manifest) -> MethodSpec:
    """The section `method`."""
    found = manifest.get("method")
    return found if isinstance(found, Mapping) else {}


def task_in(manifest: Manifest) -> TaskSpec:
    """The section `task`."""
    found = manifest.get("task")
    return found if isinstance(found, Mapping) else {}


def lineage_in(manifest: Manifest) -> Lineage:
    """The section `lineage`."""
    found = manifest.get("lineage")
    return found if isinstance(found, Mapping) else {}


# --- keys of adapter_config.json --------------------------------------------------------------------------------------
# Those that turret computes, and those that it refuses.


# Options of PEFT that change the output and are not computed here: any other value is refused.
NEUTRAL: dict[str, tuple[Plain, ...]] = {
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
    "loftq_config": ({}, None),
    "use_qalora": (False, None),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "ensure_weight_tying": (False, None),
}

# Keys of PEFT that repeat what the tensors show, or say where the adapter came from or how it was trained.
REDUNDANT = {
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config"),
    *("corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("init_weights", "encoder_hidden_size", "prefix_projection"),
}
CODE = ("auto_map", "auto_mapping")
KEPT_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initializations of LoRA that do not change the base


def check_config(config: AdapterConfig, computed: Collection[str] = ()) -> None:
    """Raise BundleError for options that are not computed here, for unknown keys, and for keys that name code.

    An unknown key passes with an empty value: PEFT writes every option that it has, used or not.

    computed: keys of `NEUTRAL` that the method computes.
    """
    refuse_code(config)
    for key, allowed in NEUTRAL.items():
        if key not in computed and config.get(key) not in allowed:
            raise BundleError(
                f"adapter_config.json sets {key} to {short_ascii(config[key])}, which is not supported: merge it first"
            )
    if config.get("init_lora_weights") not in KEPT_BASE:
        raise BundleError(
            f"adapter_config.json has init_lora_weights {short_ascii(config['init_lora_weights'])}, which changes the "
            "base's weights: save it with PEFT's path_initial_model_for_weight_conversion, or merge it first"
        )
    for key, value in config.items():
        if key not in REDUNDANT and key not in NEUTRAL and value not in (None, False, {}, []):
            raise BundleError(
                f"adapter_config.json has an unknown key {short_ascii(key)}: remove it, or merge it first"
            )


def refuse_code(config: AdapterConfig) -> None:
    """Raise BundleError for a key that names code."""
    for key in CODE:
        if config.get(key) is not None:
            raise BundleError(
                f"adapter_config.json has {key}, which names code: turret runs no code from outside; remove it"
            )


def check_agreement(config: AdapterConfig, expected: AdapterConfig) -> None:
    """Raise BundleError unless the configuration has these keys and values of the manifest."""
    for key, value in expected.items():
        if config.get(key) != value:
            raise BundleError(
                f"adapter_config.json and manifest.json disagree on {key} ({short_ascii(config.get(key))} and "
                f"{short_ascii(value)}): export it again"
            )


def short_ascii(value: Plain) -> str:
    """The value in ASCII, short enough for an error."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:56]}…"
