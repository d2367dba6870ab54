"""The axis of families: one file for each architecture and its near relatives, and a table of them. Loads no torch."""

from __future__ import annotations

from turret.errors import UnknownFamily
from turret.families.albert import ALBERT
from turret.families.bart import BART, MBART, PEGASUS
from turret.families.bert import BERT
from turret.families.big_bird import BIG_BIRD
from turret.families.deberta_v2 import DEBERTA_V2
from turret.families.distilbert import DISTILBERT
from turret.families.electra import ELECTRA
from turret.families.family import Family, Site, parts_of_head
from turret.families.gemma2 import GEMMA2, GEMMA3
from turret.families.gpt2 import GPT2
from turret.families.llama import LLAMA, QWEN2, QWEN3
from turret.families.mistral import MISTRAL
from turret.families.modernbert import MODERNBERT
from turret.families.mpnet import MPNET
from turret.families.phi3 import PHI3
from turret.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from turret.families.t5 import MT5, T5
from turret.json_types import Plain
from turret.transformer import ModelConfig

# --- table ------------------------------------------------------------------------------------------------------------
# The table of families.


ENCODERS = (
    *(BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, MODERNBERT, ELECTRA, ALBERT, MPNET, DEBERTA_V2),
    BIG_BIRD,
)
ENCODER_DECODERS = (T5, MT5, BART, MBART, PEGASUS)
DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, GPT2)
FAMILIES: dict[str, Family] = {family.name: family for family in (*ENCODERS, *ENCODER_DECODERS, *DECODERS)}


def family_named(name: Plain) -> Family:
    """The family of a `model_type`. Raises UnknownFamily, which lists the supported ones."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnknownFamily(
            f"architecture {name!r} is not supported: expected one of {', '.join(sorted(FAMILIES))}; use one of them"
        )
    return FAMILIES[name]


def family_of(config: ModelConfig) -> Family:
    """The family of a model's configuration. Raises UnknownFamily, which lists the supported ones."""
    return family_named(getattr(config, "model_type", None))


# --- families ---------------------------------------------------------------------------------------------------------


__all__ = [
    "FAMILIES",
    "Family",
    "Site",
    "family_named",
    "family_of",
    "parts_of_head",
]
