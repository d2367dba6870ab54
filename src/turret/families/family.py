"""What a base is: names and small functions that say what an architecture calls its parts. Loads no torch.

A family is one `Family`, in one file of this package, listed in `table.py`. Everything else asks the object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from turret.errors import AdapterError

Kind = Literal["encoder", "encoder-decoder", "decoder"]
Group = Literal["encoder", "decoder", "cross"]
Stream = Literal["encoder", "decoder"]
Pooling = Literal["first", "last", "mean"]
Layout = Literal["post-norm", "pre-norm"]


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
class RelativeBias:
    """A bias by relative position, added to the scores, that one attention module of a stack owns (T5).

    Args:
        method: name of the owner's method that makes the bias of a padded batch.
        owner: whether an attention module owns the bias of its stack.
        values: (owner, key - query (T, S) int64) -> (1, H, T, S).
    """

    method: str
    owner: Callable[[Any], bool]
    values: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class FastPaths:
    """Modules, by the name of their class, that a faster way to the same numbers may replace. None has to be named.

    Args:
        rms_norms: RMS norms with `weight` and `variance_epsilon` (`adapters/fused/norms.py`).
        narrow_norms: those norms give the dtype of their weight where it is 16 bits wide (T5).
        gated_mlps: MLPs of gate_proj, up_proj, down_proj and act_fn (`adapters/fused/activations.py`).
        added_norms: dense, dropout, residual sum and LayerNorm in one module (`adapters/fused/residual.py`).
        layers: whole layers (`adapters/fused/layers.py`).
        layout: how such a layer is made, with parts named as BERT (post-norm) or Llama (pre-norm) names them.
    """

    rms_norms: tuple[str, ...] = ()
    narrow_norms: bool = False
    gated_mlps: tuple[str, ...] = ()
    added_norms: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    layout: Layout | None = None


def first(config: Any) -> Pooling:
    """A classifier reads the first token."""
    return "first"


def last(config: Any) -> Pooling:
    """A classifier reads the last token; of an encoder-decoder, the decoder's end-of-sequence token."""
    return "last"


def no_offset(config: Any) -> int:
    return 0


def own_window(module: Any) -> int | None:
    window: int | None = getattr(module, "sliding_window", None)
    return window


def heads_of(config: Any, module: Any) -> tuple[int, int]:
    """(kv_heads, head_dim) of an attention module, by the names that most classes use."""
    heads = getattr(config, "num_key_value_heads", None)  # grouped queries: only the configuration says
    heads = heads or _named(module, "n_heads", "num_heads", "num_attention_heads") or config.num_attention_heads
    return int(heads), int(_named(module, "head_dim", "attention_head_size", "key_value_proj_dim"))


