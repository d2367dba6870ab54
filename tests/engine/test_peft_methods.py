"""Methods that PEFT computes are answered by the engine, beside other adapters, as by PEFT's own model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_at_hand import METHODS, made, runner_of
from batches import padded, rows, with_eos
from marks import fast_if_in
from shelf import TEXTS, Shelf
from small_models import build
from torch import nn

from turret import bundles
from turret.adapters import Adapter, peft_backend
from turret.engine.runner import Runner
from turret.engine.sequence import DecodeStep, Prefill
from turret.errors import AdapterError
from turret.methods import Head, Peft
from turret.methods.peft import MARKS, MIXED, PROMPTS, SLOW, WRAPPED
from turret.tasks import task_from_spec
from turret.train.asking import Asking

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")
SETTINGS: dict[str, dict[str, Any]] = {  # that fit small layers, with effects that are easy to see
    "C3A": {"block_size": 8},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 16, "d_initial": 0.5},
    "RANDLORA": {"r": 8},
    "ROAD": {"group_size": 8},
    "VBLORA": {"vector_length": 8, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 64},
}
QUICK = ("LOHA", "LOKR", "OFT", "HRA", "FOURIERFT")  # the others are slow tests
FAMILIES = ("bert", "llama", "t5")
WRITES: dict[str, Any] = {"bert": "classify", "llama": "generate", "t5": "generate", "gpt2": "generate"}
BOMB = r"(([a-z0-9.]+)+)+!"  # a regular expression that holds Python's lock for longer than anyone lives
WRITTEN = torch.tensor([17, 33])  # tokens that every row is made to write


PAIRS = [(family, kind) for kind in WRAPPED for family in FAMILIES]
DECODERS = [("llama", kind) for kind in PROMPTS] + [("gpt2", "PROMPT_TUNING")]


def cells(pairs: list[tuple[str, str]]) -> list[Any]:
    return fast_if_in([pair for pair in pairs if pair[1] in QUICK], pairs)


def method(kind: str, **settings: Any) -> Peft:
    return Peft(peft_type=kind, **(SETTINGS.get(kind, {}) | settings))


def stored(family: str, adapter: Adapter, folder: Path) -> tuple[Adapter, Path]:
    """The adapter as a bundle gives it, and the bundle, which PEFT reads too."""
    task = {"kind": "classify", "labels": ["a", "b", "c"]} if WRITES[family] == "classify" else {"kind": "generate"}
    base = replace(adapter.base, family=family)
    bundles.save_bundle(replace(adapter, base=base, task=adapter.task or task), folder)
    return bundles.read_bundle(folder), folder


@torch.no_grad()
def by_peft(family: str, folder: Path | None, source: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """The class scores of a row by PEFT's own model, or those of the token after each beginning of a written text."""
    model = build(family, WRITES[family])
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, str(folder))
    model = model.eval()
    if WRITES[family] == "classify":
        return model(**padded([source], 0)).logits  # type: ignore[no-any-return]
    if family != "t5":
        logits = model(**padded([torch.cat([source, written])], 0)).logits[0]
        return logits[-len(written) - 1 :]  # type: ignore[no-any-return]
    begun = torch.cat([torch.zeros(1, dtype=torch.long), written])[None]
    return model(**padded([source], 0), decoder_input_ids=begun).logits[0]  # type: ignore[no-any-return]


@torch.no_grad()
def mixed(runner: Runner, family: str, sources: list[torch.Tensor], slots: list[int]) -> torch.Tensor:
    """The scores of each row in one pass, with a slot for each row, and those of two more tokens: (B, 3 or 1, V or C).

    The engine's decode steps follow its first pass.
    """
    if WRITES[family] == "classify":
        passed = runner.run([Prefill(row.tolist(), slot) for row, slot in zip(sources, slots, strict=True)])
        return torch.stack(passed.classes)[:, None]
    kept = [runner.kv_slot(len(row), 3, slot) for row, slot in zip(sources, slots, strict=True)]
    fresh = [Prefill(row.tolist(), *rest) for row, *rest in zip(sources, slots, kept, strict=True)]
    found = [runner.run(fresh).vocabulary]
    for token in WRITTEN.tolist():
        steps = [DecodeStep(token, slot, own) for slot, own in zip(slots, kept, strict=True)]
        found.append(runner.run([], steps).vocabulary)
    return torch.stack(found, 1)


