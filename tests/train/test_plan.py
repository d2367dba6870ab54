"""The plan predicts a run, finds its mistakes, and leaves the base as it was."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
import small_models
import tiny_training as tiny
import torch
from foreign_tables import PRAISE, texts
from tiny_training import plan
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from turret import adapters
from turret.bases.device import gigabytes
from turret.data import Labelled, Pair
from turret.errors import AdapterError, PreflightRefused
from turret.methods.method import MOST_EPOCHS, Check
from turret.tasks.classify import Classify
from turret.train import memory, preflight
from turret.train.batches import EncodedRows
from turret.train.preflight import OtherProcesses, fits
from turret.train.training_plan import Plan, Prediction


def made(
    family: str = "bert",
    kind: str = "classify",
    data: Any = None,
    measured: bool = False,
    changes: Mapping[str, Any] = MappingProxyType({}),
    **overrides: Any,
) -> tuple[Plan, dict[str, Check]]:
    on = tiny.base(family, "classify" if kind == "classify" else "generate", **changes)
    data = data or tiny.dataset(kind)
    recipe = tiny.recipe(**overrides)
    result = plan(recipe, on, tiny.task_of(recipe, data, on), data, measured=measured)
    worst = {"ok": 0, "warn": 1, "refuse": 2}
    by_name: dict[str, Check] = {}
    for check in result.checks:
        if check.name not in by_name or worst[check.level] > worst[by_name[check.name].level]:
            by_name[check.name] = check
    return result, by_name


IA3 = {"method": "peft", "method.peft_type": "IA3"}


def parameters_alive() -> int:
    gc.collect()
    return sum(type(each) is torch.nn.Parameter for each in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind", "method"),
    [
        ("bert", "classify", "lora"),
        ("llama", "summarize", "prefix"),
        ("t5", "summarize", "lora"),
        ("bert", "classify", "full"),
    ],
)
def test_a_measured_plan_is_json_and_leaves_the_base_and_the_random_numbers_as_they_were(
    family: str, kind: str, method: str
) -> None:
    on = tiny.base(family, "classify" if kind == "classify" else "generate")
    data, recipe = tiny.dataset(kind, train=80), tiny.recipe(method=method, train__epochs=120)
    before = {name: each.clone() for name, each in on.model.state_dict().items()}
    state, alive = torch.get_rng_state(), parameters_alive()
    result = plan(recipe, on, tiny.task_of(recipe, data, on), data)
    assert torch.equal(state, torch.get_rng_state())
    assert parameters_alive() == alive  # a copy of all weights, with gradients, had stayed for good
    assert all(torch.equal(before[name], each) for name, each in on.model.state_dict().items())
    assert not any(each.requires_grad or each.grad is not None for each in on.model.parameters())
    assert not on.model.training
    with pytest.raises(AdapterError):
        adapters.attachment(on.model)
    said = json.loads(json.dumps(result.to_json()))
    assert said["steps"] == 1200
    assert said["parameters"]["trainable"] > 0
    assert said["memory"]["optimiser"] == 8 * said["parameters"]["trainable"]
    assert said["memory"]["activations"] > 10_000
    assert said["seconds"] > 0
    assert not result.refused, result.refusal()
    assert [check.text for check in result.checks if check.level != "ok"] == []


def test_a_target_module_that_is_not_there_is_refused_with_the_nearest_name() -> None:
    result, rows = made(method__target_modules="queri, value")
    assert rows["method"].level == "refuse"
    assert rows["method"].remedy == "did you mean query?"
    assert "queri not found in bert" in result.refusal()
    with pytest.raises(PreflightRefused, match="did you mean query"):
        result.require()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"train__lr": 2e-5}, "LoRA stays near chance"),
        ({"train__lr": 3e-5, "method": "prefix"}, "a prefix hardly moves"),
        ({"train__lr": 2e-3, "method": "full"}, "wipes out"),
        ({"train__lr": 0.5}, "likely to diverge"),
    ],
)
def test_a_rate_of_another_method_is_flagged_with_its_consequence_and_the_remedy(
    settings: dict[str, Any], word: str
) -> None:
    _, rows = made(**settings)
    check = rows["learning rate"]
    assert check.level == "warn"
    assert word in check.text
    assert "leave train.lr out" in str(check)
    assert made()[1]["learning rate"].level == "ok"


def test_cut_inputs_are_counted_and_the_limit_that_keeps_most_is_named() -> None:
    data = tiny.dataset(train=40)
    long = [Labelled("the market " * 30, "good" if number % 2 else "bad") for number in range(10)]
    _, rows = made(data=replace(data, train=[*data.train[:30], *long]), task__max_tokens=32)
    assert rows["inputs"].level == "warn"
    assert rows["inputs"].text == "10 of 40 inputs (25.0%) are cut at 32 tokens"
    assert rows["inputs"].remedy is not None
    wanted = int(rows["inputs"].remedy.removeprefix("set task.max_tokens to ").split(",")[0])
    _, rows = made(data=replace(data, train=[*data.train[:30], *long]), task__max_tokens=wanted)
    assert rows["inputs"].level == "ok"


def test_cut_targets_and_short_generation_are_counted() -> None:
    data = tiny.dataset("summarize", train=20)
    data = replace(data, train=[Pair(each.source, each.target + " in london" * 9) for each in data.train])
    _, rows = made("llama", "summarize", data, task__max_target_tokens=8)
    assert rows["targets"].level == "warn"
    assert "20 of 20 targets (100.0%) are cut at 8 tokens" in rows["targets"].text
    _, rows = made("llama", "summarize", data, task__max_target_tokens=128, task__max_new_tokens=4)
    assert rows["targets"].level == "ok"
    assert rows["generation"].level == "warn"
    assert "set task.max_new_tokens to" in str(rows["generation"])


def test_positions_beyond_the_bases_table_are_refused_and_a_prefix_counts() -> None:
    _, rows = made(task__max_tokens=521)
    assert rows["positions"].level == "refuse"
    assert rows["positions"].remedy == "set task.max_tokens to 520 or less"
    assert "positions" not in made(task__max_tokens=520)[1]
    settings = {"task__max_tokens": 490, "task__max_target_tokens": 16}
    assert "positions" not in made("gpt2", "summarize", **settings)[1]
    _, rows = made("gpt2", "summarize", method="prefix", **settings)
    assert rows["positions"].remedy == "set task.max_tokens to 476 or less"
    assert "positions" not in made("t5", "summarize", task__max_tokens=4000)[1]


def test_positions_at_which_the_frequencies_of_a_whole_batch_change_are_refused() -> None:
    _, rows = made("llama", "summarize", task__max_tokens=521)
    assert rows["positions"].level == "warn"
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    _, rows = made("llama", "summarize", changes=scaled, task__max_tokens=521)
    assert rows["positions"].level == "refuse"


def test_labels_that_are_skewed_alone_or_missing_are_named() -> None:
    rows = [Labelled(f"the market {number}", "bad") for number in range(30)]
    data = tiny.dataset()
    _, found = made(data=replace(data, train=[*rows, Labelled("a great film", "good"), Labelled("great", "good")]))
    assert found["labels"].level == "warn"
    assert "balanced" in str(found["labels"])
    result, found = made(data=replace(data, train=[*rows, Labelled("a great film", "good")]))
    assert any("only one training example is good" in check.text for check in result.checks)
    result, found = made(data=replace(data, train=rows))
    assert found["labels"].level == "refuse"
    assert any("no training example is good" in check.text for check in result.checks)


def test_classes_are_counted_and_typos_get_no_advice_that_would_lift_them() -> None:
    rows = [Labelled(f"the market {number}", "bad" if number % 2 else "good") for number in range(60)]
    data = replace(tiny.dataset(), labels=("bad", "good"), train=rows)
    assert made(data=data)[1]["labels"].text == "2 classes: good (30), bad (30)"
    rows += [Labelled("dull", "baad"), Labelled("a dull story", "baad"), Labelled("lazy", "N/A")]
    task = Classify(("N/A", "baad", "bad", "good"), small_models.tokenizer("bert"))
    found = list(preflight.labels(task, rows))
    assert any("'baad' (2) looks like 'bad', 'N/A' (1) looks like no label" in check.text for check in found)
    assert any('data.rename = {"baad" = "bad", "N/A" = ""}' in str(check.remedy) for check in found)
    assert not any("balanced" in str(check) for check in found)
    skewed = [*rows[:60], *(Labelled(f"one line {number}", "weather") for number in range(2))]
    control = list(preflight.labels(Classify(("bad", "good", "weather"), small_models.tokenizer("bert")), skewed))
    assert any("balanced" in str(check) for check in control)


def test_texts_in_a_language_that_the_base_hardly_knows_are_warned_of() -> None:
    def rows_of(language: str, known: str) -> list[Check]:
        """The check of texts in one language, with a tokenizer that was trained on another."""
        core = Tokenizer(models.BPE(unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        letters = sorted(set("".join(text for code in PRAISE for text, _ in texts(code))) - {" "})
        trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=["[UNK]", "[PAD]"], initial_alphabet=letters)
        core.train_from_iterator([text for text, _ in texts(known)], trainer)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
        examples = [Labelled(text, str(good)) for text, good in texts(language)]
        items = EncodedRows(Classify(("True", "False"), tokenizer), examples)
        return list(preflight.language(items.take(range(len(items)))))

    (foreign,) = rows_of("de", known="en")
    assert foreign.level == "warn"
    assert foreign.text.startswith("the texts look German, and the base reads ")
    assert foreign.remedy == "a multilingual or German base may do better"
    (own,) = rows_of("de", known="de")
    assert own.level == "ok"
    assert rows_of("en", known="en") == []


@pytest.mark.parametrize(
    ("language", "name"),
    [("de", "German"), ("fr", "French"), ("en", "English"), ("pl", "Polish"), ("ru", "Cyrillic"), ("es", "Spanish")],
)
def test_the_language_of_texts(language: str, name: str) -> None:
    assert preflight.language_of([text for text, _ in texts(language)]) == name
    assert preflight.language_of(["1234 5678"] * 100) is None


@pytest.mark.parametrize(("method", "needed", "epochs"), [("lora", 500, 100), ("prefix", 600, 120), ("full", 250, 50)])
def test_a_run_that_is_too_short_for_its_method_names_the_epochs_that_are_enough(
    method: str, needed: int, epochs: int
) -> None:
    data = tiny.dataset(train=40)
    short = made(data=data, method=method, train__epochs=epochs - 1)[1]["steps"]
    assert short.level == "warn"
    assert f"{method} needs about {needed}" in short.text
    assert short.remedy == f"set train.epochs to {epochs}"
    assert made(data=data, method=method, train__epochs=epochs)[1]["steps"].level == "ok"
    default = made(data=data, method=method, train__epochs=MOST_EPOCHS)[1]["steps"]
    assert default.level == "ok"  # the most epochs that a default has: no setting is asked for
    cut = made(data=data, method=method, train__epochs=epochs, train__max_steps=30)[1]["steps"]
    assert f"train.max_steps to {needed} or none" in str(cut)


def test_an_encoders_prefix_through_its_mlp_is_warned_of() -> None:
    assert made(method="prefix", method__reparametrize="true")[1]["reparametrize"].level == "warn"
    plain = made(method="prefix")[1]
    assert "reparametrize" not in plain
    assert "trails LoRA and full fine-tuning, most on pairs of texts" in plain["prefix"].text
    assert "reparametrize" not in made("llama", "summarize", method="prefix")[1]


def test_duplicates_empty_inputs_few_steps_and_splits_are_said() -> None:
    data = tiny.dataset(train=40)
    _, rows = made(data=replace(data, duplicates=2))
    assert "2 test inputs (25.0%) are also in the training split" in rows["duplicates"].text
    _, rows = made(data=replace(data, train=[*data.train, Labelled("  ", "good")]))
    assert "1 of 41 inputs are empty" in rows["inputs"].text
    _, rows = made()
    assert rows["steps"].level == "warn"
    _, rows = made(data=replace(data, test=[]))
    assert "there is nothing to evaluate the adapter on" in rows["splits"].text
    _, rows = made(data=data, train__keep="best")
    assert "4 of the training examples are held back" in rows["splits"].text


def test_memory_that_is_not_there_is_refused_before_the_first_step() -> None:
    on = tiny.base("bert")
    fine = Prediction(weights=1, trainable=1, gradients=1, optimiser=2, activations=5, runtime=7)
    assert (fine.above_base, fine.total) == (9, 17)
    assert fits(fine, on).level == "ok"
    huge = replace(fine, activations=1 << 60)
    assert fits(huge, on).level == "refuse"
    assert "micro_batch_tokens" in str(fits(huge, on))


def test_a_prediction_of_activations_is_what_autograd_keeps() -> None:
    layer = torch.nn.Linear(64, 64)
    saved = memory.SavedForBackward(layer)
    x = torch.randn(100, 64)
    with saved.counting():
        y = layer(x).tanh().tanh()
    assert saved.bytes == 3 * 100 * 64 * 4  # x and the two results of tanh, the weight not
    assert saved.largest == 100 * 64 * 4
    assert y.requires_grad


def test_resident_and_peak_memory_are_read() -> None:
    memory.reset_peak()
    before = memory.resident_bytes()
    block = bytearray(50_000_000)
    assert memory.peak() >= before + 40_000_000
    del block
    assert memory.available(torch.device("cpu")) > 0
    assert gigabytes(87e6) == "87 MB"
    assert gigabytes(1.25e9) == "1.2 GB"


@pytest.mark.parametrize(
    ("others", "threads", "count", "remedy"),
    [
        (0.9, 2, 2, "set OMP_NUM_THREADS=1 "),
        (3.2, 16, 16, "set OMP_NUM_THREADS=12 "),
        (0.4, 2, 2, None),
        (1.0, 1, 2, None),
        (4.0, 8, 16, None),
    ],
)
def test_other_work_on_the_processors_is_a_warning_where_threads_will_wait_for_it(
    others: float, threads: int, count: int, remedy: str | None
) -> None:
    found = list(preflight.processors(others, threads, count))
    assert len(found) == (remedy is not None)
    assert remedy is None or (found[0].level == "warn" and found[0].remedy.startswith(remedy))


@pytest.mark.slow
def test_the_work_of_others_is_told_from_ones_own() -> None:
    """The smallest of three measurements, since other tests may run; then beside a process that is always busy."""

    def measured() -> float:
        others, end = OtherProcesses(), time.monotonic() + 0.5
        while time.monotonic() < end:  # this process is busy all the time
            pass
        return others.busy()

    alone = min(measured() for _ in range(3))
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert max(measured() for _ in range(3)) > 0.25
        finally:
            other.kill()
    assert alone < (os.cpu_count() or 1) - 0.2  # its own share is no one else's


@pytest.mark.slow
def test_classes_are_scored_without_scikit_learn_which_takes_100_mb() -> None:
    script = (
        "import sys; from train.test_plan import made; names = lambda: 'sklearn' in sys.modules; "
        "made(); print(names()); made(measured=True); print(names())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
