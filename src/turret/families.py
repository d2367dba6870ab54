"""What an architecture calls its parts: one entry a family, read by the hooks and by the loader of bases.

A family says which modules compute attention, which linear layers LoRA adapts by default, which modules are the task's
head, and how a pooled vector becomes logits. It refuses to know adapters, files and training, and it loads no torch:
it only reads attributes of a model that somebody else has loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from turret.errors import UnknownFamily

Kind = Literal["encoder", "encoder-decoder", "decoder"]
Group = Literal["encoder", "decoder", "cross"]


@dataclass(frozen=True)
class Site:
    """One attention module of a model, and what a prefix for it looks like."""

    name: str  # dotted path inside the model
    module: Any  # the nn.Module that calls the attention function
    group: Group  # whose prefix it takes: encoder or decoder self-attention, or cross-attention
    layer: int  # 0-based within its group
    kv_heads: int
    head_dim: int

    @property
    def causal(self) -> bool:
        return self.group == "decoder"


@dataclass(frozen=True)
class Family:
    """The names one architecture gives to its parts."""

    name: str
    kind: Kind
    attention: tuple[str, ...]  # class names of the modules that call the attention function
    lora_targets: tuple[str, ...]  # PEFT's own default targets, or query and value where PEFT has none
    head_modules: tuple[str, ...]  # of the sequence classifier; trained and stored with every adapter
    pooling: Literal["first", "modernbert", "last", "eos"]  # which tokens a classifier reads
    classify: Callable[[Any, Any], Any]  # (model, pooled (B, D)) -> logits (B, C)
    body_excludes: tuple[
        str, ...
    ] = ()  # parts of the body that are task-specific (poolers): no part of the fingerprint
    position_offset: Callable[[Any], int] = lambda config: 0  # position of the first token


def _bert(model: Any, pooled: Any) -> Any:
    return model.classifier(model.dropout(model.base_model.pooler(pooled[:, None])))


def _roberta(model: Any, pooled: Any) -> Any:
    return model.classifier(pooled[:, None])  # RobertaClassificationHead takes the first of (B, 1, D)


def _distilbert(model: Any, pooled: Any) -> Any:
    return model.classifier(model.dropout(model.pre_classifier(pooled).relu()))


def _modernbert(model: Any, pooled: Any) -> Any:
    return model.classifier(model.drop(model.head(pooled)))


def _score(model: Any, pooled: Any) -> Any:
    return model.score(pooled)


def _classification_head(model: Any, pooled: Any) -> Any:
    return model.classification_head(pooled)


def _after_padding(config: Any) -> int:
    return int(config.pad_token_id) + 1  # RoBERTa counts positions from the padding index on


def _decoder(name: str, attention: str, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Family:
    return Family(name, "decoder", (attention,), targets, ("score",), "last", _score)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "bert", "encoder", ("BertSelfAttention",), ("query", "value"), ("classifier",), "first", _bert, ("pooler",)
        ),
        Family(
            "roberta",
            "encoder",
            ("RobertaSelfAttention",),
            ("query", "value"),
            ("classifier",),
            "first",
            _roberta,
            ("pooler",),
            _after_padding,
        ),
        Family(
            "distilbert",
            "encoder",
            ("DistilBertSelfAttention",),
            ("q_lin", "v_lin"),
            ("pre_classifier", "classifier"),
            "first",
            _distilbert,
        ),
        Family(
            "modernbert",
            "encoder",
            ("ModernBertAttention",),
            ("Wqkv",),
            ("head", "classifier"),
            "modernbert",
            _modernbert,
        ),
        Family("t5", "encoder-decoder", ("T5Attention",), ("q", "v"), ("classification_head",), "eos",
               _classification_head),
        Family("bart", "encoder-decoder", ("BartAttention",), ("q_proj", "v_proj"), ("classification_head",), "eos",
               _classification_head),
        _decoder("llama", "LlamaAttention"),
        _decoder("mistral", "MistralAttention"),
        _decoder("qwen2", "Qwen2Attention"),
        _decoder("qwen3", "Qwen3Attention"),
        _decoder("gpt2", "GPT2Attention", ("c_attn",)),
    )
}  # fmt: skip


def family_of(config: Any) -> Family:
    """The family of a model's configuration. Raises UnknownFamily, naming the known ones."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UnknownFamily(
            f"architecture {kind!r} is not supported: expected one of {', '.join(sorted(FAMILIES))}; use one of them"
        )
    return FAMILIES[kind]


def attention_sites(model: Any) -> list[Site]:
    """Every attention module of `model` in the order of its layers, self-attention before cross-attention."""
    family = family_of(model.config)
    counts: dict[str, int] = {}
    sites = []
    for name, module in model.named_modules():
        if type(module).__name__ not in family.attention:
            continue
        group = _group(family, name)
        layer = counts[group] = counts.get(group, -1) + 1
        kv_heads, head_dim = _shape(model.config, module)
        sites.append(Site(name, module, group, layer, kv_heads, head_dim))
    return sites


def _group(family: Family, name: str) -> Group:
    if family.kind != "encoder-decoder":
        return family.kind
    if name.endswith(("EncDecAttention", "encoder_attn")):
        return "cross"
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _shape(config: Any, module: Any) -> tuple[int, int]:
    """(kv_heads, head_dim) of an attention module, whichever name its class uses."""
    heads = getattr(config, "num_key_value_heads", None)  # grouped queries: only the configuration says
    heads = heads or _first(module, "n_heads", "num_heads", "num_attention_heads") or config.num_attention_heads
    return int(heads), int(_first(module, "head_dim", "attention_head_size", "key_value_proj_dim"))


def _first(module: Any, *names: str) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def linear_stream(family: Family, name: str) -> Literal["encoder", "decoder"]:
    """Which tokens pass the linear layer called `name`: those of the source or those of the target.

    Only an encoder-decoder has two streams; its cross-attention projects queries from the target, keys and values from
    the source.
    """
    if family.kind != "encoder-decoder":
        return "decoder" if family.kind == "decoder" else "encoder"
    parts = name.split(".")
    if parts[-2:-1] and parts[-2] in ("EncDecAttention", "encoder_attn"):
        return "encoder" if parts[-1] in ("k", "v", "k_proj", "v_proj") else "decoder"
    return "decoder" if "decoder" in parts or "classification_head" in parts else "encoder"


def stacks(model: Any) -> Iterator[tuple[Any, tuple[Group, ...]]]:
    """The modules whose call begins a pass over some groups: a body, or an encoder and a decoder."""
    family = family_of(model.config)
    if family.kind == "encoder-decoder":
        yield model.get_encoder(), ("encoder",)
        yield model.get_decoder(), ("decoder", "cross")
    else:
        yield model.base_model, (family.kind,)
