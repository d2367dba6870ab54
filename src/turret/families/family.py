"""The protocol of a family: the names of an architecture's modules, and small functions that differ by architecture.

A family is one `Family`, in a file of its own, listed in `turret.families`. Loads no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from turret.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from turret.transformer import Model, ModelConfig, Submodule

HeadParts: TypeAlias = "Callable[[str], Callable[[Tensor], Tensor]]"  # a module of the head, or of the body, by name
Kind = Literal["encoder", "encoder-decoder", "decoder"]
Group = Literal["encoder", "decoder", "cross"]
Stream = Literal["encoder", "decoder"]
Pooling = Literal["first", "last", "mean"]
Layout = Literal["post-norm", "pre-norm"]
# of a model: for a text, for each token, none for vectors of texts, or over the vocabulary
HeadKind = Literal["classify", "tag", "embed", "generate"]
VECTORS: tuple[HeadKind, ...] = ("embed", "generate")  # of bases that give vectors
OutputLayer = Callable[["Tensor"], "Tensor"]  # hidden states (N, D) -> (N, V)
Vocabulary = Callable[["Model", "Tensor", OutputLayer], "Tensor"]  # (model, hidden (N, D), output layer) -> (N, V)


@dataclass(frozen=True)
class Site:
    """One attention module of a model, and the shape of a prefix for it."""

    name: str  # dotted path inside the model
    module: Submodule  # it calls the attention function
    group: Group  # encoder or decoder self-attention, or cross-attention; a prefix belongs to a group
    layer: int  # 0-based within its group
    kv_heads: int
    head_dim: int

    @functools.cached_property
    def causal(self) -> bool:
        return self.group == "decoder"


@dataclass(frozen=True)
class RelativeBias:
    """A bias by relative position that is added to attention scores. One module owns it for its whole stack (T5).

    Args:
        method: name of the owner's method that computes the bias of a padded batch.
        owner: whether an attention module is the owner.
        values: (owner, key - query (T, S) int64) -> (1, H, T, S).
    """

    method: str
    owner: Callable[[Submodule], bool]
    values: Callable[[Submodule, Tensor], Tensor]


@dataclass(frozen=True)
class FastPaths:
    """Class names of modules that have an equal, faster implementation in `adapters/layers.py`. All are optional.

    Args:
        rms_norms: RMS norms with `weight` and `variance_epsilon`.
        narrow_norms: the output of those norms has the dtype of a 16-bit weight, not of the input (T5).
        gated_mlps: MLPs of gate_proj, up_proj, down_proj and act_fn, in such a layer.
        added_norms: dense, dropout, residual sum and LayerNorm in one module, which ends each half of such a layer.
        layers: whole layers.
        layout: order of the norms in such a layer, whose parts are named as in BERT (post-norm) or Llama (pre-norm).
    """

    rms_norms: tuple[str, ...] = ()
    narrow_norms: bool = False
    gated_mlps: tuple[str, ...] = ()
    added_norms: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    layout: Layout | None = None


def first_token(config: ModelConfig) -> Pooling:
    """A classifier reads the first token."""
    return "first"


def last_token(config: ModelConfig) -> Pooling:
    """A classifier reads the last token. In an encoder-decoder that is the decoder's end-of-sequence token."""
    return "last"


def no_offset(config: ModelConfig) -> int:
    """The first token has position 0."""
    return 0


