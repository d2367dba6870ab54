"""An attached model is an ordinary module: HF Trainer, Seq2SeqTrainer and a hand-written loop train it unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from batches import padded, rows
from datasets import Dataset
from small_models import build

from turret.adapters import attach, detach, extract, trainable_parameters
from turret.methods import LoRA, Method, Prefix

METHODS: tuple[Method, ...] = (LoRA(r=4), Prefix(num_virtual_tokens=4, encoder_hidden_size=8))


def arguments(kind: Any, folder: Path, **changes: Any) -> Any:
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=12,
        learning_rate=3e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **changes,
    )


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}


def check(trainer: Any, model: Any) -> None:
    before, start = frozen(model), {k: v.clone() for k, v in trainable_parameters(model).items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.99 * sum(losses[:3])
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in before.items())
    assert any(not torch.equal(value, start[name]) for name, value in trainable_parameters(model).items())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_hf_trainer_trains_a_classifier(family: str, method: Method, tmp_path: Path) -> None:
    model = attach(build(family, "classify"), method, generator=torch.Generator().manual_seed(0))
    batch = padded(rows(0, (9, 5, 12, 7, 4, 8, 10, 6)), model.config.pad_token_id)
    data = Dataset.from_dict({**{k: v.tolist() for k, v in batch.items()}, "labels": [0, 1, 2, 0, 1, 2, 0, 1]})
    trainer = transformers.Trainer(model, arguments(transformers.TrainingArguments, tmp_path), train_dataset=data)
    check(trainer, model)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_seq2seq_trainer_trains_and_generates(family: str, method: Method, tmp_path: Path) -> None:
    model = attach(build(family, "generate"), method, generator=torch.Generator().manual_seed(0))
    batch = padded(rows(0, (9, 5, 12, 7)), model.config.pad_token_id)
    labels = padded(rows(1, (4, 4, 4, 4)), model.config.pad_token_id)["input_ids"].tolist()
    data = Dataset.from_dict({**{k: v.tolist() for k, v in batch.items()}, "labels": labels})
    settings = arguments(
        transformers.Seq2SeqTrainingArguments, tmp_path, predict_with_generate=True, generation_max_length=6
    )
    trainer = transformers.Seq2SeqTrainer(model, settings, train_dataset=data, eval_dataset=data)
    check(trainer, model)
    assert trainer.predict(data).predictions.shape[0] == 4


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.kind)
def test_a_trainers_checkpoint_loads_into_an_attached_model(method: Method, tmp_path: Path) -> None:
    model = attach(build("bert", "classify"), method, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for each in trainable_parameters(model).values():
            each.add_(0.1)
    model.save_pretrained(tmp_path)
    state = transformers.modeling_utils.load_state_dict(str(tmp_path / "model.safetensors"))
    again = attach(build("bert", "classify"), method, generator=torch.Generator().manual_seed(9))
    again.load_state_dict(state)
    for name, value in extract(model).tensors.items():
        assert torch.equal(value, extract(again).tensors[name])


def test_a_hand_written_loop_trains_and_detach_leaves_the_base_bit_equal() -> None:
    model = build("gpt2", "generate")
    own = {name: each.clone() for name, each in model.named_parameters()}
    attach(model, METHODS[1], init_ids=torch.tensor([11, 12, 13]))
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2)
    batch = padded(rows(0, (9, 5)), model.config.pad_token_id)
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    detach(model)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in own.items())
    assert own.keys() == dict(model.named_parameters()).keys()
