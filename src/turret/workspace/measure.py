"""Measure a row of a comparison: a stored version, the base alone, or a baseline that trains nothing.

Measured are: answers and scores on every test example, the time of one answer, forgetting, and costs.
"""

from __future__ import annotations

import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from turret import adapters, quantized
from turret.adapters import packed
from turret.compare.collapse import binned_losses
from turret.data import Dataset, Example, Input
from turret.engine import untrained
from turret.engine.core import Engine
from turret.engine.untrained import Question
from turret.json_types import JsonObject, Plain
from turret.recipe import Recipe
from turret.statistics import Floats
from turret.store import Store
from turret.tasks import Prediction, Task, stored_task
from turret.tasks.shapes import Metrics, number_in, number_of
from turret.timestamp import timestamp
from turret.train.asking import MOST_TOKENS, Asking
from turret.train.batches import EncodedRows, by_length
from turret.train.evaluation import evaluation_mode
from turret.train.initialize import attach, extract_adapter
from turret.transformer import Model
from turret.workspace import answering
from turret.workspace.forgetting import on_neutral_texts
from turret.workspace.history import every_step
from turret.workspace.machine import installed_version
from turret.workspace.progress import Say
from turret.workspace.resident import OwnProcess, PreparedTraining, base_of
from turret.workspace.results import RunResult

T = TypeVar("T")
UNTRAINED = "base has an untrained head"
TIMED_LABELS, TIMED_TEXTS = 24, 6  # single answers that are timed: of a classifier, of a task that generates


def version(
    store: Store,
    recipe: Recipe,
    dataset: Dataset,
    result: RunResult,
    plan: Mapping[str, Plain],
    say: Say,
    place: OwnProcess,
) -> JsonObject:
    """Measure a stored version.

    Args:
        dataset: of the recipe.
        result: of the run.
        plan: the plan of the run, as JSON.
        place: where its base may be in memory already.
    """
    device, kept = recipe.train.device or "auto", result.as_json()
    names = ("version", "digest", "base", "parameters", "timing", "bundle_bytes", "run", "notes")
    with answering.mount_version(store, result.version, say, device, place, judged=True) as ready:
        return {
            **{name: kept[name] for name in names},
            "lr": plan.get("lr"),
            "stored_metrics": result.metrics,
            "memory": _memory(result, plan),
            "best": _best(store, result.run),
            "losses": binned_losses([record.loss for record in every_step(store, result.run)]),
            "made": provenance(ready.asking.model),
            "warnings": list(result.warnings),
            **measure_answers(ready, dataset.test, say),
        }


def base(ready: PreparedTraining, say: Say) -> JsonObject:
    """Measure the base alone. A decoder classifies by the words of the labels, another base by an untrained head."""
    task, loaded = ready.task, ready.base
    adapter = None
    if not task.bare:
        if loaded.family.decoder_only and 1 < len(task.labels) == task.num_labels(task.labels):
            return words(ready, say)
        attach(ready.recipe, loaded, task)
        adapter = extract_adapter(loaded.model, loaded, task)
        adapters.detach(loaded.model)
    with answering.Mounted(None, Asking(loaded, adapter, task)) as mounted:
        result = measure_answers(mounted, ready.dataset.test, say, bare=adapter is None)
    return of_no_version(ready) | result | ({"seedless": True} if adapter is None else {"said": UNTRAINED})


def of_no_version(ready: PreparedTraining) -> JsonObject:
    """What a result says of a row without a version."""
    return {
        "version": None,
        "base": {"id": ready.base.id, "fingerprint": ready.base.fingerprint},
        "parameters": {"trainable": 0, "stored": 0, "total": quantized.count_weights(ready.base.model)},
        "bundle_bytes": 0,
        "notes": ready.notes,
    }


# --- baselines that train nothing ------------------------------------------------------------------------------------

FOLDS = 5  # of the cross-validation
STRENGTHS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # C of the regression, tried in this order
MOST_ITERATIONS = 300
NEVER = -30.0  # the log-probability of a class that no training example has


def baseline(kind: str, ready: PreparedTraining, say: Say) -> JsonObject:
    """Measure the base alone or a baseline, by its kind. The seed changes the base's untrained head alone."""
    return {"base": base, "linear": linear, "lead": lead, "nearest": nearest}[kind](ready, say)


