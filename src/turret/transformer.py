"""The parts of a transformers model, its configuration and its tokenizer that Turret uses, for the type checker.

mypy skips transformers' own types here, because they are wrong too often. Nothing inherits from these classes, and
importing them loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, overload

if TYPE_CHECKING:
    import tokenizers
    import torch
    from torch import nn


class ModelConfig(Protocol):
    """A model's `config`. Every architecture adds attributes of its own."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    pad_token_id: int  # set when a base is loaded
    decoder_start_token_id: int
    is_encoder_decoder: bool
    dtype: torch.dtype

    def __getattr__(self, name: str) -> Any: ...  # attributes of one architecture


if TYPE_CHECKING:

    class Submodule(nn.Module):
        """A module inside a transformer, such as an attention module. Every architecture has attributes of its own."""

        turret_hook: Any  # `adapters.attention.Hooked`, which a type here cannot name without a cycle of imports

        def __getattr__(self, name: str) -> Any: ...  # attributes of one architecture

    class Model(Submodule):
        """A `PreTrainedModel`: a transformer with its head."""

        config: ModelConfig
        base_model_prefix: str
        base_model: Submodule
        device: torch.device
        dtype: torch.dtype

        @classmethod
        def from_pretrained(
            cls, folder: str | os.PathLike[str], *, dtype: torch.dtype, local_files_only: bool, use_safetensors: bool
        ) -> Self: ...
        def get_encoder(self) -> Submodule: ...
        def get_decoder(self) -> Submodule: ...
        def get_input_embeddings(self) -> nn.Embedding: ...
        def get_output_embeddings(self) -> nn.Linear | None: ...
        def save_pretrained(
            self, folder: str | os.PathLike[str], *, state_dict: Mapping[str, torch.Tensor] | None = None
        ) -> None: ...

else:

    class Submodule: ...

    class Model: ...


class BatchEncoding(Protocol):
    """Several texts as tokens."""

    encodings: list[tokenizers.Encoding]  # of a fast tokenizer

    def __getitem__(self, name: str) -> list[list[int]]: ...


class TextEncoding(Protocol):
    """One text as tokens."""

    def __getitem__(self, name: str) -> list[int]: ...
    def get(self, name: str, default: list[int]) -> list[int]: ...


class AddedToken(Protocol):
    """A token that was added to a vocabulary. `str` gives its text."""

    special: bool


class Tokenizer(Protocol):
    """A `PreTrainedTokenizerBase` with a pad token."""

    pad_token: str | None
    pad_token_id: int
    eos_token: str | None
    eos_token_id: int | None
    bos_token_id: int | None
    unk_token_id: int | None
    special_tokens_map: Mapping[str, str]
    chat_template: str | None
    is_fast: bool
    backend_tokenizer: tokenizers.Tokenizer  # of a fast tokenizer
    added_tokens_decoder: Mapping[int, AddedToken]

    @overload
    def __call__(self, texts: str, **options: bool) -> TextEncoding: ...

    @overload
    def __call__(self, texts: str, text_pair: str, **options: bool) -> TextEncoding: ...

    @overload
    def __call__(self, texts: list[str], **options: bool) -> BatchEncoding: ...

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: Literal[False], **options: bool
    ) -> str: ...

    def get_chat_template(self) -> str: ...
    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str | None]: ...
    def __len__(self) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...
    def save_pretrained(self, folder: str | os.PathLike[str]) -> tuple[str, ...]: ...
