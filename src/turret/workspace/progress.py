"""Progress of a call: the type of its callback, and the line that a notebook shows by itself.

A callback gets one line of text at the start of each stage. In a notebook, a call without callbacks shows its stages,
and a training its steps, in one line below the cell. Elsewhere it says nothing.
"""

from __future__ import annotations

import functools
import html
import inspect
import re
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from turret.amounts import span
from turret.json_types import JsonValue
from turret.notebook import in_notebook
from turret.store.jobs import StudyResult

if TYPE_CHECKING:
    from turret.train.curve import StepRecord

T = TypeVar("T")
C = TypeVar("C", bound=type)
Say: TypeAlias = Callable[[str], None]
_LEFT = re.compile(r"[,;] about [^,;:·]* left(: .*)?")  # what a stage says of the time, and of the stage in it
BETWEEN = 0.1  # seconds, at least, between two updates of the line


def silent(_value: T) -> None:
    """A callback that does nothing."""


def shown_in_notebooks(kind: C) -> C:
    """The class, whose methods with `on_stage` show their progress in a notebook if no callback is given."""
    for name, value in list(vars(kind).items()):
        if inspect.isfunction(value) and "on_stage" in inspect.signature(value).parameters:
            setattr(kind, name, _with_progress(value))
    return kind


def _with_progress(method: Callable[..., T]) -> Callable[..., T]:
    steps = "on_record" in inspect.signature(method).parameters

    @functools.wraps(method)
    def call(*places: object, **names: object) -> T:
        given = names.get("on_stage") is not None or names.get("on_record") is not None
        if given or not in_notebook():
            return method(*places, **names)
        line = NotebookLine()
        try:
            done = method(*places, **names | {"on_stage": line.stage} | ({"on_record": line.record} if steps else {}))
        except BaseException:
            line.end("stopped after")
            raise
        line.end()
        return done

    return call


class NotebookLine:
    """One line below a cell of a notebook, which is written again and again. Needs IPython alone, no widgets."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm, which would like ipywidgets
        self._id = f"turret-{uuid.uuid4().hex}"
        self._begun, self._drawn = time.monotonic(), 0.0
        self._text, self._bar, self._shown = "", "", False

    def stage(self, text: str) -> None:
        """Work without steps has started."""
        if not self._bar:
            self._text = text
            self._draw(text)
        else:
            self._draw(f"{self._text} · {text}")

    def record(self, record: StepRecord) -> None:
        """A step of a training has ended."""
        seconds = time.monotonic() - self._begun
        self._bar = f'<progress value="{record.step}" max="{record.steps}" style="vertical-align:middle"></progress> '
        self._text = f"step {record.step} of {record.steps}, loss {record.loss:.3f}"
        left = record.seconds * (record.steps - record.step)
        if record.step == record.steps or time.monotonic() - self._drawn > BETWEEN:
            self._draw(f"{self._text}, {span(seconds)} so far, about {span(left)} left")

    def end(self, how: str = "done in") -> None:
        """The call has returned, or failed. The line says no longer how much time is left."""
        if self._shown:
            text = _LEFT.sub("", self._text)
            self._draw(f"{text} · {how} {span(time.monotonic() - self._begun)}")

    def _draw(self, text: str) -> None:
        from IPython.display import display, update_display

        self._drawn = time.monotonic()
        markup = f'<div style="opacity:.8;font-size:.9em">{self._bar}{html.escape(text)}</div>'
        show = update_display if self._shown else display
        show({"text/plain": text, "text/html": markup}, raw=True, display_id=self._id)
        self._shown = True


# --- of a comparison or a sweep ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellState:
    """How far a cell is, for those who watch.

    Args:
        key: its name in the study.
        title: its row, or the settings that it tries.
        share: of the training examples.
        state: waiting, running, finished, failed, pruned or cancelled.
        score: the mean of the metric.
        seconds: of the whole cell.
    """

    key: str
    title: str
    state: str
    seed: int | None = None
    share: float = 1.0
    score: float | None = None
    seconds: float | None = None
    version: str | None = None
    run: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a comparison or a sweep is.

    Args:
        study: its folder, under the store's root.
        metric: of the scores.
        planned: how many cells there will be.
    """

    study: str
    metric: str
    planned: int
    cells: Sequence[CellState]

    def as_json(self) -> StudyResult:
        found: JsonValue = asdict(self)
        return found
