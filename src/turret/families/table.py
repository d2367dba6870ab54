"""Every family by its name, and which one a configuration belongs to."""

from __future__ import annotations

from typing import Any

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

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (BERT, ROBERTA, DISTILBERT, MODERNBERT, T5, BART, LLAMA, MISTRAL, QWEN2, QWEN3, GPT2)
}


def family_named(name: object) -> Family:
    """The family of a `model_type`. Raises UnknownFamily, naming the known ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnknownFamily(
            f"architecture {name!r} is not supported: expected one of {', '.join(sorted(FAMILIES))}; use one of them"
        )
    return FAMILIES[name]


def family_of(config: Any) -> Family:
    """The family of a model's configuration. Raises UnknownFamily, naming the known ones."""
    return family_named(getattr(config, "model_type", None))