def linear(ready: PreparedTraining, say: Say) -> JsonObject:
    """scikit-learn's logistic or ridge regression on the mean of the frozen base's last hidden states.

    The mean is how embeddings are usually made, and predicts more than the token that a head reads. Cross-validation on
    the training split chooses the strength of the regularisation.
    """
    task, train, test = ready.task, ready.dataset.train, ready.dataset.test
    started = time.perf_counter()
    attach(ready.recipe, ready.base, task)
    say(f"computing the features of {len(train) + len(test)} texts once")
    known = _features(ready, train)
    scale = known.std(0)
    middle, scale = known.mean(0), np.where(scale > 0, scale, 1.0)
    targets, weights = task.linear_targets(train).numpy(), task.spec().get("class_weights") or {}
    outputs, name = task.num_labels(task.labels) or 1, "ridge" if _are_numbers(targets) else "logistic"
    say(f"fitting the {name} regression")
    by_class = [float(weights.get(label, 1.0)) for label in task.labels[:outputs]]
    strength = _strength((known - middle) / scale, targets, by_class)
    fitted = _regression((known - middle) / scale, targets, by_class, strength)
    seconds = time.perf_counter() - started

    def logits(examples: Sequence[Example]) -> torch.Tensor:
        return torch.tensor(fitted((_features(ready, examples) - middle) / scale))

    found = logits(test)
    metrics, answers = task.judge(found, test)
    result = _score_predictions(task, test, [task.prediction_of(each) for each in answers], metrics)
    count = (known.shape[1] + 1) * outputs
    return (
        of_no_version(ready)
        | result
        | {
            "parameters": {"trainable": count, "stored": count, "total": quantized.count_weights(ready.base.model)},
            "timing": {"train_seconds": seconds},
            "latency": _time_answers(test[:TIMED_LABELS], lambda example: logits([example])),
            "said": f"linear is scikit-learn's {name} regression on the mean of the frozen base's last hidden states; "
            f"cross-validation on the training split chose C = {strength:g}",
            "seedless": True,
        }
    )


def _features(ready: PreparedTraining, examples: Sequence[Example]) -> Floats:
    """The mean of the bare base's last hidden states of each example: (N, D)."""
    model, items = ready.base.model, EncodedRows(ready.task, examples)
    places: list[int] = []
    parts = []
    with evaluation_mode(model, adapters.BARE):
        for piece in by_length(items.lengths(), MOST_TOKENS):
            rows = [item.source for item in items.take(piece)]
            parts.append(packed.pooled_states(model, rows, "mean").double().cpu())
            places += piece
    return torch.cat(parts)[torch.tensor(places).argsort()].numpy()


def _regression(z: Floats, targets: Floats, by_class: Sequence[float], strength: float) -> Callable[[Floats], Floats]:
    """The function from standardised features (N, D) to logits (N, C) that scikit-learn fits.

    Args:
        targets: class numbers (N,), numbers (N,) float32, or ones and zeros (N, C): then one regression for each.
        by_class: the weight of each class in the loss: (C,).
        strength: of the fit, C: the inverse of the regularisation.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    if _are_numbers(targets):
        ridge = Ridge(alpha=1 / strength).fit(z, targets[:, None])
        return lambda rows: np.reshape(ridge.predict(rows), (-1, 1))

    def fitted(wanted: Floats, weights: dict[int, float]) -> LogisticRegression:
        return LogisticRegression(C=strength, class_weight=weights, max_iter=MOST_ITERATIONS).fit(z, wanted)

    if targets.ndim == 1:
        known = np.unique(targets)
        one = fitted(targets, {each: by_class[each] for each in known.tolist()}) if len(known) > 1 else None

        def classes(rows: Floats) -> Floats:
            found = np.full((len(rows), len(by_class)), NEVER)
            found[:, known] = 0.0 if one is None else one.predict_log_proba(rows)
            return found

        return classes
    some = [0 < column.sum() < len(column) for column in targets.T]  # a label that is always or never given is constant
    many = [
        fitted(column, {0: 1.0, 1: weight}) if varies else None
        for column, weight, varies in zip(targets.T, by_class, some, strict=True)
    ]

    def labels(rows: Floats) -> Floats:
        return np.stack(
            [
                np.full(len(rows), NEVER if column[0] == 0 else -NEVER)
                if each is None
                else each.decision_function(rows)
                for each, column in zip(many, targets.T, strict=True)
            ],
            axis=1,
        )

    return labels


def _are_numbers(targets: Floats) -> bool:
    """Whether these are numbers to be predicted, not classes."""
    return targets.ndim == 1 and targets.dtype.kind == "f"


def _strength(z: Floats, targets: Floats, by_class: Sequence[float]) -> float:
    """The C with the highest cross-validated likelihood, the smallest if several have it."""
    folds = np.random.default_rng(0).permutation(len(z)) % min(FOLDS, len(z))
    likelihood = dict.fromkeys(STRENGTHS, 0.0)
    for fold in range(int(folds.max()) + 1 if len(z) > 1 else 0):
        out = folds == fold
        for strength in STRENGTHS:
            given, true = _regression(z[~out], targets[~out], by_class, strength)(z[out]), targets[out]
            if _are_numbers(targets):
                likelihood[strength] -= float(np.square(given[:, 0] - true).sum())
            elif targets.ndim == 1:
                likelihood[strength] += float(given[np.arange(len(true)), true].sum())
            else:
                likelihood[strength] -= float(np.logaddexp(0, np.where(true > 0, -given, given)).sum())
    return max(STRENGTHS, key=likelihood.__getitem__)


def lead(ready: PreparedTraining, say: Say) -> JsonObject:
    """Answer each text with its first sentence."""
    say("taking the first sentences")
    answers = [first_sentence(example.input) for example in ready.dataset.test]
    return _texts(ready, answers, lambda example: first_sentence(example.input)) | {
        "said": "lead answers with the first sentence of the text"
    }


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence or line that has a word, without blanks around it."""
    found = re.match(r"\s*(.*?\w.*?(?:[.!?]+[\"'”’)\]]*(?=\s)|(?=\n)|\Z))", text, re.DOTALL)
    return " ".join(text.split()) if found is None else " ".join(found[1].split())