def _named(module: Any, *names: str) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def project(model: Any, hidden: Any, output: Callable[[Any], Any]) -> Any:
    """Logits over the vocabulary: the output layer and nothing else."""
    return output(hidden)


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture of transformers calls its parts, and how they work together.

    Args:
        name: `model_type` of its configuration.
        kind: which stacks of layers there are.
        attention: class names of the modules that call transformers' attention interface.
        lora_targets: last part of the paths that LoRA adapts by default: PEFT's own, or query and value.
        head_modules: of the sequence classifier; trained and stored with every adapter.
        classify: (model, pooled (B, D)) -> logits (B, C).
        head_dropouts: names of the dropout modules that `classify` calls.
        output_layer: name of the layer that makes logits over the vocabulary.
        pooling: (config) -> which tokens of a row a classifier reads.
        body_excludes: parts of the body that belong to a task, such as a pooler: no part of the fingerprint.
        positions: a learned table that ends, rotary, or by relative position only, which knows no limit.
        position_offset: (config) -> the position of the first token.
        position_module: name of each stack's module that computes positions itself, and so takes no position_ids.
        relative_bias: the bias by relative position, where there is one.
        window: (attention module) -> its sliding window, or None.
        heads: (config, attention module) -> (kv_heads, head_dim).
        cross_attention: last part of the paths of cross-attention modules.
        source_projections: names of the linear layers of cross-attention that read the source: keys and values.
        vocabulary: (model, hidden (N, D), output layer) -> logits (N, V), as the model's own forward makes them.
        fan_in_fan_out: linear layers keep their weight as (D_in, D_out), in PEFT's word.
        vllm_lora: vLLM serves LoRA on it.
        fast: modules that a faster way may replace.
    """

    name: str
    kind: Kind
    attention: tuple[str, ...]
    lora_targets: tuple[str, ...]
    head_modules: tuple[str, ...]
    classify: Callable[[Any, Any], Any]
    head_dropouts: tuple[str, ...] = ()
    output_layer: str = "lm_head"
    pooling: Callable[[Any], Pooling] = first
    body_excludes: tuple[str, ...] = ()
    positions: Literal["table", "rotary", "relative"] = "rotary"
    position_offset: Callable[[Any], int] = no_offset
    position_module: str | None = None
    relative_bias: RelativeBias | None = None
    window: Callable[[Any], int | None] = own_window
    heads: Callable[[Any, Any], tuple[int, int]] = heads_of
    cross_attention: tuple[str, ...] = ()
    source_projections: tuple[str, ...] = ()
    vocabulary: Callable[[Any, Any, Callable[[Any], Any]], Any] = project
    fan_in_fan_out: bool = False
    vllm_lora: bool = False
    fast: FastPaths = field(default_factory=FastPaths)

    @property
    def generates(self) -> bool:
        """Whether it has tokens that look back only, and so can write; a prefix shifts their positions."""
        return self.kind != "encoder"

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether a source and a target are read by different stacks."""
        return self.kind == "encoder-decoder"

    @property
    def decoder_only(self) -> bool:
        """Whether source and target are one row of tokens."""
        return self.kind == "decoder"

    @property
    def beside_body(self) -> tuple[str, ...]:
        """The modules of a model that are not its body: the classifier's head and the output layer."""
        return (*self.head_modules, self.output_layer)

    def position_limit(self, config: Any) -> int | None:
        """Most tokens that have a position; None where there is no such limit."""
        most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        if most is None or self.positions == "relative":
            return None
        return int(most) - self.position_offset(config)

    def sites(self, model: Any) -> list[Site]:
        """Every attention module of `model` in the order of its layers, self-attention before cross-attention.

        Raises AdapterError where there is none.
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
        if not sites:
            raise AdapterError(
                f"{type(model).__name__} has no attention module of the family {self.name}: expected modules of class "
                f"{' or '.join(self.attention)}; use transformers' own class of this architecture"
            )
        return sites

    def group(self, path: str) -> Group:
        """Whose prefix the attention module at `path` takes."""
        if self.kind != "encoder-decoder":
            return self.kind
        parts = path.split(".")
        if parts[-1] in self.cross_attention:
            return "cross"
        return "decoder" if "decoder" in parts else "encoder"

    def stream(self, path: str) -> Stream:
        """Which tokens pass the linear layer at `path`: the source's (encoder) or the target's (decoder).

        Cross-attention projects queries from the target, keys and values from the source.
        """
        if self.kind != "encoder-decoder":
            return self.kind
        parts = path.split(".")
        if parts[-2:-1] and parts[-2] in self.cross_attention:
            return "encoder" if parts[-1] in self.source_projections else "decoder"
        return "decoder" if "decoder" in parts or parts[0] in self.head_modules else "encoder"

    def stacks(self, model: Any) -> Iterator[tuple[Any, tuple[Group, ...]]]:
        """The modules whose call begins a pass over some groups: a body, or an encoder and a decoder."""
        if self.kind == "encoder-decoder":
            yield model.get_encoder(), ("encoder",)
            yield model.get_decoder(), ("decoder", "cross")
        else:
            yield model.base_model, (self.kind,)
