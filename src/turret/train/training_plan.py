"""The plan of a training: its checks, its cost, and the learning rate that trials found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

from turret.amounts import size, span
from turret.bases.device import gigabytes
from turret.errors import PreflightRefused
from turret.json_types import JsonObject
from turret.methods.method import Check
from turret.notebook import Cell, Table, as_html, mark_level

# --- learning rate ----------------------------------------------------------------------------------------------------
# The size of the trials for `lr = "auto"`, and their result. `lr_finder.py` says how they are run.

UPWARD, DOWNWARD = (3.0, 10.0, 30.0), (1 / 3, 1 / 10, 1 / 30)  # times the default
MOST_TRIALS = 2 + len(DOWNWARD)  # the default, one above it, all below
SHARE = 0.2  # of the run's steps in a trial,
FEWEST_STEPS, MOST_STEPS = 10, 100  # within these bounds; LoRA on 200 snippets starts to learn after about 50
FEWEST_TIMES = 4  # a run needs this many times FEWEST_STEPS for a search
HELD_SHARE = 0.2  # of the training examples are held out of a trial and score it,
FEWEST_HELD, MOST_HELD = 16, 128  # within these bounds


@dataclass(frozen=True)
class Prediction:
    """Bytes that a training will need, by component; `total` is the predicted peak of the process, or on a GPU."""

    weights: int  # of the frozen base
    trainable: int  # adapter, prefix MLP, head, or the copy of full fine-tuning
    gradients: int
    optimiser: int  # two moments
    activations: int  # peak of the passes: saved for backward, temporaries, holes in the heap
    runtime: int  # Python and its libraries; on a GPU CUDA's context, if nothing was measured there
    prepared: int = 0  # examples and libraries that were loaded after the base, checkpoint and curve

    @property
    def above_base(self) -> int:
        """Bytes that the training needs besides the loaded base."""
        return self.trainable + self.gradients + self.optimiser + self.activations + self.prepared

    @property
    def total(self) -> int:
        return self.weights + self.above_base + self.runtime

    def to_json(self) -> dict[str, int]:
        return {**vars(self), "above_base": self.above_base, "total": self.total}

    def __str__(self) -> str:
        sizes = vars(self).items()
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in sizes if size or name != "prepared")
        return f"{gigabytes(self.total)} ({parts})"


@dataclass(frozen=True)
class TrialSize:
    """The steps of a trial and the number of examples that score it."""

    steps: int
    held: int
    reason: str | None = None  # why there are no trials


def size_of(examples: int, steps: int) -> TrialSize:
    """The size of the trials for a run with so many training examples and steps."""
    held = min(MOST_HELD, int(HELD_SHARE * examples))
    if steps < FEWEST_TIMES * FEWEST_STEPS:
        return TrialSize(
            0, 0, f"{steps} steps are too few to try rates first; at least {FEWEST_TIMES * FEWEST_STEPS} are needed"
        )
    if held < FEWEST_HELD:
        enough = math.ceil(FEWEST_HELD / HELD_SHARE)
        return TrialSize(
            0, 0, f"{examples} training examples are too few to compare rates; at least {enough} are needed"
        )
    return TrialSize(max(FEWEST_STEPS, min(MOST_STEPS, round(SHARE * steps))), held)


@dataclass(frozen=True)
class FoundRate:
    """The learning rate to train with, and how it was found."""

    lr: float
    default: float
    size: TrialSize
    losses: dict[float, float | None]  # rate -> loss on held-out examples after its trial, None: diverged; rates rise

    def to_json(self) -> JsonObject:
        tried = [{"lr": lr, "loss": loss} for lr, loss in self.losses.items()]
        return {"lr": self.lr, "default": self.default, **asdict(self.size), "tried": tried}

    def __str__(self) -> str:
        """For the plan: `0.003, found by trying 3 rates for 20 steps each (held-out loss 0.41, 0.47 at ...)`."""
        if self.size.reason is not None:
            return f"{self.lr:.3g}, this method's own: {self.size.reason}"
        tried = f"trying {len(self.losses)} rates for {self.size.steps} steps each"
        loss = _number(self.losses[self.lr])
        if self.lr == self.default:
            return f"{self.lr:.3g}, this method's own: {tried} found no better one (held-out loss {loss})"
        than = f"{_number(self.losses[self.default])} at the default {self.default:.3g}"
        return f"{self.lr:.3g}, found by {tried} (held-out loss {loss}, {than})"

    def note(self) -> str:
        """The whole table in one line."""
        pairs = ", ".join(f"{lr:.3g}: {_number(loss)}" for lr, loss in self.losses.items())
        how = f"{self.size.steps} steps each, loss on {self.size.held} held-out training examples"
        return f"learning rates tried ({how}): {pairs}" if pairs else f"learning rate {self}"


def _number(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4g}"


# --- plan -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a training will do and cost, and what is wrong with it."""

    checks: tuple[Check, ...]
    memory: Prediction | None  # None: not measured
    seconds: float | None  # of training, every evaluation, and the proof
    steps: int
    lr: float  # the method's own if the recipe says "auto" and no trial has run
    trainable: int | None
    total: int
    found: FoundRate | None = None  # how `lr` was found, if the recipe says "auto"

    @property
    def refused(self) -> bool:
        """Whether a check refuses the training."""
        return any(check.level == "refuse" for check in self.checks)

    def refusal(self) -> str:
        """All refusals in one line."""
        return "; ".join(str(check) for check in self.checks if check.level == "refuse")

    def _repr_html_(self) -> str:
        return as_html("Plan", self.facts(), self.table())

    def facts(self) -> dict[str, Cell]:
        """What the training will cost, in words."""
        trained = None if self.trainable is None else f"{self.trainable:,} of {self.total:,} parameters"
        return {
            "steps": f"{self.steps:,}",
            "time": None if self.seconds is None else f"about {span(self.seconds)}",
            "memory": None if self.memory is None else size(self.memory.total),
            "learning rate": f"{self.lr:g}",
            "trains": trained,
        }

    def table(self) -> Table:
        """The checks, a row each."""
        rows = [(mark_level(each.level, each.name), each.text, each.remedy) for each in self.checks]
        return Table(("check", "found", "to do"), rows)

    def require(self) -> None:
        """Raise PreflightRefused if a check refuses."""
        if self.refused:
            raise PreflightRefused(self.refusal())

    def with_rate(self, found: FoundRate) -> Plan:
        """The plan with the rate that trials found for `lr = "auto"`."""
        row = Check("learning rate", "ok", str(found))
        rows = tuple(row if check.name == row.name else check for check in self.checks)
        return replace(self, lr=found.lr, found=found, checks=rows)

    def to_json(self) -> JsonObject:
        return {
            "refused": self.refused,
            "checks": [check.to_json() for check in self.checks],
            "memory": None if self.memory is None else self.memory.to_json(),
            "seconds": self.seconds,
            "steps": self.steps,
            "lr": self.lr,
            "rates": None if self.found is None else self.found.to_json(),
            "parameters": {"trainable": self.trainable, "total": self.total},
        }
