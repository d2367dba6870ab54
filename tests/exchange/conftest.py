"""Fixtures: bases, PEFT folders, and a store with an adapter of each kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import small_models
import torch
from exchange.foreign import (
    LABELS,
    peft_folder,
)

from turret import bundles
from turret.adapters import Adapter
from turret.workspace import Workspace


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_base("bert", tmp_path_factory.mktemp("bases") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.save_base("llama", tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder of a BERT classifier with three classes; never changed."""
    return peft_folder("bert", "classify", tmp_path_factory.mktemp("peft") / "sentiment")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory, bert: Path, llama: Path, foreign: Path) -> Workspace:
    """A store with a classifier on BERT, `sentiment`, and a LoRA and a prefix on Llama, `writer` and `prefix`."""
    root = tmp_path_factory.mktemp("exchange")
    made = Workspace(root / "store")
    made.import_adapter(foreign, "sentiment", base=str(bert), labels=LABELS)
    made.import_adapter(peft_folder("llama", "generate", root / "writer"), "writer", base=str(llama), task="summarize")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        small_models.build("llama", "generate"), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.save_pretrained(root / "prefix")
    made.import_adapter(root / "prefix", "prefix", base=str(llama))
    return made


@pytest.fixture
def folder(foreign: Path, tmp_path: Path) -> Path:
    """A copy of the PEFT folder that a test may damage."""
    return Path(shutil.copytree(foreign, tmp_path / "sentiment"))


@pytest.fixture
def bundle(workspace: Workspace, tmp_path: Path) -> Path:
    """An exported bundle that a test may damage."""
    workspace.export("sentiment", tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def bundle_of_writer(workspace: Workspace, tmp_path: Path) -> Adapter:
    workspace.export("writer", tmp_path / "writer")
    return bundles.read_bundle(tmp_path / "writer")
