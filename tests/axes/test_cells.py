"""Every cell of family, method and task does what the generated table says: train, mix, export, import, or one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import torch
from adapters_at_hand import METHODS as AT_HAND
from adapters_at_hand import made, runner_of
from batches import rows, with_eos
from scripts import load

from turret import bundles
from turret.adapters import Adapter, BaseInfo, attach, classify_logits, extract, mount, target_logits
from turret.adapters.hooks import trainable_parameters
from turret.engine.sequence import Prefill
from turret.errors import TurretError
from turret.families import FAMILIES
from turret.families.family import IA3_BASES
from turret.methods import METHODS, SHOWN, LoRA, Method, Peft
from turret.workspace.machine import kinds, refusals

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
TRIED = {  # smaller than the defaults, and with effects that are easy to see
    "lora": LoRA(r=4, lora_alpha=8, lora_dropout=0.0),
    "peft:DORA": Peft(peft_type="DORA", r=4, lora_dropout=0.0),
    "peft:VERA": Peft(peft_type="VERA", r=16, d_initial=0.5),
    "peft:LOHA": Peft(peft_type="LOHA", r=4),
    "peft:OFT": Peft(peft_type="OFT", oft_block_size=8),
    "peft:PROMPT_TUNING": Peft(peft_type="PROMPT_TUNING", num_virtual_tokens=4),
}
LISTED = (*small_models.FAMILIES, *small_models.RELATIVES)
CROSS = [(family, method, task) for family in LISTED for method in SHOWN for task in kinds(FAMILIES[family])]


def covering() -> list[tuple[str, str, str]]:
    """Cells that take each family, each method and each task at least once."""
    names = list(SHOWN)
    cells = []
    for number, family in enumerate(LISTED):
        tasks = list(kinds(FAMILIES[family]))
        cells.append((family, names[number % len(names)], tasks[number % len(tasks)]))
    return cells


def tried(name: str, family: str) -> Method:
    """The method, with the norms of the family for LN tuning, which PEFT does not know."""
    if name != "peft:LN_TUNING":
        return TRIED.get(name, SHOWN[name])
    task = next(iter(kinds(FAMILIES[family])))
    norms, others = set[str](), set(FAMILIES[family].heads_first)
    for path, each in small_models.build(family, task).named_modules():
        of_head = path.partition(".")[0] in FAMILIES[family].head_modules
        own = "norm" in type(each).__name__.lower() and not of_head
        (norms if own else others).add(path.rpartition(".")[2])
    return Peft(peft_type="LN_TUNING", target_modules=sorted(norms - others))


def answers(model: Any, task: str, slots: list[int] | None = None) -> torch.Tensor:
    if task == "classify":
        return classify_logits(model, with_eos(model, rows()), slots)
    return target_logits(model, rows(1), rows(2, (5, 2, 1, 7)), slots)


def trained(family: str, method: Method, task: Any) -> tuple[Adapter, torch.Tensor]:
    """An adapter after two steps, and its outputs."""
    model = small_models.build(family, task)
    attach(model, method, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = answers(model, task)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        logits = answers(model, task)
        labels = torch.arange(len(logits)) % 3
        torch.nn.functional.cross_entropy(logits, labels).backward()
        assert any(each.grad is not None and each.grad.abs().max() > 0 for each in parameters.values())
        optimizer.step()
    with torch.no_grad():
        after = answers(model.eval(), task)
    assert (after - before).abs().max() > 1e-5  # control: it learnt something
    tensors, head, kept = extract(model)
    return Adapter(kept, tensors, head, BaseInfo("small", "sha256:small", family)), after


@torch.no_grad()
def exported_and_imported(adapter: Adapter, family: str, task: Any, folder: Path, expected: torch.Tensor) -> None:
    spec = {"kind": "classify", "labels": ["a", "b", "c"]} if task == "classify" else {"kind": "generate"}
    bundles.save_bundle(Adapter(adapter.method, adapter.tensors, adapter.head, adapter.base, spec), folder)
    again = bundles.read_bundle(folder)
    assert again.method == adapter.method
    model = mount(small_models.build(family, task), again)
    torch.testing.assert_close(answers(model, task), expected, atol=1e-5, rtol=1e-5)


def same_but_for_rounding(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A score is a sum over one hidden state, so its rounding error grows with the scores of its row, not with its own.

    `test_the_engine_is_as_near_to_float64_as_the_model_that_it_is_compared_with` shows that the difference is rounding.
    """
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())), rtol=1e-5)


