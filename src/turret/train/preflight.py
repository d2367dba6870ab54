"""The preflight: checks a training before its first step and predicts its time and memory."""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from turret import adapters, process, quantized
from turret.adapters import StoredAdapter
from turret.adapters.packed import texts_in
from turret.adapters.tuners.tuner import tuner_of
from turret.bases import Base, ChosenDevice, native_bfloat16, synchronize
from turret.bases.device import gigabytes
from turret.data import Dataset, Example, cells
from turret.errors import memory_ran_out, one_line
from turret.methods.method import MOST_EPOCHS, Check, Level, epochs_for
from turret.recipe import Recipe, toml_text
from turret.tasks import Task, is_comparing
from turret.train import memory
from turret.train.adamw import moment_bytes, warmup_steps
from turret.train.asking import Asking, twin_base
from turret.train.batches import (
    GENERATED_ROWS,
    EncodedRow,
    EncodedRows,
    Schedule,
    Splits,
    micro_batches,
    pass_tokens,
    splits_of,
    spread_indices,
)
from turret.train.evaluation import evaluate
from turret.train.initialize import attach, defaults_of, extract_adapter, seeded_generators
from turret.train.linear_start import head_start
from turret.train.losses import backward, loss_of
from turret.train.training_plan import MOST_TRIALS, Plan, Prediction, TrialSize, size_of
from turret.transformer import Model, Tokenizer

# --- cost -------------------------------------------------------------------------------------------------------------
# Measures the time and memory of a training by a few passes on the real model, which is left as it was.
#
# On a GPU, which computes while Python goes on, every time is taken after it has computed all.


LONG = 3.0  # seconds; a step this long is timed once instead of twice
TIMED = 0.3  # seconds; a shorter span is too short to count, because the system counts hundredths
BATCHES_SAMPLED = 50  # batches, of which the typical and the largest are measured
FIRST_TOKENS = (1, 5)  # new tokens of each text in the two timed generations
GPU_GROWTH = 1.05  # a GPU's allocator gives back what it has freed, whole
HEAP_GROWTH = 1.2  # the heap after hundreds of passes of other sizes, divided by the heap after a few
BETWEEN_STEPS = 10 << 20  # bytes of the checkpoint and the curve
SIZES = 5  # sizes of a pass that are tried, because each leaves other holes in the heap


