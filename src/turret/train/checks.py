"""What may be wrong with a training before it begins: one function a question, one line an answer, with the remedy.

Knows recipes, lengths and labels. Runs no model: `cost` measures, `plan` puts both together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from turret.adapters import int8_layers
from turret.bases import native_bfloat16
from turret.data import texts_of
from turret.errors import AdapterError
from turret.plan_check import Check, Level
from turret.train.batches import Item, Schedule
from turret.train.defaults import epochs_for
from turret.train.optim import warmup_steps
from turret.train.rates import MOST_TRIALS, Size
from turret.train.splits import Splits

MANY_CUT = 0.05  # share of the inputs that lose their end, from which on it is worth a warning
BUSY = 0.5  # processors that others keep busy, from which on it is worth a warning
SKEWED = 10  # times as many examples of the largest class as of the smallest


def share(trainable: int, total: int) -> Check:
    return Check(
        "trainable", "ok", f"{trainable:,} weights are trained, {trainable / total:.2%} of the base's {total:,}"
    )


def processors(others: float, threads: int, count: int) -> Iterator[Check]:
    """others: processors that other processes keep busy. An operation that several threads share waits for the last."""
    if threads > 1 and others >= BUSY and others + threads > count + BUSY / 2:
        yield Check(
            "processors",
            "warn",
            f"other work keeps {others:.1f} of {count} busy, and each small operation waits for the slower of "
            f"{threads} threads",
            f"OMP_NUM_THREADS={max(1, count - math.ceil(others))} for as long as that lasts: about twice as fast",
        )


def rates(size: Size, usual: float) -> Check:
    """`lr = "auto"` before it was carried out: a plan alone does not take the time."""
    if size.reason is not None:
        return Check("learning rate", "ok", f"{usual:g}, this method's own: {size.reason}")
    tried = f"at most {MOST_TRIALS} rates about this method's own {usual:g}, {size.steps} steps each"
    return Check("learning rate", "ok", f"auto: training first tries {tried}")


def steps(recipe: Any, schedule: Schedule, enough: int) -> Check:
    """enough: the steps below which the method is not trained out."""
    warmup = warmup_steps(recipe.train.warmup, schedule.steps)
    text = f"{schedule.steps} steps of {schedule.batch_size} examples, {warmup} of them warm-up"
    if schedule.steps >= enough:
        return Check("steps", "ok", text)
    epochs = epochs_for(enough, schedule.examples, schedule.batch_size)
    remedy = f"train.epochs = {epochs} would do"
    if schedule.max_steps is not None:
        remedy += f", with train.max_steps = {enough} or none"
    return Check("steps", "warn", f"only {text}, and {recipe.method.kind} needs about {enough}", remedy)


def splits(made: Splits, dataset: Any) -> Iterator[Check]:
    counts = f"{len(made.train)} train, {len(dataset.validation)} validation, {len(dataset.test)} test examples"
    if made.note:
        yield Check("splits", "warn", f"{counts}; {made.note}", "name data.validation to choose it yourself")
    elif not dataset.test and not dataset.validation:
        yield Check("splits", "warn", f"{counts}: nothing will measure the adapter", "name data.test")
    else:
        yield Check("splits", "ok", counts)
    if dataset.duplicates:
        part = dataset.duplicates / max(1, len(dataset.test))
        yield Check(
            "duplicates",
            "warn",
            f"{dataset.duplicates} test inputs ({part:.1%}) are training inputs too, so the test scores flatter",
            "remove them from the data",
        )
    else:
        yield Check("duplicates", "ok", "no test input is a training input")


def special_tokens(base: Any, task: Any) -> Check:
    tokenizer = base.tokenizer
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if task.generates and pad == eos:
        return Check(
            "tokens", "ok", f"pad is eos (token {eos}); the loss never sees padding, every target ends with eos"
        )
    return Check("tokens", "ok", f"pad is token {pad}, eos is {'not needed' if eos is None else f'token {eos}'}")


def inputs(items: Sequence[Item], task: Any, base: Any) -> Iterator[Check]:
    """How many inputs are cut at the limit, and what limit would hold most of them."""
    cut = sum(item.cut for item in items)
    empty = sum(not text.strip() for text in texts_of([item.example for item in items]))
    if empty:
        yield Check("inputs", "warn", f"{empty} of {len(items)} inputs are empty", "remove these rows")
    longest = max(len(item.source) for item in items)
    if not cut:
        yield Check("inputs", "ok", f"no input is cut: the longest has {longest} tokens of {task.max_tokens}")
        return
    wanted = _percentile(whole_lengths(items, base.tokenizer, task.max_tokens), 0.95)
    text = f"{cut} of {len(items)} inputs ({cut / len(items):.1%}) lose their end at {task.max_tokens} tokens"
    limit = base.family.position_limit(base.model.config)
    if limit is not None:
        wanted = min(wanted, limit)
    if cut / len(items) < MANY_CUT or wanted <= task.max_tokens:
        yield Check("inputs", "ok", text)
    else:
        reach = "the most this base reads" if wanted == limit else "keeps 95% of them whole"
        yield Check("inputs", "warn", text, f"task.max_tokens = {wanted} {reach}, and takes longer")


def outputs(items: Sequence[Item], task: Any) -> Iterator[Check]:
    """Targets that are cut, and whether generation may write as much as the targets have."""
    if not task.generates:
        return
    lengths = [item.weight for item in items]
    cut = sum(item.target_cut for item in items)
    text = f"{cut} of {len(items)} targets ({cut / len(items):.1%}) are cut at {task.max_target_tokens} tokens"
    if cut / len(items) >= MANY_CUT / 5:
        yield Check("targets", "warn", f"{text} and teach it to stop in the middle", "raise task.max_target_tokens")
    else:
        yield Check("targets", "ok", text if cut else f"no target is cut: the longest has {max(lengths)} tokens")
    wanted, given = _percentile(lengths, 0.95), int(task.generation["max_new_tokens"])
    if given < wanted:
        yield Check(
            "generation",
            "warn",
            f"at most {given} new tokens are generated, and one target in twenty has {wanted} or more",
            f"set task.max_new_tokens to {wanted}",
        )
    else:
        yield Check("generation", "ok", f"up to {given} new tokens, 95% of the targets have at most {wanted}")


def positions(recipe: Any, task: Any, base: Any) -> Iterator[Check]:
    """A table of positions has an end; beyond it there is an index error or noise."""
    limit = base.family.position_limit(base.model.config)
    if limit is None:
        return
    needed, said = task.max_tokens, f"task.max_tokens = {task.max_tokens}"
    if base.family.decoder_only:
        if task.generates:
            needed += max(task.max_target_tokens, int(task.generation["max_new_tokens"]))
            said += " and the target"
        virtual = getattr(recipe.method, "num_virtual_tokens", None)
        if isinstance(virtual, int):
            needed += virtual
            said += " and the prefix"
    if needed <= limit:
        return
    level: Level = "refuse" if base.family.positions == "table" else "warn"
    fits = task.max_tokens - (needed - limit)
    yield Check(
        "positions",
        level,
        f"{said} need {needed} positions, and {base.id} has {limit}",
        f"set task.max_tokens to {fits} or less" if fits > 0 else "use a base with more positions",
    )


def labels(task: Any, examples: Sequence[Any]) -> Iterator[Check]:
    """Classes that are missing, alone, or far rarer than the others."""
    if not task.labels:
        return
    counts = Counter(label for example in examples for label in example.labels)
    missing = [label for label in task.labels if not counts[label]]
    alone = [label for label in task.labels if counts[label] == 1]
    if missing:
        yield Check(
            "labels", "warn", f"no training example is {_some(missing)}", "take more examples, or drop the class"
        )
    if alone:
        yield Check("labels", "warn", f"one training example only is {_some(alone)}", "take more examples of it")
    seen = [counts[label] for label in task.labels if counts[label]]
    if not seen or (len(seen) == 1 and not task.multi_label):
        yield Check("labels", "refuse", "all training examples are of one class", "take more examples")
        return
    largest, smallest = max(seen), min(seen)
    text = f"{len(task.labels)} classes, {smallest} to {largest} examples each"
    if largest >= SKEWED * smallest and getattr(task, "class_weights", {}) is None:  # it could weigh them
        yield Check(
            "labels", "warn", f"{text}: the rare ones will be neglected", 'set task.class_weights to "balanced"'
        )
    else:
        yield Check("labels", "ok", text)


def precision(recipe: Any, base: Any) -> Iterator[Check]:
    """The base's numbers, and the products of a step."""
    if recipe.train.int8:
        yield _in_8_bits(recipe.method, base.model)
    if not str(base.dtype).endswith("bfloat16"):
        return
    remedy = 'set train.dtype to "float32"'
    if recipe.method.every_weight:
        yield Check("dtype", "warn", "a full fine-tuning starts from weights rounded to bfloat16", remedy)
    if not native_bfloat16():
        yield Check("dtype", "warn", "this processor emulates bfloat16, several times slower than float32", remedy)


def _in_8_bits(method: Any, model: Any) -> Check:
    if method.not_int8 is not None:
        return Check("int8", "warn", f"method {method.kind} {method.not_int8}: it multiplies in train.dtype as ever")
    try:
        layers = int8_layers(model)
    except AdapterError as error:
        text, _, remedy = str(error).partition(": ")
        return Check("int8", "refuse", text, remedy)
    return Check("int8", "ok", f"{len(layers)} frozen layers multiply in 8 bits while it trains")


def whole_lengths(items: Sequence[Item], tokenizer: Any, limit: int) -> list[int]:
    """Tokens of the inputs before they were cut; texts beyond forty times the limit count as that long."""
    most = 40 * 6 * limit  # characters
    cut = [item for item in items if item.cut]
    texts = [text[:most] for text in texts_of([item.example for item in cut])]
    whole = tokenizer(texts, verbose=False)["input_ids"] if cut else []
    lengths = [len(item.source) for item in items if not item.cut]
    return lengths + [max(limit + 1, len(ids)) for ids in whole]


def _percentile(values: Sequence[int], part: float) -> int:
    """The smallest value that `part` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
