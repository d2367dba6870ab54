"""Search settings of a recipe by several trainings: `turret sweep`. Loads no torch.

Each trial is a job of kind `cell` (`turret.store.jobs`) that trains without the test split and is judged by the
validation split. Settings that are lists are tried in all combinations, if there are as many trials; otherwise Optuna
proposes them (TPE), and ends trials whose curve is worse than the median of the others at that step.

A folder per sweep under the store's root, `sweeps/<name>-<digest of recipe, settings and data>/`:

- `cells/<key>/trial.json`: the settings of a trial, and how it ended, as the process of the sweep wrote it
- `cells/<key>/evaluations.json`: (step, value) of each evaluation on the validation split, as the training goes on
- `cells/<key>/result.json`: the version and its metrics
- `best.toml`: the recipe of the best trial

Optuna's study is in memory only: a sweep that was killed makes it again from these files.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from turret.data import Dataset
from turret.database import OPEN_STATES
from turret.errors import QueueFull, RecipeError, TrainingError, quote, require_package
from turret.json_types import JsonObject
from turret.recipe import Recipe
from turret.store import Store
from turret.store.jobs import JobState, NewCell
from turret.tasks import task_of
from turret.workspace.cells import (
    POLL_SECONDS,
    TRIAL,
    CellJobs,
    KeptFiles,
    Workers,
    executor,
    hold_comparison,
    read_json,
    require_executor,
)
from turret.workspace.child_process import why_alone
from turret.workspace.progress import CellState, Progress, Say
from turret.workspace.queueing import MOST_CELLS, Place, SweepOrder, placed_data, with_absolute_base
from turret.workspace.reading import read_dataset, with_base

if TYPE_CHECKING:
    import optuna

TRIALS = 20  # unless --trials says otherwise, or all settings are lists
MOST_TRIALS = 1000
AT_ONCE = 4  # trials that wait or run at a time on workers
SEARCHED = ("method.", "train.")  # settings that a client may search; no other could name a file or a tracker
NOT_SEARCHED = ("method.kind", "train.init_from", "train.trackers")
WIDE = 10.0  # a range whose ends are so many times apart is searched on a logarithmic scale
State = Literal["finished", "pruned", "failed"]
Plain = str | float | int


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of some values, as `--set` reads them."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A setting that takes a number of a range."""

    low: float
    high: float
    whole: bool  # numbers without a fraction alone

    @property
    def log(self) -> bool:
        return self.low > 0 and self.high / self.low >= WIDE


def parse_settings(sets: Mapping[str, str]) -> tuple[dict[str, str], dict[str, Choices | Range]]:
    """The settings that are fixed, and those that are searched: `1e-4..1e-2` or `4,8,16`. Raises RecipeError."""
    fixed, searched = dict[str, str](), dict[str, Choices | Range]()
    for key, value in sets.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise RecipeError(f"settings: expected texts such as 'train.lr': '1e-4..1e-2', given {quote(key)}")
        low, dots, high = value.partition("..")
        if dots:
            searched[key] = _range(key, low, high)
        elif "," in value:
            values = tuple(dict.fromkeys(each.strip() for each in value.split(",") if each.strip()))
            if len(values) < 2:
                raise RecipeError(f"--set {key}={value[:60]}: expected at least two values with commas between them")
            searched[key] = Choices(values)
        else:
            fixed[key] = value
    if not searched:
        raise RecipeError("nothing to search: give --set train.lr=1e-4..1e-2 or --set method.r=4,8,16")
    return fixed, searched


def _range(key: str, low: str, high: str) -> Range:
    try:
        ends = float(low), float(high)
        if not (math.isfinite(ends[0]) and ends[0] < ends[1] < math.inf):
            raise ValueError
    except ValueError:
        raise RecipeError(f"--set {key}={low[:30]}..{high[:30]}: expected two numbers, the lower one first") from None
    return Range(*ends, whole=low.strip().lstrip("-").isdigit() and high.strip().lstrip("-").isdigit())


