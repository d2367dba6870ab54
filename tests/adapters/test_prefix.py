"""Prefix tuning against plain references, in the cases where another implementation went wrong.

The plainest reference of all is text: a prefix that holds the keys and values of words is those words prepended. Where
a prefix holds anything else, the reference is attention written out with the prefix concatenated by hand.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import own_target_logits, padded, rows, with_eos, without_dropout
from small_models import DECODERS, ENCODERS, FAMILIES, GENERATORS, build
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from turret.adapters import attach, attachment, classify_logits, extract, mount, set_context, target_logits
from turret.adapters.adapter import Adapter, BaseInfo
from turret.adapters.attention import relative_bias
from turret.adapters.prefix import PrefixSlot, from_peft, to_peft
from turret.errors import AdapterError
from turret.methods import Prefix

P = 5
WORDS = torch.tensor([11, 57, 93, 40, 77])
CLOSE: dict[str, float] = {"atol": 2e-5, "rtol": 2e-5}


def prefixed(family: str, task: Any, seed: int = 1, **changes: Any) -> Any:
    """A small model with a prefix that is far from its start, so that every part of it matters."""
    method = Prefix(num_virtual_tokens=changes.pop("num_virtual_tokens", P), encoder_hidden_size=8, **changes)
    model = attach(build(family, task), method, init_ids=WORDS, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for each in slot_of(model).parameters():
            each.add_(torch.randn(each.shape, generator=generator) * 0.3)
    return model


def slot_of(model: Any) -> PrefixSlot:
    slot = attachment(model).prefixes["1"]
    assert isinstance(slot, PrefixSlot)
    return slot


def stored(model: Any) -> Adapter:
    tensors, head, method = extract(model)
    return Adapter(method, tensors, head, BaseInfo("small"))


@pytest.mark.parametrize("reparametrize", [True, False])
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_prefix_starts_as_exactly_its_text_prepended(family: str, reparametrize: bool) -> None:
    bare, sources, targets = build(family, "generate"), rows(1), rows(2, (5, 2, 1, 7))
    expected = own_target_logits(bare, [torch.cat([WORDS, row]) for row in sources], targets)
    without = own_target_logits(bare, sources, targets)
    model = attach(bare, Prefix(num_virtual_tokens=P, reparametrize=reparametrize), init_ids=WORDS)
    torch.testing.assert_close(target_logits(model, sources, targets), expected, **CLOSE)
    torch.testing.assert_close(own_target_logits(model, sources, targets), expected, **CLOSE)
    assert (expected - without).abs().max() > 1e-2, "control: the words do change the answer"


def test_the_bart_decoders_prefix_starts_as_its_text_prepended_to_the_target() -> None:
    bare, source, target = build("bart", "generate"), rows(1, (9,))[0], rows(2, (6,))[0]
    with torch.no_grad():
        encoded = bare.get_encoder()(input_ids=source[None])[0]
        words = bare.get_encoder()(input_ids=WORDS[None])[0]
        decoder = bare.get_decoder()
        cache = decoder(input_ids=WORDS[None], encoder_hidden_states=words, use_cache=True).cache
        keys = [layer.keys for layer in cache.self_attention_cache.layers]
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
        for layer in cache.cross_attention_cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        expected = decoder(input_ids=target[None], encoder_hidden_states=encoded, cache=cache)[0]
        model = attach(bare, Prefix(num_virtual_tokens=P, encoder=False), init_ids=WORDS)
        torch.testing.assert_close(slot_of(model).keys_values("decoder", 1)[0], keys[1][0, :, :P], **CLOSE)
        got = model.get_decoder()(
            input_ids=target[None], encoder_hidden_states=encoded, use_cache=False, attention_mask=None
        )[0]
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_unpadded_equals_padded_equals_each_row_alone(family: str) -> None:
    model = prefixed(family, "classify")
    inputs = with_eos(model, rows())
    right = model(**padded(inputs, model.config.pad_token_id)).logits
    torch.testing.assert_close(classify_logits(model, inputs), right, **CLOSE)
    alone = torch.cat([classify_logits(model, [row]) for row in inputs])
    torch.testing.assert_close(alone, right, **CLOSE)
    attachment(model).context.active = 0
    bare = classify_logits(model, inputs)
    assert (bare - right).abs().max() > 1e-2, "control: the prefix changes the answer"


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_left_padding_changes_nothing(family: str) -> None:
    model = prefixed(family, "generate")
    inputs = rows(6)
    left = padded(inputs, model.config.pad_token_id, left=True)
    logits = model(**left).logits
    for index, row in enumerate(inputs):
        alone = model(input_ids=row[None], attention_mask=torch.ones_like(row)[None]).logits[0]
        torch.testing.assert_close(logits[index, -len(row) :], alone, **CLOSE)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_step_without_a_mask_goes_on_where_the_cache_ends(family: str) -> None:
    model = prefixed(family, "generate").eval()
    tokens = max(rows(1), key=len)[None]
    whole = model(input_ids=tokens).logits
    begun = model(input_ids=tokens[:, :2], use_cache=True)
    rest = model(input_ids=tokens[:, 2:], cache=begun.cache).logits
    torch.testing.assert_close(rest, whole[:, 2:], **CLOSE)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without_and_takes_the_prefix_into_account(
    family: str, beams: int
) -> None:
    model = prefixed(family, "generate")
    batch = padded(rows(7), model.config.pad_token_id, left=family in DECODERS)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    attachment(model).context.active = 0
    assert not torch.equal(cached, model.generate(**batch, **settings)), "control: the bare base says something else"


@pytest.mark.parametrize("family", GENERATORS)
@torch.no_grad()
def test_greedy_generation_follows_the_teacher_forced_logits(family: str) -> None:
    model = prefixed(family, "generate")
    sources = rows(8)
    batch = padded(sources, model.config.pad_token_id, left=family in DECODERS)
    new = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    new = new[:, 1:] if model.config.is_encoder_decoder else new[:, batch["input_ids"].shape[1] :]
    logits = target_logits(model, sources, list(new)).view(len(sources), 5, -1)
    logits[..., model.generation_config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), new)


def plain_attention(
    module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float | None = None, position_bias: Any = None, **_: Any
) -> Any:
    """softmax(q [K_prefix; K]^T scaling + bias) [V_prefix; V] in float64, written out for padded rows of one prefix."""
    hooked = module.turret_hook
    prefix = [x.double().expand(q.shape[0], -1, -1, -1) for x in hooked.prefix(1, hooked.site)]
    keys, values = (torch.cat([p, x.double()], 2) for p, x in zip(prefix, (k, v), strict=True))  # (B, H_kv, P + S, D)
    groups = q.shape[1] // k.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = q.double() @ keys.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    length = prefix[0].shape[2]
    if hooked.bias_module is not None:
        there = torch.arange(-length, k.shape[2])[None] - torch.arange(q.shape[2])[:, None]
        scores = scores + relative_bias(hooked, there).double()
    if mask is not None:
        hidden = torch.cat([torch.zeros(*mask.shape[:3], length), mask[..., : k.shape[2]]], -1) < -1
        scores = scores.masked_fill(hidden, -1e30)
    return (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype), None


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_hook_equals_the_formula_written_out(family: str) -> None:
    AttentionInterface.register("written-out", plain_attention)
    AttentionMaskInterface.register("written-out", eager_mask)
    model = prefixed(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    got = model(**batch).logits
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "written-out"
    torch.testing.assert_close(got, model(**batch).logits, **CLOSE)
    for site in attachment(model).sites:
        if site.layer == 1:
            keys_values = site.module.turret_hook.prefix(1, site)
            twisted = replace(site.module.turret_hook, prefix=lambda slot, site, kv=keys_values: (kv[1], kv[0]))
            site.module.turret_hook = twisted
    assert (got - model(**batch).logits).abs().max() > 1e-3, "control: one twisted layer is seen"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_folding_changes_no_output_and_stores_no_mlp(family: str) -> None:
    model = prefixed(family, "classify")
    inputs = with_eos(model, rows())
    trained = classify_logits(model, inputs)
    adapter = stored(model)
    count = sum(value.numel() for value in adapter.tensors.values())
    sites = attachment(model).sites
    assert count == sum(2 * site.kv_heads * P * site.head_dim for site in sites)
    fresh = mount(build(family, "classify"), adapter)
    torch.testing.assert_close(classify_logits(fresh, inputs), trained, **CLOSE)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "gpt2", "t5", "bart"])
@torch.no_grad()
def test_a_mixed_batch_of_prefixes_of_different_lengths_and_bare_rows(family: str) -> None:
    first, second = (
        stored(prefixed(family, "classify", 1)),
        stored(prefixed(family, "classify", 2, num_virtual_tokens=9)),
    )
    model = build(family, "classify")
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)
    own = model(**batch).logits
    mount(model, first, 1)
    mount(model, second, 2)
    context, slots = attachment(model).context, (2, 0, 1, 2)
    with set_context(context, slots, None):
        mixed = model(**batch).logits
    torch.testing.assert_close(classify_logits(model, inputs, slots), mixed, **CLOSE)
    for row, slot in enumerate(slots):
        context.active = slot
        torch.testing.assert_close(mixed[row], classify_logits(model, [inputs[row]])[0], **CLOSE)
    torch.testing.assert_close(mixed[1], own[1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_part_also_with_activation_checkpointing(family: str) -> None:
    model = without_dropout(prefixed(family, "classify")).train()
    inputs = with_eos(model, rows())
    batch = padded(inputs, model.config.pad_token_id)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch).logits.square().sum().backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}

    plain = gradients()
    assert all(value.abs().max() > 0 for value in plain.values())
    model.activation_checkpointing_enable()
    for name, value in gradients().items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [*ENCODERS, "llama"])
def test_a_prefix_alone_learns_to_classify(family: str) -> None:
    """The head is frozen, so only the prefix learns."""
    model = attach(
        build(family, "classify"), Prefix(num_virtual_tokens=P, reparametrize=True, encoder_hidden_size=8)
    ).train()
    prefix = [each for each in attachment(model).prefixes.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(prefix, lr=0.03)
    inputs, labels, losses = rows(9), torch.tensor([0, 1, 2, 1]), []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(classify_logits(model, inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.7


def test_short_words_are_repeated_and_long_ones_cut() -> None:
    short = attach(build("llama", "generate"), Prefix(num_virtual_tokens=5), init_ids=WORDS[:2])
    same = attach(build("llama", "generate"), Prefix(num_virtual_tokens=5), init_ids=WORDS[[0, 1, 0, 1, 0, 1, 0]])
    assert torch.equal(stored(short).tensors["prompt_embeddings"], stored(same).tensors["prompt_embeddings"])


def test_pefts_shape_is_kept_both_ways() -> None:
    keys_values = torch.randn(3, 2, 4, 6, 5)  # (L, 2, H, P, D)
    flat = to_peft(keys_values)
    assert flat.shape == (6, 3 * 2 * 4 * 5)
    assert torch.equal(from_peft(flat, 3, 4, 5), keys_values)
    theirs = flat.view(1, 6, 3 * 2, 4, 5).permute(2, 0, 3, 1, 4).split(2)  # as PEFT's get_prompt does
    assert torch.equal(theirs[1][0][0], keys_values[1, 0])
    assert torch.equal(theirs[1][1][0], keys_values[1, 1])


def test_a_prefix_of_another_base_is_refused() -> None:
    adapter = stored(prefixed("llama", "generate"))
    with pytest.raises(AdapterError, match="belongs to another base"):
        mount(build("gpt2", "generate"), adapter)
