"""Claim: 32 different LoRAs in one batch of an encoder take no more time than rivals need for the bare base.

all-MiniLM-L6 with a trained head of five classes, 32 texts of 64 to 256 tokens, two threads. The rivals are OpenVINO,
ONNX Runtime and CTranslate2, each with the bare base: all texts in one padded batch (the stock way), and batches of
four texts of like length (the tuned way, with one worker of two threads and two workers of one). Turret answers the
same token ids by its engine, bare and with a LoRA (r 8, all linear layers) of its own for every text. Every side is a
process of its own; they take turns, round after round. A ratio is a rival's time over Turret's of the same round.

Every side's logits are held against transformers in float32, text by text, and its accuracy is that on held-out BBC
articles: the head is a logistic regression on others. CTranslate2 has int8 besides float32 on this processor, and no
bfloat16, nor has ONNX Runtime. Its time in int8 is shown with what that costs in accuracy.

    python benchmarks/rivals_encoder.py --setup         once: the rivals' environment, 1 GB
    python benchmarks/rivals_encoder.py                 both precisions; some minutes
    python benchmarks/rivals_encoder.py --dtypes float32 --quick
    python benchmarks/rivals_encoder.py --report
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import rival_sides
import rivals
import side
from serve_sides import BASES, LABELS, Shelf, adapters, use_threads

NAME = "rivals_encoder"
CLAIM = "a batch of 32 different LoRAs takes no longer than the fastest rivals need for the bare base"
GOAL = 1.0  # Turret's speed with 32 LoRAs over the bare rival's, in float32
SIDES = {"float32": ("openvino", "onnxruntime", "ctranslate2", "ctranslate2 int8"), "bfloat16": ("openvino",)}
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "ctranslate2": "CTranslate2"}
TURRET, BARE, DIFFERENT = "turret", "bare", "32 LoRAs"
LONGEST, TRAIN, TEST = 256, 600, 400  # tokens of an article, articles that the head is fitted on, and held-out ones


def main() -> None:
    options = _options()
    if options.worker is not None:
        work(json.loads(options.worker))
    elif options.setup:
        rivals.set_up(options.venvs, "encoder")
    else:
        if not options.report:
            rivals.python(options.venvs, "encoder")
            for dtype in options.dtypes:
                run = measure(dtype, options)
                if options.quick:
                    print(report([run]))
                else:
                    record.keep(NAME, CLAIM, run)
        print(report(kept()))


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    rounds = options.rounds or (2 if options.quick else 15)
    texts, test = (8, 40) if options.quick else (32, TEST)
    shared = {"threads": options.threads, "seed": options.seed, "texts": texts, "test": test}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        errand = {**shared, "folder": name, "dtype": dtype}
        around = rivals.environment(options.threads)

        def ours(who: str) -> tuple[list[str], dict[str, str]]:
            return rivals.command(__file__, {**errand, "side": who}), around

        with rivals.started({"prepare": ours("prepare")}, folder):
            pass
        commands = {TURRET: ours(TURRET)}
        for rival in SIDES[dtype]:
            kind, _, other = rival.partition(" ")
            words = {"rival": kind, "folder": name, "dtype": other or dtype, "threads": options.threads}
            interpreter = rivals.python(options.venvs, "encoder")
            commands[rival] = (rivals.command(__file__, words, interpreter), around)
        with rivals.started(commands, folder) as sides:
            checked = {name: check(each, folder) for name, each in sides.items()}
            times = rivals.in_turns(sides, rounds)
        found = {
            name: {"dtype": name.partition(" ")[2] or dtype, **each.facts, **checked[name], "ways": times[name]}
            for name, each in sides.items()
        }
        reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    return {
        "settings": {"dtype": dtype, "rounds": rounds, **shared},
        "sides": found,
        "reference": {
            "logits": max(abs(value) for row in centred(reference["speed"]) for value in row),
            "accuracy": accuracy(reference["held out"], labels),
        },
        "machine": record.machine(options.threads),
    }  # fmt: skip


def check(each: side.Side, folder: Path) -> dict[str, Any]:
    """How far each way's logits lie from the reference's, and the accuracy on held-out articles by one of the ways."""
    reference = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    bare, save = [way for way in each.facts["ways"] if way != DIFFERENT], folder / "answers.json"
    off = {way: apart(rivals.answered(each, way, "speed", save), reference["speed"]) for way in bare}
    held_out = rivals.answered(each, bare[-1], "held out", save)
    return {"off": off, "accuracy": accuracy(held_out, labels)}


def centred(logits: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each row's logits less their mean: what probabilities tell of them."""
    return [[value - statistics.fmean(row) for value in row] for row in logits]


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference of centred logits."""
    pairs = zip(centred(one), centred(other), strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True))


def accuracy(logits: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    return statistics.fmean(
        int(max(range(len(row)), key=row.__getitem__) == label) for row, label in zip(logits, labels, strict=True)
    )


# --- processes of ours -----------------------------------------------------------------------------------------------


def work(errand: Mapping[str, Any]) -> None:
    if "rival" in errand:
        rival_sides.work(errand)
        return
    use_threads(errand["threads"])
    says = side.answers_alone()
    if errand["side"] == "prepare":
        prepare(errand, Path(errand["folder"]))
        side.take_turns({}, {}, says, {})
    else:
        turret(errand, Path(errand["folder"]), says)


def prepare(errand: Mapping[str, Any], folder: Path) -> None:
    """Write the texts, the base with a fitted head, and what transformers answers in float32, text by text."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from train_sides import articles
    from transformers import AutoModelForSequenceClassification

    from turret import bases

    base = bases.load(BASES["encoder"], task="classify", num_labels=LABELS, dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(base.folder, num_labels=LABELS).eval()
    generator = random.Random(errand["seed"])
    lengths = [generator.randint(64, 256) for _ in range(errand["texts"])]
    drawn = [[generator.randrange(1000, 20_000) for _ in range(length)] for length in lengths]
    read = list(articles())
    generator.shuffle(read)
    names = sorted({label for _, label in read})
    labels = [names.index(label) for _, label in read]
    rows = [base.tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"] for text, _ in read[: TRAIN + TEST]]
    test = slice(TRAIN, TRAIN + errand["test"])

    def each(rows: Sequence[Sequence[int]], compute: Callable[..., Any]) -> list[list[float]]:
        with torch.inference_mode():
            return [compute(input_ids=torch.tensor([row]))[0].tolist() for row in rows]

    pooled = each(rows[:TRAIN], lambda **ids: model.base_model(**ids).pooler_output)
    head = LogisticRegression(C=10, max_iter=1000).fit(pooled, labels[:TRAIN])
    with torch.no_grad():
        model.classifier.weight.copy_(torch.from_numpy(head.coef_))
        model.classifier.bias.copy_(torch.from_numpy(head.intercept_))
    model.save_pretrained(folder / "model")
    given = {"speed": drawn, "held out": rows[test]}
    reference = {name: each(own, lambda **ids: model(**ids).logits) for name, own in given.items()}
    for name, content in (("rows", given), ("reference", reference), ("labels", labels[test])):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def turret(errand: Mapping[str, Any], folder: Path, says: Any) -> None:
    from importlib.metadata import version

    from safetensors.torch import load_file

    from turret import bases
    from turret.engine import Engine, Limits

    base = bases.load(BASES["encoder"], task="classify", num_labels=LABELS, dtype=errand["dtype"])
    shelf = Shelf()
    shelf.adapters = adapters(base.model, "classify", errand["texts"])
    fitted = load_file(folder / "model" / "model.safetensors")
    head = shelf.adapters["bare"].head
    head.update({name: fitted[name] for name in head})
    with Engine(base, shelf, Limits(running=64, slots=64, queue_tokens=1 << 20)) as engine:

        def way(names: Sequence[str] | None) -> side.Way:
            def classify(rows: Sequence[Sequence[int]]) -> list[list[float]]:
                whose = names or ["bare"] * len(rows)
                tickets = [engine.submit("classify", row, name) for row, name in zip(rows, whose, strict=True)]
                return [_logits(ticket.result()["probabilities"]) for ticket in tickets]

            return classify

        ways = {BARE: way(None), DIFFERENT: way([f"a{number}" for number in range(errand["texts"])])}
        rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        facts = {"package": "turret", "version": version("turret"), "float32": str(bases.float32_products())}
        side.take_turns(ways, rows, says, facts)


def _logits(probabilities: Mapping[str, float]) -> list[float]:
    """Logits up to a constant."""
    from math import log

    return [log(max(value, 1e-30)) for value in probabilities.values()]


# --- what the kept runs say ------------------------------------------------------------------------------------------


def kept() -> list[dict[str, Any]]:
    """The newest run of each precision on each processor."""
    return record.newest(record.load(NAME), lambda run: run["settings"]["dtype"])


def goals(run: Mapping[str, Any]) -> list[list[str]]:
    """[name, wanted, measured, verdict] against each rival that computes in float32 too."""
    if run["settings"]["dtype"] != "float32":
        return []
    ours, rows = run["sides"][TURRET]["ways"], []
    for name, each in run["sides"].items():
        if name != TURRET and each["dtype"] == "float32":
            got = record.ratio(each["ways"][rivals.best(each["ways"])], ours[DIFFERENT]).mean
            rows.append([
                f"speed of 32 LoRAs against {title(name, each)} with the bare base",
                f"at least {GOAL:.1f}x", f"{got:.2f}x", "reached" if got >= GOAL else "missed",
            ])  # fmt: skip
    return rows


def title(name: str, each: Mapping[str, Any]) -> str:
    return f"{TITLES[name.partition(' ')[0]]} {each['version']}"


def report(runs: Sequence[Mapping[str, Any]], prefix: Callable[[Mapping[str, Any]], str] | None = None) -> str:
    """A table of rivals in Turret's precision, then one of rivals in 8 bits; those that were missed stand first."""
    tables = []
    for eight in (False, True):
        rows = [
            (record.ratio(each["ways"][rivals.best(each["ways"])], run["sides"][TURRET]["ways"][DIFFERENT]).mean,
             _row(run, name, each, prefix))
            for run in runs for name, each in run["sides"].items()
            if name != TURRET and (each["dtype"] == "int8") == eight
        ]  # fmt: skip
        if rows:
            header = [
                "processor", "precision", "rival, bare base", "rival: stock, ms", "rival: best, ms", "Turret bare, ms",
                "Turret 32 LoRAs, ms", "Turret bare against its best", "32 LoRAs against its best",
                "logits off: rival, Turret", "accuracy: rival, Turret", "measured",
            ]  # fmt: skip
            tables.append(record.table(header, [row for _, row in sorted(rows, key=lambda each: each[0])]))
    return "\n\n".join(tables)


def _row(run: Mapping[str, Any], name: str, each: Mapping[str, Any], where: Any) -> list[str]:
    ours, ways = run["sides"][TURRET], each["ways"]
    best = rivals.best(ways)
    precision = each["dtype"] if each["dtype"] == ours["dtype"] else f"{each['dtype']}, Turret {ours['dtype']}"
    return [
        where(run) if where else run["machine"]["device"], precision, title(name, each),
        rivals.milliseconds(ways["whole"]), f"{rivals.milliseconds(ways[best])} ({best})",
        rivals.milliseconds(ours["ways"][BARE]), rivals.milliseconds(ours["ways"][DIFFERENT]),
        record.shown(record.ratio(ways[best], ours["ways"][BARE])),
        record.shown(record.ratio(ways[best], ours["ways"][DIFFERENT])),
        f"{each['off'][best]:.1e}, {ours['off'][BARE]:.1e} of {run['reference']['logits']:.1f}",
        f"{each['accuracy']:.1%}, {ours['accuracy']:.1%}",
        run["machine"]["at"][:10],
    ]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    rivals.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
