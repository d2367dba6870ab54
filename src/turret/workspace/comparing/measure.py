"""What is measured of one training once its version is stored, and of the base alone: answers and scores on every test
example, the time of one answer, what was forgotten, what it cost. Refuses to judge any of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from turret import adapters
from turret import train as trainer
from turret.compare.losses import binned
from turret.data import texts_of
from turret.data.dataset import read
from turret.methods import LoRA
from turret.recipe import Recipe
from turret.store import Store
from turret.tasks import schemas
from turret.train.initialize import attach
from turret.workspace import answering, training
from turret.workspace.comparing.neutral_texts import PARAGRAPHS
from turret.workspace.comparing.provenance import provenance

Say = Callable[[str], None]
ASKED, WRITTEN = 24, 6  # texts, one at a time, for the time of an answer; of a task that generates
LEAD = 24  # tokens of a neutral paragraph that are given, the rest is predicted


def version(
    store: Store, recipe: Recipe, result: Mapping[str, Any], plan: Mapping[str, Any], say: Say
) -> dict[str, Any]:
    """Everything about one training. result: as `turret train --json` gives it; plan: as its preflight said."""
    dataset = data_of(recipe)
    ready = answering.mounted(store, str(result["version"]), say)
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
        "losses": binned([record.loss for record in _curve(store, str(result["run"]))]),
        "made": provenance(ready.model, recipe.train.int8),
        "warnings": list(result.get("warnings", ())),
        **_answers(ready, dataset.test, say),
    }


def base(store: Store, recipe: Recipe, say: Say) -> dict[str, Any]:
    """The base alone on the same examples: a classifier's with a head that nobody trained."""
    ready = training.prepare(store, recipe, training.Watching(on_stage=say))
    writes = ready.task.generates
    shown = recipe.model_copy(update={"method": LoRA()}) if writes else recipe
    attach(shown, ready.base, ready.task)
    ready.base.model.eval()
    mounted = answering.Mounted(None, ready.base.model, ready.task)
    total = sum(each.numel() for each in ready.base.model.parameters())
    return {
        "version": None,
        "base": {"id": ready.base.id, "fingerprint": ready.base.fingerprint},
        "parameters": {"trainable": 0, "stored": 0, "total": total},
        "bundle_bytes": 0,
        "notes": ready.notes,
        **_answers(mounted, ready.dataset.test, say, bare=writes),
    }


def data_of(recipe: Recipe) -> Any:
    """The examples that the recipe means."""
    return read(recipe.data, schemas(recipe.task), recipe.split_seed)


def _answers(ready: answering.Mounted, examples: Sequence[Any], say: Say, *, bare: bool = False) -> dict[str, Any]:
    """Metrics, an answer and a score for every example, the time of one answer, and what was forgotten."""
    say(f"answering {len(examples)} test examples")
    model, task = ready.model, ready.task
    slot = adapters.BARE if bare else None
    metrics, answers = trainer.evaluate(model, task, examples, most_tokens=answering.MOST_TOKENS, slot=slot)
    given = [task.judged(each) for each in answers]
    scores = [task.score(each, example) for each, example in zip(given, examples, strict=True)]
    guess = None  # what is right by chance, the shares of the classes tell
    if not task.right_or_wrong:
        guess = statistics.fmean(task.score(each, examples[place - 1]) for place, each in enumerate(given))
    say("timing single answers")
    return {
        "kind": task.kind,
        "metrics": metrics,
        "answers": given,
        "scores": scores,
        "guess": guess,
        "latency": _latency(ready, texts_of(examples), bare),
        "forgetting": _forgetting(model, task.tokenizer) if task.generates else None,
    }


def _latency(ready: answering.Mounted, texts: Sequence[str], bare: bool) -> dict[str, float]:
    """Seconds of one answer to one text, the first left out."""
    count = min(len(texts), WRITTEN if ready.task.generates else ASKED)
    asked = [texts[place * len(texts) // count] for place in range(count)]
    answering.answers(ready, asked[:1], bare=bare)
    seconds = []
    for text in asked:
        started = time.perf_counter()
        answering.answers(ready, [text], bare=bare)
        seconds.append(time.perf_counter() - started)
    return {
        "median_seconds": statistics.median(seconds),
        "slowest_seconds": max(seconds),
        "answers": len(seconds),
    }


def _forgetting(model: Any, tokenizer: Any) -> dict[str, float]:
    """Loss per token of neutral text, given its first words, with the adapter and without."""
    sources, targets = [], []
    for paragraph in PARAGRAPHS:
        ids = torch.tensor(tokenizer(paragraph)["input_ids"], dtype=torch.long)[:256]
        sources.append(ids[:LEAD])
        targets.append(ids[LEAD:])
    losses = {}
    for name, slot in (("loss", 1), ("base_loss", adapters.BARE)):
        total, count = 0.0, 0
        with torch.no_grad(), adapters.on_slot(model, slot):
            for source, target in zip(sources, targets, strict=True):
                logits = adapters.target_logits(model, [source], [target])
                total += float(
                    torch.nn.functional.cross_entropy(logits.float(), target.to(logits.device), reduction="sum")
                )
                count += len(target)
        losses[name] = total / count
    return losses


def _memory(result: Mapping[str, Any], plan: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes by component: as the plan predicted, and measured. What is trained, its gradients and moments are known
    exactly; what else the process took above the base while it trained is its activations."""
    said, trainable = result["memory"], 4 * int(result["parameters"]["trainable"])
    above = int(said["above_base_bytes"])
    return {
        "peak_bytes": said["peak_bytes"],
        "above_base_bytes": above,
        "predicted": plan.get("memory"),
        "measured": {
            "weights": said["base_bytes"],
            "trainable": trainable,
            "gradients": trainable,
            "optimiser": 2 * trainable,
            "activations": max(0, above - 4 * trainable),
        },
    }


def _curve(store: Store, run: str) -> Iterator[trainer.StepRecord]:
    return trainer.read_curve(Path(store.root) / "runs" / run / "curve.jsonl")


def _best(store: Store, run: str) -> dict[str, Any] | None:
    """Seconds of training up to the best evaluation on the way, and the split that it looked at."""
    seconds, best = 0.0, None
    for record in _curve(store, run):
        seconds += record.seconds
        if record.metrics:
            merit = record.metrics.get("accuracy", -record.metrics["loss"])
            if best is None or merit > best["merit"]:
                best = {"merit": merit, "seconds": seconds, "step": record.step, "split": record.split}
    return best
