"""Compare a composition such as `legal@3+formal@2` with its parts and the bare base, on the same test examples.

Nothing is trained: the base is loaded once, and answers for one row after another. Each result is kept in the folder
of the comparison, so the same command continues after a kill, and later only writes the report again. Loads torch.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from turret import quantized
from turret.adapters import Adapter
from turret.bases.base import Dtype
from turret.compare.comparison import Comparison, comparison
from turret.compare.design import Candidate, Design, design
from turret.compare.report import write_report
from turret.compare.results import CellResult
from turret.data import Dataset, Example
from turret.data.dataset import digest_of
from turret.engine.request import Named
from turret.errors import AdapterError, RecipeError, WrongBase
from turret.json_types import JsonMapping
from turret.recipe import Recipe
from turret.reference import parts_of
from turret.store import Store, Version
from turret.tasks import stored_task, task_from_spec
from turret.train.asking import Asking
from turret.workspace import measure
from turret.workspace.answering import Mounted
from turret.workspace.cells import FORMAT, KeptFiles, hold_comparison, read_json
from turret.workspace.progress import Say
from turret.workspace.reading import read_labelled
from turret.workspace.resident import load_base
from turret.workspace.serving import StoreSource

BASE, COMPOSITION = "base", "composition"  # kinds of rows; that of a part is its method's
LONGEST = 200  # characters of all names together: they are in the name of a folder


@dataclass(frozen=True)
class CompositionRequest:
    """A composition, the examples that it is measured on, and the options of the comparison."""

    composition: str
    source: str
    columns: JsonMapping = field(default_factory=dict)  # keys of a recipe's [data]
    against: str | None = None  # a part, or base; None: the composition
    margin: float = 1.0  # points
    texts: bool = True  # whether the report shows examples
    device: str = "auto"
    dtype: Dtype = "auto"  # of the base

    def command(self, composition: str) -> str:
        """The command line with the same options. composition: with the number of every version."""
        words = ["turret", "compare", self.source, "--composition", composition]
        for key, value in self.columns.items():
            words += ["--set", f"data.{key}={value}"]
        words += [] if self.against is None else ["--against", self.against]
        words += [] if self.margin == 1 else ["--margin", f"{self.margin:g}"]
        return shlex.join(words if self.texts else [*words, "--no-texts"])


@dataclass(frozen=True)
class _Parts:
    """A composition and what it is of, each as the version that its reference names now."""

    whole: Named
    parts: tuple[Named, ...]
    versions: tuple[Version, ...]  # of the parts

    @classmethod
    def of(cls, store: Store, source: StoreSource, composition: str) -> _Parts:
        if len(parts_of(composition)) < 2:
            raise RecipeError(
                f"--composition {composition[:60]}: expected several versions with + between them, such as "
                "legal@production+formal@2"
            )
        whole = source.resolve(composition)
        references = parts_of(str(whole))
        return cls(whole, tuple(map(source.resolve, references)), tuple(map(store.resolve, references)))

    @property
    def rows(self) -> dict[str, Named]:
        """By what a row is called: the composition, then its parts."""
        return {str(each): each for each in (self.whole, *self.parts)}

    def key(self, candidate: Candidate, dtype: Dtype) -> str:
        """The name of the folder of a row. The base answers as the first part's task asks it."""
        named = self.rows.get(candidate.spec, self.parts[0])
        parts = [candidate.slug, _short(named.digest), *([] if dtype == "auto" else [dtype])]
        return "-".join(parts)


def compare_composition(store: Store, request: CompositionRequest, say: Say) -> Comparison:
    """Measure the rows without a result, judge all of them, and write the report.

    Raises:
        AdapterError: the parts cannot be composed, or differ in their task. Nothing is computed then.
        WrongBase: they were trained on different bases.
        RecipeError: it is no composition, or an option does not fit.
    """
    source = StoreSource(store)
    composed = _Parts.of(store, source, request.composition)
    notes = _require_alike(composed.versions)
    against = _against(request, source, composed)
    first = composed.versions[0]
    labelled = read_labelled(store, first, request.source, request.columns)
    data = Dataset(
        train=[],
        validation=[],
        test=labelled.examples,
        kind=stored_task(first.task).kind,
        labels=(),
        columns={},
        notes=(*labelled.notes, *notes),
        duplicates=0,
        digest=digest_of({"test": labelled.examples}),
    )
    recipe = Recipe(name=first.name, base=str(first.base.get("id")), data=labelled.data)
    planned = _design(recipe, composed, against, request.margin)
    folder = _folder(store, composed, data.digest)
    with hold_comparison(store, folder, say) as files:
        keys = [(cell, composed.key(cell.candidate, request.dtype)) for cell in planned.cells()]
        rows = [(cell, folder / "cells" / key / "result.json") for cell, key in keys]
        if missing := [(cell.candidate.spec, path) for cell, path in rows if read_json(path) is None]:
            _measure(source.load(composed.whole), composed, missing, data.test, request, files, say)
        results = [CellResult.of(cell, read_json(path) or {}) for cell, path in rows]
        result = comparison(
            planned,
            data,
            results,
            failures={},
            missing=0,
            budget=None,
            folder=str(folder),
            command=request.command(str(composed.whole)),
        )
        result = result if request.texts else result.without_texts()
        write_report(result, folder, files.write_text)
    return result