@dataclass(frozen=True)
class SweepRequest:
    """The options of a sweep."""

    settings: Mapping[str, Choices | Range]
    trials: int | None = None
    at_once: int = AT_ONCE
    budget: float | None = None  # seconds; None: until all trials have run
    on: str | Workers | None = None  # who trains: `workers` of the store, ray://HOST:PORT, or this process

    @property
    def combinations(self) -> int | None:
        """How many there are; None with a range."""
        lists = [each.values for each in self.settings.values() if isinstance(each, Choices)]
        return math.prod(map(len, lists)) if len(lists) == len(self.settings) else None

    @property
    def count(self) -> int:
        """The number of trials."""
        most = self.combinations
        return min(self.trials or most or TRIALS, most or MOST_TRIALS)


def split(order: SweepOrder, recipe: Recipe) -> tuple[Recipe, SweepRequest]:
    """The recipe with the settings that are fixed, and what a client searches. Raises RecipeError."""
    for key in order.settings:
        if not key.startswith(SEARCHED) or key.startswith(NOT_SEARCHED):
            raise RecipeError(f"a sweep searches settings of method and train, such as train.lr: given {key[:60]}")
    fixed, searched = parse_settings(order.settings)
    for key, each in searched.items():
        texts = each.values if isinstance(each, Choices) else (f"{each.low:g}", f"{each.high:g}")
        for text in texts:
            recipe.with_overrides({**fixed, key: text})  # a value that does not fit
    request = SweepRequest(searched, order.trials, order.at_once, order.budget)
    if request.count > MOST_CELLS:
        raise RecipeError(f"{request.count} trials: expected at most {MOST_CELLS}: give fewer values, or fewer trials")
    return recipe.with_overrides(fixed), request


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """One training of a sweep."""

    number: int
    settings: dict[str, Plain]
    key: str
    recipe: Recipe
    state: State | None = None  # None: it waits or runs
    value: float | None = None  # the metric on the validation split
    version: str | None = None
    error: str | None = None
    seconds: float | None = None  # of the whole trial
    run: str | None = None
    evaluations: list[tuple[int, float]] = field(default_factory=list)  # step and value

    @property
    def title(self) -> str:
        """Its settings in words."""
        said = {key: f"{each:.4g}" if isinstance(each, float) else each for key, each in self.settings.items()}
        return ", ".join(f"{key} {each}" for key, each in said.items())

    def as_json(self) -> JsonObject:
        """The trial as JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("recipe", "key")}


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Args:
        metric: on the validation split; higher is better.
        best: the recipe of the best trial.
        file: where the recipe is.
        missing: trials that have not run.
    """

    name: str
    metric: str
    trials: tuple[Trial, ...]
    best: Recipe
    file: str
    folder: str
    missing: int

    @property
    def ranked(self) -> list[Trial]:
        """The finished trials, the best one first."""
        done = [each for each in self.trials if each.state == "finished" and each.value is not None]
        return sorted(done, key=lambda each: (-(each.value or 0.0), each.number))

    def as_json(self) -> JsonObject:
        """The sweep as JSON."""
        return {
            "name": self.name,
            "metric": self.metric,
            "trials": [each.as_json() for each in self.trials],
            "best": self.ranked[0].as_json(),
            "recipe": self.file,
            "folder": self.folder,
            "missing": self.missing,
        }


# --- who proposes -----------------------------------------------------------------------------------------------------


class Listed:
    """Proposes all combinations, in order. Ends no trial."""

    def __init__(self, settings: Mapping[str, Choices | Range]) -> None:
        values = [each.values for each in settings.values() if isinstance(each, Choices)]
        self._left = [dict(zip(settings, each, strict=True)) for each in itertools.product(*values)]

    def propose(self, number: int) -> dict[str, Plain]:
        """The settings of a new trial with this number."""
        return dict(self._left.pop(0))

    def know(self, trial: Trial) -> None:
        """Learn of a trial of an earlier call."""
        self._left = [each for each in self._left if each != trial.settings]

    def ends(self, trial: Trial) -> bool:
        """Whether a trial that runs is not worth its end."""
        return False

    def tell(self, trial: Trial) -> None:
        """Learn how a trial has ended."""


