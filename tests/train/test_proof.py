"""A fresh process proves a bundle from disk; a bundle that does not reproduce the training is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from marks import few
from tiny_training import fit

from turret import adapters, bases, bundles
from turret.errors import ProofFailed
from turret.train import proof
from turret.train.proof import Probe, answer, probe, prove


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: small_models.save_base(family, root / family) for family in ("bert", "llama", "t5")}


def trained(folder: Path, to: Path, kind: str = "classify", **overrides: Any) -> tuple[bases.Base, Probe, Any]:
    on = bases.load(str(folder), task="classify" if kind == "classify" else "generate", num_labels=2, dtype="float32")
    data, recipe = tiny.dataset(kind), tiny.recipe(train__lr=1e-2, train__epochs=1, **overrides)
    task = tiny.task_of(recipe, data, on)
    _, fitted = tiny.train(fit(recipe, on, task, data))
    asked = probe(on.model, task, data.test)
    adapters.detach(on.model)
    bundles.save_bundle(fitted.adapter, to)
    return on, asked, fitted.adapter


def examine(on: bases.Base, bundle: Path, asked: Probe, **changes: Any) -> dict[str, Any]:
    """The work of the fresh process, in this process."""
    load = {
        "base": on.id,
        "task": on.head,
        "num_labels": None if asked.targets else 2,
        "dtype": "float32",
        "device": "cpu",
    }
    request: Any = {
        "bundle": str(bundle),
        "load": load | changes,
        "fingerprint": on.fingerprint,
        "tolerance": 1e-5,
    }
    tensors = {f"source.{i}": each for i, each in enumerate(asked.sources)}
    tensors |= {f"target.{i}": each for i, each in enumerate(asked.targets)}
    return proof.examine(request, {**tensors, "outputs": asked.outputs})


@pytest.mark.parametrize(
    ("family", "kind", "method"),
    few(
        [
            ("bert", "classify", "lora"),
            ("llama", "summarize", "prefix"),
            ("bert", "classify", "full"),
            ("bert", "classify", "prefix"),
            ("bert", "classify", "head"),
            ("llama", "summarize", "lora"),
            ("llama", "summarize", "full"),
            ("t5", "summarize", "lora"),
            ("t5", "summarize", "prefix"),
        ],
        3,
    ),
)
def test_every_method_is_proven(folders: dict[str, Path], tmp_path: Path, family: str, kind: str, method: str) -> None:
    on, asked, _ = trained(folders[family], tmp_path / "bundle", kind, method=method)
    report = examine(on, tmp_path / "bundle", asked)
    assert report["problem"] is None
    assert report["error"] <= 1e-6
    assert report["effect"] > 1e-4
    assert report["rows"] == 4


@pytest.fixture
def fresh(forked_proofs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proof starts a process, as outside tests."""
    monkeypatch.setattr(proof, "_run", forked_proofs)


@pytest.mark.slow
def test_a_fresh_process_says_what_a_forked_one_does(
    folders: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    on, asked, _ = trained(folders["bert"], tmp_path / "bundle")
    forked = prove(tmp_path / "bundle", on, asked)
    request.getfixturevalue("fresh")
    report = prove(tmp_path / "bundle", on, asked)
    assert {**report, "seconds": 0} == {**forked, "seconds": 0}
    assert report["problem"] is None
    assert report["fingerprint"] == on.fingerprint
    assert report["tensors"] > 8


@pytest.mark.slow
def test_a_bundle_that_is_broken_fails_its_proof_in_one_line(
    folders: dict[str, Path], tmp_path: Path, fresh: None
) -> None:
    on, asked, _ = trained(folders["bert"], tmp_path / "bundle")
    weights = tmp_path / "bundle" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ProofFailed, match=r"not stored, because read back in a fresh process it could not be used: .*"):
        prove(tmp_path / "bundle", on, asked)


def test_a_proof_without_an_answer_says_so(folders: dict[str, Path], tmp_path: Path, fresh: None) -> None:
    on, asked, _ = trained(folders["bert"], tmp_path / "bundle")
    with pytest.raises(ProofFailed, match=r"wrote no report \(it took longer than 0 s"):
        prove(tmp_path / "bundle", on, asked, timeout=0.05)


def test_other_outputs_another_base_and_an_adapter_without_effect_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    on, asked, adapter = trained(folders["bert"], tmp_path / "bundle")
    report = examine(on, tmp_path / "bundle", replace(asked, outputs=asked.outputs + 0.1))
    assert "its outputs differ by" in report["problem"]

    other = small_models.save_base("bert", tmp_path / "other", seed=1)
    report = examine(on, tmp_path / "bundle", asked, base=str(other))
    assert "its base had other weights" in report["problem"]

    silent = {name: each * 0 if "lora_B" in name else each for name, each in adapter.tensors.items()}
    bundles.save_bundle(replace(adapter, tensors=silent), tmp_path / "silent")
    adapters.mount(on.model, replace(adapter, tensors=silent))
    outputs = answer(on.model, asked.sources, []).detach()
    adapters.detach(on.model)
    report = examine(on, tmp_path / "silent", replace(asked, outputs=outputs))
    assert "the adapter has no effect" in report["problem"]


def test_a_probe_is_spread_over_the_examples_and_leaves_the_mode_alone(folders: dict[str, Path]) -> None:
    on, data = tiny.base("bert"), tiny.dataset(test=40)
    recipe = tiny.recipe()
    task = tiny.task_of(recipe, data, on)
    adapters.attach(on.model, recipe.method)
    on.model.train()
    asked = probe(on.model, task, data.test)
    assert on.model.training
    assert asked.outputs.shape == (4, 2)
    assert [source.tolist() for source in asked.sources] == [
        task.encode_sources([data.test[place].text])[0].ids.tolist() for place in (0, 10, 20, 30)
    ]
    assert not asked.targets
    assert asked.outputs.dtype == torch.float32
