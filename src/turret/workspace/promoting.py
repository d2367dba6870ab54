"""Promote a version: replay golden examples with it, then let the store check its gates and move the alias.

If a gate asks for forgetting that is not measured yet, it is measured first and kept with the version's metrics.

The store moves an alias only if the version's replays cover the golden sets that the alias requires at that moment;
otherwise it raises ReplayNeeded. `replay_then_promote` then replays the missing sets and tries again. So examples that
are added during a replay are replayed too. Loads torch only to replay or to measure.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, SupportsFloat

from turret.data import cells
from turret.data.source import open_table
from turret.data.table import CellValue, Table
from turret.errors import DataError, GateFailed, ReplayNeeded, quote
from turret.store import Gate, Move, Store, Version
from turret.store.catalog import now
from turret.store.core import Also
from turret.store.gates import FORGETTING
from turret.store.golden import (
    CHECKS,
    MOST_EXAMPLES,
    Example,
    Golden,
    GoldenFailure,
    GoldenReplay,
    GoldenSet,
    name_of,
    quote_value,
    why_unfit,
)
from turret.tasks import Prediction, stored_task
from turret.tasks.shapes import Answer
from turret.workspace.progress import Say, silent

if TYPE_CHECKING:
    from turret.workspace.answering import Mounted


Ask = Callable[[str, Sequence[str]], Sequence[Answer]]  # (version, texts) -> answers as `predict` returns them
SHOWN = 500  # characters of a wrong answer that are stored


def replay_then_promote(
    store: Store,
    reference: str,
    alias: str,
    require: Sequence[str],
    *,
    again: bool = False,
    say: Say = silent,
    ask: Ask | None = None,
    device: str = "auto",
    also: Also = None,
) -> Move:
    """Move an alias to a version.

    Args:
        require: gates for this call only, such as "accuracy>=0.9".
        again: also repeat the replays that are stored already.
        ask: answers texts with a version; default: load its base.
        device: where that base computes.
        also: written in the transaction that moves the alias.

    Raises:
        GateFailed: the version does not pass a gate.
    """
    version = store.resolve(reference)  # an alias could move during the replay, so use the number from here on
    with closing(_Replayer(store, version, say, ask, device)) as replayer:
        required_here = [gate for gate in store.gate(version.name, alias) if isinstance(gate, Gate)]
        gates = [gate for gate in (*required_here, *map(Gate.parse, require)) if gate.split == FORGETTING]
        if gates:
            replayer.measure_forgetting(gates, alias)
        if again:
            required = [gate.golden for gate in store.gate(version.name, alias) if isinstance(gate, Golden)]
            replayer.replay(required, only_fitting=True)
        while True:
            try:
                return store.promote(str(version), alias, require=require, also=also)
            except ReplayNeeded as needed:
                replayer.replay(needed.sets)


class _Replayer:
    """Asks one version golden examples, and measures its forgetting. Its base is loaded when it is needed first."""

    def __init__(self, store: Store, version: Version, say: Say, ask: Ask | None, device: str) -> None:
        self._store, self._version, self._say, self._device = store, version, say, device
        self._served = ask is not None
        self._ask = ask or self._ask_mounted
        self._mounted: Mounted | None = None

    def close(self) -> None:
        """Free the base."""
        if self._mounted is not None:
            self._mounted.asking.close()

    def replay(self, digests: Sequence[str], *, only_fitting: bool = False) -> None:
        """Replay golden sets and store the results.

        Args:
            only_fitting: skip sets for another kind of task; the store refuses those.
        """
        for digest in digests:
            golden_set = self._store.examples(digest)
            if only_fitting and why_unfit(self._version, golden_set):
                continue
            self._say(f"asking {len(golden_set.examples)} golden examples ({name_of(digest)})")
            answers = self._ask(str(self._version), [example.text for example in golden_set.examples])
            task = stored_task(self._version.task)
            self._store.keep_replay(
                self._version, judge_answers(digest, golden_set, list(map(task.prediction_of, answers)))
            )

    def measure_forgetting(self, gates: Sequence[Gate], alias: str) -> None:
        """Measure what the gates ask for, unless it is stored and covers the present tasks of the store.

        Raises:
            GateFailed: the version classifies, or the base is in a server, which measures nothing.
        """
        version, first = self._version, gates[0]
        from turret.workspace import answering, forgetting

        if not forgetting.is_defined(version):
            raise GateFailed(
                f"{version} may not become {version.name}@{alias}: {first} is required, and forgetting is not defined "
                f"for a version that classifies, because it answers through its own head: remove the gate with "
                f"`turret gate {version.name} {alias} --remove {first.split}.{first.metric}`"
            )
        measured = version.metrics.get(FORGETTING) or {}
        on_tasks = any(gate.metric.startswith(("tasks", "against")) for gate in gates)
        if "neutral" in measured and not on_tasks:
            return
        if on_tasks and forgetting.is_current(measured, forgetting.other_generators(self._store, version)):
            return
        if self._served:
            raise GateFailed(
                f"{version} may not become {version.name}@{alias}: {first} is required, and it is not measured yet: "
                f"run `turret promote {version} {alias}`, which measures it"
            )
        ready = self._mounted = self._mounted or answering.mount_version(
            self._store, str(version), self._say, self._device
        )
        self._say("measuring forgetting")
        neutral = forgetting.on_neutral_texts(ready.asking.model, ready.task.tokenizer)
        found = forgetting.metrics_of(neutral)
        if on_tasks:
            found = forgetting.on_other_tasks(
                self._store, version, ready.asking.model, ready.task.tokenizer, neutral, self._say
            )
        self._store.keep_metrics(version, FORGETTING, found)

    def _ask_mounted(self, version: str, texts: Sequence[str]) -> Sequence[Answer]:
        from turret.workspace import answering

        if self._mounted is None:
            self._mounted = answering.mount_version(self._store, version, self._say, self._device)
        return answering.answers(self._mounted, texts)


def judge_answers(digest: str, golden_set: GoldenSet, answers: Sequence[Prediction]) -> GoldenReplay:
    """How many answers passed, and the first that failed."""
    first: GoldenFailure | None = None
    passed = 0
    for place, (example, given) in enumerate(zip(golden_set.examples, answers, strict=True), start=1):
        failure = example.failure(given)
        if failure is None:
            passed += 1
        elif first is None:
            shown = given[:SHOWN] if isinstance(given, str) else given
            expected = example.words() + failure
            first = {"example": place, "text": example.text[:SHOWN], "expected": expected, "given": shown}
    return GoldenReplay(digest, passed, len(answers), first, now())


# --- a table of golden examples ---------------------------------------------------------------------------------------


TEXTS = ("text", "prompt", "document")
SCORE = "min_score"


def read_examples(path: str | Path) -> GoldenSet:
    """The golden examples of a table, in order. Raises DataError that names the line.

    Columns: `text`, `prompt` or `document`, and what the answer to it must be: `label`, `equals`, `contains`, or
    `expected` with `min_score`. If a table has several of the latter, each row fills one.
    """
    path = Path(os.path.expanduser(path))
    if not os.path.isfile(path):  # Path.is_file raises for some names
        raise DataError(
            f"there is no file {quote(str(path), 100)}: give a table of golden examples, such as golden.csv"
        )
    table = open_table(path)
    text, checks = _columns(table)
    examples: list[Example] = []
    columns = [text, *checks, *([SCORE] if SCORE in table.columns else [])]
    for place, row in table.read(columns):
        cells_by_column = dict(zip(columns, row, strict=True))
        try:
            examples.append(_example(cells_by_column.pop(text), cells_by_column))
        except DataError as error:
            raise DataError(f"{table.name} {table.unit} {place}: {error}") from None
        if len(examples) > MOST_EXAMPLES:
            raise DataError(f"{table.name} has more than {MOST_EXAMPLES} golden examples: keep fewer")
    if not examples:
        raise DataError(f"{table.name} has columns and no rows: give at least one golden example")
    _refuse_contradictions(table, examples)
    return GoldenSet(tuple(examples))


def _columns(table: Table) -> tuple[str, list[str]]:
    """The column of the texts, and the columns of the checks."""
    texts = [name for name in TEXTS if name in table.columns]
    checks = [name for name in CHECKS if name in table.columns]
    columns = ", ".join(table.columns)
    if len(texts) != 1:
        raise DataError(f"{table.name} needs one column {', '.join(TEXTS[:-1])} or {TEXTS[-1]}: it has {columns}")
    if not checks:
        raise DataError(
            f"{table.name} has no column with expected answers: add {', '.join(CHECKS[:-1])} or "
            f"{CHECKS[-1]} (with {SCORE}); it has {columns}"
        )
    if unknown := [name for name in table.columns if name not in (*texts, *checks, SCORE)]:
        raise DataError(
            f"{table.name} has an unknown column {unknown[0]!r}: known are {', '.join((*TEXTS, *CHECKS, SCORE))}"
        )
    if ("expected" in checks) != (SCORE in table.columns):
        raise DataError(f"{table.name}: the columns expected and {SCORE} come together; it has {columns}")
    return texts[0], checks


def _example(text: CellValue, row: dict[str, CellValue]) -> Example:
    """One example.

    Args:
        row: the other columns of the row.
    """
    source = cells.text_of(text)
    if source is None:
        raise DataError("the text is missing")
    score = _score(row.pop(SCORE, None))
    filled = {check: wanted for check, cell in row.items() if (wanted := _wanted_answer(check, cell))}
    if len(filled) != 1:
        found = " and ".join(filled) if filled else "nothing"
        raise DataError(f"expected one of {', '.join(row)}, found {found}")
    ((check, wanted),) = filled.items()
    if (check == "expected") != (score is not None):
        raise DataError(f"expected and {SCORE} come together, and other checks have no score")
    return Example(source, check, wanted, score)


def _wanted_answer(check: str, cell: CellValue) -> str | tuple[str, ...] | None:
    if check == "label":
        return cells.label_of(cell, (), multi_label=isinstance(cell, list | tuple))
    if check == "contains" and isinstance(cell, list | tuple):
        parts = tuple(cells.text_of(part) for part in cell)
        if not all(parts):
            raise DataError("contains lists a text that is missing")
        return tuple(part for part in parts if part)
    return cells.text_of(cell)


def _score(cell: CellValue) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell)):
        return None
    try:
        score = float(cell) if isinstance(cell, str | bytes | SupportsFloat) else math.nan
    except ValueError:
        score = math.nan
    if isinstance(cell, bool) or not 0 < score <= 1:
        raise DataError(f"{SCORE} {quote_value(cell)}: expected a number above 0 and at most 1")
    return score


def _refuse_contradictions(table: Table, examples: list[Example]) -> None:
    """No version can pass if one text requires two labels, or must equal two texts."""
    seen: dict[tuple[str, str], str | tuple[str, ...]] = {}
    for example in examples:
        if example.check in ("label", "equals") and seen.setdefault((example.text, example.check), example.wanted) != (
            example.wanted
        ):
            both = f"{quote_value(seen[example.text, example.check])} and {quote_value(example.wanted)}"
            raise DataError(f"{table.name} requires {both} for {quote_value(example.text)}: no version can answer both")
