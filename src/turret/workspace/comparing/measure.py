"""Measure a stored version of a comparison, or the base alone.

Measured are: answers and scores on every test example, the time of one answer, forgetting, and costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from turret import adapters, quantized
from turret import train as trainer
from turret.compare.losses import binned
from turret.data import Example, Input, inputs_of
from turret.json_types import JsonMapping, JsonObject
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import writes
from turret.train.initialize import attach
from turret.transformer import Model, Tokenizer
from turret.workspace import answering, training
from turret.workspace.comparing.provenance import provenance
from turret.workspace.forgetting import on_neutral_texts
from turret.workspace.progress import Say
from turret.workspace.reading import read_dataset
from turret.workspace.training_runs import every_step

TIMED_LABELS, TIMED_TEXTS = 24, 6  # single answers that are timed: of a classifier, of a task that generates


def version(store: Store, recipe: Recipe, result: JsonMapping, plan: JsonMapping, say: Say) -> JsonObject:
    """Measure a stored version.

    Args:
        result: the run, as `turret train --json` prints it.
        plan: the plan of the run, as JSON.
    """
    dataset = read_dataset(store, recipe)
    ready = answering.mounted(store, str(result["version"]), say, recipe.train.device or "auto")
    return {
        **{
            key: result[key]
            for key in ("version", "digest", "base", "parameters", "timing", "bundle_bytes", "run", "notes")
        },
        "method": dict(store.resolve(str(result["version"])).part("method")),
        "lr": plan.get("lr"),
        "stored_metrics": result["metrics"],
        "memory": _memory(result, plan),
        "best": _best(store, str(result["run"])),
        "losses": binned([record.loss for record in every_step(store, str(result["run"]))]),
        "made": provenance(ready.model, recipe.train.int8),
        "warnings": list(result.get("warnings", ())),
        **answered(ready, dataset.test, say),
    }


def base(store: Store, recipe: Recipe, say: Say) -> JsonObject:
    """Measure the base alone on the same examples; a classifier's base with an untrained head."""
    ready = training.prepare(store, recipe, training.Callbacks(stage=say))
    bare = ready.task.generates
    # slot 0 answers for the base; attaching a LoRA only makes the slots
    attach(recipe.model_copy(update={"method": LoRA()}) if bare else recipe, ready.base, ready.task)
    ready.base.model.eval()
    mounted = answering.Mounted(None, ready.base.model, ready.task)
    total = quantized.count(ready.base.model)
    return {
        "version": None,
        "base": {"id": ready.base.id, "fingerprint": ready.base.fingerprint},
        "parameters": {"trainable": 0, "stored": 0, "total": total},
        "bundle_bytes": 0,
        "notes": ready.notes,
        **answered(mounted, ready.dataset.test, say, bare=bare),
    }


def answered(ready: answering.Mounted, examples: Sequence[Example], say: Say, *, bare: bool = False) -> JsonObject:
    """Metrics, an answer and a score per example, the time of one answer, and the forgetting of slot 1.

    Args:
        bare: ask slot 0, the base alone.
    """
    say(f"answering {len(examples)} test examples")
    model, task = ready.model, ready.task
    slot = adapters.BARE if bare else None
    metrics, answers = trainer.evaluate(model, task, examples, most_tokens=answering.MOST_TOKENS, slot=slot)
    predictions = [task.judged(each) for each in answers]
    scores = [task.score(each, example) for each, example in zip(predictions, examples, strict=True)]
    guess = None  # of a classifier, the class shares give the chance level
    if not task.right_or_wrong:  # the mean score against the references of other examples
        guess = statistics.fmean(task.score(each, examples[place - 1]) for place, each in enumerate(predictions))
    say("timing single answers")
    return {
        "kind": task.kind,
        "metrics": metrics,
        "answers": predictions,
        "scores": scores,
        "guess": guess,
        "latency": _latency(ready, inputs_of(examples), bare),
        "forgetting": _forgetting(model, task.tokenizer) if writes(task) else None,
    }


def _latency(ready: answering.Mounted, texts: Sequence[Input], bare: bool) -> dict[str, float]:
    """Seconds per answer to one text at a time, after one answer to warm up."""
    count = min(len(texts), TIMED_TEXTS if ready.task.generates else TIMED_LABELS)
    sample = [texts[place * len(texts) // count] for place in range(count)]
    answering.answers(ready, sample[:1], bare=bare)
    seconds = []
    for text in sample:
        started = time.perf_counter()
        answering.answers(ready, [text], bare=bare)
        seconds.append(time.perf_counter() - started)
    return {
        "median_seconds": statistics.median(seconds),
        "slowest_seconds": max(seconds),
        "answers": len(seconds),
    }


def _forgetting(model: Model, tokenizer: Tokenizer) -> dict[str, float]:
    """The loss per token of neutral texts with the adapter and without it, and the interval of its increase."""
    found = on_neutral_texts(model, tokenizer).neutral
    return {"loss": found.loss, "base_loss": found.base_loss, "low": found.low, "high": found.high}


def _memory(result: JsonMapping, plan: JsonMapping) -> JsonObject:
    """Bytes per component, predicted and measured.

    The sizes of the trained weights, their gradients and their moments are known. All other memory above the base
    counts as activations.
    """
    measured, trainable = result["memory"], 4 * int(result["parameters"]["trainable"])
    above = int(measured["above_base_bytes"])
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
    seconds, best = 0.0, None
    for record in every_step(store, run):
        seconds += record.seconds
        if record.metrics:
            merit = record.metrics.get("accuracy", -record.metrics["loss"])
            if best is None or merit > best["merit"]:
                best = {"merit": merit, "seconds": seconds, "step": record.step, "split": record.split}
    return best
