"""An architecture that is not listed is served after a check against its own outputs, or refused with what differed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
import transformers
from adapters_at_hand import GENERATES
from batches import own_target_logits, padded, rows
from small_models import save_base, tokenizer

import turret
from turret import bases
from turret.adapters import Adapter, BaseInfo, attach, classify_logits, extract, on_slot, target_logits
from turret.bases import base
from turret.engine import runner as runner_module
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.errors import TurretError, UnknownFamily
from turret.families import FAMILIES
from turret.families.generic import kind_of
from turret.methods import LoRA, Peft

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
DECODERS = {
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "starcoder2": lambda: transformers.Starcoder2Config(**GROUPED, sliding_window=None),
    "granite": lambda: transformers.GraniteConfig(**GROUPED, attention_multiplier=0.2),
}
ENCODERS = {
    "ernie": lambda: transformers.ErnieConfig(**SIZES),
    "rembert": lambda: transformers.RemBertConfig(**SIZES, input_embedding_size=24, output_embedding_size=24),
    "mobilebert": lambda: transformers.MobileBertConfig(**SIZES, intra_bottleneck_size=48, embedding_size=48),
    "roformer": lambda: transformers.RoFormerConfig(**SIZES, embedding_size=48),
}
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """The table as it was."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def small(config: Any, kind: Any) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() > 1:
                each.normal_(std=each.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_decoder_that_is_not_listed_writes_as_by_itself(name: str) -> None:
    model = small(DECODERS[name](), transformers.AutoModelForCausalLM)
    assert name not in FAMILIES
    assert kind_of(name) == "decoder"
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    own = own_target_logits(model, sources, targets)
    family, off = base.recognise_family(model, "decoder")
    assert off < 1e-4
    assert FAMILIES[name] is family
    attach(model, LoRA(r=2, init_lora_weights=False), generator=torch.Generator().manual_seed(1))
    assert (target_logits(model, sources, targets) - own).abs().max() > 1e-3
    with on_slot(model, 0):
        torch.testing.assert_close(target_logits(model, sources, targets), own, **CLOSE)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_encoder_that_is_not_listed_classifies_as_by_itself(name: str) -> None:
    model = small(ENCODERS[name](), transformers.AutoModelForSequenceClassification)
    inputs = rows()
    own = torch.cat([model(**padded([row], 0)).logits for row in inputs])
    family, off = base.recognise_family(model, "encoder")
    assert off < 1e-4
    attach(model, LoRA(r=2, init_lora_weights=False), generator=torch.Generator().manual_seed(1))
    assert (classify_logits(model, inputs) - own).abs().max() > 1e-3
    with on_slot(model, 0):
        torch.testing.assert_close(classify_logits(model, inputs), own, **CLOSE)
    assert family.lora_targets


OPT: dict[str, Any] = SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 48, "max_position_embeddings": 64}
LN = Peft(peft_type="LN_TUNING", target_modules=["final_layer_norm"])
ALL = LoRA(r=2, init_lora_weights=False, target_modules="all-linear")
SERVED = {
    "rows that are left out": (lambda: transformers.OPTConfig(**OPT), ALL),
    "norms of tokens without rows": (lambda: transformers.OPTConfig(**OPT), LN),
    "experts": (
        lambda: transformers.HunYuanMoEV1Config(**GROUPED, head_dim=12, num_experts=4, moe_topk=2),
        LoRA(r=2, init_lora_weights=False, target_modules=("gate_proj", "q_proj")),
    ),
    "a window": (lambda: transformers.Starcoder2Config(**GROUPED, sliding_window=8), ALL),
    "another name of a head's size": (lambda: transformers.GPTNeoXConfig(**SIZES), ALL),
}


