"""The decoder that judges is the decoder that serves: a version's texts in an evaluation are those of the engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import tiny_training
import torch
from adapters_at_hand import METHODS, alone, made
from shelf import Shelf

from turret import Full, Workspace, adapters, bases, bundles
from turret.adapters import Adapter, BaseInfo
from turret.adapters.hooks import attachment
from turret.cli.main import run
from turret.data import Labelled
from turret.engine import Engine, Limits, SamplingParams
from turret.errors import AdapterError
from turret.methods import Method, Peft
from turret.recipe import Recipe
from turret.tasks import task_from_spec
from turret.tasks.generate import Summarize
from turret.train import evaluation
from turret.train.asking import Asking
from turret.train.loop import fit
from turret.workspace import training
from turret.workspace.progress import silent
from turret.workspace.resident import ResidentBases

TEXTS = ["a great film", "why not", "the market in london fell by 12%", "x", "shares of the bank"]


def engines() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("turret-engine")]


def stored(folder: Path, family: str, method: str | Method, **settings: Any) -> tuple[Workspace, str]:
    """A store with one version, of random tensors, and the folder of its base."""
    base = bases.load(str(small_models.save_base(family, folder / family)), task="generate")
    spec = Summarize(base.tokenizer, base.family.kind, 64, max_target_tokens=10, **settings).spec()
    info = BaseInfo(base.id, base.fingerprint, base.family.name)
    chosen = METHODS[method] if isinstance(method, str) else method
    adapter = replace(made(family, "generate", chosen, 1, spec=spec), base=info)
    bundles.save_bundle(adapter, folder / "bundle")
    workspace = Workspace(folder / "store")
    workspace.store.put("short", folder / "bundle")
    return workspace, base.id


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["lora", "prefix"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_version_is_judged_by_the_texts_that_it_serves(family: str, method: str, beams: int, tmp_path: Path) -> None:
    workspace, base = stored(tmp_path, family, method, num_beams=beams)
    table, said, judged = tmp_path / "pairs.jsonl", list[Any](), list[str]()
    for text in TEXTS:  # one by one: in bfloat16 the texts of one pass change each other's rounding
        said += workspace.predict("short", [text])
        table.write_text(json.dumps({"document": text, "summary": "nothing like it"}))
        judged += [str(each.given) for each in workspace.evaluate("short", str(table)).details.mistakes]
    assert engines() == []
    with workspace.engine(base) as engine:
        served = [engine.generate([text], "short")[0] for text in TEXTS]
        other = engine.generate(TEXTS, "short", SamplingParams(num_beams=4 - beams))
        bare = engine.generate(TEXTS, None, SamplingParams(max_tokens=10))
    assert said == [{key: each[key] for key in ("text", "finish_reason", "tokens")} for each in served]
    texts = [each["text"] for each in served]
    assert judged == texts
    assert [each["text"] for each in other] != texts, "the control: another number of beams shows"
    assert [each["text"] for each in bare] != texts, "the control: so does the base alone"


@pytest.mark.parametrize("kind", ["LOHA", "PROMPT_TUNING", "HRA"])
def test_a_version_of_peft_is_judged_by_the_engine_and_served_unless_it_is_slow(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"num_virtual_tokens": 5} if kind == "PROMPT_TUNING" else {"r": 4}
    workspace, base = stored(tmp_path, "llama", Peft(peft_type=kind, **options))
    said = [workspace.predict("short", [text])[0] for text in TEXTS]
    capsys.readouterr()
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"document": TEXTS[0], "summary": said[0]["text"]}))
    assert run(["evaluate", "short", str(tmp_path / "pairs.jsonl"), "--store", str(tmp_path / "store")]) == 0
    assert "answered by the trained model itself" not in "".join(capsys.readouterr())
    with workspace.engine(base) as engine:
        bare = engine.generate(TEXTS, None, SamplingParams(max_tokens=10))
        if kind == "HRA":
            with pytest.raises(AdapterError, match="r products of the whole weight in every pass, which would hold up"):
                engine.generate(TEXTS, "short")
            return
        served = [engine.generate([text], "short")[0]["text"] for text in TEXTS]
    assert [each["text"] for each in said] == served
    assert [each["text"] for each in bare] != served, "the control: the base alone shows"


def by_transformers(adapter: Adapter | None, family: str, task: Summarize, sources: list[torch.Tensor]) -> list[str]:
    """The texts of transformers' `generate`, one row at a time."""
    model, texts = alone(family, "generate", adapter), []
    for source in sources:
        ids = source[None]
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **task.generation)
        texts.append(task.decode(out[0, 1 if model.config.is_encoder_decoder else len(source) :].tolist()))
    return texts