def _require_alike(versions: Sequence[Version]) -> list[str]:
    """Raise AdapterError unless all generate on one base, for one task. Returns notes on harmless differences."""
    first, *others = versions
    notes, task = [], stored_task(first.task)
    base, kept = first.base, first.base.get("quantization") or "none"
    for version in versions:
        if not stored_task(version.task).generates:
            raise AdapterError(f"{version} answers with a head: only adapters that generate can be composed")
    for version in others:
        own = version.base
        if own.get("fingerprint") != base.get("fingerprint"):
            raise WrongBase(
                f"{version} was trained on {str(own.get('id'))[:60]}, and {first} on {str(base.get('id'))[:60]}, "
                "whose weights differ: compose versions of one base"
            )
        if stored_task(version.task) is not task:
            kind = stored_task(version.task).kind
            raise AdapterError(
                f"{version} is of the task {kind}, and {first} of {task.kind}: compare parts of one task"
            )
        if (other := own.get("quantization") or "none") != kept:
            notes.append(f"{version} was trained on base_quantization {other} and is measured on {kept}, like {first}")
    return notes


def _against(request: CompositionRequest, source: StoreSource, composed: _Parts) -> str:
    """The row that all others are compared with."""
    if request.against in (None, BASE):
        return request.against or str(composed.whole)
    named = str(source.resolve(str(request.against)))
    if named not in composed.rows:
        raise RecipeError(f"--against {request.against}: expected one of {', '.join((*composed.rows, BASE))}")
    return named


def _design(recipe: Recipe, composed: _Parts, against: str, margin: float) -> Design:
    kinds = [COMPOSITION, *(str(version.method.get("kind")) for version in composed.versions)]
    rows = [Candidate(spec, kind, recipe) for spec, kind in zip(composed.rows, kinds, strict=True)]
    rows.append(Candidate(BASE, BASE, recipe))
    made = design(recipe, rows, seeds=1, fractions=(1.0,), against=against, margin=margin, train=0)
    return replace(made, composition=str(composed.whole))


def _folder(store: Store, composed: _Parts, data_digest: str) -> Path:
    """The folder of the comparison. Its name has all names, so that only who sees all of them sees the report."""
    names = "+".join(dict.fromkeys(part.name for part in composed.parts))
    if len(names) > LONGEST:
        raise RecipeError(f"the names of {composed.whole!s:.60} are too long: expected {LONGEST} characters together")
    digest = hashlib.sha256(f"{FORMAT}\n{composed.whole.digest}\n{data_digest}".encode()).hexdigest()
    return store.home / "comparisons" / f"{names}-{digest[:10]}"


def _measure(
    adapter: Adapter,
    composed: _Parts,
    missing: Sequence[tuple[str, Path]],
    examples: Sequence[Example],
    request: CompositionRequest,
    files: KeptFiles,
    say: Say,
) -> None:
    """Load the base, and write the result of each missing row.

    Args:
        adapter: the composition.
        missing: what the row is called, and its file.
    """
    parts = (replace(adapter, others=()), *adapter.others)
    of_row = dict(zip(composed.rows, (adapter, *parts), strict=True))
    say(f"loading {adapter.base.id}")
    base = load_base(adapter, request.dtype, device=request.device)
    total = quantized.count_weights(base.model)
    _ = Asking(base, adapter, task_from_spec(adapter.task, base.tokenizer)).model  # refuses parts that do not compose
    for spec, path in missing:
        started, own = time.perf_counter(), of_row.get(spec)
        asking = Asking(base, own, task_from_spec((own or adapter).task, base.tokenizer))
        files.require()
        say(f"asking {spec}")
        with Mounted(None, asking) as mounted:
            found = measure.measure_answers(mounted, examples, say, bare=own is None)
        weights = _weights(own)
        files.write(
            path,
            {
                **found,
                "guess": None,  # no row learns here
                "version": None if own is None else spec,
                "digest": None if own is None else composed.rows[spec].digest,
                "base": {"id": base.id, "fingerprint": base.fingerprint},
                "parameters": {"trainable": weights, "stored": weights, "total": total},
                "bundle_bytes": 0 if own is None else composed.rows[spec].bytes,
                "notes": [*base.notes, *asking.notes],
                "made": measure.provenance(base.model),
                "wall_seconds": time.perf_counter() - started,
            },
        )


def _weights(adapter: Adapter | None) -> int:
    """The numbers in an adapter and in those that it is composed with."""
    every = () if adapter is None else (adapter, *adapter.others)
    return sum(tensor.numel() for each in every for tensor in each.tensors.values())


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:10]