@pytest.mark.parametrize("case", SERVED)
@torch.no_grad()
def test_a_decoder_that_is_not_listed_is_served_as_by_itself(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an adapter and bare in one pass, in long prompts that take several passes, step by step, and scored."""
    monkeypatch.setattr(runner_module, "PROMPT_PASS", 16)
    config, method = SERVED[case]
    model = small(config(), transformers.AutoModelForCausalLM)
    family, _ = base.recognise_family(model, "decoder")
    prompts, targets = rows(1, (9, 40)), rows(2, (2, 2))
    own = own_target_logits(model, prompts, targets).split(2)
    scored = float(
        own_target_logits(model, [prompts[1]], [targets[1]]).log_softmax(-1).gather(1, targets[1][:, None]).sum()
    )

    trained = small(config(), transformers.AutoModelForCausalLM)
    attach(trained, method, generator=torch.Generator().manual_seed(1)).eval()
    for name, each in trained.named_parameters():
        if each.requires_grad and "ln_tuning" in name:
            each.add_(torch.linspace(-0.5, 0.5, each.numel()))
    adapted = target_logits(trained, prompts, targets).split(2)
    assert (adapted[0] - own[0]).abs().max() > 1e-3
    mixed = (
        target_logits(trained, prompts, targets, [1, 0]).split(2) if isinstance(method, LoRA) else (adapted[0], own[1])
    )
    for found, wanted in zip(mixed, (adapted[0], own[1]), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)

    runner = Runner(tiny_training.Base(model, tokenizer("llama"), family))  # type: ignore[arg-type]
    tensors, head, stored = extract(trained)
    adapter = Adapter(stored, tensors, head, BaseInfo("small", None, family.name))
    runner.adapter_pool.mount(1, runner.adapter_pool.prepare(adapter, "a", GENERATES))  # type: ignore[arg-type]
    for slots in ((1, 0), (0, 1)):
        kv_slots = [runner.kv_slot(len(prompt), 2, slot) for prompt, slot in zip(prompts, slots, strict=True)]
        begin = [Prefill(*each) for each in zip([each.tolist() for each in prompts], slots, kv_slots, strict=True)]
        first = runner.run([*begin, Prefill(prompts[1].tolist(), branches=(targets[1].tolist(), [5, 6]))])
        last = runner.run(
            [], [DecodeStep(int(t[0]), slot, kv) for t, slot, kv in zip(targets, slots, kv_slots, strict=True)]
        )
        for row, slot in enumerate(slots):
            wanted = (adapted if slot else own)[row]
            torch.testing.assert_close(torch.stack([first.vocabulary[row], last.vocabulary[row]]), wanted, **CLOSE)
        assert first.scores[0][0] == pytest.approx(scored, abs=1e-4)
        with torch.inference_mode():
            for each in kv_slots:
                runner.cache.close(each)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: transformers.JetMoeConfig(**GROUPED, kv_channels=12, num_local_experts=4, num_experts_per_tok=2),
            "has keys and values of",
        ),
        (lambda: transformers.DiffLlamaConfig(**GROUPED), "computes attention twice"),
    ],
    ids=["keys of another shape", "two pairs of keys"],
)
def test_a_decoder_whose_keys_no_cache_has_room_for_is_refused(config: Any, reason: str) -> None:
    model = small(config(), transformers.AutoModelForCausalLM)
    with pytest.raises(UnknownFamily, match=reason):
        base.recognise_family(model, "decoder")


@torch.no_grad()
def test_an_encoder_that_gives_attention_other_tokens_than_its_rows_have_takes_them_one_by_one() -> None:
    """ESM reads the mask too, which is of one token here; a kernel that believed it would read beyond its tensors."""
    model = small(transformers.EsmConfig(**SIZES, mask_token_id=1), transformers.AutoModelForSequenceClassification)
    family, off = base.recognise_family(model, "encoder")
    assert family.rows_alone
    assert off < 1e-4


def test_what_gives_other_outputs_under_the_hooks_is_refused_with_how_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(DECODERS["olmo2"](), transformers.AutoModelForCausalLM)

    own = base._own_outputs
    monkeypatch.setattr(
        base,
        "_own_outputs",
        lambda model, kind: 1.5 * own(model, kind),  # a last step that no hook sees
    )
    with pytest.raises(UnknownFamily, match=r"'olmo2' is not listed.*differ by \d+% of the largest at best"):
        base.recognise_family(model, "decoder")
    assert "olmo2" not in FAMILIES


def test_what_does_not_look_up_attention_functions_is_refused_if_it_writes() -> None:
    config = transformers.BloomConfig(vocab_size=128, hidden_size=48, n_layer=2, n_head=4)
    model = small(config, transformers.AutoModelForCausalLM)
    with pytest.raises(UnknownFamily, match="no module of it looks up transformers' attention functions"):
        base.recognise_family(model, "decoder")


@torch.no_grad()
def test_a_model_that_cannot_answer_rows_of_any_length_is_refused() -> None:
    config = transformers.NystromformerConfig(**SIZES, num_landmarks=4, segment_means_seq_len=16)
    model = small(config, transformers.AutoModelForSequenceClassification)
    with pytest.raises(UnknownFamily, match=r"'nystromformer' is not listed.*shape"):
        base.recognise_family(model, "encoder")


@pytest.mark.slow
def test_a_base_that_is_not_listed_loads_with_a_note_and_trains_and_answers(tmp_path: Path) -> None:
    model = small(DECODERS["olmo2"](), transformers.AutoModelForCausalLM)
    model.save_pretrained(tmp_path / "base")
    tokenizer("llama").save_pretrained(tmp_path / "base")
    table = tmp_path / "data.jsonl"
    rows = [{"source": f"item {row} fell", "target": f"story {row}"} for row in range(12)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workspace = turret.Workspace(tmp_path / "store")
    recipe = turret.Recipe(
        name="story", base=str(tmp_path / "base"), data={"source": str(table), "test": 2}, train={"epochs": 1}
    )
    run = workspace.train(recipe)
    assert any("olmo2 is not listed; with the plain hooks" in note for note in run.notes)
    (answer,) = workspace.predict(run.version, ["item 1 fell"])
    with workspace.engine(str(tmp_path / "base"), dtype="float32") as engine:
        (served,) = engine.generate(["item 1 fell"], run.version)
    assert answer["text"]
    assert served["tokens"] > 0


def test_an_architecture_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    save_base("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "no-such-thing"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TurretError, match="no-such-thing"):
        bases.load(str(tmp_path), task="classify")
