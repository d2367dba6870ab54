"""Guess the family of an architecture that is not listed, from the modules of its model.

`bases/base.py` compares each guess with the model's own outputs before it is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from turret.families.family import Family, HeadParts, Kind, Pooling, first_token, last_token, no_offset
from turret.families.mistral import configured_window

if TYPE_CHECKING:
    from torch import Tensor, nn

    from turret.transformer import Model, ModelConfig

Classify = Callable[[HeadParts, "Tensor"], "Tensor"]
INTERFACE = "ALL_ATTENTION_FUNCTIONS"  # transformers' table of attention functions
QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "query_proj", "value_proj", "q", "v")
HEADS = ("classifier", "score", "pooler", "head", "pre_classifier")  # common names of the modules of a head
FUSED = ("qkv_proj", "Wqkv", "query_key_value", "c_attn", "in_proj", "qkv")


def kind_of(model_type: str) -> Kind | None:
    """Whether transformers has an architecture as an encoder or a decoder; None if neither.

    An architecture with a masked language model is an encoder. Encoder-decoders differ too much to be guessed.
    """
    from transformers.models.auto import modeling_auto as auto

    if model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    return None


def name_of(model: Model) -> str:
    """The name of the model's architecture."""
    return model.config.model_type


def stand_in(model_type: str, kind: Kind) -> Family:
    """A provisional family of an architecture, for loading its model."""
    return Family(
        name=model_type,
        kind=kind,
        attention=(),
        rows_alone=True,
        lora_targets=(),
        head_modules=HEADS,
        tag_modules=(),
        classify=_nothing,
        body_excludes=("pooler",),
        guessed=True,
    )


def guesses(model: Model, kind: Kind) -> Iterator[Family]:
    """Families that may fit the model, the most likely first: packed rows before rows alone."""
    classifies = "ForSequenceClassification" in type(model).__name__
    attention = _attention(model)
    heads = _heads(model)
    poolings: Sequence[Callable[[ModelConfig], Pooling]] = (last_token,) if kind == "decoder" else (first_token, _mean)
    ways: Sequence[Classify] = CLASSIFY if classifies else (_nothing,)
    alone = (False, True) if attention else (True,)
    if kind == "decoder" and not attention:
        return  # no cache would hold its keys and values
    for rows_alone, offset, pooling, classify in product(
        alone[: 1 if kind == "decoder" else 2], (no_offset, _after_padding), poolings, ways
    ):
        yield Family(
            name=model.config.model_type,
            kind=kind,
            attention=() if rows_alone else attention,
            rows_alone=rows_alone,
            lora_targets=_targets(model),
            head_modules=heads,
            tag_modules=(),
            classify=classify,
            head_dropouts=tuple(name for name in ("dropout", "drop") if hasattr(model, name)),
            heads_first=("q_norm", "k_norm"),  # some are, and nothing tells which
            pooling=pooling,
            window=_window,
            body_excludes=("pooler",),
            positions="table" if _has_table(model) else "rotary",
            position_offset=offset,
            guessed=True,
        )


def _attention(model: Model) -> tuple[str, ...]:
    """The names of the classes that use transformers' attention interface."""
    names: dict[str, None] = {}
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and INTERFACE in code.co_names:
            names[type(module).__name__] = None
    return tuple(names)


def _heads(model: Model) -> tuple[str, ...]:
    """The children with weights, except the body and the output layer."""
    output = model.get_output_embeddings()
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and child is not output and next(child.parameters(), None) is not None
    )


def _targets(model: Model) -> tuple[str, ...]:
    """The query and value layers by their common names, or the one layer that computes both, else all linear layers."""
    names = [path.rpartition(".")[2] for path, module in model.base_model.named_modules() if _is_linear(module)]
    for common in (QUERY_VALUE, FUSED):
        if targets := tuple(name for name in common if name in names):
            return targets
    return tuple(dict.fromkeys(names))


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _has_table(model: Model) -> bool:
    """Whether the model has a learned table of positions."""
    names = ("position_embeddings", "embed_positions", "wpe")
    return any(path.rpartition(".")[2] in names for path, _ in model.base_model.named_modules())


def _window(module: nn.Module) -> int | None:
    own: int | None = getattr(module, "sliding_window", None)
    return configured_window(module) if own is None else own


def _after_padding(config: ModelConfig) -> int:
    return int(config.pad_token_id or 0) + 1


def _mean(config: ModelConfig) -> Pooling:
    return "mean"


# How transformers' classifiers compute logits from the token that they read.
CLASSIFY: tuple[Classify, ...] = (
    lambda part, pooled: part("score")(pooled),
    lambda part, pooled: part("classifier")(part("dropout")(part("pooler")(pooled[:, None]))),
    lambda part, pooled: part("classifier")(part("drop")(part("head")(pooled))),
    lambda part, pooled: part("classifier")(part("dropout")(pooled)),
    lambda part, pooled: part("classifier")(pooled[:, None]),
)


def _nothing(part: HeadParts, pooled: Tensor) -> Tensor:
    raise AttributeError("the model has no classifier")
