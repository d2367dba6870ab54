"""A trial: adapters that PEFT made, of as many kinds as users have, are imported with no option and answer together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
import transformers
from bundles.test_conversion import CUT, EXACT, trained_by_peft
from bundles.test_mixing import KINDS, TARGETS, WHOLE
from exchange.foreign import chances_by_peft

from turret import Workspace
from turret.cli.main import run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
LABELS = {0: "bad", 1: "good", 2: "odd"}
TEXT = "a dull and boring story about the market"
TRIED: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS),
    "rsLoRA": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True),
    "DoRA": KINDS["dora"],
    "IA3": KINDS["ia3"],
    "VeRA": KINDS["vera"],
    "AdaLoRA": EXACT["adalora"],
    "LoRA with patterns": EXACT["rank pattern"],
    "LoRA with its layers' biases": EXACT["trained biases"],
    "LoRA with every bias": WHOLE["every bias"],
    "LoRA with norms": WHOLE["norms"],
    "LoRA with embeddings": WHOLE["embeddings"],
    "LoRA with a few tokens": WHOLE["a few tokens"],
    "LN tuning": WHOLE["norms alone"],
    "LoHa": CUT["loha"],
    "LoKr": CUT["lokr"],
}
CUT_KINDS = ("LoHa", "LoKr")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as people have it: its labels have names."""
    folder = tmp_path_factory.mktemp("base") / "bert"
    small_models.build("bert", "classify", id2label=LABELS).save_pretrained(folder)
    small_models.tokenizer("bert").save_pretrained(folder)
    return folder


def classifier(base: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(base).eval()


@pytest.mark.slow
def test_fifteen_adapters_of_as_many_kinds_need_no_reading(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {kind: tmp_path / f"given {number}" for number, kind in enumerate(TRIED)}
    for kind, make in TRIED.items():
        torch.manual_seed(0)
        trained_by_peft(classifier(base), make, folders[kind], 0.05 if kind in CUT_KINDS else 0.2)
    names = {kind: f"a{number}" for number, kind in enumerate(TRIED)}
    for kind, folder in folders.items():  # the configuration names the base, and the base names the labels
        status = run(["import", str(folder), "--name", names[kind], "--store", str(tmp_path / "store")])
        assert status == 0, f"{kind}: {capsys.readouterr().err}"
    workspace = Workspace(tmp_path / "store")
    with workspace.engine(str(base), dtype="float32") as engine:
        for name in names.values():
            engine.warm(name)
        tickets = {kind: engine.submit("classify", TEXT, name) for kind, name in names.items()}
        answers = {kind: ticket.result(60) for kind, ticket in tickets.items()}
    for kind, answer in answers.items():
        found = torch.tensor(list(answer["probabilities"].values()))
        tolerance = 0.05 if kind in CUT_KINDS else 1e-5
        expected = chances_by_peft(classifier(base), folders[kind], TEXT)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance, msg=kind)
    assert len({tuple(answer["probabilities"].values()) for answer in answers.values()}) == len(TRIED)  # control
