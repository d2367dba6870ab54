"""The checks of a plan that need no model run: each function gives rows with a finding and its remedy."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from turret.adapters import int8_layers
from turret.bases import Base, native_bfloat16
from turret.data import Dataset, Example, Labelled, cells, texts_of
from turret.errors import AdapterError, one_line
from turret.methods import Method
from turret.methods.method import epochs_for
from turret.plan_check import Check, Level
from turret.recipe import Recipe, toml
from turret.tasks import Task, writes
from turret.train.batches import Item, Schedule
from turret.train.optim import warmup_steps
from turret.train.rates import MOST_TRIALS, TrialSize
from turret.train.splits import Splits
from turret.transformer import Model, Tokenizer

MANY_CUT = 0.05  # warn from this share of cut inputs on
BUSY = 0.5  # warn from this many processors in use by other processes on
FEW_WORDS = 50  # in which no language is looked for
MANY_PIECES = 2.0  # warn from this many tokens for a word on; English texts have about 1.3 with an English base
SKEWED = 10  # warn if the largest class has this many times the examples of the smallest


def share(trainable: int, total: int) -> Check:
    """How many weights are trained."""
    return Check(
        "trainable", "ok", f"{trainable:,} weights are trained, {trainable / total:.2%} of the base's {total:,}"
    )


def processors(others: float, threads: int, count: int) -> Iterator[Check]:
    """Warn if other processes slow down multi-threaded operations, which wait for their slowest thread.

    Args:
        others: number of processors that other processes keep busy.
        threads: number of threads that training uses.
        count: number of processors of the machine.
    """
    if threads > 1 and others >= BUSY and others + threads > count + BUSY / 2:
        yield Check(
            "processors",
            "warn",
            f"other processes keep {others:.1f} of {count} busy, and each small operation waits for the slowest of "
            f"{threads} threads",
            f"set OMP_NUM_THREADS={max(1, count - math.ceil(others))} while they run: about 2x faster",
        )


def rates(size: TrialSize, usual: float) -> Check:
    """What `lr = "auto"` will do. A plan does not run the trials, because they take time."""
    if size.reason is not None:
        return Check("learning rate", "ok", f"{usual:g}, this method's own: {size.reason}")
    tried = f"at most {MOST_TRIALS} rates around this method's own {usual:g}, for {size.steps} steps each"
    return Check("learning rate", "ok", f"auto: training first tries {tried}")


def steps(recipe: Recipe, schedule: Schedule, enough: int) -> Check:
    """Whether there are enough steps. enough: the fewest with which the method is fully trained."""
    warmup = warmup_steps(recipe.train.warmup, schedule.steps)
    text = f"{schedule.steps} steps of {schedule.batch_size} examples, {warmup} of them warm-up"
    if schedule.steps >= enough:
        return Check("steps", "ok", text)
    remedy = f"set train.epochs to {epochs_for(enough, schedule.examples, schedule.batch_size)}"
    if schedule.max_steps is not None:
        remedy += f" and train.max_steps to {enough} or none"
    return Check("steps", "warn", f"only {text}, and {recipe.method.kind} needs about {enough}", remedy)


def splits(used: Splits, dataset: Dataset) -> Iterator[Check]:
    """The sizes of the splits, and whether test inputs occur among the training inputs."""
    counts = f"{len(used.train)} train, {len(dataset.validation)} validation, {len(dataset.test)} test examples"
    if used.note:
        yield Check("splits", "warn", f"{counts}; {used.note}", "name data.validation to choose it yourself")
    elif not dataset.test and not dataset.validation:
        yield Check("splits", "warn", f"{counts}: there is nothing to evaluate the adapter on", "name data.test")
    else:
        yield Check("splits", "ok", counts)
    if dataset.duplicates:
        part = dataset.duplicates / max(1, len(dataset.test))
        yield Check(
            "duplicates",
            "warn",
            f"{dataset.duplicates} test inputs ({part:.1%}) are also training inputs, so test scores will be too high",
            "remove them from the data",
        )
    else:
        yield Check("duplicates", "ok", "no test input is a training input")


def special_tokens(base: Base, task: Task) -> Check:
    """The pad and eos tokens."""
    pad, eos = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    if task.generates and pad == eos:
        return Check(
            "tokens", "ok", f"pad is eos (token {eos}); the loss never sees padding, every target ends with eos"
        )
    return Check("tokens", "ok", f"pad is token {pad}, eos is {'not needed' if eos is None else f'token {eos}'}")


def inputs(items: Sequence[Item], task: Task, base: Base) -> Iterator[Check]:
    """How many inputs are cut at the limit, and which limit would keep most of them whole."""
    cut = sum(item.cut for item in items)
    empty = sum(not text.strip() for text in texts_of([item.example for item in items]))
    if empty:
        yield Check("inputs", "warn", f"{empty} of {len(items)} inputs are empty", "remove these rows")
    longest = max(len(item.source) for item in items)
    turns, shortened = sum(item.left_out for item in items), sum(item.left_out > 0 for item in items)
    if turns:
        yield Check(
            "turns",
            "warn",
            f"{shortened} of {len(items)} conversations are longer than {task.max_tokens} tokens: their oldest "
            f"{turns} turns are left out, as a whole",
            "raise task.max_tokens to keep them; training takes longer",
        )
    if not cut:
        yield Check("inputs", "ok", f"no input is cut: the longest has {longest} tokens of {task.max_tokens}")
        return
    wanted = _percentile(whole_lengths(items, base.tokenizer, task.max_tokens), 0.95)
    text = f"{cut} of {len(items)} inputs ({cut / len(items):.1%}) are cut at {task.max_tokens} tokens"
    limit = base.family.position_limit(base.model.config)
    if limit is not None:
        wanted = min(wanted, limit)
    if cut / len(items) < MANY_CUT or wanted <= task.max_tokens:
        yield Check("inputs", "ok", text)
    else:
        gain = "the most that this base reads" if wanted == limit else "which keeps 95% of them whole"
        yield Check("inputs", "warn", text, f"set task.max_tokens to {wanted}, {gain}; training takes longer")


def outputs(items: Sequence[Item], task: Task) -> Iterator[Check]:
    """How many targets are cut, and whether generated texts may be as long as the targets."""
    if not writes(task):
        return
    lengths = [0 if item.target is None else len(item.target) for item in items]
    counted = sum(item.weight for item in items)
    if counted > sum(lengths):
        share = counted / sum(item.tokens for item in items)
        text = f"the loss counts every answer of a conversation: {share:.0%} of all tokens"
        yield Check("loss", "ok", text)
    cut = sum(item.target_cut for item in items)
    text = f"{cut} of {len(items)} targets ({cut / len(items):.1%}) are cut at {task.max_target_tokens} tokens"
    if cut / len(items) >= MANY_CUT / 5:
        end = int(task.generation["eos_token_id"])
        ended = any(item.target_cut and item.target is not None and int(item.target[-1]) == end for item in items)
        lesson = " and teach the model to stop early" if ended else ", and are learnt up to there"
        yield Check("targets", "warn", f"{text}{lesson}", "raise task.max_target_tokens")
    else:
        yield Check("targets", "ok", text if cut else f"no target is cut: the longest has {max(lengths)} tokens")
    wanted, given = _percentile(lengths, 0.95), int(task.generation["max_new_tokens"])
    if given < wanted:
        yield Check(
            "generation",
            "warn",
            f"generation stops at {given} new tokens, and 5% of the targets have {wanted} or more",
            f"set task.max_new_tokens to {wanted}",
        )
    else:
        yield Check("generation", "ok", f"up to {given} new tokens, 95% of the targets have at most {wanted}")


def positions(recipe: Recipe, task: Task, base: Base) -> Iterator[Check]:
    """Whether the base has enough positions. Past the end of a learned table the lookup fails."""
    limit = base.family.position_limit(base.model.config)
    if limit is None:
        return
    needed, parts = task.max_tokens, f"task.max_tokens = {task.max_tokens}"
    if base.family.decoder_only:
        if writes(task):
            needed += max(task.max_target_tokens, int(task.generation["max_new_tokens"]))
            parts += " and the target"
        virtual = getattr(recipe.method, "num_virtual_tokens", None)
        if isinstance(virtual, int):
            needed += virtual
            parts += " and the prefix"
    if needed <= limit:
        return
    level: Level = "refuse" if base.family.positions == "table" else "warn"
    fits = task.max_tokens - (needed - limit)
    yield Check(
        "positions",
        level,
        f"{parts} need {needed} positions, and {base.id} has {limit}",
        f"set task.max_tokens to {fits} or less" if fits > 0 else "use a base with more positions",
    )


def labels(task: Task, examples: Sequence[Example]) -> Iterator[Check]:
    """Classes without examples, with one example, or with far fewer than others."""
    if not task.labels:
        return
    counts = Counter(label for example in examples if isinstance(example, Labelled) for label in example.labels)
    missing = [label for label in task.labels if not counts[label]]
    single = [label for label in task.labels if counts[label] == 1]
    if missing:
        yield Check(
            "labels", "warn", f"no training example is {_some(missing)}", "take more examples, or drop the class"
        )
    if single:
        yield Check("labels", "warn", f"only one training example is {_some(single)}", "take more examples of it")
    seen = [counts[label] for label in task.labels if counts[label]]
    if not seen or (len(seen) == 1 and not task.multi_label):
        yield Check("labels", "refuse", "all training examples are of one class", "take more examples")
        return
    doubts = cells.doubts(counts)
    if doubts:
        meant = toml.written(cells.renaming(counts))
        yield Check(
            "labels", "warn", f"classes in doubt: {_some(doubts)}", f"if so, set data.rename = {one_line(meant, 120)}"
        )
    sure = [count for label, count in counts.items() if label not in cells.renaming(counts)] or seen
    largest, smallest = max(sure), min(sure)
    text = f"{len(task.labels)} classes: {_counted(counts)}"
    if largest >= SKEWED * smallest and getattr(task, "class_weights", {}) is None:  # the task has weights, all 1
        yield Check(
            "labels", "warn", f"{text}: the rare ones will be neglected", 'set task.class_weights to "balanced"'
        )
    else:
        yield Check("labels", "ok", text)


def _counted(counts: Mapping[str, int]) -> str:
    """The classes with their training examples, the most frequent first; of many the first and the last."""
    named = [f"{one_line(label, 30)} ({count})" for label, count in Counter(counts).most_common()]
    return ", ".join(named if len(named) <= 8 else [*named[:5], "...", *named[-2:]])


def language(items: Sequence[Item]) -> Iterator[Check]:
    """Whether the base's tokenizer cuts the words of texts in another language than English into many pieces."""
    texts = [text for text in texts_of([item.example for item in items]) if text.strip()]
    name = language_of(texts)
    if name is None or name == "English":
        return
    whole = [item for item in items if not item.cut]
    words = sum(len(text.split()) for text in texts_of([item.example for item in whole]))
    pieces = sum(len(item.source) for item in whole) / max(1, words)
    text = f"the texts look {name}, and the base reads {pieces:.1f} tokens for each of their words"
    if pieces > MANY_PIECES:
        yield Check("language", "warn", f"{text}: it hardly knows them", f"a multilingual or {name} base may do better")
    else:
        yield Check("language", "ok", text)


