"""What one training is made of and how far it has come: everything the loop reads, moves and saves.

Knows how to begin (seeded, attached, or gone on from a checkpoint), to judge an evaluation, to save and to finish.
Refuses to know when: the loop decides.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turret import adapters
from turret.adapters import Adapter, BaseInfo
from turret.errors import TrainingError
from turret.tasks.tokens import tokenizer_digest
from turret.train import checkpoint, memory, processes
from turret.train.batches import Item, Items, Schedule, pass_tokens
from turret.train.curve import StepRecord
from turret.train.defaults import filled
from turret.train.evaluation import evaluate
from turret.train.flat_loss import WINDOW, FlatLoss, flat_loss
from turret.train.initialize import InitialAdapter, attach, optimiser_of
from turret.train.optim import AdamW, warmup_steps
from turret.train.processes import Processes
from turret.train.seeds import Randomness
from turret.train.splits import Splits, splits_of

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "turret")


@dataclass(frozen=True)
class Fitted:
    """What a finished training made. `model` is still attached and in eval mode, with the weights that were kept."""

    adapter: Adapter
    model: Any
    steps: int
    examples: int
    tokens: int
    seconds: float  # in optimiser steps, over all sittings of the run
    evaluate_seconds: float
    peak_bytes: int  # of the process, in this sitting
    resumed_from: int  # the step of the checkpoint this sitting began with, 0 for none
    stopped_early: bool
    best: dict[str, Any] | None  # step and metrics of the best evaluation on the validation split
    parameters: dict[str, int]  # trainable, stored, total
    flat_loss: FlatLoss | None  # where the training loss ended at the level of guessing


@dataclass
class RunProgress:
    """The counters of a run, as they stand in its checkpoint."""

    step: int = 0
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluate_seconds: float = 0.0
    best_step: int = 0
    best_metrics: dict[str, Any] | None = None
    stale: int = 0  # evaluations since the best one
    gave_up: bool = False
    losses: list[float] = field(default_factory=list)  # of the latest WINDOW steps


@dataclass
class TrainingRun:
    """One training under way."""

    recipe: Any
    base: Any
    task: Any
    dataset: Any
    folder: Path | None
    splits: Splits
    items: Items
    watched: Items | None
    schedule: Schedule
    optimiser: AdamW
    randomness: Randomness
    lr: float
    warmup: int
    unchanged: str  # checksum of the base before anything was attached
    originals: list[Tensor]  # what it is the checksum of
    total: int  # weights of the base
    guessing: float | None  # the loss of an answer that does not look at the input
    processes: Processes
    start: InitialAdapter | None
    progress: RunProgress = field(default_factory=RunProgress)
    best_weights: Tensor | None = None
    resumed_from: int = 0

    @classmethod
    def begin(
        cls, recipe: Any, base: Any, task: Any, dataset: Any, folder: Path | None, start: InitialAdapter | None = None
    ) -> TrainingRun:
        """Attach a new adapter, seeded or from `start`; go on from the folder's checkpoint where there is one."""
        here = processes.begin()
        splits = splits_of(recipe, dataset)
        recipe = filled(recipe, base, task.kind, len(splits.train))
        train = recipe.train
        if train.lr == "auto":
            raise TrainingError(
                'train.lr is "auto": find it first (Workspace.train does, or find_rate), or give a number'
            )
        schedule = Schedule(len(splits.train), train.batch_size, train.epochs, recipe.seed, train.max_steps)
        originals = [each.detach() for each in (*base.model.parameters(), *base.model.buffers())]
        unchanged = checksum(originals)
        total = sum(each.numel() for each in base.model.parameters())
        randomness = Randomness(recipe.seed, base.model.device)
        with randomness:
            attach(recipe, base, task, start)
        if not here.main:  # attached alike, dropped out apart
            randomness = Randomness(here.seed(recipe.seed), base.model.device)
        try:
            optimiser = optimiser_of(recipe, base)
            run = cls(
                recipe=recipe,
                base=base,
                task=task,
                dataset=dataset,
                folder=folder,
                splits=splits,
                items=Items(task, splits.train),
                watched=None if splits.watched is None else Items(task, splits.watched),
                schedule=schedule,
                optimiser=optimiser,
                randomness=randomness,
                lr=train.lr,
                warmup=warmup_steps(train.warmup, schedule.steps),
                unchanged=unchanged,
                originals=originals,
                total=total,
                guessing=task.guessing_loss(splits.train),
                processes=here,
                start=start,
            )
            here.require_same(**run._identity())
            run._resume()
        except BaseException:
            adapters.detach(base.model)
            raise
        base.model.train()
        return run

    # --- what the loop asks -----------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def over(self) -> bool:
        return self.progress.gave_up or self.progress.step >= self.schedule.steps

    def remaining(self) -> Iterator[tuple[int, list[Item]]]:
        """(step, batch) for every step that is left."""
        if not self.over:
            for step, indices in self.schedule.batches(after=self.progress.step):
                yield step, self.items.take(indices)

    @property
    def most_tokens(self) -> int:
        """Of one pass."""
        return pass_tokens(self.recipe.train, self.model.config)

    def evaluates(self, step: int) -> bool:
        every = self.recipe.train.evaluate
        if self.watched is None or every == "never":
            return False
        each = self.schedule.steps_per_epoch if every == "epoch" else every
        return step % each == 0 or step == self.schedule.steps

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the weights as they are, on the examples that are watched."""
        assert self.watched is not None
        metrics, _ = evaluate(self.model, self.task, self.watched, most_tokens=self.most_tokens, texts=False)
        return metrics

    def saves(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint after this step."""
        every = self.recipe.train.checkpoint_every
        return step % (every or self.schedule.steps_per_epoch) == 0

    # --- what a step leaves -----------------------------------------------------------------------------------------

    def count(self, step: int, batch: Sequence[Item], loss: float, seconds: float) -> None:
        self.progress.step = step
        self.progress.losses = [*self.progress.losses, loss][-WINDOW:]
        self.progress.examples += len(batch)
        self.progress.tokens += sum(item.tokens for item in batch)
        self.progress.seconds += seconds

    def judge(self, step: int, metrics: dict[str, Any], seconds: float) -> None:
        """Compare an evaluation with the best one so far. The test split is looked at, and chooses nothing."""
        progress, train = self.progress, self.recipe.train
        progress.evaluate_seconds += seconds
        if not self.splits.selects:
            return
        if progress.best_metrics is None or merit(metrics) > merit(progress.best_metrics):
            progress.best_step, progress.best_metrics, progress.stale = step, metrics, 0
            if train.keep == "best":
                self.best_weights = self.optimiser.weights.clone()
        else:
            progress.stale += 1
            progress.gave_up = train.early_stopping is not None and progress.stale >= train.early_stopping

    def record(
        self,
        step: int,
        batch: Sequence[Item],
        *,
        loss: float,
        rate: float,
        norm: float,
        seconds: float,
        metrics: dict[str, Any] | None,
    ) -> StepRecord:
        tokens = sum(item.tokens for item in batch)
        return StepRecord(
            step=step,
            steps=self.schedule.steps,
            epoch=self.schedule.epoch_after(step),
            loss=loss,
            lr=rate,
            grad_norm=norm,
            examples=len(batch),
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / max(seconds, 1e-9),
            rss=memory.resident(),
            metrics=metrics,
            split=self.splits.watched_name if metrics is not None else None,
            guessing=None if self.flat_loss() is None else self.guessing,
        )

    def flat_loss(self) -> FlatLoss | None:
        """Whether the latest losses lie at the level of guessing; nothing is said of the first steps of a long run."""
        progress = self.progress
        early = progress.step < min(WINDOW, self.schedule.steps)
        return None if early else flat_loss(progress.losses, self.guessing)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        said = {
            "recipe": hashlib.sha256(self.recipe.to_toml().encode()).hexdigest(),
            "data": self.dataset.digest,
            "base": self.base.fingerprint,
            "tokenizer": tokenizer_digest(self.base.tokenizer),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "world_size": self.processes.size,  # who draws which dropout, and the order of sums
        }
        return said if self.start is None else {**said, "parent": self.start.digest}

    def _lineage(self) -> dict[str, Any]:
        """Everything the weights depend on, and nothing that differs when the same training is repeated."""
        said = {key: value for key, value in self._identity().items() if key not in ("torch", "transformers")}
        libraries = {name: version(name) for name in LIBRARIES}
        libraries["python"] = platform.python_version()
        said |= {"recipe": self.recipe.to_toml(), "seed": self.recipe.seed, "libraries": libraries}
        said |= {"steps": self.progress.step, "lr": self.lr}
        if (flat := self.flat_loss()) is not None:
            said |= {"flat_loss": flat.to_json()}
        return said if self.best_weights is None else {**said, "kept_step": self.progress.best_step}

    def save(self) -> None:
        """Write the checkpoint, unless the weights are no longer good; the main process does, the others wait."""
        ends = torch.stack(torch.aminmax(self.optimiser.weights))  # a NaN is both; no copy is made
        if not bool(torch.isfinite(ends).all()):
            return  # the next loss will say so; the last good state stays
        tensors = dict(self.optimiser.state())
        for rank, states in enumerate(self.processes.gather(self.randomness.tensors())):
            tensors |= {f"{_random_prefix(rank)}{name}": each for name, each in states.items()}
        if self.best_weights is not None:
            tensors["best"] = self.best_weights
        self.processes.from_main(lambda: self._write(tensors))

    def _write(self, tensors: dict[str, Tensor]) -> None:
        assert self.folder is not None
        checkpoint.save(
            self.folder,
            tensors,
            identity=self._identity(),
            layout=self.optimiser.layout,
            progress=vars(self.progress),
        )

    def _resume(self) -> None:
        """Take up the folder's checkpoint where there is one. The main process reads; all begin as it does."""
        here, optimiser = self.processes, self.optimiser
        found = self._read() if here.main else None
        states = None
        if found is not None:
            self.progress = RunProgress(**found.progress)
            optimiser.load_state(found.tensors, self.progress.step)
            best = found.tensors.get("best")
            self.best_weights = None if best is None else best.to(optimiser.weights.device)
            states = [_random_state(found.tensors, rank) for rank in range(here.size)]
        progress, states, kept = here.from_main(lambda: (vars(self.progress), states, self.best_weights is not None))
        self.progress = RunProgress(**progress)
        self.resumed_from = self.progress.step
        rows = {name: here.take_from_main(row) for name, row in optimiser.state().items()}
        optimiser.load_state(rows, self.progress.step)
        if kept:
            row = optimiser.weights.clone() if self.best_weights is None else self.best_weights
            self.best_weights = here.take_from_main(row)
        if states:
            self.randomness.load(states[here.rank])

    def _read(self) -> checkpoint.Checkpoint | None:
        found = None if self.folder is None else checkpoint.load(self.folder, identity=self._identity())
        if found is not None and found.layout != self.optimiser.layout:
            raise TrainingError(f"checkpoint in {self.folder} holds other weights than this run trains: delete it")
        return found

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> Fitted:
        """Keep the last or the best weights, check that the base is untouched, and read the adapter off the model."""
        if self.best_weights is not None:
            self.optimiser.set_weights(self.best_weights)
        self.optimiser.end()
        self.model.eval()
        if checksum(self.originals) != self.unchanged:
            raise TrainingError(
                "the base's weights changed while an adapter was trained: load the base anew, and report it"
            )
        if self.processes.size > 1:
            self.processes.require_same(weights=checksum([self.optimiser.weights]))
        progress = self.progress
        tensors, head, method = adapters.extract(self.model)
        base, spec = self.base, self.task.spec()
        adapter = Adapter(
            method=method,
            tensors=tensors,
            head=head,
            base=BaseInfo(id=base.id, fingerprint=base.fingerprint, family=base.family.name, revision=base.revision),
            task=spec,
            generation=dict(spec.get("generation") or {}),
            lineage=self._lineage(),
        )
        stored = sum(each.numel() for each in (*tensors.values(), *head.values()))
        return Fitted(
            adapter=adapter,
            model=self.model,
            steps=progress.step,
            examples=progress.examples,
            tokens=progress.tokens,
            seconds=progress.seconds,
            evaluate_seconds=progress.evaluate_seconds,
            peak_bytes=memory.peak(),
            resumed_from=self.resumed_from,
            stopped_early=progress.gave_up,
            best=None if progress.best_metrics is None else {"step": progress.best_step, **progress.best_metrics},
            parameters={
                "trainable": self.optimiser.weights.numel(),
                "stored": stored,
                "total": self.total,
            },
            flat_loss=self.flat_loss(),
        )

    def abandon(self) -> None:
        """Leave the base as it was."""
        adapters.detach(self.model)
        self.model.eval()

    # --- words ------------------------------------------------------------------------------------------------------

    def what_to_change(self) -> str:
        """The remedy for a loss that is not finite, and what is left of the run."""
        family, classify = self.base.family.kind, not self.task.generates
        usual = self.recipe.method.defaults(family, classify=classify, parameters=self.total).lr
        remedy = f"set train.lr to {min(usual, self.lr / 10):g} (now {self.lr:g})"
        if str(self.base.dtype).endswith("bfloat16"):
            remedy += ' or train.dtype to "float32"'
        return f"{remedy}; {self._kept()}"

    def how_to_resume(self) -> str:
        if self.folder is None:
            return "nothing is kept, because no folder was given"
        return f"start the same command again to go on from there ({self._kept()})"

    def _kept(self) -> str:
        step = 0 if self.folder is None else checkpoint.step_of(self.folder)
        return f"the state after step {step} is kept in {self.folder}" if step else "no checkpoint had been written yet"


def _random_prefix(rank: int) -> str:
    return f"random.{rank}." if rank else "random."


def _random_state(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The states of one process's generators in a checkpoint."""
    named = {name.removeprefix(_random_prefix(rank)): each for name, each in tensors.items()}
    return {name: named[name] for name in ("python", "torch", "cuda") if name in named}


def merit(metrics: dict[str, Any]) -> tuple[float, float]:
    """What makes an evaluation better than another: accuracy where the task has it, then a lower loss."""
    loss = float(metrics["loss"])
    return float(metrics.get("accuracy", 0.0)), -loss if math.isfinite(loss) else -math.inf


def checksum(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of the bytes of some tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