def nearest(ready: PreparedTraining, say: Say) -> JsonObject:
    """Answer each text as its nearest training text was answered, by the cosine of TF-IDF vectors."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    say("finding the nearest training texts")
    train = ready.dataset.train
    reader = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        known = reader.fit_transform([example.input for example in train])  # (N, V), sparse, rows of length 1
    except ValueError:  # no text has a word
        return _texts(ready, [_text(train[0])] * len(ready.dataset.test), lambda _: _text(train[0]))

    def answer(example: Example) -> str:
        likeness = (known @ reader.transform([example.input]).T).toarray()[:, 0]
        return _text(train[int(likeness.argmax())])

    return _texts(ready, [answer(example) for example in ready.dataset.test], answer) | {
        "said": "nearest answers as the training text with the largest cosine of TF-IDF vectors was answered"
    }


def _text(example: Example) -> str:
    assert isinstance(example.output, str)
    return example.output


def words(ready: PreparedTraining, say: Say) -> JsonObject:
    """Classify by the words of the labels, compared with an empty text: see `turret.engine.untrained`."""
    task, test = ready.task, ready.dataset.test
    base = base_of(ready.recipe, stored_task({}), (), ready.device)
    question, count = Question(task.labels), len(task.labels)
    say(f"reading {len(test)} texts")
    with Engine(base, None) as engine:

        def logits(examples: Sequence[Example]) -> torch.Tensor:
            """The logarithm of each label's probability, as a multiple of an equal share: (B, C)."""
            found = untrained.decide(engine, question, [example.input for example in examples], prior=True)
            shares = [[max(each.probabilities[label], 1e-30) * count for label in task.labels] for each in found]
            return torch.tensor(shares, dtype=torch.float64).log()

        metrics, answers = task.judge(logits(test), test)
        latency = _time_answers(test[:TIMED_TEXTS], lambda example: logits([example]))
    return (
        of_no_version(ready)
        | _score_predictions(task, test, [task.prediction_of(each) for each in answers], metrics)
        | {
            "latency": latency,
            "said": "base answers with the label whose words the bare base makes most probable, "
            "compared with an empty text",
            "seedless": True,
        }
    )


def _texts(ready: PreparedTraining, answers: Sequence[str], answer: Callable[[Example], str]) -> JsonObject:
    """The result of a baseline that answers with texts."""
    task, test = ready.task, ready.dataset.test
    metrics = task.judge_texts(answers, [example.references for example in test], None)
    latency = _time_answers(test[:TIMED_TEXTS], answer)
    return (
        of_no_version(ready) | _score_predictions(task, test, answers, metrics) | {"latency": latency, "seedless": True}
    )


def _time_answers(texts: Sequence[T], answer: Callable[[T], object]) -> dict[str, float]:
    """Seconds per answer to one text at a time, after one answer to warm up."""
    answer(texts[0])
    seconds = []
    for text in texts:
        started = time.perf_counter()
        answer(text)
        seconds.append(time.perf_counter() - started)
    return {"median_seconds": statistics.median(seconds), "slowest_seconds": max(seconds), "answers": len(seconds)}