def language_of(texts: Sequence[str]) -> str | None:
    """The language of most texts, by their commonest words or their script; None if it cannot be told."""
    words = Counter(word for text in texts[:1000] for word in re.findall(r"[^\W\d_]+", text[:1000].lower()))
    total = words.total()
    if total < FEW_WORDS:
        return None
    shares = {name: sum(words[word] for word in common) / total for name, common in _COMMON_WORDS.items()}
    best = max(shares, key=lambda name: shares[name])
    others = sorted(shares.values())[-2]
    if shares[best] >= 0.08 and shares[best] > 1.3 * others:
        return best
    for name, letters in _SCRIPTS.items():
        if sum(count for word, count in words.items() if letters.search(word)) > 0.5 * total:
            return name
    return None


_COMMON_WORDS = {  # that no other language of the table uses often
    language: words.split()
    for language, words in {
        "English": "the and of to is was it that for with you this are have not at be my but they",
        "German": "der die das und ist nicht ich ein eine zu mit auf den dem sich es wir mir war im",
        "French": "le les et est des une du je pas que pour dans sur au ce nous vous il très mon",
        "Spanish": "el los y es una del por las con para su lo pero muy me se mi está fue al",
        "Italian": "il di che è un per una non sono con della del gli mi ho ma più era dei alla",
        "Dutch": "het een van is niet ik dat op te met voor zijn mijn er maar ook naar bij nog aan",
        "Portuguese": "o os e um uma do da não com para em foi muito mas ao na no eu minha meu",
        "Polish": "w i nie na się z jest do to że jak ale po mnie za od czy przez tak bardzo",
    }.items()
}
_SCRIPTS = {
    "Cyrillic": re.compile("[\u0400-\u04ff]"), "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"), "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Chinese or Japanese": re.compile("[\u3040-\u30ff\u3400-\u9fff]"), "Korean": re.compile("[\uac00-\ud7af]"),
    "Devanagari": re.compile("[\u0900-\u097f]"), "Thai": re.compile("[\u0e00-\u0e7f]"),
}  # fmt: skip


