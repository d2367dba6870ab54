"""What Turret uses of a transformers model, its configuration and its tokenizer, for the type checker.

transformers ships no types that mypy can use. Nothing inherits from these classes, and importing them loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn


class ModelConfig(Protocol):
    """A model's `config`. Every architecture adds attributes of its own."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pad_token_id: int | None
    decoder_start_token_id: int
    is_encoder_decoder: bool

    def to_dict(self) -> dict[str, Any]: ...
    def __getattr__(self, name: str) -> Any: ...  # what one architecture names


if TYPE_CHECKING:

    class Model(nn.Module):
        """A `PreTrainedModel`: a transformer with its head."""

        config: ModelConfig
        base_model_prefix: str
        base_model: nn.Module
        device: torch.device
        dtype: torch.dtype

        def get_encoder(self) -> nn.Module: ...
        def get_decoder(self) -> nn.Module: ...
        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear | None: ...
        def __getattr__(self, name: str) -> Any: ...  # the parts that one architecture names

else:

    class Model: ...


class Tokenizer(Protocol):
    """A `PreTrainedTokenizerBase` with a pad token."""

    pad_token: str
    pad_token_id: int
    eos_token: str | None
    eos_token_id: int | None
    is_fast: bool
    backend_tokenizer: Any  # of the library tokenizers, which ships no types

    def __call__(self, texts: Sequence[str], **options: Any) -> Mapping[str, Any]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any: ...
    def get_vocab(self) -> dict[str, int]: ...
    def save_pretrained(self, folder: str) -> tuple[str, ...]: ...
