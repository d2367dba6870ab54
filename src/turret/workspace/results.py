"""What the methods of `Workspace` return, with the keys that `--json` prints. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from turret.amounts import percentage, size, span
from turret.data.memory import short_source
from turret.errors import one_line
from turret.json_types import AsJson, JsonObject
from turret.manifest import FlatLossSpec
from turret.notebook import Cell, Table, as_html, class_table, mark_level, metrics_table
from turret.tasks.shapes import Metrics, SplitMetrics

if TYPE_CHECKING:
    from turret.compare.results import Details, QuestionResult
    from turret.recipe import Recipe
    from turret.train.training_plan import Plan


MISTAKES = 5  # that an evaluation shows in a notebook


@dataclass(frozen=True)
class RunResult(AsJson):
    """A finished training and the version it made."""

    version: str  # "sentiment@1"
    digest: str
    base: dict[str, str]  # id, fingerprint
    metrics: SplitMetrics  # split -> metrics
    parameters: dict[str, int]  # trainable, stored, total
    timing: dict[str, float]  # seconds of load, train, evaluate and proof; steps; examples and tokens per second
    memory: dict[str, int | None]  # base_bytes, peak_bytes, above_base_bytes, predicted_bytes
    bundle_bytes: int
    run: str  # the id of its folder in runs/
    resumed_from: int = 0  # the step at which this process resumed the run; 0: it started it
    stopped_early: bool = False
    flat_loss: FlatLossSpec | None = None  # loss, guessing: set if the final loss is no better than guessing
    warnings: list[str] = field(default_factory=list)  # reasons not to trust this version, a sentence each
    advice: list[str] = field(default_factory=list)  # what would make a better one, a sentence each
    notes: list[str] = field(default_factory=list)  # what was guessed, dropped or cut
    device: str = "cpu"  # where it was trained and proven
    forgetting: Metrics | None = None  # on neutral text; None for a classifier

    def _repr_html_(self) -> str:
        trained, total = self.parameters.get("trainable"), self.parameters.get("total")
        facts: dict[str, Cell] = {
            "base": self.base.get("id"),
            "steps": f"{self.timing.get('steps', 0):,.0f}",
            "training": span(self.timing.get("train_seconds", 0.0)),
            "trained": f"{trained:,} of {total:,} parameters",
            "on disk": size(self.bundle_bytes),
            "device": self.device,
            "run": self.run,
        }
        warnings = [mark_level("warn", each) for each in self.warnings]
        return as_html(self.version, facts, metrics_table(self.metrics), *warnings, notes=self.notes)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a stored version on some data."""

    version: str
    digest: str
    data: JsonObject  # source, examples
    metrics: Metrics
    seconds: float
    details: Details  # confusion, reliability, coverage, mistakes
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many answers are wrong, or not what they should be."""
        return len(self.details.mistakes)

    def _repr_html_(self) -> str:
        facts: dict[str, Cell] = {
            "data": one_line(short_source(str(self.data["source"])), 60),
            "examples": f"{self.data['examples']:,}",
            "wrong": f"{len(self.details.mistakes):,}",
            "time": span(self.seconds),
        }
        shown = self.details.mistakes[:MISTAKES]
        wrong = [
            (each.row, _short(each.right), _short(each.given), each.error, _short(each.text, 160)) for each in shown
        ]
        tables = [metrics_table({"": self.metrics}), class_table(self.metrics)]
        tables += [Table(("row", "right", "given", "error", "text"), wrong)] if wrong else []
        return as_html(self.version, facts, *(each for each in tables if each is not None), notes=self.notes)

    def as_json(self) -> JsonObject:
        return vars(self) | {"details": self.details.as_json()}


@dataclass(frozen=True)
class PanelEvaluation:
    """Each question of a panel, measured on some data."""

    panel: str  # "tickets@2"
    data: JsonObject  # source, examples
    questions: list[QuestionResult]
    left_out: list[str]  # questions without a column in the data
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """How many answers are wrong, to all questions together."""
        return sum(len(each.details.mistakes) for each in self.questions)

    def _repr_html_(self) -> str:
        rows: list[tuple[Cell, ...]] = [
            (
                each.question,
                each.version,
                each.examples,
                percentage(each.metrics["accuracy"]),
                f"{each.sureness.ece:.3f}",
                percentage(each.share),
                "" if each.decided.error is None else percentage(each.decided.error),
            )
            for each in self.questions
        ]
        table = Table(("question", "version", "examples", "accuracy", "ECE", "decided", "error of these"), rows)
        facts: dict[str, Cell] = {
            "data": one_line(short_source(str(self.data["source"])), 60),
            "time": span(self.seconds),
        }
        return as_html(self.panel, facts, table, notes=self.notes)

    def as_json(self) -> JsonObject:
        return vars(self) | {"questions": [each.as_json() for each in self.questions]}


@dataclass(frozen=True)
class Predicted(AsJson):
    """The answers to a table, written to a file."""

    version: str
    out: str
    columns: list[str]  # of the file
    rows: int
    blank: int  # rows without an input, which are not answered
    cut: int  # rows whose input was longer than the version reads
    guarded: int  # cells that got a ' in front, so that no spreadsheet runs them
    seconds: float
    notes: list[str] = field(default_factory=list)
    to_a_person: int | None = None  # answers below the threshold of the version's promise; None without a promise


@dataclass(frozen=True)
class Suggestion:
    """A row to label next, and what the version answers now."""

    row: int  # the line of a text file, or the number in the table
    texts: tuple[str, ...]  # one, or two that are read together
    predicted: str | list[str]
    confidence: float  # the probability of the answer; with several labels, of the least sure decision


@dataclass(frozen=True)
class Suggested(AsJson):
    """The rows of a table to label next."""

    version: str
    rows: int  # that were read
    blank: int  # without a text
    repeated: int  # whose text an earlier row has
    suggestions: list[Suggestion]  # the least sure first
    seconds: float
    columns: tuple[str, ...]  # of the table, that hold the texts
    label: str  # the column of the labels that the version was trained on
    notes: list[str] = field(default_factory=list)

    def _repr_html_(self) -> str:
        rows: list[tuple[Cell, ...]] = [
            (each.row, _short(each.predicted), f"{each.confidence:.3f}", *(_short(text, 160) for text in each.texts))
            for each in self.suggestions
        ]
        table = Table(("row", "predicted", "confidence", *self.columns), rows)
        return as_html(self.version, {"rows": f"{self.rows:,}", "time": span(self.seconds)}, table, notes=self.notes)


@dataclass(frozen=True)
class Planned:
    """A recipe with every guess filled in, and the plan of its run."""

    recipe: Recipe
    plan: Plan
    notes: list[str]

    def _repr_html_(self) -> str:
        return as_html(f"Plan of {self.recipe.name}", self.plan.facts(), self.plan.table(), notes=self.notes)

    def as_json(self) -> JsonObject:
        return {"recipe": self.recipe.model_dump(mode="json"), "plan": self.plan.to_json(), "notes": self.notes}


@dataclass(frozen=True)
class Imported(AsJson):
    """An adapter from outside that is now a stored version."""

    version: str
    digest: str
    base: dict[str, str]  # id, fingerprint
    method: str  # lora, prefix, head, full, peft
    task: JsonObject  # kind, labels
    tensors: int
    parameters: int
    effect: float  # largest difference from the bare base's outputs / the largest output
    bundle_bytes: int
    notes: list[str] = field(default_factory=list)  # what was read, guessed or renamed


@dataclass(frozen=True)
class Merged(AsJson):
    """A version that was merged from several others."""

    version: str
    digest: str
    parents: list[str]
    how: str
    weights: list[float]  # one per parent
    effect: float  # largest difference from the bare base's outputs / the largest output
    bundle_bytes: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Exported(AsJson):
    """A version written as a folder for other tools."""

    version: str
    digest: str
    form: str  # peft, merged, vllm, gguf
    folder: str
    files: dict[str, int]  # name -> bytes
    notes: list[str] = field(default_factory=list)  # how to load it
    warnings: list[str] = field(default_factory=list)  # what another tool does not do, or what is missing


@dataclass(frozen=True)
class Pushed(AsJson):
    """A version that is now in a repository of the Hub."""

    version: str
    digest: str
    form: str  # peft, merged, gguf
    hub_id: str
    url: str
    commit: str
    private: bool
    created: bool  # the repository is new
    changed: bool  # the commit is new: the files were not there already
    files: dict[str, int]  # name -> bytes
    notes: list[str] = field(default_factory=list)  # how to load it
    warnings: list[str] = field(default_factory=list)  # what another tool does not do, or what is missing


def _short(value: str | list[str], most: int = 60) -> str:
    return one_line(value if isinstance(value, str) else ", ".join(value), most)
