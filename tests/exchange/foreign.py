"""PEFT folders from outside, and how the import command refuses them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch

from turret import adapters, bases, bundles
from turret.cli.main import run
from turret.tasks import task_from_spec
from turret.workspace import Workspace

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "manifest.json"
LABELS = ["bad", "good", "odd"]
TEXTS = ["a great film", "a dull and boring story about the market"]


def peft_folder(family: str, task: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder that PEFT saved: a LoRA whose weights all have an effect, and a head if the task has one."""
    kinds = {"classify": "SEQ_CLS", "generate": "SEQ_2_SEQ_LM" if family in ("t5", "bart") else "CAUSAL_LM"}
    method = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "fan_in_fan_out": family == "gpt2", **changes}
    torch.manual_seed(seed)
    model = peft.get_peft_model(
        small_models.build(family, task),
        peft.LoraConfig(task_type=kinds[task], **method),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "modules_to_save" in name:
                each.add_(torch.randn_like(each) * 0.1)
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def chances(workspace: Workspace, name: str, text: str) -> torch.Tensor:
    """The probabilities of a stored classifier, with a float32 base on every machine."""
    manifest = workspace.show(name)["manifest"]
    base = bases.load(manifest["base"]["id"], task="classify", dtype="float32")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        workspace.store.materialize(name, Path(folder))
        adapters.mount(base.model, bundles.read_bundle(folder), fingerprint=base.fingerprint)
        task = task_from_spec(manifest["task"], base.tokenizer)
        return adapters.classify_logits(base.model, [task.encode_sources([text])[0].ids]).softmax(-1)[0]


def chances_by_peft(classifier: Any, folder: Path, text: str) -> torch.Tensor:
    """The probabilities of PEFT with a folder on a classifier of BERT's."""
    model = peft.PeftModel.from_pretrained(classifier, str(folder)).eval()
    inputs = small_models.tokenizer("bert")(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits.softmax(-1)[0]
    return found


def refused(capsys: pytest.CaptureFixture[str], store: Path, source: object, *more: str) -> str:
    """The error line of an import that is refused and stores nothing."""
    capsys.readouterr()
    status = run(["import", str(source), "--name", "x", "--store", str(store), *more])
    out, err = capsys.readouterr()
    assert status in (1, 2), err
    assert out == ""
    assert err.startswith("turret: ")
    assert err.count("\n") == 1
    assert len(err) < 700
    assert "bug in turret" not in err
    assert not (store / "turret.db").exists()
    return err


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