@torch.no_grad()
def mixed(adapter: Adapter, family: str, task: Any, expected: torch.Tensor) -> None:
    """The adapter's rows of a pass of an engine, next to a LoRA, are those of the adapter alone."""
    found, firsts = by_engine(adapter, family, task)
    same_but_for_rounding(found, expected[firsts])


@torch.no_grad()
def by_engine(adapter: Adapter, family: str, task: Any) -> tuple[torch.Tensor, Any]:
    """Its outputs in a pass next to a LoRA, and which of `answers` they are."""
    runner = runner_of(family, task, [made(family, task, AT_HAND["lora"]), adapter])
    if task == "classify":
        inputs = with_eos(runner.model, rows())
        passed = runner.run([Prefill(row.tolist(), slot) for row in inputs for slot in (1, 2)])
        return torch.stack(passed.classes[1::2]), slice(None)
    sources, targets = rows(1), rows(2, (5, 2, 1, 7))
    fresh = [Prefill(row.tolist(), slot, runner.kv_slot(len(row), 2, slot)) for row in sources for slot in (1, 2)]
    firsts = torch.tensor([0, *(len(row) for row in targets[:-1])]).cumsum(0)
    return runner.run(fresh).vocabulary[1::2], firsts


def check(family: str, name: str, task: Any, folder: Path) -> None:
    method, found = tried(name, family), refusals(SHOWN[name], FAMILIES[family])

    if task in found["train"]:
        if method.head_alone:  # a recipe is refused, before anything is attached
            return
        with pytest.raises(TurretError, match=r"^[^\n]{20,300}$"):
            trained(family, method, task)
        return
    adapter, expected = trained(family, method, task)
    exported_and_imported(adapter, family, task, folder / "bundle", expected)
    if task in found["mix"]:
        with pytest.raises(TurretError) as error:
            mixed(adapter, family, task, expected)
        assert str(error.value) == found["mix"][task]
    else:
        mixed(adapter, family, task, expected)


@pytest.mark.parametrize(("family", "method", "task"), covering())
def test_each_family_each_method_and_each_task_does_what_the_table_says(
    family: str, method: str, task: str, tmp_path: Path
) -> None:
    check(family, method, task, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "task"), CROSS)
def test_every_cell_does_what_the_table_says(family: str, method: str, task: str, tmp_path: Path) -> None:
    check(family, method, task, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["peft:DORA", "lora", "peft:IA3"])
@torch.no_grad()
def test_the_engine_is_as_near_to_float64_as_the_model_that_it_is_compared_with(name: str) -> None:
    """The cells of Gemma 3 differ most: 1.5e-5 with DoRA, of which the engine makes the smaller part."""
    family, task = "gemma3_text", "generate"
    with torch.enable_grad():
        adapter, alone = trained(family, tried(name, family), task)
    found, firsts = by_engine(adapter, family, task)
    exact = answers(mount(small_models.build(family, task).double(), adapter), task)[firsts]
    assert exact.dtype == torch.float64
    error, other = ((each - exact).abs().max() for each in (found, alone[firsts]))
    assert error < 3 * other
    assert max(error, other) < 1e-5 * exact.abs().max()
    with pytest.raises(AssertionError, match="not close"):  # the control
        same_but_for_rounding(found + 5e-5 * (torch.arange(len(found)) == 1)[:, None], alone[firsts])


def test_the_bases_whose_layers_peft_knows_for_ia3_are_pefts_own() -> None:
    known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.keys()
    assert known == IA3_BASES


def test_the_small_models_are_those_of_the_table() -> None:
    listed = {name for name, family in FAMILIES.items() if not family.guessed}
    assert set(LISTED) == listed
    cells = covering()
    assert {family for family, _, _ in cells} == listed
    assert {method for _, method, _ in cells} == set(SHOWN)
    assert {task for _, _, task in cells} == {"classify", "generate"}
    assert {method.kind for method in SHOWN.values()} == set(METHODS)


def test_the_table_counts_a_refusal_once_and_says_yes_for_what_is_whole() -> None:
    page = load(Path(__file__).parents[2] / "release" / "make_reference.py").cells("", "")
    row = next(line for line in page.splitlines() if line.startswith("| `deberta-v2` |"))
    assert row.split("|")[2].strip() == "yes"
    assert row.split("|")[3].strip().startswith("no (note ")
    assert page.count("computes its attention itself, so a prefix cannot stand in front of it") == 1
