"""The loop learns, is repeatable bit by bit, resumes after a kill, and leaves the base as it was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_training as tiny
import torch
from tiny_training import fit

from turret import adapters
from turret.engine.protocol import OptimStep
from turret.errors import AdapterError, Interrupted, LossNotFinite, OutOfMemory, RecipeError, TrainingError
from turret.train import checkpoint
from turret.train.adamw import AdamW
from turret.train.asking import Asking
from turret.train.batches import EncodedRows
from turret.train.curve import read_curve
from turret.train.evaluation import evaluate
from turret.train.initialize import attach
from turret.train.loop import rank_of
from turret.train.losses import loss_of
from turret.train.memory import explain_out_of_memory
from turret.train.slot import LocalSlot
from turret.train.training_plan import Prediction


def run(on: tiny.Base, data: Any, folder: Path | None = None, **overrides: Any) -> Any:
    made = tiny.recipe(**overrides)
    return tiny.train(fit(made, on, tiny.task_of(made, data, on), data, folder=folder))


def weights(fitted: Any) -> dict[str, torch.Tensor]:
    return {**fitted.adapter.tensors, **fitted.adapter.head}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- it learns --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "rate", "epochs", "share", "accuracy"),
    [
        ("lora", 1e-2, 4, 0.5, 0.9),
        ("prefix", 3e-2, 20, 0.8, 0.8),
        ("head", 1e-2, 4, 0.9, 0.0),
        ("full", 1e-3, 4, 0.5, 0.9),
    ],
)
def test_a_classifier_learns_and_the_base_is_left_as_it_was(
    method: str, rate: float, epochs: int, share: float, accuracy: float
) -> None:
    on, data = tiny.base("bert"), tiny.dataset(train=48, test=16)
    before = {name: each.clone() for name, each in on.model.state_dict().items()}
    records, fitted = run(on, data, method=method, train__epochs=epochs, train__lr=rate)
    assert [record.step for record in records] == list(range(1, 6 * epochs + 1))
    assert records[-1].epoch == epochs
    assert records[-1].metrics is not None
    assert records[-1].split == "test"
    assert records[-1].loss < records[0].loss * share
    assert records[-1].metrics["accuracy"] >= accuracy
    assert fitted.adapter.base.family == "bert"
    assert fitted.adapter.task["labels"] == ["bad", "good"]
    assert fitted.parameters["stored"] == sum(each.numel() for each in weights(fitted).values())
    adapters.detach(fitted.model)
    after = on.model.state_dict()
    assert same(before, after)
    assert not any(module.training for module in on.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_a_generator_learns_and_evaluates_texts(family: str, method: str) -> None:
    on, data = tiny.base(family, "generate"), tiny.dataset("summarize", train=48, test=8)
    records, fitted = run(on, data, method=method, train__epochs=5, train__lr=1e-2, train__evaluate="never")
    assert records[-1].loss < records[0].loss * (0.95 if family == "t5" else 0.7)
    made = tiny.recipe()
    task = tiny.task_of(made, data, on)
    with Asking(tiny.base(family, "generate"), fitted.adapter, task) as asking:
        metrics, answers = asking.evaluate(data.test)
    bare, _ = evaluate(fitted.model, task, data.test, slot=0)
    assert metrics["loss"] < bare["loss"]
    assert {"rougeL", "perplexity"} <= metrics.keys()
    assert [set(answer) for answer in answers] == [{"text", "finish_reason", "tokens"}] * 8


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), [("bert", "classify"), ("llama", "summarize"), ("t5", "summarize")])
def test_micro_batches_give_the_gradient_of_the_whole_batch(family: str, kind: str) -> None:
    on = tiny.base(family, "classify" if kind == "classify" else "generate")
    data = tiny.dataset(kind)
    made = tiny.recipe(method__lora_dropout=0.0)
    task = tiny.task_of(made, data, on)
    attach(made, on, task)
    parameters = adapters.trainable_parameters(on.model)
    optimiser = AdamW(parameters)
    batch = EncodedRows(task, data.train).take(range(8))
    optimiser.zero_gradients()
    loss = loss_of(on.model, task, batch)
    loss.backward()
    whole = optimiser.gradients.clone()

    seen = {}
    for most in (1, 20, 45, 10_000):
        kept = optimiser.weights.clone()
        got, norm = LocalSlot(on, task, optimiser, 42, most).train_step(batch, OptimStep(0.0, clip=None))
        assert got == pytest.approx(float(loss.detach()), rel=1e-5)
        assert norm == pytest.approx(float(whole.norm()), rel=1e-4)
        assert torch.equal(optimiser.weights, kept)
        optimiser.zero_gradients()
        for piece in ([item] for item in batch):
            share = piece[0].weight / sum(item.weight for item in batch)
            (loss_of(on.model, task, piece) * share).backward()
        seen[most] = optimiser.gradients.clone()
        torch.testing.assert_close(seen[most], whole, rtol=1e-4, atol=1e-6)


def test_running_out_of_memory_names_the_setting_and_the_prediction() -> None:
    made = tiny.recipe()
    data, on = tiny.dataset(), tiny.base("bert")
    batch = EncodedRows(tiny.task_of(made, data, on), data.train).take(range(8))
    predicted = Prediction(10**9, 0, 0, 0, 2 * 10**8, 0)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):
        expected = r"step 7.*train.micro_batch_tokens to \d+.*predicted 1.2 GB"
        with pytest.raises(OutOfMemory, match=expected), explain_out_of_memory(512, batch, 7, predicted):
            raise error
    with pytest.raises(OutOfMemory, match=r"lower task.max_tokens"), explain_out_of_memory(512, batch[:1], 7, None):
        raise MemoryError
    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(512, batch, 7, None):
        raise RuntimeError("something else")


# --- the same run again -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_same_recipe_gives_the_same_curve_and_weights_whatever_the_caller_draws(method: str) -> None:
    made = tiny.recipe(method=method)
    results = []
    for disturbed in (False, True):
        on, data = tiny.base("bert"), tiny.dataset()
        steps = fit(made, on, tiny.task_of(made, data, on), data)
        records = []
        while True:
            try:
                records.append(tiny.repeatable(next(steps)))
            except StopIteration as end:
                results.append((records, weights(end.value)))
                break
            if disturbed:
                torch.manual_seed(len(records))
                torch.rand(5)
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def child_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])}


def child(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, tiny.__file__, str(folder), *arguments],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In its own process, as the runs that are killed: settings of other tests may change the rounding in this one."""
    folder = tmp_path_factory.mktemp("whole")
    done = child(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 4, 5])
