"""An argument of the attention function is computed, known to change nothing, or an error; never ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from batches import padded, rows, with_eos
from small_models import FAMILIES, GENERATORS, VOCABULARY, build

from turret.adapters import attach, attachment, classify_logits, set_context
from turret.errors import AdapterError
from turret.families import FAMILIES as TABLE
from turret.methods import LoRA, Prefix
from turret.ops.attention import attend, attend_plainly
from turret.ops.structs import NO_DROPOUT, DropoutArguments

GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "attn_logit_softcapping": 0.5,
    "pad_token_id": 0,
}


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small Gemma 2, the one architecture of transformers that caps its scores, with transformers' own attention."""
    monkeypatch.setitem(
        TABLE, "gemma2", dataclasses.replace(TABLE["llama"], name="gemma2", attention=("Gemma2Attention",))
    )
    config = transformers.Gemma2Config(**GEMMA, num_labels=3, attn_implementation="eager")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma2ForSequenceClassification(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data *= 20.0  # scores well above the cap
    return model


def own_logits(model: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**padded(inputs, 0)).logits
    return logits


@torch.no_grad()
def test_a_softcap_is_computed_as_transformers_does_padded_and_unpadded(gemma: Any) -> None:
    inputs = rows(0, (9, 3, 14, 1))
    own = own_logits(gemma, inputs)
    attach(gemma, LoRA(r=2))
    torch.testing.assert_close(gemma(**padded(inputs, 0)).logits, own, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(classify_logits(gemma, inputs), own, atol=2e-5, rtol=2e-5)
    for site in attachment(gemma).sites:
        site.module.attn_logit_softcapping = None
    for swallowed in (gemma(**padded(inputs, 0)).logits, classify_logits(gemma, inputs)):
        assert (swallowed - own).abs().max() > 1e-2, "control: a softcap that is swallowed is noticed"


def test_a_softcap_gives_the_gradients_of_transformers_own_attention(gemma: Any) -> None:
    inputs, gradients = rows(0, (9, 3)), []
    batch = padded(inputs, 0)
    embeddings = gemma.get_input_embeddings()(batch["input_ids"]).detach()
    for attached in (False, True):
        if attached:
            attach(gemma, LoRA(r=2))
        given = embeddings.clone().requires_grad_()
        logits = gemma(inputs_embeds=given, attention_mask=batch["attention_mask"]).logits
        gradients.append(torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), given)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_prefix_that_is_a_text_is_that_text_prepended_under_a_softcap(gemma: Any) -> None:
    text, inputs = torch.tensor([11, 12, 13]), rows(0, (4, 3))
    own = own_logits(gemma, [torch.cat([text, row]) for row in inputs])
    attach(gemma, Prefix(num_virtual_tokens=3, reparametrize=False), init_ids=text)
    torch.testing.assert_close(classify_logits(gemma, inputs), own, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(gemma(**padded(inputs, 0)).logits, own, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_generation_with_transformers_cache_keeps_the_softcap(gemma: Any) -> None:
    config = transformers.Gemma2Config(**GEMMA, attn_implementation="eager")
    generator = transformers.Gemma2ForCausalLM(config).eval()
    generator.model.load_state_dict(gemma.model.state_dict())
    batch = padded(rows(3, (9, 4)), 0, left=True)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    own = generator.generate(**batch, **settings)
    attach(generator, LoRA(r=2))
    assert torch.equal(generator.generate(**batch, **settings), own)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_the_reference_caps_scores_before_the_mask_and_the_fast_way_declines(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator).requires_grad_()
    k, v = (torch.randn(2, 2, 9, 8, generator=generator) for _ in range(2))
    bias = torch.randn(1, 1, 5, 9, generator=generator)
    dropped = DropoutArguments.of(p, 1, torch.arange(10).view(2, 5)) if p else NO_DROPOUT
    outputs = [function(q, k, v, bias, 0.9, dropped, softcap=1.5) for function in (attend, attend_plainly)]
    assert torch.equal(outputs[0], outputs[1])
    if p == 0.0:
        keys, values = (each.repeat_interleave(2, dim=1) for each in (k, v))
        scores = 1.5 * torch.tanh(0.9 * q @ keys.mT / 1.5) + bias
        torch.testing.assert_close(outputs[0], scores.softmax(-1) @ values)
        assert not torch.allclose(outputs[0], attend(q, k, v, bias, 0.9), atol=1e-3), "control: the cap matters"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_unknown_argument_of_attention_is_an_error_in_one_line(family: str) -> None:
    model = build(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    attach(model, LoRA(r=2))
    model(**batch, s_aux=None)  # nothing is said by None
    with pytest.raises(AdapterError, match="s_aux") as error:
        model(**batch, s_aux=torch.zeros(4))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@torch.no_grad()
def test_attention_weights_that_nobody_can_hand_out_are_an_error_and_not_none() -> None:
    model = attach(build("bert", "classify"), LoRA(r=2))
    batch = padded(rows(), 0)
    assert model(**batch, output_attentions=False).logits.shape == (4, 3)
    with pytest.raises(AdapterError, match="output_attentions"):
        model(**batch, output_attentions=True)


@torch.no_grad()
def test_a_causality_that_contradicts_the_module_is_an_error() -> None:
    model = attach(build("llama", "classify"), LoRA(r=2))
    batch = padded(rows(), 3)
    torch.testing.assert_close(model(**batch, is_causal=True).logits, model(**batch).logits)
    with pytest.raises(AdapterError, match="is_causal"):
        model(**batch, is_causal=False)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_every_family_hands_over_is_known(family: str) -> None:
    model = build(family, "classify")
    batch = padded(with_eos(model, rows()), model.config.pad_token_id)
    attach(model, LoRA(r=2))
    told: dict[str, Any] = {
        "labels": torch.tensor([0, 1, 2, 0]),
        "num_items_in_batch": torch.tensor(4),
        "output_hidden_states": True,
    }
    told["token_type_ids"] = torch.zeros_like(batch["input_ids"])  # a plain tokenizer makes them for every model
    output = model(**batch, **told)
    assert len(output.get("hidden_states") or output.decoder_hidden_states) > 1


@torch.no_grad()
def test_a_position_bias_without_an_owner_is_an_error_where_rows_are_not_padded() -> None:
    model = attach(build("llama", "classify"), LoRA(r=2))
    context, ids = attachment(model).context, torch.arange(10, 17)[None]
    with set_context(context, None, {"decoder": [4, 3]}), pytest.raises(AdapterError, match="position_bias"):
        model.base_model(
            input_ids=ids,
            attention_mask=torch.zeros(1, 1, 1, 1),
            position_ids=torch.arange(7)[None],
            use_cache=False,
            position_bias=torch.ones(1, 4, 7, 7),
        )


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_what_generation_hands_over_is_known(family: str) -> None:
    model = build(family, "generate")
    batch = padded(rows(), model.config.pad_token_id, left=True)
    settings = {"max_new_tokens": 3, "do_sample": False, "labels": batch["input_ids"]}  # as Seq2SeqTrainer calls it
    own = model.generate(**batch, **settings)
    assert torch.equal(attach(model, LoRA(r=2)).generate(**batch, **settings), own)