def asked(family: str, adapter: Adapter, **changes: Any) -> tuple[Asking, Summarize, list[torch.Tensor]]:
    base: Any = tiny_training.base(family, "generate", **changes)
    task: Any = task_from_spec(adapter.task, base.tokenizer)
    return Asking(base, adapter, task), task, [each.ids for each in task.encode_sources(TEXTS)]


def test_an_answer_at_the_last_position_of_the_base_ends_there_as_when_served() -> None:
    shelf = Shelf("gpt2", "generate")
    adapter = shelf.put("a")
    asking, _, _ = asked("gpt2", adapter)
    long = torch.arange(5, 5 + 508) % 100 + 5  # of 512 positions
    with asking, shelf.engine(max_tokens=1 << 30) as engine:
        (answer,) = asking.texts([long])
        served = engine.submit("generate", long.tolist(), "a").result(60)
    assert (answer["text"], answer["tokens"]) == (served["text"], served["tokens"])
    assert answer["tokens"] <= 4 < asking.task.generation["max_new_tokens"]  # type: ignore[union-attr]


def test_an_adapter_in_memory_and_its_bare_base_answer_as_by_transformers() -> None:
    adapter = Shelf("t5", "generate").put("a", "prefix", num_beams=2)
    asking, task, sources = asked("t5", adapter)
    with asking:
        own, bare = asking.texts(sources), asking.texts(sources, bare=True)
        longer = asking.texts([sources[0].repeat(400)])  # needs a larger cache, so the engine starts again
        again, exactly = asking.texts(sources), asking.texts(sources, new_tokens=7)
    assert asking.why_plain is None
    assert [each["text"] for each in own] == by_transformers(adapter, "t5", task, sources)
    assert [each["text"] for each in bare] == by_transformers(None, "t5", task, sources)
    assert again == own != bare
    assert len(longer) == 1
    assert {each["tokens"] for each in exactly} == {7}


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_vectors_of_texts_are_those_of_the_bare_base(family: str) -> None:
    task = "classify" if family == "bert" else "generate"
    adapter = Shelf(family, task).put("a")
    base: Any = tiny_training.base(family, task)
    sources = [torch.arange(5, 5 + count) for count in (3, 9, 4)]
    read: Any = task_from_spec(adapter.task, base.tokenizer)
    with Asking(base, adapter, read) as asking, Asking(base, adapter, read) as attached:
        attached.why_plain = "as on a device where no engine runs"
        by_engine, by_model = asking.embeddings(sources), attached.embeddings(sources)
    model = small_models.build(family, task, num_labels=2).eval()
    with torch.no_grad():
        states = [model.base_model(input_ids=each[None])[0][0] for each in sources]
    pooled = torch.stack([each.mean(0) if base.family.embedding == "mean" else each[-1] for each in states])
    expected = torch.nn.functional.normalize(pooled)
    assert torch.allclose(by_engine, expected, atol=1e-4)
    assert torch.allclose(by_model, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_full_fine_tuning_is_asked_by_the_engine_on_weights_of_its_own(family: str) -> None:
    model = small_models.build(family, "generate")
    adapters.attach(model, Full())
    with torch.no_grad():
        for place, each in enumerate(attachment(model).full.values()):
            each.add_(0.02 * torch.randn(each.shape, generator=torch.Generator().manual_seed(place)))
    tensors, head, method = adapters.extract(model)
    spec = Shelf(family, "generate").spec()
    adapter = Adapter(method, tensors, head, BaseInfo("small", "sha256:small"), task=spec)
    asking, task, sources = asked(family, adapter)
    before = [each.clone() for each in asking.base.model.parameters()]
    with asking:
        own, bare = asking.texts(sources), asking.texts(sources, bare=True)
    assert engines() == []
    assert asking.why_plain is None
    assert [each["text"] for each in own] == by_transformers(adapter, family, task, sources)
    assert [each["text"] for each in bare] == by_transformers(None, family, task, sources)
    assert own != bare
    assert all(torch.equal(*pair) for pair in zip(before, asking.base.model.parameters(), strict=True))


def test_what_the_engine_cannot_take_is_asked_of_the_model_and_says_so() -> None:
    spec = Shelf("llama", "generate").spec()
    adapter = made("llama", "generate", Peft(peft_type="ADAMSS", r=4), 1, spec=spec)
    asking, task, sources = asked("llama", adapter)
    with asking:
        found, bare = asking.texts(sources), asking.texts(sources, bare=True)
    assert asking.notes == [f"answered by the trained model itself, not by the engine that serves: {asking.why_plain}"]
    assert "ADAMSS is computed by PEFT" in asking.notes[0]
    assert [each["text"] for each in found] == by_transformers(adapter, "llama", task, sources)
    assert [each["text"] for each in bare] == by_transformers(None, "llama", task, sources)
    plain = made("llama", "generate", METHODS["lora"], 1, spec=spec)
    base: Any = tiny_training.base("llama", "generate")
    assert Asking(base, plain, task).notes == [], "the control"
    base.model.generation_config.bad_words_ids = [[9]]
    with Asking(base, plain, task) as told:
        assert len(told.texts(sources)) == len(sources)
    assert "sets bad_words_ids, which this engine does not support" in str(told.why_plain)


@pytest.mark.slow
def test_an_adapter_that_is_not_finite_is_refused_in_one_line_and_the_engine_ends() -> None:
    adapter = Shelf("llama", "generate").put("a")
    name = next(iter(adapter.tensors))
    broken = replace(adapter, tensors=adapter.tensors | {name: adapter.tensors[name] * float("nan")})
    asking, _, sources = asked("llama", broken)
    with pytest.raises(AdapterError, match=r"not finite in torch\.float32: train it again"), asking:
        asking.texts(sources)
    assert engines() == []
    asking, _, sources = asked("llama", adapter)
    with asking:
        assert len(asking.texts(sources)) == len(sources), "the control"
        assert len(engines()) == 1


@pytest.mark.parametrize("method", ["lora", "prefix", "head"])
def test_classes_are_those_of_the_engine(method: str) -> None:
    shelf = Shelf("bert", "classify")
    adapter = shelf.put("a", method)
    base = shelf.base()
    task: Any = task_from_spec(adapter.task, base.tokenizer)
    with Asking(base, adapter, task) as asking:
        found = asking.answers(TEXTS)
    with shelf.engine() as engine:
        served = engine.classify(TEXTS, "a")
    assert [each["label"] for each in found] == [each["label"] for each in served]
    for own, other in zip(found, served, strict=True):
        assert set(own) == {"label", "probabilities"}
        assert own["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)


LABELLED = [
    Labelled(f"{('a great film', 'dull and boring', 'the market fell')[n % 3]} {n} {'and on ' * (n % 7)}", str(n % 3))
    for n in range(100)
]
TRAINED, CHECKED, TESTED = LABELLED[:20], LABELLED[20:60], LABELLED[60:]


def served(engine: Engine, task: Any, examples: Sequence[Any]) -> torch.Tensor:
    """The logits (B, C) of the stored version `c` for some texts in one pass."""
    ids = [each.ids.tolist() for each in task.encode_sources([each.input for each in examples])]
    order, before = sorted(range(len(ids)), key=lambda place: len(ids[place])), engine.stats().passes
    with engine.together():
        tickets = [engine.submit("classify", ids[place], "c", SamplingParams(logits=True)) for place in order]
    found = torch.tensor([each.result(60)["logits"][0] for each in tickets])[torch.tensor(order).argsort()]
    assert engine.stats().passes == before + 1
    one = engine.submit("classify", ids[0], "c").result(60)
    assert one["probabilities"] == pytest.approx(task.answers(found)[0]["probabilities"], abs=1e-2)
    return found


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("lora", "bfloat16")]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in (("lora", "float32"), ("prefix", "float32"), ("head", "bfloat16"))
    ],
)
def test_a_classifier_is_measured_by_the_logits_that_it_serves(method: str, dtype: Any, tmp_path: Path) -> None:
    """Bit for bit, in passes of equal composition: by a training, its calibration, and `turret evaluate`."""
    base, data = str(small_models.save_base("bert", tmp_path / "bert")), tmp_path / "data"
    data.mkdir()
    for split, part in (("train", TRAINED), ("validation", CHECKED), ("test", TESTED)):
        rows = [json.dumps({"text": each.text, "label": each.label}) for each in part]
        (data / f"{split}.jsonl").write_text("\n".join(rows))
    train = {"epochs": 4, "lr": 1e-2, "dtype": dtype, "evaluate": "never"}
    recipe = Recipe(name="c", base=base, data={"source": str(data)}, method={"kind": method}, train=train)
    workspace = Workspace(tmp_path / "store")
    ready = training.prepare(workspace.store, recipe, training.Callbacks(), place=ResidentBases(thread=None))
    _, fitted = tiny_training.train(fit(*ready.parts))
    checks, tests = ready.dataset.validation, ready.dataset.test

    def on_the_slot(examples: Sequence[Any]) -> torch.Tensor:
        sources = [each.ids for each in ready.task.encode_sources([each.input for each in examples])]
        with evaluation.evaluation_mode(fitted.model, None):
            return torch.cat(evaluation.class_logits(fitted.model, [(each, None) for each in sources], 2048))

    trained = on_the_slot(checks), on_the_slot(tests)
    found = training.measure_adapter(ready, fitted, silent, beside_base=False)
    bundles.save_bundle(found.fitted.adapter, tmp_path / "bundle")
    workspace.store.put("c", tmp_path / "bundle")

    with workspace.engine(base, dtype=dtype, limits=Limits(batch_tokens=2048)) as engine:
        task: Any = task_from_spec(workspace.resolve("c").task, engine.base.tokenizer)
        checked, tested = served(engine, task, checks), served(engine, task, tests)
    right = task.targets(checks), task.targets(tests)
    assert found.metrics == {"validation": task.metrics(checked, right[0]), "test": task.metrics(tested, right[1])}
    assert task.calibration == task.calibrated(checked, checks, chose_weights=False).calibration
    with workspace.engine(base, limits=Limits(batch_tokens=2048)) as engine:  # in the precision that suits the machine
        later = served(engine, task, TESTED)
    assert workspace.evaluate("c", str(data / "test.jsonl")).metrics == task.metrics(later, task.targets(TESTED))

    torch.testing.assert_close(trained, (checked, tested), atol=0.02, rtol=0.02)
    assert not torch.equal(trained[1], tested), "the control: the weights that train give other logits"
    assert task.metrics(trained[1], right[1]) != found.metrics["test"], "which shows in the metrics"
    assert task.calibrated(trained[0], checks, chose_weights=False).calibration != task.calibration