def check_beside_a_lora(family: str, adapter: Adapter, folder: Path) -> None:
    task = WRITES[family]
    left_out = Adapter(Head(), {}, adapter.head, adapter.base)
    runner = runner_of(family, task, [made(family, task, METHODS["lora"], 2), adapter, left_out])
    before = [each.clone() for each in runner.base.model.parameters()]
    sources = with_eos(runner.model, rows(lengths=(9, 3, 14)))
    found = mixed(runner, family, [row for row in sources for _ in range(3)], [1, 2, 3] * 3)
    beside, own, without = (found[place::3] for place in range(3))
    theirs = torch.stack([by_peft(family, folder, row, WRITTEN) for row in sources])
    torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(own.log_softmax(-1), theirs.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert (without - theirs).abs().amax((0, 2)).min() > 3e-3, "the control: a change that is left out shows"
    assert (beside - theirs).abs().max() > 3e-3
    assert all(torch.equal(*pair) for pair in zip(before, runner.base.model.parameters(), strict=True))
    runner.close()
    if task == "generate":
        bare = torch.stack([by_peft(family, None, row, WRITTEN) for row in sources])
        torch.testing.assert_close(without, bare, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "kind"), cells(PAIRS))
def test_a_method_of_peft_beside_a_lora_is_what_peft_computes(family: str, kind: str, tmp_path: Path) -> None:
    check_beside_a_lora(family, *stored(family, made(family, WRITES[family], method(kind)), tmp_path / "bundle"))


