"""What the verbs answer, with the keys that `--json` prints. Knows no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """One finished training and the version it made."""

    version: str  # "sentiment@1"
    digest: str
    base: dict[str, Any]  # id, fingerprint
    metrics: dict[str, dict[str, Any]]  # split -> metrics
    parameters: dict[str, int]  # trainable, stored, total
    timing: dict[str, float]  # load, train, evaluate, proof in seconds; steps; examples and tokens per second
    memory: dict[str, int | None]  # base_bytes, peak_bytes, above_base_bytes, predicted_bytes
    bundle_bytes: int
    run: str  # the id of its folder in runs/
    resumed_from: int = 0  # the step that this sitting went on from
    stopped_early: bool = False
    flat_loss: dict[str, float] | None = None  # loss, guessing: where the training ended no better than guessing
    warnings: list[str] = field(default_factory=list)  # a sentence each: why not to trust this version
    notes: list[str] = field(default_factory=list)  # what was guessed, dropped or cut

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """How a stored version does on some data."""

    version: str
    digest: str
    data: dict[str, Any]  # source, split, examples, digest
    metrics: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Planned:
    """A recipe with all guesses filled in, and what its run will do."""

    recipe: Any  # turret.Recipe
    plan: Any  # turret.train.Plan
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json"), "plan": self.plan.to_json(), "notes": self.notes}


@dataclass(frozen=True)
class Imported:
    """An adapter from outside that is a version now."""

    version: str
    digest: str
    base: dict[str, Any]  # id, fingerprint
    method: str  # lora, prefix, head, full
    task: dict[str, Any]  # kind, labels
    tensors: int
    parameters: int
    effect: float  # how far it moves the outputs from the bare base's, of the largest output
    bundle_bytes: int
    notes: list[str] = field(default_factory=list)  # what was read, guessed or named anew

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Exported:
    """A version as a folder for others."""

    version: str
    digest: str
    form: str  # peft, merged, vllm
    folder: str
    files: dict[str, int]  # name -> bytes
    notes: list[str] = field(default_factory=list)  # what to know to load it

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