def measure_answers(
    ready: answering.Mounted, examples: Sequence[Example], say: Say, *, bare: bool = False
) -> JsonObject:
    """Metrics, an answer and a score per example, the time of one answer, and the forgetting of the attached adapter.

    Args:
        bare: ask slot 0, the base alone.
    """
    say(f"answering {len(examples)} test examples")
    task = ready.task
    metrics, answers = ready.asking.evaluate(examples, bare=bare)
    say("timing single answers")
    return {
        **_score_predictions(task, examples, [task.prediction_of(each) for each in answers], metrics),
        "latency": _latency(ready, [each.asked for each in examples], bare),
        "forgetting": _forgetting(ready),
    }


def _score_predictions(
    task: Task, examples: Sequence[Example], predictions: Sequence[Prediction], metrics: Metrics
) -> JsonObject:
    """The scores of some predictions, by the task's own metric."""
    scores = task.scores(predictions, examples)
    guess = None  # of a classifier, the class shares give the chance level
    if not task.right_or_wrong:  # the mean score against the references of other examples
        others = [examples[place - 1] for place in range(len(examples))]
        guess = statistics.fmean(task.scores(predictions, others))
    return {
        "kind": task.kind,
        "metrics": dict(metrics),
        "answers": list(predictions),
        "scores": scores,
        "guess": guess,
        "forgetting": None,
    }


def _latency(ready: answering.Mounted, texts: Sequence[Input], bare: bool) -> dict[str, float]:
    """Seconds per answer to some of the texts, evenly spread."""
    count = min(len(texts), TIMED_TEXTS if ready.task.max_new_tokens else TIMED_LABELS)
    sample = [texts[place * len(texts) // count] for place in range(count)]
    return _time_answers(sample, lambda text: answering.answers(ready, [text], bare=bare))


def _forgetting(ready: answering.Mounted) -> dict[str, float] | None:
    """The loss per token of neutral texts with the adapter and without it, and the interval of its increase.

    None of a base that was loaded with another head than its output layer.
    """
    if ready.asking.base.model.get_output_embeddings() is None:
        return None
    found = on_neutral_texts(ready.asking.model, ready.task.tokenizer)
    return {"loss": found.loss, "base_loss": found.base_loss, "low": found.low, "high": found.high}


def _memory(result: RunResult, plan: Mapping[str, Plain]) -> JsonObject:
    """Bytes per component, predicted and measured.

    The sizes of the trained weights, their gradients and their moments are known. All other memory above the base
    counts as activations.
    """
    measured, trainable = result.memory, 4 * int(result.parameters["trainable"])
    above = measured["above_base_bytes"] or 0
    return {
        "peak_bytes": measured["peak_bytes"],
        "above_base_bytes": above,
        "predicted": plan.get("memory"),
        "measured": {
            "weights": measured["base_bytes"],
            "trainable": trainable,
            "gradients": trainable,
            "optimiser": 2 * trainable,
            "activations": max(0, above - 4 * trainable),
        },
    }


def _best(store: Store, run: str) -> JsonObject | None:
    """The best evaluation during the training: its merit, step and split, and the seconds of training until then."""
    seconds, most = 0.0, -math.inf
    best: JsonObject | None = None
    for record in every_step(store, run):
        seconds += record.seconds
        if record.metrics:
            accuracy = number_in(record.metrics, "accuracy")
            merit = -number_of(record.metrics, "loss") if accuracy is None else accuracy
            if best is None or merit > most:
                most = merit
                best = {"merit": merit, "seconds": seconds, "step": record.step, "split": record.split}
    return best


# --- provenance -------------------------------------------------------------------------------------------------------
# Date, device, precision and versions of a training, for its report. Runs in the process of that training.


PACKAGES = ("turret", "torch", "transformers", "peft")


def provenance(model: Model) -> JsonObject:
    """Date, device, threads, precision, versions and commit."""
    weight = next(model.parameters())
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()})
    packed = ", weights in 4 bits" if quantized.any_packed(model) else ""
    precision = " and ".join(kinds) + packed
    return {
        "date": timestamp(time.time(), "seconds"),
        "device": _device(weight.device),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "commit": commit(Path(__file__).parents[4]),
    }


def commit(folder: Path) -> str | None:
    """The commit of a source checkout; None for an installed package."""
    if not (folder / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {_processor()}"


def _processor() -> str:
    """The processor's name with family and model number, because one name covers several generations."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    info = {key.strip(): value.strip() for key, value in pairs}
    name = info.get("model name", platform.machine())
    return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else name
