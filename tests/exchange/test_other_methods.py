"""PEFT's other methods come in, answer beside LoRA in one engine, and go out as PEFT reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from bundles.test_conversion import CUT, EXACT, folder_of
from bundles.test_mixing import KINDS, WHOLE
from exchange.foreign import LABELS, TEXTS, chances_by_peft
from marks import slow

from turret import Workspace
from turret.errors import BundleError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")


def by_peft(folder: Path, text: str) -> torch.Tensor:
    return chances_by_peft(small_models.build("bert", "classify"), folder, text)


@pytest.mark.parametrize("kind", [*KINDS, *slow(WHOLE), *EXACT])
def test_it_answers_in_an_engine_as_peft_does_and_goes_out_again(
    kind: str, tmp_path: Path, bert: Path, foreign: Path
) -> None:
    folder = folder_of((KINDS | WHOLE | EXACT)[kind], tmp_path / "given")
    workspace = Workspace(tmp_path / "store")
    workspace.import_adapter(foreign, "plain", base=str(bert), labels=LABELS)
    found = workspace.import_adapter(folder, "other", base=str(bert), labels=LABELS)
    assert any("converted from" in note for note in found.notes) == (kind in EXACT)
    with workspace.engine(str(bert), dtype="float32") as engine:
        tickets = [engine.submit("classify", TEXTS[0], name) for name in ("plain", "other", "plain")]
        _, answer, _ = [ticket.result(60) for ticket in tickets]
    given = torch.tensor(list(answer["probabilities"].values()))
    torch.testing.assert_close(given, by_peft(folder, TEXTS[0]), atol=1e-5, rtol=1e-5)
    workspace.export("other", tmp_path / "out")
    torch.testing.assert_close(by_peft(tmp_path / "out", TEXTS[0]), given, atol=1e-5, rtol=1e-5)
    again = workspace.import_adapter(tmp_path / "out", "other")
    assert again.digest == found.digest


@pytest.mark.parametrize("kind", CUT)
def test_what_is_cut_says_how_much_and_a_rank_that_is_too_small_is_refused(
    kind: str, tmp_path: Path, bert: Path
) -> None:
    folder = folder_of(CUT[kind], tmp_path / "given", scale=0.1)
    workspace = Workspace(tmp_path / "store")
    options: dict[str, Any] = {"base": str(bert), "labels": LABELS}
    found = workspace.import_adapter(folder, "cut", rank=48, **options)
    assert any(f"converted from {kind.upper()} to LoRA of rank 48: outputs change by" in note for note in found.notes)
    strong = folder_of(CUT[kind], tmp_path / "strong", scale=1.0)
    with pytest.raises(BundleError, match="give a larger --rank"):
        workspace.import_adapter(strong, "cut", rank=1, **options)
    assert len(workspace.list("cut")) == 1