class Proposed:
    """Optuna proposes, and ends trials early."""

    def __init__(self, settings: Mapping[str, Choices | Range], seed: int) -> None:
        what = "a sweep over a range, or over a part of all combinations,"
        remedy = "pip install 'turret[sweep]', or give lists and as many trials"
        with require_package(what, "Optuna", remedy, RecipeError):
            import optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna = optuna
        self._space: dict[str, optuna.distributions.BaseDistribution] = {
            key: self._distribution(each) for key, each in settings.items()
        }
        self._seed = seed
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
        self._study = optuna.create_study(direction="maximize", sampler=self._sampler(0), pruner=pruner)
        self._asked: dict[int, optuna.trial.Trial] = {}  # by the number of our trial

    def _sampler(self, known: int) -> optuna.samplers.TPESampler:
        """It draws other numbers than the one that proposed so many known trials."""
        return self._optuna.samplers.TPESampler(seed=(self._seed + known) % 2**32, constant_liar=True)

    def _distribution(self, setting: Choices | Range) -> optuna.distributions.BaseDistribution:
        kinds = self._optuna.distributions
        if isinstance(setting, Choices):
            return kinds.CategoricalDistribution(setting.values)
        if setting.whole:
            return kinds.IntDistribution(int(setting.low), int(setting.high), log=setting.log)
        return kinds.FloatDistribution(setting.low, setting.high, log=setting.log)

    def propose(self, number: int) -> dict[str, Plain]:
        """The settings of a new trial with this number."""
        asked = self._asked[number] = self._study.ask(self._space)
        return dict(asked.params)

    def know(self, trial: Trial) -> None:
        """Learn of a trial of an earlier call that has ended."""
        states = self._optuna.trial.TrialState
        state = {"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[str(trial.state)]
        if trial.state == "pruned" and not trial.evaluations:
            state = states.FAIL
        made = self._optuna.trial.create_trial(
            state=state,
            params=dict(trial.settings),
            distributions=self._space,
            value=trial.value if trial.state == "finished" else None,
            intermediate_values=dict(trial.evaluations),
        )
        self._study.add_trial(made)
        self._study.sampler = self._sampler(len(self._study.trials))

    def ends(self, trial: Trial) -> bool:
        """Whether a trial that runs is not worth its end."""
        asked = self._asked.get(trial.number)
        if asked is None:  # of an earlier call
            return False
        known = self._study.trials[asked.number].intermediate_values
        for step, value in trial.evaluations:
            if step not in known:
                asked.report(value, step)
        return bool(trial.evaluations) and asked.should_prune()

    def tell(self, trial: Trial) -> None:
        """Learn how a trial has ended."""
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            self.know(trial)
            return
        self.ends(replace(trial))  # its last evaluations
        states = self._optuna.trial.TrialState
        if trial.state == "finished":
            self._study.tell(asked, trial.value)
        else:
            self._study.tell(asked, state=states.PRUNED if trial.state == "pruned" else states.FAIL)


# --- the sweep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a sweep knows before the first trial."""

    recipe: Recipe
    data: Dataset
    proposes: Listed | Proposed
    folder: Path

    @property
    def metric(self) -> str:
        """It judges, on the validation split."""
        return task_of(self.data.kind).metric


def prepare(store: Store, recipe: Recipe, request: SweepRequest, say: Say, data: Dataset | None = None) -> Prepared:
    """Check the request, and read the data unless it is given. Trains and writes nothing. Raises RecipeError."""
    require_executor(request.on)
    if not 1 <= request.count <= MOST_TRIALS:
        raise RecipeError(f"--trials {request.count}: expected 1 to {MOST_TRIALS}")
    if not 1 <= request.at_once <= 100:
        raise RecipeError(f"--at-once {request.at_once}: expected 1 to 100")
    listed = request.combinations is not None and request.count == request.combinations
    proposes = Listed(request.settings) if listed else Proposed(request.settings, recipe.seed)
    if request.on is not None:
        recipe = with_absolute_base(recipe)
    data = data or read_dataset(store, recipe, say)
    recipe, _ = with_base(recipe, data.kind)
    if not data.validation:
        raise RecipeError("a sweep is judged by validation examples, and the data has none: give data.validation = 0.1")
    text = f"{recipe.without_trackers().to_toml()}\n{sorted(request.settings.items())}\n{data.digest}"
    folder = store.home / "sweeps" / f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    return Prepared(recipe, data, proposes, folder)


def sweep(store: Store, recipe: Recipe, request: SweepRequest, say: Say) -> Sweep:
    """Run the missing trials. Raises TrainingError if none has a value."""
    ready = prepare(store, recipe, request, say)
    store.keep_rows(ready.recipe.data.source)
    with hold_comparison(store, ready.folder, say) as files, executor(request.on, store, ready.data) as tasks:
        running = _Running(store, ready, request, files, say, tasks)
        running.run()
        return running.result()


class _Running(CellJobs):
    """A sweep that runs now."""

    def __init__(
        self,
        store: Store,
        ready: Prepared,
        request: SweepRequest,
        files: KeptFiles,
        say: Say,
        tasks: Workers | None,
    ) -> None:
        deadline = None if request.budget is None else time.monotonic() + request.budget
        super().__init__(store, ready.folder, say, files, deadline, tasks)
        self._recipe, self._metric, self._request = ready.recipe, ready.metric, request
        self._proposes = ready.proposes
        self._trials: list[Trial] = []
        self._open: dict[str, Trial] = {}  # by the id of their job
        self._states: Mapping[str, str] = {}  # of those that are open, by their key
        self._data: tuple[str, Place] | None = None

    def run(self) -> None:
        """Run trials until there are enough, or the budget ends."""
        self._know_earlier()
        left = [each for each in self._trials if each.state is None]
        try:
            if self._tasks is None:
                for trial in itertools.chain(left, self._proposals()):
                    if self._late() or not self._train_here(trial):
                        break
            else:
                self._train_on(self._tasks, left)
        finally:
            self._stop_worker()

    def result(self) -> Sweep:
        """What was found. Writes the best recipe."""
        missing = self._request.count - sum(each.state is not None for each in self._trials)
        found = Sweep(
            self._recipe.name,
            self._metric,
            tuple(self._trials),
            self._recipe,
            str(self.folder / "best.toml"),
            str(self.folder),
            missing,
        )
        if not found.ranked:
            errors = [each.error for each in self._trials if each.error]
            raise TrainingError(f"no trial was finished: {errors[0] if errors else 'the budget ended before'}")
        best = found.ranked[0].recipe
        self.files.write_text(self.folder / "best.toml", best.to_toml())
        return replace(found, best=best)

    # --- trials -------------------------------------------------------------------------------------------------------

    def _know_earlier(self) -> None:
        """Read the trials of earlier calls."""
        for path in sorted(self.folder.glob("cells/*/trial.json")):
            kept = read_json(path) or {}
            trial = self._trial(int(kept["number"]), kept["settings"])
            self._trials.append(trial)
            self._look_at(trial)
            if kept["state"] is not None:
                trial.state, trial.error = kept["state"], kept["error"]
                self._proposes.know(trial)
            elif trial.value is not None:  # it has ended after the earlier call
                self._end(trial, "finished")
            elif isinstance(self._proposes, Listed):
                self._proposes.know(trial)

    def _proposals(self) -> Iterator[Trial]:
        while len(self._trials) < self._request.count:
            number = len(self._trials)
            trial = self._trial(number, self._proposes.propose(number))
            self._trials.append(trial)
            yield trial

    def _trial(self, number: int, settings: Mapping[str, Plain]) -> Trial:
        texts = {key: f"{each:.4g}" if isinstance(each, float) else str(each) for key, each in settings.items()}
        recipe = self._recipe.with_overrides(texts)
        digest = hashlib.sha256(recipe.to_toml().encode()).hexdigest()
        return Trial(number, dict(settings), f"trial{number:04}-{digest[:8]}", recipe)

    def _end(self, trial: Trial, state: State, error: str | None = None) -> None:
        trial.state, trial.error = state, error
        self._write(trial)
        self._proposes.tell(trial)
        settings = trial.title
        value = f"{self._metric} {trial.value:.4f}" if state == "finished" else error or state
        self.say(f"trial {trial.number + 1} of {self._request.count}  {settings}: {value}")

    def _write(self, trial: Trial) -> None:
        kept: JsonObject = {
            "number": trial.number,
            "settings": trial.settings,
            "state": trial.state,
            "error": trial.error,
        }
        self.files.write(self.folder / "cells" / trial.key / "trial.json", kept)

    def _look_at(self, trial: Trial) -> None:
        """Read how far a trial is, and its value if it is finished."""
        here = self.folder / "cells" / trial.key
        self.store.artifacts.bring(f"{self._study}/cells/{trial.key}/")
        known = read_json(here / "evaluations.json") or {}
        trial.evaluations = [(int(step), float(value)) for step, value in known.get("evaluations", ())]
        result = read_json(here / "result.json")
        if result is not None:
            trial.value = float(result["metrics"]["validation"][self._metric])
            trial.version, trial.run, trial.seconds = str(result["version"]), result["run"], result["wall_seconds"]

    def _new(self, trial: Trial, source: str | None) -> NewCell:
        spec = self._spec(TRIAL, trial.key, source, alone=why_alone(trial.recipe) is not None)
        spec["metric"] = self._metric
        return NewCell(trial.key, trial.recipe.name, trial.recipe.to_toml(), spec)

    # --- this process -------------------------------------------------------------------------------------------------

    def _train_here(self, trial: Trial) -> bool:
        """Run a trial. Returns whether the sweep goes on."""
        self.files.require()
        self._write(trial)
        (id,) = self._queue.submit_cells(self._study, [self._new(trial, None)], here=True)
        ended, looked = False, time.monotonic()

        def stop() -> bool:
            nonlocal ended, looked
            if not ended and time.monotonic() > looked + POLL_SECONDS:
                self._look_at(trial)
                ended, looked = self._proposes.ends(trial), time.monotonic()
            return ended or self._late()

        state = self._do_here(id, lambda line: self.say(f"trial {trial.number + 1}: {line}"), stop)
        self._look_at(trial)
        if trial.value is None and not ended and state["state"] != "failed":  # the budget has ended
            return False
        self._note_end(trial, state, pruned=ended)
        return True

    # --- workers ------------------------------------------------------------------------------------------------------

    def _train_on(self, tasks: Workers, left: Sequence[Trial]) -> None:
        new, stopped = itertools.chain(left, self._proposals()), set[str]()
        waits: Trial | None = None  # the queue was full
        while True:
            self.files.require()
            while len(self._open) < self._request.at_once and (waits := waits or next(new, None)) is not None:
                if not self._submit(tasks, waits):
                    break
                waits = None
            if not self._open:
                tasks.tell(self._progress())
                return
            try:
                tasks.check()
            except TrainingError:
                self._queue.cancel_cells(self._open)
                raise
            states = self._queue.states(self._open)
            self._states = {self._open[id].key: str(each["state"]) for id, each in states.items()}
            tasks.tell(self._progress())
            for id, trial in list(self._open.items()):
                self._look_at(trial)
                if states[id]["state"] not in OPEN_STATES:
                    del self._open[id]
                    self._note_end(trial, states[id], pruned=id in stopped)
                elif id not in stopped and self._proposes.ends(trial):
                    stopped.add(id)
                    self._queue.cancel_cells([id])
            if self._late():
                self._queue.cancel_cells(self._open)
                return
            time.sleep(POLL_SECONDS)

    def _progress(self) -> Progress:
        cells = [
            CellState(
                each.key,
                each.title,
                each.state or self._states.get(each.key, "waiting"),
                score=each.value,
                seconds=each.seconds,
                version=each.version,
                run=each.run,
                error=each.error,
            )
            for each in self._trials
        ]
        return Progress(self._study, self._metric, self._request.count, cells)

    def _submit(self, tasks: Workers, trial: Trial) -> bool:
        """Returns whether the queue took it."""
        self._data = self._data or placed_data(self.store, self._recipe.data.source)
        source, place = self._data
        self._write(trial)
        tasks.tell(self._progress())  # first: a cancel ends the trials that were told
        try:
            (id,) = self._queue.submit_cells(self._study, [self._new(trial, source)], place=place)
        except QueueFull:
            if not self._open:
                raise
            return False
        tasks.begin(id, trial.recipe)
        self._open[id] = trial
        return True

    def _note_end(self, trial: Trial, state: JobState, *, pruned: bool) -> None:
        if trial.value is not None:
            self._end(trial, "finished")
        elif pruned:
            self._end(trial, "pruned")
        else:
            self._end(trial, "failed", str(state["error"]))