@dataclass(frozen=True)
class GenerationTime:
    """Seconds of generating texts with the KV cache.

    Args:
        prompt: seconds to read one row's prompt.
        step: seconds of one decode step for all rows of a batch.
    """

    prompt: float
    step: float

    def seconds(self, rows: int, new_tokens: int) -> float:
        """The time of generating `new_tokens` for every row, if no text ends early."""
        return rows * self.prompt + -(-rows // GENERATED_ROWS) * new_tokens * self.step


@dataclass(frozen=True)
class Cost:
    """Seconds of a typical optimiser step, and bytes by component at the largest one."""

    seconds: float
    head_start: float  # most seconds of the head's start, which is before the first step; 0 without one
    step_tokens: float
    memory: Prediction
    trainable: int  # weights
    others: float  # processors that other processes kept busy during the measurement
    generation: GenerationTime | None  # None if the task generates no text


class OtherProcesses:
    """Counts the processors that other processes keep busy, from its creation to `busy`."""

    def __init__(self) -> None:
        self._started, self._before = time.perf_counter(), self._cpu_seconds()

    def busy(self) -> float:
        """The average number of busy processors; 0 if the time is too short to tell."""
        seconds = time.perf_counter() - self._started
        return max(0.0, (self._cpu_seconds() - self._before) / seconds) if seconds >= TIMED else 0.0

    @staticmethod
    def _cpu_seconds() -> float:
        """Processor seconds of all other processes. Guests are left out: their time is counted as user time already."""
        machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = sum(getattr(machine, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
        return float(sum(machine) - idle - own.user - own.system)


def measure(
    recipe: Recipe,
    base: Base,
    task: Task,
    items: EncodedRows,
    schedule: Schedule,
    *,
    before: int | None = None,
    start: StoredAdapter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Attach the recipe's adapter, run passes on real batches as a training does, and detach it.

    First, forward and backward passes on a typical batch are timed. Then memory is measured: forward and backward
    passes on pieces of several sizes up to the largest, and a pass without gradients as in an evaluation. The growth of
    the process up to the second part counts as `prepared`: examples and libraries. Its growth at the peak of the second
    part counts as `activations`: saved tensors, temporaries, and holes in the heap, because a training keeps freed
    memory. `activations` is at least what the largest piece saved for its backward pass.

    On a GPU the same is measured of its tensors there.

    Args:
        before: bytes of the process after the base was loaded; None: now. Growth since then counts as `prepared`.
        start: the adapter to continue from.
        clock: seconds.
    """
    sampled = _sample_batches(schedule)
    batches = [items.take(indices) for indices in sampled]
    model: Model = base.model
    most = pass_tokens(recipe.train, model.config, base.pass_tokens)
    typical = sorted(batches, key=_tokens_of_batch)[len(batches) // 2]
    pieces = sorted((piece for batch in batches for piece in micro_batches(batch, most)), key=_tokens_of_batch)
    device, on_gpu = model.device, model.device.type != "cpu"
    clock = _synchronized_clock(clock, device) if on_gpu else clock
    before = memory.resident_bytes(device) if before is None else before
    bare = twin_base(base) if task.max_new_tokens else base
    with process.keep_freed(), seeded_generators(recipe.seed, device):
        attach(recipe, base, task, start)
        try:
            model.train()
            trainable = memory.trainable_bytes(adapters.trainable_parameters(model))
            backward(loss_of(model, task, typical[:1]))  # warm up: the first pass is slow
            evaluate(model, task, items.examples[:1])  # loads the libraries that score
            others = OtherProcesses()
            seconds = _seconds_of_passes(model, task, micro_batches(typical, most), clock)
            busy = others.busy()
            begins = head_start(recipe, base, task, items, most) if start is None else None
            before_steps = 0.0 if begins is None else begins.most_seconds(seconds, schedule.steps, clock)
            # From the state in which a training starts: libraries, a trimmed heap.
            with memory.measure_growth(device) as grown:
                begun = memory.resident_bytes(device)
                saved = _saved_by(model, task, pieces, 1 if seconds > LONG else SIZES)
                _evaluate(model, task, items, {place for indices in sampled for place in indices}, most)
            texts = [item for batch in batches for item in batch][:GENERATED_ROWS]  # a step of fewer rows is faster
            generation = _generation_time(bare, model, task, texts, clock)
        finally:
            adapters.detach(model)
            model.eval()
    process.release_memory()
    prediction = Prediction(
        weights=base.bytes,
        trainable=trainable,
        gradients=trainable,
        optimiser=moment_bytes(recipe.train.optimizer, trainable // 4),
        activations=max(round((GPU_GROWTH if on_gpu else HEAP_GROWTH) * grown.bytes), saved.bytes + 2 * saved.largest),
        prepared=(0 if on_gpu else BETWEEN_STEPS) + max(0, begun - before - 2 * trainable),
        runtime=max(0, before - base.bytes),
    )
    return Cost(
        seconds,
        before_steps,
        sum(map(_tokens_of_batch, batches)) / len(batches),
        prediction,
        trainable // 4,
        busy,
        generation,
    )


def sampled_batches(used: Splits, recipe: Recipe, task: Task) -> list[list[EncodedRow]]:
    """The batches of a training among which its largest pass is looked for."""
    items = EncodedRows(task, used.train)
    return [items.take(indices) for indices in _sample_batches(Schedule.of(recipe, len(items)))]


def _sample_batches(schedule: Schedule) -> list[list[int]]:
    return [indices for (_, indices), _ in zip(schedule.batches(), range(BATCHES_SAMPLED), strict=False)]


def _synchronized_clock(clock: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """The clock, read when the device has computed all that was asked of it."""

    def read() -> float:
        synchronize(device)
        return clock()

    return read


def _seconds_of_passes(
    model: Model, task: Task, pieces: Sequence[Sequence[EncodedRow]], clock: Callable[[], float]
) -> float:
    """Seconds of a step of these pieces: the shorter of two, in case another process was busy during one."""
    seconds = math.inf
    for _ in range(2):
        started = clock()
        for piece in pieces:
            backward(loss_of(model, task, piece))
        seconds = min(seconds, clock() - started)
        if seconds > LONG:
            break
    return seconds


def _saved_by(model: Model, task: Task, pieces: Sequence[Sequence[EncodedRow]], sizes: int) -> memory.SavedForBackward:
    """Run pieces of so many sizes, smallest first; returns what the largest saved for its backward pass."""
    for place in range(1, sizes):
        backward(loss_of(model, task, pieces[(len(pieces) - 1) * place // sizes]))
    for _ in range(min(sizes, 2)):
        saved = memory.SavedForBackward(model)
        with saved.counting():
            loss = loss_of(model, task, pieces[-1])
        backward(loss)  # outside `counting`, which keeps every saved tensor: a backward pass frees them by layer
        del loss
    return saved


def _evaluate(model: Model, task: Task, items: EncodedRows, places: set[int], most_tokens: int) -> None:
    """An evaluation of the longest of these items: two passes of the size that an evaluation uses."""
    room, chosen = 2 * most_tokens, list[Example]()
    for place, item in sorted(zip(places, items.take(list(places)), strict=True), key=lambda each: -each[1].tokens):
        room -= item.tokens
        if room < 0 and chosen:
            break
        chosen.append(items.examples[place])
    evaluate(model, task, chosen, most_tokens=most_tokens)


def _generation_time(
    bare: Base, model: Model, task: Task, items: Sequence[EncodedRow], clock: Callable[[], float]
) -> GenerationTime | None:
    """Generate a few texts at two lengths: the difference is the time of the further tokens.

    Args:
        bare: the base, with nothing attached.
        model: with the adapter.
    """
    if not task.max_new_tokens:
        return None
    sources, seconds = [item.source for item in items], []
    method = adapters.attachment(model).methods[adapters.ATTACHED]
    adapter = None  # of a method that does not share its base: the base alone is as fast
    if method.mixes(method.model_dump()):
        adapter = extract_adapter(model, bare, task)
    with Asking(bare, adapter, task, model) as asking:
        asking.texts(sources[:1], new_tokens=1)  # starts the engine
        for new_tokens in FIRST_TOKENS:
            started = clock()
            asking.texts(sources, new_tokens=new_tokens)
            seconds.append(clock() - started)
    step = max(0.0, seconds[1] - seconds[0]) / (FIRST_TOKENS[1] - FIRST_TOKENS[0])
    return GenerationTime(max(0.0, seconds[0] - FIRST_TOKENS[0] * step) / len(items), step)


def _tokens_of_batch(batch: Sequence[EncodedRow]) -> int:
    return sum(item.tokens for item in batch)


# --- checks -----------------------------------------------------------------------------------------------------------
# The checks of a plan that need no model run: each function gives rows with a finding and its remedy.


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
    wanted = epochs_for(enough, schedule.examples, schedule.batch_size)
    if schedule.max_steps is None and recipe.train.epochs == MOST_EPOCHS < wanted:  # as many as a default is
        return Check("steps", "ok", f"{text}; {MOST_EPOCHS} epochs are the most that a default has")
    remedy = f"set train.epochs to {wanted}"
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
        part = f"({dataset.duplicates / max(1, len(dataset.test)):.1%})"
        one = dataset.duplicates == 1
        what = f"1 test input {part} is" if one else f"{dataset.duplicates} test inputs {part} are"
        yield Check(
            "duplicates",
            "warn",
            f"{what} also in the training split, so test scores will be too high",
            f"remove {'it' if one else 'them'} from the data",
        )
    else:
        yield Check("duplicates", "ok", "no test input is a training input")


def special_tokens(base: Base, task: Task) -> Check:
    """The pad and eos tokens."""
    pad, eos = base.tokenizer.pad_token_id, base.tokenizer.eos_token_id
    if task.max_target_tokens and pad == eos:
        return Check(
            "tokens", "ok", f"pad is eos (token {eos}); the loss never sees padding, every target ends with eos"
        )
    return Check("tokens", "ok", f"pad is token {pad}, eos is {'not needed' if eos is None else f'token {eos}'}")


def inputs(items: Sequence[EncodedRow], task: Task, base: Base) -> Iterator[Check]:
    """How many inputs are cut at the limit, and which limit would keep most of them whole."""
    cut = sum(item.cut for item in items)
    empty = sum(not item.example.input.strip() for item in items)
    if empty:
        yield Check("inputs", "warn", f"{empty} of {len(items)} inputs are empty", "remove these rows")
    rows = [(item.source, None if task.pooling is None else item.read) for item in items]
    longest = max(len(text) for row in rows for text in texts_in(row))
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


def outputs(items: Sequence[EncodedRow], task: Task) -> Iterator[Check]:
    """How many targets are cut, and whether generated texts may be as long as the targets."""
    if not task.max_target_tokens:
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
        if written := max(task.max_target_tokens, task.max_new_tokens):
            needed += written
            parts += " and the target"
        virtual = getattr(recipe.method, "num_virtual_tokens", None)
        if isinstance(virtual, int):
            needed += virtual
            parts += " and the prefix"
    if needed <= limit:
        return
    level: Level = "warn" if base.family.last_position(base.model.config) is None else "refuse"
    fits = task.max_tokens - (needed - limit)
    yield Check(
        "positions",
        level,
        f"{parts} need {needed} positions, and {base.id} has {limit}",
        f"set task.max_tokens to {fits} or less" if fits > 0 else "use a base with more positions",
    )


def vectors(recipe: Recipe, task: Task, base: Base) -> Iterator[Check]:
    """What the vectors of texts are, and whether they have as many numbers as the recipe asks for."""
    if task.embedding is None:
        return
    size, wanted = int(base.model.config.hidden_size), task.embedding.dimensions
    how = "" if task.embedding.normalize is False else ", of length 1"
    found = f"{wanted or size} numbers{how}: {task.embedding.pooling} of the last hidden states"
    if wanted is not None and wanted > size:
        found = f"task.dimensions has {wanted}, and a vector of {base.id} has {size} numbers"
        yield Check("vectors", "refuse", found, f"set task.dimensions to at most {size}")
    elif recipe.method.head_alone:
        found = f"{recipe.method.kind} trains a head, and a task of vectors has none"
        yield Check("vectors", "refuse", found, 'set method.kind to "lora"')
    else:
        yield Check("vectors", "ok", found)


def labels(task: Task, examples: Sequence[Example]) -> Iterator[Check]:
    """Classes without examples, with one example, or with far fewer than others."""
    if not task.labels:
        return
    counts = Counter(label for example in examples for label in example.labels)
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
    doubts = cells.doubtful_labels(counts)
    if doubts:
        meant = toml_text(cells.suggest_renames(counts))
        yield Check(
            "labels", "warn", f"classes in doubt: {_some(doubts)}", f"if so, set data.rename = {one_line(meant, 120)}"
        )
    sure = [count for label, count in counts.items() if label not in cells.suggest_renames(counts)] or seen
    largest, smallest = max(sure), min(sure)
    text = f"{len(task.labels)} classes: {_class_counts(counts)}"
    if (
        largest >= SKEWED * smallest
        and "task.class_weights" in task.settings
        and not getattr(task, "class_weights", None)
    ):
        yield Check(
            "labels", "warn", f"{text}: the rare ones will be neglected", 'set task.class_weights to "balanced"'
        )
    else:
        yield Check("labels", "ok", text)


def _class_counts(counts: Mapping[str, int]) -> str:
    """The classes with their training examples, the most frequent first; of many the first and the last."""
    named = [f"{one_line(label, 30)} ({count})" for label, count in Counter(counts).most_common()]
    return ", ".join(named if len(named) <= 8 else [*named[:5], "...", *named[-2:]])


def language(items: Sequence[EncodedRow]) -> Iterator[Check]:
    """Whether the base's tokenizer cuts the words of texts in another language than English into many pieces."""
    texts = [item.example.input for item in items if item.example.input.strip()]
    name = language_of(texts)
    if name is None or name == "English":
        return
    whole = [item for item in items if not item.cut]
    words = sum(len(item.example.input.split()) for item in whole)
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
    "Cyrillic": re.compile("[\u0400-\u04ff]"),
    "Greek": re.compile("[\u0370-\u03ff]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u0590-\u05ff]"),
    "Chinese or Japanese": re.compile("[\u3040-\u30ff\u3400-\u9fff]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Devanagari": re.compile("[\u0900-\u097f]"),
    "Thai": re.compile("[\u0e00-\u0e7f]"),
}


def checkpoints(base: Base) -> Iterator[Check]:
    """Whether the layers are checkpointed because a GPU is small."""
    if base.checkpoints is not None:
        text = f"on, the gradients are the same and a step computes the layers twice: {base.checkpoints}"
        yield Check("checkpoint_layers", "ok", text)


def passes(base: Base) -> Iterator[Check]:
    """The tokens of a pass, if a GPU decides them."""
    if base.pass_tokens is not None:
        yield Check("passes", "ok", f"of at most {base.pass_tokens:,} tokens: as many as the GPU has memory for")


def reference(recipe: Recipe, base: Base, task: Task, start: StoredAdapter | None) -> Iterator[Check]:
    """What a preference compares its answers with, and whether its first loss is ln 2."""
    if not is_comparing(task) or task.objective != "dpo":
        return
    given = base.reference
    if given is not None and given.adapter.base.fingerprint not in (None, base.fingerprint):
        text = f"{given.version} was trained on another base ({given.adapter.base.id})"
        yield Check("reference", "refuse", text, "name a version on this base in task.reference, or leave it out")
        return
    if given is not None and (recipe.method.wraps_modules or given.adapter.method.every_weight):
        odd = recipe.method if recipe.method.wraps_modules else given.adapter.method
        text = f"the method {odd.kind} shares no model with another adapter"
        yield Check("reference", "refuse", text, "leave task.reference out, or use lora or prefix")
        return
    name = "the bare base" if given is None else f"{given.version} ({given.digest[:19]})"
    if (None if start is None else start.digest) == (None if given is None else given.digest):
        yield Check("reference", "ok", f"{name}, from which the training starts: the first loss is ln 2")
        return
    begins = "the bare base" if start is None else start.version
    text = f"{name}, and the training starts from {begins}, so the first loss is not ln 2"
    remedy = "set train.init_from to it too" if start is None else f'set task.reference = "{begins}"'
    yield Check("reference", "warn", text, remedy)


def precision(recipe: Recipe, base: Base) -> Iterator[Check]:
    """Whether the processor and the method suit the precision of the base's weights and products."""
    dtype = str(base.dtype).removeprefix("torch.")
    if dtype == "float32":
        return
    remedy, device = 'set train.dtype to "float32"', base.model.device
    if recipe.method.every_weight:
        yield Check("dtype", "warn", f"full fine-tuning starts from weights rounded to {dtype}", remedy)
    if dtype == "bfloat16" and not native_bfloat16(device):
        where = "this processor" if device.type == "cpu" else f"the GPU {device}"
        yield Check("dtype", "warn", f"{where} emulates bfloat16, several times slower than float32", remedy)
    if dtype == "float16":
        slow = "this processor computes float16 slowly; " if device.type == "cpu" else ""
        level: Level = "warn" if slow else "ok"
        yield Check("dtype", level, f"{slow}the loss is scaled, because small gradients vanish in float16", remedy)


def whole_lengths(items: Sequence[EncodedRow], tokenizer: Tokenizer, limit: int) -> list[int]:
    """The tokens of the inputs before they were cut. Texts are read up to 240 characters per token of the limit."""
    most = 40 * 6 * limit  # characters
    cut = [item for item in items if item.cut and item.whole is None]
    texts = [item.example.input[:most] for item in cut]
    whole = tokenizer(texts, verbose=False)["input_ids"] if cut else []
    lengths = [item.whole or len(item.source) for item in items if not item.cut or item.whole is not None]
    return lengths + [max(limit + 1, len(ids)) for ids in whole]


def _percentile(values: Sequence[int], part: float) -> int:
    """The smallest value that `part` of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(part * len(values)) - 1)]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# --- preflight --------------------------------------------------------------------------------------------------------


EXAMPLES_SAMPLED = 1000  # training examples whose lengths are checked
EVALUATION = 0.35  # of the time of training on as many tokens, because there is no backward pass


def plan(
    recipe: Recipe,
    base: Base,
    task: Task,
    dataset: Dataset,
    *,
    measured: bool = True,
    start: StoredAdapter | None = None,
    proof_seconds: float = 0.0,
    device: ChosenDevice | None = None,
) -> Plan:
    """Check a recipe against its base and data. The base is left as it was.

    Args:
        recipe: with its defaults filled in, see `fill_recipe`.
        measured: run a few passes on the model for memory and time.
        start: the version that the adapter starts from.
        proof_seconds: time of the proof, which loads the base in a fresh process.
        device: where the base is, and why; for a row of the plan.
    """
    before = memory.resident_bytes(base.model.device)
    used = splits_of(recipe, dataset)
    schedule = Schedule.of(recipe, len(used.train))
    items = EncodedRows(task, used.train)
    sample = items.take(spread_indices(len(items), EXAMPLES_SAMPLED))
    total = quantized.count_weights(base.model)
    own = defaults_of(recipe.method, base, task.kind)
    lr = recipe.train.lr
    auto = None
    if lr is None or isinstance(lr, str):  # "auto"
        auto = size_of(len(used.train), schedule.steps)
        lr, rate = own.lr, rates(auto, own.lr)
    else:
        rate = recipe.method.rate_check(lr, own.lr)
    rows = [
        tuner_of(recipe.method).targets(base.model),
        rate,
        *recipe.method.checks(base.family.kind),
        steps(recipe, schedule, own.steps),
        *splits(used, dataset),
        *labels(task, used.train),
        special_tokens(base, task),
        *inputs(sample, task, base),
        *language(sample),
        *outputs(sample, task),
        *positions(recipe, task, base),
        *vectors(recipe, task, base),
        *reference(recipe, base, task, start),
        *precision(recipe, base),
        *([] if device is None else [Check("device", "ok", str(device))]),
        *checkpoints(base),
        *passes(base),
    ]
    cost: Cost | None = None
    if measured and not any(check.level == "refuse" for check in rows):
        room = memory.available(base.model.device)
        if recipe.method.every_weight and 16 * total > room:
            needed = f"every weight, its gradient and two moments take {gigabytes(16 * total)}"
            remedy = "use method lora or prefix, or a smaller base"
            rows.append(Check("memory", "refuse", f"{needed}, {gigabytes(room)} are free", remedy))
        else:
            try:
                cost = measure(recipe, base, task, items, schedule, before=before, start=start)
            except (MemoryError, RuntimeError) as error:
                if not memory_ran_out(error):
                    raise
                text = f"a trial step ran out of memory with {gigabytes(room)} free"
                rows.append(Check("memory", "refuse", text, "lower train.micro_batch_tokens or task.max_tokens"))
    seconds = None
    if cost is not None:
        seconds = _training_seconds(recipe, used, dataset, task, schedule, cost) + proof_seconds
        rows.insert(1, share(cost.trainable, total))
        rows += [
            fits(cost.memory, base),
            Check("time", "ok", f"about {duration(seconds)} for {schedule.steps} steps{_before(auto, cost)}"),
            *processors(cost.others, torch.get_num_threads(), os.cpu_count() or 1),
        ]
    return Plan(
        checks=tuple(rows),
        memory=None if cost is None else cost.memory,
        seconds=seconds,
        steps=schedule.steps,
        lr=lr,
        trainable=None if cost is None else cost.trainable,
        total=total,
    )


def fits(predicted: Prediction, base: Base) -> Check:
    """Whether the machine has room for a training besides the base, which is loaded already."""
    room = memory.available(base.model.device)
    text = f"{predicted}, {gigabytes(room)} free"
    remedy = "lower train.micro_batch_tokens or task.max_tokens, or free memory"
    remedy += "" if base.model.device.type == "cpu" else ', or set train.device to "cpu"'
    if predicted.above_base > room:
        return Check("memory", "refuse", text, remedy)
    if predicted.above_base > 0.8 * room:
        return Check("memory", "warn", text, remedy)
    return Check("memory", "ok", text)


def _training_seconds(
    recipe: Recipe, used: Splits, dataset: Dataset, task: Task, schedule: Schedule, cost: Cost
) -> float:
    """The time of the head's start and all steps, of evaluations, and of the final one, which also generates texts."""
    each_token = EVALUATION * cost.seconds / cost.step_tokens
    every = recipe.train.evaluate
    during = 0.0
    if used.watched is not None and every != "never":
        times = -(-schedule.steps // (every if isinstance(every, int) else schedule.steps_per_epoch))
        during = times * _estimated_tokens(task, used.watched) * each_token
    splits = [split for split in (dataset.validation, dataset.test) if split]
    final = sum(_estimated_tokens(task, split) for split in splits) * each_token
    if cost.generation is not None:
        final += sum(cost.generation.seconds(len(split), task.max_new_tokens) for split in splits)
    return cost.head_start + schedule.steps * cost.seconds + during + final


def _estimated_tokens(task: Task, examples: Sequence[Example]) -> float:
    """The number of tokens of all examples, estimated from some of them."""
    items = EncodedRows(task, examples)
    sample = items.take(spread_indices(len(items), EXAMPLES_SAMPLED // 10))
    return sum(item.tokens for item in sample) / len(sample) * len(items)


def _before(auto: TrialSize | None, cost: Cost) -> str:
    """What is done before the first step, and its time, for the end of the row on time."""
    text = ""
    if cost.head_start >= 1:
        text = f", of it at most {duration(cost.head_start)} before the first step, for the start of the head"
    if auto is not None and auto.reason is None:
        text += f", before them at most {duration(MOST_TRIALS * auto.steps * cost.seconds)} to find the learning rate"
    return text


def duration(seconds: float) -> str:
    """Seconds as text: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
