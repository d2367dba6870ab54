"""The relatives that `families` lists beside the nine: small models straight from their configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from batches import own_target_logits, padded, rows

from turret.adapters import attach, attachment, classify_logits, target_logits
from turret.methods import LoRA, Prefix

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=12, sliding_window=6),  # narrower than the rows
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
}


def small(family: str, kind: Any) -> Any:
    torch.manual_seed(0)
    return kind.from_config(CONFIGS[family]()).eval()


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_logits_are_the_models_own_padded_and_unpadded(family: str) -> None:
    model = small(family, transformers.AutoModelForCausalLM)
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    own = own_target_logits(model, sources, targets)
    attach(model, LoRA(r=2))
    assert {path.rsplit(".", 1)[-1] for path in attachment(model).linears} == {"q_proj", "v_proj"}
    torch.testing.assert_close(own_target_logits(model, sources, targets), own, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(target_logits(model, sources, targets), own, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_a_prefix_tuned_classifier_is_the_same_padded_and_unpadded(family: str) -> None:
    model = small(family, transformers.AutoModelForSequenceClassification)
    attach(model, Prefix(num_virtual_tokens=4, encoder_hidden_size=8))
    batch = padded(rows(), 0)
    torch.testing.assert_close(classify_logits(model, rows()), model(**batch).logits, atol=2e-5, rtol=2e-5)
