"""The table of families."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turret.errors import UnknownFamily
from turret.families.bart import BART
from turret.families.bert import BERT
from turret.families.distilbert import DISTILBERT
from turret.families.family import Family
from turret.families.gpt2 import GPT2
from turret.families.llama import LLAMA
from turret.families.mistral import MISTRAL
from turret.families.modernbert import MODERNBERT
from turret.families.qwen2 import QWEN2
from turret.families.qwen3 import QWEN3
from turret.families.roberta import ROBERTA
from turret.families.t5 import T5
from turret.json_types import JsonValue

if TYPE_CHECKING:
    from turret.transformer import ModelConfig

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (BERT, ROBERTA, DISTILBERT, MODERNBERT, T5, BART, LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)
}


def family_named(name: JsonValue) -> Family:
    """The family of a `model_type`. Raises UnknownFamily, which lists the supported ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnknownFamily(
            f"architecture {name!r} is not supported: expected one of {', '.join(sorted(FAMILIES))}; use one of them"
        )
    return FAMILIES[name]


def family_of(config: ModelConfig) -> Family:
    """The family of a model's configuration. Raises UnknownFamily, which lists the supported ones."""
    return family_named(getattr(config, "model_type", None))
