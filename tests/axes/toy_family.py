"""A toy family in one file: a decoder unlike the others in the table.

Attention and MLP run in parallel after one LayerNorm. Scores are capped, the first two rows of the position table are
unused, logits are scaled, and the classification head is a dropout `rest` and a layer `grade`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import small_models
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from turret.families.family import Family, HeadParts, last_token, parts_of_head

UNUSED = 2  # rows of the position table


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    vocab_size: int = small_models.VOCABULARY
    hidden_size: int = 48
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 300
    softcap: float | None = 0.5
    output_scale: float = 4.0
    pad_token_id: int | None = 3
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2


class ToyHeads(nn.Module):
    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width = config.num_key_value_heads * self.head_dim
        self.ask = nn.Linear(config.hidden_size, config.hidden_size)
        self.key, self.value = nn.Linear(config.hidden_size, width), nn.Linear(config.hidden_size, width)
        self.back = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, **kwargs: Any) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (layer(x).view(shape).transpose(1, 2) for layer in (self.ask, self.key, self.value))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        settings = {"scaling": self.head_dim**-0.5, "softcap": self.config.softcap}
        y, _ = attend(self, q, k, v, mask, dropout=0.0, **settings, **kwargs)
        return self.back(y.reshape(*x.shape[:-1], -1))


class ToyBlock(nn.Module):
    """y = x + attention(n) + W_down tanh(W_up n), n = LayerNorm(x)."""

    def __init__(self, config: ToyConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.heads = ToyHeads(config, layer_idx)
        self.up, self.down = nn.Linear(config.hidden_size, 64), nn.Linear(64, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, cache: Any, **kwargs: Any) -> Tensor:
        n = self.norm(x)
        return x + self.heads(n, mask, cache, **kwargs) + self.down(self.up(n).tanh())


class ToyPreTrained(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "body"
    _supports_attention_backend = True


class ToyModel(ToyPreTrained):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(ToyBlock(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        x = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1])[None] + UNUSED
        mask = create_causal_mask(self.config, x, attention_mask, cache=cache, position_ids=position_ids)
        x = x + self.places(position_ids)
        for block in self.blocks:
            x = block(x, mask, cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=x, cache=cache)


class ToyForCausalLM(ToyPreTrained, GenerationMixin):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.body = ToyModel(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        out = self.body(input_ids, attention_mask, position_ids, cache, use_cache=use_cache, **kwargs)
        return CausalLMOutputWithPast(logits=vocabulary(self, out.last_hidden_state, self.speak), cache=out.cache)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + UNUSED
        return inputs


class ToyForSequenceClassification(ToyPreTrained):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.body = ToyModel(config)
        self.rest = nn.Dropout(0.1)
        self.grade = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        hidden = self.body(input_ids, attention_mask, **kwargs).last_hidden_state
        ends = torch.full((len(hidden),), -1) if attention_mask is None else attention_mask.sum(-1) - 1
        return SequenceClassifierOutput(logits=classify(parts_of_head(self), hidden[torch.arange(len(hidden)), ends]))


def classify(part: HeadParts, pooled: Tensor) -> Tensor:
    return part("grade")(part("rest")(pooled))


def vocabulary(model: nn.Module, hidden: Tensor, output: Callable[[Tensor], Tensor]) -> Tensor:
    return output(hidden) * model.config.output_scale


TOY = Family(
    name="toy",
    kind="decoder",
    attention=("ToyHeads",),
    lora_targets=("ask", "value"),
    head_modules=("grade",),
    classify=classify,
    head_dropouts=("rest",),
    output_layer="speak",
    pooling=last_token,
    positions="table",
    position_offset=lambda config: UNUSED,
    vocabulary=vocabulary,
)


def register() -> None:
    """Register the toy with transformers' automatic classes. The caller adds it to the table of families."""
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    AutoModel.register(ToyConfig, ToyModel, exist_ok=True)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(ToyConfig, ToyForSequenceClassification, exist_ok=True)


def build(kind: type[ToyPreTrained], **settings: Any) -> Any:
    """A small toy with random weights, large enough that every part changes the output."""
    model = kind(ToyConfig(**settings, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * parameter.shape[-1] ** -0.5
    return model


def save_base(folder: Path) -> Path:
    """Save a toy as a base on disk."""
    build(ToyForCausalLM).save_pretrained(folder)
    small_models.tokenizer("llama").save_pretrained(folder)
    return folder
