"""Replay: two versions answer the same labelled examples, and a paired test compares their scores. Loads torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turret.data import Example, Input
from turret.data.columns import RoleColumns
from turret.errors import DataError
from turret.experiments import paired, status_text
from turret.experiments.paired import Paired
from turret.json_types import JsonObject
from turret.store import Golden, Store, golden
from turret.store.catalog import PRODUCTION
from turret.tasks.shapes import Answer
from turret.workspace import answering
from turret.workspace.progress import Say, silent
from turret.workspace.promoting import fails
from turret.workspace.reading import read_labelled

Judge = Callable[[Answer], float]  # answer -> score; higher is better


@dataclass(frozen=True)
class Replayed:
    """Version b compared with version a on the same examples."""

    a: str
    b: str
    source: str
    score: str  # "accuracy", "ROUGE-L" or "passed"
    paired: Paired
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return status_text.replayed(self.paired, self.a, self.b, self.score)

    def as_json(self) -> JsonObject:
        shared = {"a": self.a, "b": self.b, "source": self.source, "score": self.score}
        return {**shared, "paired": self.paired.as_json(), "notes": list(self.notes), "text": self.text}


def replay(
    store: Store, a: str, b: str, source: str | None, columns: RoleColumns, say: Say = silent, device: str = "auto"
) -> Replayed:
    """Ask both versions, one after the other.

    Args:
        source: labelled examples; None: the golden examples that a's alias `production` requires.
        columns: keys of a recipe's `[data]`; only with `source`.
        device: where their bases compute.
    """
    first, second = store.resolve(a), store.resolve(b)
    if first.digest == second.digest:
        raise DataError(f"{a} and {b} are the same version, {first}: give two that differ")
    if columns and source is None:
        raise DataError("columns are named, and no data is: give a table of labelled examples")
    texts: list[Input] = []
    judges: list[Judge] = []
    notes: Sequence[str] = ()
    score = "passed"
    if source is None:
        texts, judges = _golden(store, first.name)
    scores: list[list[float]] = []
    for version in (first, second):
        labelled = None if source is None else read_labelled(store, version, source, columns)
        with answering.mounted(store, str(version), say, device) as ready:
            notes = [*(notes or (labelled.notes if labelled else ())), *ready.asking.notes]
            say(f"asking {version} {len(labelled.examples if labelled else texts)} examples")
            if labelled is not None:
                score = ready.task.metric_label
                texts = _asked(labelled.examples, texts)
                scores.append(_scores(ready, labelled.examples))
            else:
                answers = answering.answers(ready, texts)
                scores.append([judge(answer) for judge, answer in zip(judges, answers, strict=True)])
        del ready  # free the first base before the second is loaded
    found = paired.compare(*scores)
    return Replayed(str(first), str(second), source or "golden examples", score, found, tuple(notes))


def _asked(examples: Sequence[Example], before: Sequence[Input]) -> list[Input]:
    """The texts of some examples. before: those that the other version was asked; they must be equal."""
    texts = [each.asked for each in examples]
    if before and list(before) != texts:
        raise DataError("the two versions read this data as different tasks: compare versions of one kind")
    return texts


def _scores(ready: answering.Mounted, examples: Sequence[Example]) -> list[float]:
    """How well a version answers each example."""
    _, answers = ready.asking.evaluate(examples)
    return ready.task.scores([ready.task.judged(each) for each in answers], examples)


def _golden(store: Store, name: str) -> tuple[list[Input], list[Judge]]:
    """All golden examples that the name's alias `production` requires."""
    sets = [gate.golden for gate in store.gate(name, PRODUCTION) if isinstance(gate, Golden)]
    examples = [example for digest in sets for example in store.examples(digest).examples]
    if not examples:
        raise DataError(
            f"nothing to replay: {name}@{PRODUCTION} requires no golden examples; give a table of labelled examples, "
            f"or store some with `turret gate {name} {PRODUCTION} --golden FILE`"
        )

    def judge(example: golden.Example) -> Judge:
        def passes(answer: Answer) -> float:
            given = answer.get("label") if example.check == "label" else answer.get("text")
            return float(given is not None and fails(example, given) is None)

        return passes

    return [example.text for example in examples], [judge(example) for example in examples]