def checkpoints(base: Base) -> Iterator[Check]:
    """Whether the layers are checkpointed because a card is small."""
    if base.checkpoints is not None:
        text = f"on, the gradients are the same and a step computes the layers twice: {base.checkpoints}"
        yield Check("checkpoint_layers", "ok", text)


def precision(recipe: Recipe, base: Base) -> Iterator[Check]:
    """Whether the processor and the method suit the precision of the base's weights and products."""
    if recipe.train.int8:
        yield _in_8_bits(recipe.method, base.model)
    dtype = str(base.dtype).removeprefix("torch.")
    if dtype == "float32":
        return
    remedy, device = 'set train.dtype to "float32"', base.model.device
    if recipe.method.every_weight:
        yield Check("dtype", "warn", f"full fine-tuning starts from weights rounded to {dtype}", remedy)
    if dtype == "bfloat16" and not native_bfloat16(device):
        where = "this processor" if device.type == "cpu" else f"the card {device}"
        yield Check("dtype", "warn", f"{where} emulates bfloat16, several times slower than float32", remedy)
    if dtype == "float16":
        slow = "this processor computes float16 slowly; " if device.type == "cpu" else ""
        level: Level = "warn" if slow else "ok"
        yield Check("dtype", level, f"{slow}the loss is scaled, because small gradients vanish in float16", remedy)


def _in_8_bits(method: Method, model: Model) -> Check:
    if method.not_int8 is not None:
        return Check("int8", "warn", f"method {method.kind} {method.not_int8}: products stay in train.dtype")
    try:
        layers = int8_layers(model)
    except AdapterError as error:
        text, _, remedy = str(error).partition(": ")
        return Check("int8", "refuse", text, remedy)
    return Check("int8", "ok", f"{len(layers)} frozen layers multiply in 8 bits during training")


def whole_lengths(items: Sequence[Item], tokenizer: Tokenizer, limit: int) -> list[int]:
    """The tokens of the inputs before they were cut. Texts are read up to 240 characters per token of the limit."""
    most = 40 * 6 * limit  # characters
    cut = [item for item in items if item.cut and item.whole is None]
    texts = [text[:most] for text in texts_of([item.example for item in cut])]
    whole = tokenizer(texts, verbose=False)["input_ids"] if cut else []
    lengths = [item.whole or len(item.source) for item in items if not item.cut or item.whole is not None]
    return lengths + [max(limit + 1, len(ids)) for ids in whole]


def _percentile(values: Sequence[int], part: float) -> int:
    """The smallest value that `part` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
