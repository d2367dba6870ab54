"""Generators with norms, embeddings, biases or an output of their own: in a mixed batch they answer as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_at_hand import METHODS, made, runner_of
from batches import own_target_logits, padded, rows
from marks import fast_if_in
from small_models import ENCODER_DECODERS, build

from turret import adapters, bundles
from turret.adapters import Adapter, BaseInfo
from turret.adapters.lifecycle import merged_state
from turret.adapters.tuners.peft import with_modules
from turret.engine.sequence import DecodeStep, Prefill
from turret.errors import AdapterError, BundleError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TARGET = torch.tensor([17, 23, 17])


def lora(**settings: Any) -> Any:
    return lambda: peft.LoraConfig(r=3, lora_alpha=6, **settings)


Q = ["q_proj", "v_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
# name: (family, changes of the base, PEFT's configuration)
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "norms of llama": ("llama", {}, lora(target_modules=Q, modules_to_save=NORMS)),
    "untied embeddings and output": ("llama", {}, lora(target_modules=Q, modules_to_save=["embed_tokens", "lm_head"])),
    "tied embeddings": (
        "llama",
        {"tie_word_embeddings": True},
        lora(target_modules=Q, modules_to_save=["embed_tokens"]),
    ),
    "tied few tokens": (
        "llama",
        {"tie_word_embeddings": True},
        lora(target_modules=Q, trainable_token_indices=[17, 5]),
    ),
    "an output that stays tied": (
        "llama",
        {"tie_word_embeddings": True},
        lora(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "few tokens": ("llama", {}, lora(target_modules=Q, trainable_token_indices=[17, 5, 99])),
    "every bias of gpt2": ("gpt2", {}, lora(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
    "norms of queries": ("qwen3", {}, lora(target_modules=Q, modules_to_save=["q_norm", "k_norm"])),
    "scaled few tokens": ("gemma3_text", {}, lora(target_modules=Q, trainable_token_indices=[17, 5])),
    "embeddings of t5": ("t5", {}, lora(target_modules=["q", "v"], modules_to_save=["embed_tokens", "layer_norm"])),
    "every bias of bart": ("bart", {}, lora(target_modules=Q, bias="all")),
}
QUICK = ("norms of llama", "untied embeddings and output", "tied few tokens")


def folder_of(family: str, changes: dict[str, Any], make: Any, folder: Path) -> Path:
    config = make()
    config.task_type = "SEQ_2_SEQ_LM" if family in ENCODER_DECODERS else "CAUSAL_LM"
    torch.manual_seed(0)
    model = peft.get_peft_model(build(family, "generate", **changes), config)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad and "original_module" not in name:
                each.add_(torch.randn_like(each) * 0.1)
    model.save_pretrained(folder)
    return folder


def by_peft(family: str, changes: dict[str, Any], folder: Path, source: torch.Tensor) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(build(family, "generate", **changes), str(folder)).eval()
    return own_target_logits(model, [source], [TARGET])


@pytest.mark.parametrize("case", fast_if_in(QUICK, CASES))
@torch.no_grad()
def test_prefill_and_cached_steps_of_a_mixed_pass_equal_peft_alone(case: str, tmp_path: Path) -> None:
    family, changes, make = CASES[case]
    folder = folder_of(family, changes, make, tmp_path / "given")
    plain, own = made(family, "generate", METHODS["lora"]), bundles.read_bundle(folder)
    runner = runner_of(family, "generate", [plain, own], **changes)
    sources, slots = rows(1, (6, 4, 9)), [2, 1, 0]
    sources[0][2] = sources[1][1] = 17  # a token that is trained
    kv_slots = [runner.kv_slot(len(row), 3, slot) for row, slot in zip(sources, slots, strict=True)]
    fresh = [Prefill(r.tolist(), slot, kv) for r, slot, kv in zip(sources, slots, kv_slots, strict=True)]
    passes = [runner.run(fresh).vocabulary]
    for token in TARGET[:-1].tolist():
        steps = [DecodeStep(token, slot, kv) for slot, kv in zip(slots, kv_slots, strict=True)]
        passes.append(runner.run([], steps).vocabulary)
    answers = torch.stack(passes, dim=1)  # (3, 3, V)
    expected = by_peft(family, changes, folder, sources[0])
    bare = build(family, "generate", **changes)
    torch.testing.assert_close(answers[0], expected, **CLOSE)
    assert (own_target_logits(bare, sources[:1], [TARGET]) - expected).abs().max() > 1e-2  # control
    torch.testing.assert_close(answers[2], own_target_logits(bare, sources[2:], [TARGET]), **CLOSE)
    mounted = adapters.mount(build(family, "generate", **changes), plain)
    torch.testing.assert_close(answers[1], own_target_logits(mounted, sources[1:2], [TARGET]), **CLOSE)


@pytest.mark.parametrize("case", ["untied embeddings and output", "tied few tokens"])
@torch.no_grad()
def test_slots_of_one_model_equal_peft_packed(case: str, tmp_path: Path) -> None:
    family, changes, make = CASES[case]
    folder = folder_of(family, changes, make, tmp_path / "given")
    model = adapters.mount(build(family, "generate", **changes), made(family, "generate", METHODS["lora"]), 1)
    adapters.mount(model, bundles.read_bundle(folder), 2)
    sources, targets = rows(1, (6, 4)), [TARGET, TARGET]
    logits = adapters.target_logits(model, sources, targets, [1, 2])
    torch.testing.assert_close(logits[3:], by_peft(family, changes, folder, sources[1]), **CLOSE)
    mounted = adapters.mount(build(family, "generate", **changes), made(family, "generate", METHODS["lora"]))
    torch.testing.assert_close(logits[:3], own_target_logits(mounted, sources[:1], [TARGET]), **CLOSE)


@pytest.mark.parametrize(
    "case", ["norms of llama", "untied embeddings and output", "tied few tokens", "every bias of gpt2"]
)
@torch.no_grad()
def test_a_merged_model_answers_as_peft_does(case: str, tmp_path: Path) -> None:
    family, changes, make = CASES[case]
    folder = folder_of(family, changes, make, tmp_path / "given")
    model = build(family, "generate", **changes)
    model.load_state_dict(merged_state(model, bundles.read_bundle(folder)))
    (source,) = rows(1, (6,))
    torch.testing.assert_close(
        own_target_logits(model, [source], [TARGET]), by_peft(family, changes, folder, source), atol=1e-4, rtol=1e-4
    )


def refused(family: str, changes: dict[str, Any], folder: Path) -> str:
    with pytest.raises(AdapterError) as error:
        runner_of(family, "generate", [bundles.read_bundle(folder)], **changes)
    return str(error.value)


def test_an_embedding_that_the_base_ties_cannot_be_merged_alone(tmp_path: Path) -> None:
    family, changes, make = CASES["tied embeddings"]
    adapter = bundles.read_bundle(folder_of(family, changes, make, tmp_path / "given"))
    with pytest.raises(
        AdapterError, match="embed_tokens shares its weight with lm_head, so the adapter cannot be merged"
    ):
        merged_state(build(family, "generate", **changes), adapter)


def test_a_linear_layer_that_is_trained_whole_is_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = folder_of("llama", {}, lora(target_modules=Q, modules_to_save=["down_proj"]), tmp_path / "given")
    message = refused("llama", {}, folder)
    assert "down_proj; a row can have its own norms, embeddings and output layer, but no other module" in message
    assert "merge the adapter with PEFT" in message


def test_a_norm_that_gets_heads_before_tokens_is_refused_with_a_way_out(tmp_path: Path) -> None:
    make = lora(target_modules=Q, modules_to_save=["q_norm"])
    message = refused("gemma3_text", {}, folder_of("gemma3_text", {}, make, tmp_path / "given"))
    assert "q_norm of one row cannot differ from that of another" in message


def test_a_norm_of_the_head_is_refused_with_a_way_out() -> None:
    values = {"head.norm.weight": torch.ones(32)}
    with pytest.raises(AdapterError, match=r"head\.norm is a part of the classification head.* and train again"):
        with_modules(values, {}, build("modernbert", "classify"))


def test_tokens_that_were_added_are_refused_with_a_way_out(tmp_path: Path) -> None:
    make = CASES["untied embeddings and output"][2]
    folder = folder_of("llama", {"vocab_size": 131}, make, tmp_path / "given")
    assert "it has 3 more tokens; save the resized base with its tokenizer and give it as --base" in refused(
        "llama", {}, folder
    )


def test_an_option_that_is_not_computed_is_refused_beside_one_that_is(tmp_path: Path) -> None:
    folder = folder_of("llama", {}, lora(target_modules=Q, lora_bias=True), tmp_path / "given")
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"alora_invocation_tokens": null', '"alora_invocation_tokens": [5]'))
    with pytest.raises(BundleError, match="sets alora_invocation_tokens to"):
        bundles.read_bundle(folder)


def test_what_peft_saves_twice_with_every_bias_is_read_once(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    peft.get_peft_model(build("bert", "classify"), config).save_pretrained(tmp_path / "given")
    found: Adapter = bundles.read_bundle(tmp_path / "given")
    assert not [name for name in (*found.tensors, *found.head) if "original_module" in name or "to_save" in name]
    assert set(found.head) >= {"classifier.weight", "classifier.bias"}


@pytest.mark.slow
@torch.no_grad()
def test_peft_loads_a_head_that_has_a_pooler_inside_the_body(tmp_path: Path) -> None:
    model = adapters.attach(build("bert", "classify"), METHODS["lora"], head=("bert.pooler",))
    for each in adapters.trainable_parameters(model).values():
        each.add_(torch.randn_like(each) * 0.1)
    tensors, head, method = adapters.extract(model)
    adapter = Adapter(method, tensors, head, BaseInfo("small", None, "bert"), {"kind": "classify"})
    assert adapter.head_modules == ["bert.pooler", "classifier"]
    bundles.save_bundle(adapter, tmp_path / "bundle")
    theirs = peft.PeftModel.from_pretrained(build("bert", "classify"), str(tmp_path / "bundle")).eval()
    batch = padded(rows(), 0)
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, **CLOSE)
