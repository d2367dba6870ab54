"""The parts of transformers' layers by their names, for the type checker. No object is of these classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from turret.transformer import ModelConfig, Submodule

if TYPE_CHECKING:
    from turret.adapters.attention import Hooked


class PostNormSelf(nn.Module):
    """`BertSelfAttention` and its like."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int
    scaling: float
    config: ModelConfig
    turret_hook: Hooked


class PostNormAttention(nn.Module):
    """`BertAttention`."""

    self: PostNormSelf
    output: nn.Module


class PostNormIntermediate(nn.Module):
    """`BertIntermediate`."""

    dense: nn.Module
    intermediate_act_fn: nn.Module


class PostNormLayer(nn.Module):
    """A layer of BERT or RoBERTa."""

    attention: PostNormAttention
    intermediate: PostNormIntermediate
    output: nn.Module
    is_decoder: bool


class PreNormAttention(Submodule):
    """`LlamaAttention`. Qwen 3 adds `q_norm` and `k_norm`."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    scaling: float
    attention_dropout: float
    config: ModelConfig
    turret_hook: Hooked


class PreNormLayer(nn.Module):
    """A layer of Llama, Mistral or Qwen."""

    self_attn: PreNormAttention
    mlp: nn.Module
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module