@pytest.mark.parametrize(("family", "kind"), DECODERS)
def test_virtual_tokens_beside_a_lora_are_what_peft_computes(family: str, kind: str, tmp_path: Path) -> None:
    adapter = made(family, "generate", method(kind, num_virtual_tokens=5))
    check_beside_a_lora(family, *stored(family, adapter, tmp_path / "bundle"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [("t5", "LOHA"), ("llama", "OFT"), ("llama", "HRA"), ("llama", "PROMPT_TUNING")]
)
def test_a_version_is_asked_by_the_engine_and_writes_what_peft_writes(family: str, kind: str, tmp_path: Path) -> None:
    shelf = Shelf(family, "generate")
    extra = {"num_virtual_tokens": 5} if kind in PROMPTS else {}
    adapter, folder = stored(family, shelf.put("a", method(kind, **extra), max_target_tokens=6), tmp_path / "bundle")
    base = shelf.base()
    task: Any = task_from_spec(adapter.task, base.tokenizer)
    sources = [each.ids for each in task.encode_sources(TEXTS)]
    with Asking(base, adapter, task) as asking:
        found, bare = asking.texts(sources), asking.texts(sources, bare=True)
    assert asking.notes == [], "the engine answers"
    for texts, own in ((found, folder), (bare, None)):
        assert [each["text"] for each in texts] == [greedy(family, own, row, task) for row in sources]
    assert found != bare


def greedy(family: str, folder: Path | None, source: torch.Tensor, task: Any) -> str:
    """The most probable tokens by PEFT's own model, one after another. Its `generate` of a prompt disagrees with it."""
    written = torch.zeros(0, dtype=torch.long)
    while len(written) < task.generation["max_new_tokens"]:
        token = by_peft(family, folder, source, written)[-1].argmax()
        if int(token) == task.generation["eos_token_id"]:
            break
        written = torch.cat([written, token[None]])
    return str(task.decode(written.tolist()))


def test_classes_of_a_version_are_those_of_peft(tmp_path: Path) -> None:
    shelf = Shelf("bert", "classify")
    adapter, folder = stored("bert", shelf.put("a", method("LOKR")), tmp_path / "bundle")
    task: Any = task_from_spec(adapter.task, shelf.base().tokenizer)
    sources = [each.ids for each in task.encode_sources(TEXTS)]
    with Asking(shelf.base(), adapter, task) as asking:
        found = asking.answers(TEXTS)
    assert asking.notes == []
    for row, each in zip(sources, found, strict=True):
        expected = by_peft("bert", folder, row, WRITTEN).softmax(-1)[0]
        assert list(each["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-4)


def test_half_precision_stays_half_precision() -> None:
    adapter = made("llama", "generate", method("LOHA"))
    wide = runner_of("llama", "generate", [adapter])
    narrow = runner_of("llama", "generate", [adapter], torch.bfloat16)
    sources = rows(lengths=(9, 3))
    found = mixed(narrow, "llama", sources, [1, 0]).float()
    torch.testing.assert_close(found, mixed(wide, "llama", sources, [1, 0]), atol=0.2, rtol=0.1)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("ADAMSS", {}, "one adapter at a time"),
        ("LOHA", {"r": 4, "rank_pattern": {BOMB: 4}}, "is a pattern"),
        ("LOHA", {"r": 100_000}, "r = 100000 would hold up others"),
        ("OFT", {"oft_block_size": 8, "num_cayley_neumann_terms": 10**9}, "would hold up others"),
        ("HRA", {"r": 4, "bias": "all"}, "trains the base's own biases"),
    ],
)
def test_a_method_that_would_harm_others_is_refused_in_one_line(kind: str, settings: Any, words: str) -> None:
    adapter = made("llama", "generate", method(kind, r=4) if kind != "OFT" else method(kind))
    adapter = replace(adapter, method=Peft(peft_type=kind, **settings))
    with pytest.raises(AdapterError, match=words) as caught:
        runner_of("llama", "generate", [adapter])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_settings_that_do_not_belong_to_the_tensors_take_no_memory() -> None:
    adapter = made("llama", "generate", method("LOHA"))
    assert isinstance(adapter.method, Peft)
    other = adapter.method.with_options(adapter.method.options | {"r": 200})
    layers = {path: nn.Linear(1 << 16, 1 << 16, device="meta") for path in ("model.layers.0.self_attn.q_proj",)}
    with pytest.raises(AdapterError, match="it belongs to another base"):
        peft_backend.build_peft_layers(other, adapter.tensors, layers)


def test_a_tensor_of_the_base_among_those_of_an_adapter_is_refused_and_the_base_stays() -> None:
    adapter = made("bert", "classify", method("LOHA"))
    (path, *_) = {name.rpartition(".")[0] for name in adapter.tensors}
    for name in (f"{path}.bias", f"{path}.base_layer.bias", f"{path}.weight"):
        with pytest.raises(AdapterError, match="the base's own"):
            runner_of("bert", "classify", [replace(adapter, tensors=adapter.tensors | {name: torch.zeros(64)})])


def test_a_pattern_of_layers_is_not_read_since_the_tensors_name_the_layers() -> None:
    adapter = made("bert", "classify", method("LOHA"))
    told = replace(
        adapter, method=adapter.method.with_options(adapter.method.options | {"target_modules": "((a+)+)+!"})
    )
    sources = rows(lengths=(5,))
    found = [mixed(runner_of("bert", "classify", [each]), "bert", sources, [1]) for each in (adapter, told)]
    torch.testing.assert_close(*found)


def test_numbers_that_are_not_finite_are_refused_and_memory_is_counted_once() -> None:
    adapter = made("bert", "classify", method("VBLORA"))  # its layers share one bank of vectors
    loaded = runner_of("bert", "classify", [adapter]).adapter_pool.at(1)
    assert loaded is not None
    assert loaded.bytes == 4 * sum(each.numel() for each in (*adapter.tensors.values(), *adapter.head.values()))
    name = next(iter(adapter.tensors))
    broken = replace(adapter, tensors=adapter.tensors | {name: adapter.tensors[name] * float("nan")})
    with pytest.raises(AdapterError, match="not finite"):
        runner_of("bert", "classify", [broken])


def test_virtual_tokens_that_do_not_fit_are_refused() -> None:
    adapter = made("llama", "generate", method("PROMPT_TUNING", num_virtual_tokens=5))
    (name,) = adapter.tensors
    for shape, words in (((5, 7), "expected prompt_embeddings of shape"), ((100_000, 48), "do not fit this base")):
        with pytest.raises(AdapterError, match=words):
            runner_of("llama", "generate", [replace(adapter, tensors={name: torch.zeros(shape)})])


def test_every_method_that_mixes_is_known_to_peft_and_tried_here() -> None:
    known = set(peft_backend.peft_types())
    assert {*MIXED, *SLOW} <= known
    assert {*MIXED, *SLOW} - set(MARKS) == {kind for _, kind in [*PAIRS, *DECODERS]}