def test_a_run_killed_and_started_again_ends_with_the_same_curve_and_weights(
    tmp_path: Path, uninterrupted: Path, killed_after: int
) -> None:
    """Checkpoints are written after steps 2, 4 and 6 of 6; the first kill comes before any of them."""
    done = child(tmp_path, "--kill-after", str(killed_after))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(read_curve(tmp_path / "curve.jsonl"))) == killed_after
    assert checkpoint.step_of(tmp_path) == (killed_after - 1) // 2 * 2
    again = child(tmp_path)
    assert again.returncode == 0, again.stderr
    expected, got = (json.loads((each / "weights.json").read_text()) for each in (uninterrupted, tmp_path))
    assert got["resumed_from"] == (killed_after - 1) // 2 * 2
    assert got["weights"] == expected["weights"]
    curves = [[tiny.repeatable(r) for r in read_curve(each / "curve.jsonl")] for each in (uninterrupted, tmp_path)]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_any_moment_still_ends_the_same(tmp_path: Path, uninterrupted: Path) -> None:
    """Killed from outside after a random time past its first step: inside steps, checkpoints and evaluations."""
    chance, kills = random.Random(7), 0
    for attempt in range(8):
        process = subprocess.Popen(
            [sys.executable, tiny.__file__, str(tmp_path)], env=child_environment(), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # its first step of this sitting, or nothing where all are done
        try:
            process.wait(timeout=chance.uniform(0.0, 0.12) if attempt < 7 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stdout.close()
        if process.returncode == 0:
            break
    assert kills
    expected, got = (json.loads((each / "weights.json").read_text())["weights"] for each in (uninterrupted, tmp_path))
    assert got == expected
    curves = [[tiny.repeatable(r) for r in read_curve(each / "curve.jsonl")] for each in (uninterrupted, tmp_path)]
    assert curves[0] == curves[1]
    finished = child(tmp_path)
    assert (finished.returncode, finished.stdout) == (0, ""), finished.stderr
    assert json.loads((tmp_path / "weights.json").read_text()) == {"resumed_from": 6, "weights": expected}


def test_a_finished_run_started_again_gives_its_adapter_without_a_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train__keep": "best", "train__checkpoint_every": 2, "method__lora_dropout": 0.3}
    first, again = (
        run(tiny.base("bert"), tiny.dataset(validation=8), folder=tmp_path, train__lr=3e-3, **settings)
        for _ in range(2)
    )
    assert [each.step for each in first[0]] == [1, 2, 3, 4, 5, 6]
    assert again[0] == []
    assert again[1].resumed_from == again[1].progress.step == 6
    assert same(weights(again[1]), weights(first[1]))


def test_a_checkpoint_of_another_recipe_is_refused_and_the_base_is_free_again(tmp_path: Path) -> None:
    on, data = tiny.base("bert"), tiny.dataset()
    run(on, data, folder=tmp_path, train__epochs=1)
    adapters.detach(on.model)
    with pytest.raises(TrainingError, match="belongs to another run: its recipe"):
        run(on, data, folder=tmp_path, train__epochs=1, train__lr=5e-3)
    with pytest.raises(AdapterError):
        adapters.attachment(on.model)


# --- it stops ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_keeps_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    made = tiny.recipe(train__epochs=2)
    on, data = tiny.base("bert"), tiny.dataset()
    task = tiny.task_of(made, data, on)
    handler = signal.getsignal(signal.SIGINT)
    steps = fit(made, on, task, data, folder=tmp_path)
    seen = [tiny.repeatable(next(steps)), tiny.repeatable(next(steps))]
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted, match=r"stopped by the user after step 2 of 6: start the same command again"):
        next(steps)
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoint.step_of(tmp_path) == 2
    rest, resumed = tiny.train(fit(made, on, task, data, folder=tmp_path))
    adapters.detach(on.model)
    whole, expected = tiny.train(fit(made, on, task, data))
    assert [*seen, *(tiny.repeatable(record) for record in rest)] == [tiny.repeatable(record) for record in whole]
    assert same(weights(resumed), weights(expected))


def test_training_in_another_thread_leaves_signals_alone() -> None:
    results: list[Any] = []

    def body() -> None:
        results.append(run(tiny.base("bert"), tiny.dataset(), train__max_steps=2))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results[0][1].progress.step == 2


def test_a_loss_that_is_not_finite_names_the_step_and_the_rate_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    on, data = tiny.base("bert"), tiny.dataset()
    before = {name: each.clone() for name, each in on.model.state_dict().items()}
    rate = {"train__lr": 1e30, "train__warmup": 0, "train__checkpoint_every": 1, "train__gradient_clip": 1e9}
    with pytest.raises(
        LossNotFinite, match=r"at step [23]: set train.lr to 0.001 \(now 1e\+30\); the state after step"
    ):
        run(on, data, folder=tmp_path, **rate)
    found = checkpoint.step_of(tmp_path)
    assert found >= 1
    assert same(before, on.model.state_dict())


def test_a_caller_that_walks_away_leaves_the_base_free() -> None:
    on, data = tiny.base("bert"), tiny.dataset()
    made = tiny.recipe()
    steps = fit(made, on, tiny.task_of(made, data, on), data)
    next(steps)
    steps.close()
    with pytest.raises(AdapterError):
        adapters.attachment(on.model)
    assert not on.model.training


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much address space is in use")
def test_a_step_that_really_runs_out_of_memory_says_so_in_one_line(tmp_path: Path) -> None:
    """In its own process: after a failed allocation the matrix library rounds differently."""
    done = child(tmp_path, "--grant", "250000000")
    assert done.returncode == 0, done.stderr
    expected = "out of memory at step 1, in a pass of 32000 tokens: set train.micro_batch_tokens to 16000 (now 100000)"
    assert done.stdout.splitlines() == [expected]


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_best_weights_by_the_validation_split_are_kept_and_stopping_early_stops() -> None:
    on, data = tiny.base("bert"), tiny.dataset(train=24, validation=8)
    settings: dict[str, Any] = {
        "train__epochs": 40,
        "train__evaluate": 1,
        "train__lr": 0.3,
        "train__schedule": "constant",
    }
    records, fitted = run(on, data, train__keep="best", train__early_stopping=3, **settings)
    assert fitted.progress.gave_up
    assert len(records) < 120
    assert all(record.split == "validation" for record in records)
    best = fitted.progress.best_metrics
    made = tiny.recipe()
    metrics, _ = evaluate(fitted.model, tiny.task_of(made, data, on), data.validation)
    assert metrics["accuracy"] == best["accuracy"]
    assert metrics["loss"] == pytest.approx(best["loss"], rel=1e-6)
    assert records[-1].step == fitted.progress.best_step + 3


def test_the_best_weights_of_an_embedding_of_several_lengths_have_the_highest_main_score() -> None:
    better = {"main_score": 0.9, "main_score_64": 0.8, "loss": 2.0}
    worse = {"main_score": 0.5, "main_score_64": 0.4, "loss": 1.0}
    assert rank_of(better, "embedding") > rank_of(worse, "embedding")
    assert rank_of({"loss": 1.0}, "embedding") > rank_of({"loss": 2.0}, "embedding")


def test_the_best_prefix_is_what_answers_after_the_run() -> None:
    """A prefix is computed once and cached between passes: restored weights must be computed again."""
    on, data = tiny.base("bert"), tiny.dataset(train=24, validation=8)
    settings: dict[str, Any] = {"train__epochs": 2, "train__evaluate": 1, "train__lr": 0.3, "train__warmup": 0}
    _, fitted = run(on, data, method="prefix", train__keep="best", **settings)
    metrics, _ = evaluate(fitted.model, tiny.task_of(tiny.recipe(), data, on), data.validation)
    assert metrics["loss"] == pytest.approx(fitted.progress.best_metrics["loss"], rel=1e-6)


def test_choosing_without_a_validation_split_takes_a_tenth_of_the_training_examples() -> None:
    on, data = tiny.base("bert"), tiny.dataset(train=40)
    records, fitted = run(on, data, train__keep="best", train__epochs=1)
    assert fitted.progress.examples == 36
    assert records[-1].split == "validation"


def test_the_test_split_never_chooses() -> None:
    on, data = tiny.base("bert"), tiny.dataset(train=24)
    _, fitted = run(on, data, train__epochs=1)
    assert fitted.progress.best_metrics is None


def test_choosing_needs_evaluations_and_enough_examples() -> None:
    on = tiny.base("bert")
    with pytest.raises(RecipeError, match="never"):
        run(on, tiny.dataset(), train__keep="best", train__evaluate="never")
    with pytest.raises(RecipeError, match="too few"):
        run(on, tiny.dataset(train=8), train__keep="best")


@pytest.mark.parametrize(("evaluate_", "steps"), [("epoch", [3, 5]), ("never", []), ("2", [2, 4, 5])])
def test_evaluation_comes_by_epoch_by_steps_or_never(evaluate_: str, steps: list[int]) -> None:
    records, _ = run(tiny.base("bert"), tiny.dataset(), train__evaluate=evaluate_, train__max_steps=5)
    assert [record.step for record in records if record.metrics] == steps


def test_a_base_that_was_written_to_is_noticed() -> None:
    on, data = tiny.base("bert"), tiny.dataset()
    made = tiny.recipe()
    steps = fit(made, on, tiny.task_of(made, data, on), data)
    next(steps)
    with torch.no_grad():
        next(each for name, each in on.model.named_parameters() if "word_embeddings" in name)[0, 0] += 1
    with pytest.raises(TrainingError, match="the base's weights changed"):
        tiny.train(steps)


def test_evaluation_gives_every_example_its_own_answer_whatever_the_batches() -> None:
    on, data = tiny.base("bert"), tiny.dataset(test=9)
    made = tiny.recipe()
    task = tiny.task_of(made, data, on)
    attach(made, on, task)
    answers = [evaluate(on.model, task, data.test, most_tokens=most)[1] for most in (1, 30, 10_000)]
    for one, two in zip(answers[0], answers[1], strict=True):
        assert one["probabilities"]["good"] == pytest.approx(two["probabilities"]["good"], abs=1e-6)
    assert len(answers[2]) == 9