def heads_of(config: ModelConfig, module: Submodule) -> tuple[int, int]:
    """(kv_heads, head_dim) of an attention module, by the attribute names that most classes use."""
    heads = getattr(config, "num_key_value_heads", None)  # grouped queries: only the configuration says
    heads = (
        heads or _first_attribute(module, "n_heads", "num_heads", "num_attention_heads") or config.num_attention_heads
    )
    head_dim = _first_attribute(module, "head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    assert head_dim is not None
    return int(heads), int(head_dim)


def _first_attribute(module: Submodule, *names: str) -> int | None:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


HEADLESS = "turret_headless"  # attribute of a model whose head was taken off


def take_head_off(model: Model, family: Family) -> None:
    """Take the head off a classifier, and the poolers of its body: a vector of a text is read from hidden states."""
    for name in family.head_modules:
        if hasattr(model, name):
            delattr(model, name)
    for name in () if family.guessed else family.body_excludes:
        if getattr(model.base_model, name, None) is not None:
            setattr(model.base_model, name, None)
    setattr(model, HEADLESS, True)


def head_of(model: Model) -> HeadKind:
    """The head that a model was loaded with."""
    if model.get_output_embeddings() is not None:
        return "generate"
    if getattr(model, HEADLESS, False):
        return "embed"
    return "tag" if "ForTokenClassification" in type(model).__name__ else "classify"


def parts_of_head(model: Model) -> HeadParts:
    """The modules that `Family.classify` names: children of a classifier or of its body."""

    def part(name: str) -> Callable[[Tensor], Tensor]:
        return getattr(model if hasattr(model, name) else model.base_model, name)

    return part


def _changes_frequencies(config: ModelConfig) -> bool:
    """Whether a long row changes the rotary frequencies of all rows of its batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("rope_type") in ("dynamic", "longrope")


def project(model: Model, hidden: Tensor, output: OutputLayer) -> Tensor:
    """Logits (N, V): the output layer and nothing else. hidden: (N, D)."""
    return output(hidden)


def tag_tokens(part: HeadParts, hidden: Tensor) -> Tensor:
    """Logits of each token: dropout and one linear layer."""
    return part("classifier")(part("dropout")(hidden))


# Model types whose layers PEFT knows for IA3; a test compares them with PEFT's own.
IA3_BASES = frozenset({
    "RefinedWeb", "RefinedWebModel", "bart", "bert", "bloom", "deberta", "deberta-v2", "falcon", "gemma", "gemma2",
    "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "llama", "llama4", "mistral", "mixtral",
    "mt5", "opt", "phi", "qwen2", "qwen3", "roberta", "t5",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of transformers: the names of its modules, and how they work together.

    Args:
        name: `model_type` of its configuration.
        kind: which stacks of layers there are.
        attention: class names of the modules that call transformers' attention interface.
        rows_alone: attention does not use transformers' interface, so packed rows cannot be kept apart. Each row passes
            through the body alone, there is no prefix, and `attention` is empty.
        lora_targets: last part of the paths that LoRA adapts by default: PEFT's defaults, or query and value.
        head_modules: modules of the classification head; trained and stored with every adapter.
        classify: (parts of the head by name, pooled (B, D)) -> logits (B, C).
        head_dropouts: names of the dropout modules that `classify` calls.
        tag_modules: modules of the head of transformers' token classifier; () if turret attaches none.
        tag: (parts of that head by name, hidden (N, D)) -> logits (N, C) of each token.
        heads_first: names of norms that get (B, H, T, D), heads before tokens; a row cannot have its own.
        output_layer: name of the layer that computes logits over the vocabulary.
        pooling: (config) -> which token of a row a classifier reads, or the mean of all.
        body_excludes: parts of the body that belong to a task, such as a pooler; not part of the fingerprint.
        unread: linear layers of the body whose output a model never uses.
        positions: a learned table of limited length, rotary, or relative only, which has no limit.
        position_offset: (config) -> the position of the first token.
        position_module: name of each stack's module that computes positions itself and takes no position_ids.
        relative_bias: the bias by relative position, if there is one.
        window: (attention module) -> its sliding window, or None.
        heads: (config, attention module) -> (kv_heads, head_dim).
        cross_attention: last part of the paths of cross-attention modules.
        source_projections: names of the linear layers of cross-attention that read the source: keys and values.
        vocabulary: (model, hidden (N, D), output layer) -> logits (N, V), equal to the model's own forward.
        fan_in_fan_out: linear layers store their weight as (D_in, D_out); PEFT's term.
        vllm_lora: vLLM serves LoRA on it.
        gguf: llama.cpp's name of the architecture; None: no LoRA is written for it.
        gguf_rotary: last part of the paths of the layers whose output llama.cpp orders for its own rotary positions.
        fast: modules that have a faster implementation.
        loaded_with: settings of its configuration that are set when it is loaded.
        guessed: by `generic`, for an architecture that is not listed.
    """

    name: str
    kind: Kind
    attention: tuple[str, ...]
    lora_targets: tuple[str, ...]
    head_modules: tuple[str, ...]
    classify: Callable[[HeadParts, Tensor], Tensor]
    rows_alone: bool = False
    head_dropouts: tuple[str, ...] = ()
    tag_modules: tuple[str, ...] = ("classifier",)
    tag: Callable[[HeadParts, Tensor], Tensor] = tag_tokens
    heads_first: tuple[str, ...] = ()
    output_layer: str = "lm_head"
    pooling: Callable[[ModelConfig], Pooling] = first_token
    body_excludes: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    positions: Literal["table", "rotary", "relative"] = "rotary"
    position_offset: Callable[[ModelConfig], int] = no_offset
    position_module: str | None = None
    relative_bias: RelativeBias | None = None
    window: Callable[[nn.Module], int | None] = lambda module: getattr(module, "sliding_window", None)
    heads: Callable[[ModelConfig, Submodule], tuple[int, int]] = heads_of
    cross_attention: tuple[str, ...] = ()
    source_projections: tuple[str, ...] = ()
    vocabulary: Vocabulary = project
    fan_in_fan_out: bool = False
    vllm_lora: bool = False
    gguf: str | None = None
    gguf_rotary: tuple[str, ...] = ()
    fast: FastPaths = field(default_factory=FastPaths)
    loaded_with: Mapping[str, str] = field(default_factory=dict)
    guessed: bool = False

    @functools.cached_property
    def causal(self) -> bool:
        """Whether its last stack attends to earlier tokens only. A prefix shifts the positions of such tokens."""
        return self.kind != "encoder"

    @functools.cached_property
    def head_kinds(self) -> tuple[HeadKind, ...]:
        """The heads that its models have, the one that serves most first: a base that generates also classifies."""
        there: dict[HeadKind, bool] = {
            "generate": self.causal,
            "classify": bool(self.head_modules),
            "tag": bool(self.tag_modules),
            "embed": not self.is_encoder_decoder,
        }
        return tuple(kind for kind, has in there.items() if has)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the source and the target go through different stacks."""
        return self.kind == "encoder-decoder"

    @functools.cached_property
    def decoder_only(self) -> bool:
        """Whether source and target are one row of tokens."""
        return self.kind == "decoder"

    @property
    def has_ia3_layers(self) -> bool:
        """Whether PEFT knows which layers of this family IA3 changes."""
        return self.name in IA3_BASES

    @property
    def beside_body(self) -> tuple[str, ...]:
        """The modules outside the body: the classification head and the output layer."""
        return (*self.head_modules, self.output_layer)

    def head_for(self, wanted: HeadKind) -> HeadKind:
        """The head that a base is loaded with. A generator gives vectors as it is, so that it serves both."""
        return "generate" if wanted == "embed" and self.causal else wanted

    @property
    def embedding(self) -> Pooling:
        """How an embedding is pooled by default: in a decoder only the last token has read the whole text."""
        return "last" if self.decoder_only else "mean"

    def position_limit(self, config: ModelConfig) -> int | None:
        """The largest number of tokens that have a position; None if there is no limit.

        Some rotary frequencies change if a row of the batch is long. A row would then depend on its neighbours, so only
        positions below that change are used.
        """
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if limit is None or self.positions == "relative":
            return None
        if _changes_frequencies(config):
            original = "original_max_position_embeddings"
            limit = getattr(config, original, None) or config.rope_parameters.get(original, limit)
        return int(limit) - self.position_offset(config)

    def last_position(self, config: ModelConfig) -> int | None:
        """The limit if no row may pass it: of a learned table, and of frequencies that change. None: rows may."""
        return self.position_limit(config) if self.positions == "table" or _changes_frequencies(config) else None

    def sites(self, model: Model) -> list[Site]:
        """Every attention module of `model`, in the order of its layers, self-attention before cross-attention.

        Raises:
            AdapterError: the model has none.
        """
        counts: dict[Group, int] = {}
        sites = []
        for path, module in model.named_modules():
            if type(module).__name__ not in self.attention:
                continue
            group = self.group(path)
            layer = counts[group] = counts.get(group, -1) + 1
            kv_heads, head_dim = self.heads(model.config, module)
            sites.append(Site(path, module, group, layer, kv_heads, head_dim))
        if not sites and not self.rows_alone:
            raise AdapterError(
                f"{type(model).__name__} has no attention module of the family {self.name}: expected modules of class "
                f"{' or '.join(self.attention)}; use transformers' own class of this architecture"
            )
        return sites

    def group(self, path: str) -> Group:
        """The group of the attention module at `path`, whose prefix it takes."""
        if self.kind != "encoder-decoder":
            return self.kind
        parts = path.split(".")
        if parts[-1] in self.cross_attention:
            return "cross"
        return "decoder" if "decoder" in parts else "encoder"

    def stream(self, path: str) -> Stream:
        """Which tokens go through the linear layer at `path`: the source's (encoder) or the target's (decoder).

        Cross-attention computes queries from the target, keys and values from the source.
        """
        if self.kind != "encoder-decoder":
            return self.kind
        parts = path.split(".")
        if parts[-2:-1] and parts[-2] in self.cross_attention:
            return "encoder" if parts[-1] in self.source_projections else "decoder"
        return "decoder" if "decoder" in parts or parts[0] in self.head_modules else "encoder"

    def stacks(self, model: Model) -> Iterator[tuple[Submodule, tuple[Group, ...]]]:
        """The stacks and the groups in each: one body, or an encoder and a decoder."""
        if self.kind == "encoder-decoder":
            yield model.get_encoder(), ("encoder",)
            yield model.get_decoder(), ("decoder", "cross")
        else:
            yield model.base_model, (self.kind,)
