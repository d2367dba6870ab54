"""`Workspace(path)`: every verb of Turret, each a few lines over the package that does the work.

It knows nothing of HTTP or of the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from turret.location import Location
from turret.store import AccessTokens, Collected, Deleted, Gate, GateStatus, Golden, Move, Store, Verified, Version
from turret.workspace.results import Evaluation, Exported, Imported, Planned, RunResult

if TYPE_CHECKING:
    from turret.compare.comparison import Comparison
    from turret.compare.control_rates import Control
    from turret.compare.design import PlannedDesign
    from turret.engine import Engine, Limits
    from turret.experiments import Router
    from turret.experiments.evidence_history import EvidenceHistory
    from turret.recipe import Recipe
    from turret.store.difference import Difference
    from turret.train import StepRecord
    from turret.workspace.experimenting import ExperimentStatus, LiveExperiment
    from turret.workspace.promoting import Ask
    from turret.workspace.replaying import Replayed


Say = Callable[[str], None]


class Workspace:
    """A folder of adapters, or a catalog's URL, and everything that can be done with them."""

    def __init__(self, path: str | Path | Location = ".turret") -> None:
        self.store = Store(path)
        self._memories: dict[int, Any] = {}  # what `settle` added up of each experiment so far
        self._courses: dict[int, Any] = {}  # what `course` did

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All stored versions, or those of one name."""
        return self.store.list(name)

    def show(self, reference: str) -> dict[str, Any]:
        """All that is known of one version."""
        return self.store.show(reference)

    def resolve(self, reference: str) -> Version:
        """The version that a reference means now."""
        return self.store.resolve(reference)

    def diff(self, first: str, second: str) -> Difference:
        """Two versions side by side: settings, metrics, sizes, and how far the weights are apart."""
        return self.store.diff(first, second)

    def promote(
        self,
        reference: str,
        alias: str,
        *,
        require: Iterable[str] = (),
        replay: bool = False,
        ask: Ask | None = None,
        on_stage: Say | None = None,
    ) -> Move:
        """Move an alias to a version whose files hash right, whose metrics pass the alias's gates, and whose answers to
        the alias's golden examples do.

        require: gates for this time only, such as "accuracy>=0.9" or "validation.loss<0.4".
        replay: ask the golden examples again where this version was asked before.
        ask: gives a version's answers to texts as `predict` does, for a program that has the base in memory.
        """
        from turret.workspace import promoting

        return promoting.promote(self.store, reference, alias, list(require), again=replay, stage=on_stage, ask=ask)

    def rollback(self, name: str, alias: str = "production") -> Move:
        """Move an alias back to what it named before; again and again walks further back."""
        return self.store.rollback(name, alias)

    def gate(
        self,
        name: str,
        alias: str | None = None,
        *,
        add: Iterable[str] = (),
        remove: Iterable[str] = (),
        golden: str | Path | None = None,
        share: float | None = None,
    ) -> Sequence[Gate | Golden]:
        """What a version must pass before it may take the alias, after removing and adding some.

        golden: a table (CSV, JSONL) of texts with what the answer to each must be. share: of them that must pass, all
        where left out.
        """
        examples = None
        if golden is not None:
            from turret.workspace.examples import read_examples

            examples = read_examples(golden)
        return self.store.gate(name, alias, add=add, remove=remove, examples=examples, share=share)

    def standing(self, name: str, alias: str | None = None) -> Sequence[GateStatus]:
        """Whether the version that the alias (or each alias) names passes the alias's gates now, gate by gate."""
        return self.store.standing(name, alias)

    def verify(self, reference: str | None = None) -> Verified:
        """Hash and open everything in the store again, or all of one version."""
        return self.store.verify(reference)

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Remove what nothing refers to; safe beside everything else."""
        return self.store.gc(dry_run=dry_run)

    def delete(self, reference: str, *, force: bool = False) -> Deleted:
        """Take a version out of the catalog; its number is never given again, its files go with the next gc."""
        return self.store.delete(reference, force=force)

    @property
    def tokens(self) -> AccessTokens:
        """Who may ask a server: `create(name, scopes)`, `list()`, `revoke(name)`."""
        return self.store.tokens

    def plan(self, recipe: Recipe, *, on_stage: Say | None = None) -> Planned:
        """The preflight of a training, without training: fills what the recipe leaves to be seen, and checks it."""
        from turret.workspace import training

        return training.plan(self.store, recipe, training.Watching(on_stage=on_stage))

    def train(
        self,
        recipe: Recipe,
        *,
        on_record: Callable[[StepRecord], None] | None = None,
        on_plan: Callable[[Planned], None] | None = None,
        on_stage: Say | None = None,
        fresh: bool = False,
        beside_base: bool = False,
    ) -> RunResult:
        """Train, prove and store. The same recipe on the same data goes on from where it was killed, unless `fresh`.

        beside_base: measure the bare base on the same held-out examples too (metrics "test bare base"); a classifier's
        bare base answers with a head that nobody trained.
        on_plan is called once, before the first step; on_record after every step; on_stage with words for people.
        """
        from turret.workspace import training

        watching = training.Watching(on_record, on_plan, on_stage)
        return training.train(self.store, recipe, watching, fresh=fresh, beside_base=beside_base)

    def compare(
        self,
        recipe: Recipe,
        *,
        methods: str | None = None,
        seeds: int = 5,
        budget: float | None = None,
        fractions: Sequence[float] = (1.0,),
        margin: float = 1.0,
        against: str = "full",
        lr: float | Literal["auto"] | None = None,
        texts: bool = True,
        on_plan: Callable[[PlannedDesign], None] | None = None,
        on_stage: Say | None = None,
    ) -> Comparison:
        """Train several methods on the same data, each with several seeds in processes of their own, and judge them.

        methods: such as "base,head,full,lora:r=4/16,prefix"; those that the task allows where left out. budget: seconds
        of this sitting. fractions: of the training examples, for learning curves. margin: points of accuracy or ROUGE-L
        that are still as good. lr: one rate for all, or "auto"; each method's own where left out. texts: whether the
        report shows examples. on_plan: called once, before the first training. What an earlier call made is used; every
        training is a version in the store, and the report lies in `.folder`.
        """
        from turret.workspace import comparing

        wanted = comparing.ComparisonRequest(methods, seeds, budget, tuple(fractions), margin, against, lr, texts)
        return comparing.compare(self.store, recipe, wanted, on_stage or (lambda _words: None), on_plan)

    def plan_comparison(
        self,
        recipe: Recipe,
        *,
        methods: str | None = None,
        seeds: int = 5,
        fractions: Sequence[float] = (1.0,),
        margin: float = 1.0,
        against: str = "full",
        lr: float | Literal["auto"] | None = None,
        on_stage: Say | None = None,
    ) -> PlannedDesign:
        """What `compare` would train, and which difference its verdicts could decide. Trains and writes nothing.

        `.power` says how often equal methods would be called as good with so many seeds and test examples, and what
        would decide. It takes the spread of what has run where an earlier call made some, else an assumed one.
        """
        from turret.workspace import comparing

        wanted = comparing.ComparisonRequest(methods, seeds, None, tuple(fractions), margin, against, lr)
        return comparing.prepare(self.store, recipe, wanted, on_stage or (lambda _words: None)).planned

    def control(
        self,
        recipe: Recipe,
        aspects: Sequence[str],
        *,
        methods: str | None = None,
        seeds: int = 1,
        judge: str | None = None,
        texts: bool = True,
        on_stage: Say | None = None,
    ) -> Control:
        """Train an adapter an aspect, and measure how often an output is of the aspect that was asked for.

        recipe: with `{aspect}` where the data of the aspects differ, in data.source or in a column. judge: the base of
        the classifier that learns the aspects from the references; a small encoder where left out. texts: whether the
        report shows documents and outputs. What an earlier call made is used; every training is a version in the store,
        and the report lies in `.folder`.
        """
        from turret.workspace.comparing import controlling

        asked = controlling.ControlRequest(tuple(aspects), methods, seeds, judge or controlling.JUDGE, texts=texts)
        return controlling.control(self.store, recipe, asked, on_stage or (lambda _words: None))

    def runs(self, most: int = 500) -> Sequence[dict[str, Any]]:
        """The newest trainings, the newest first: id, name, state, created, ended, error, result."""
        return self.store.runs(most)

    def run(self, run_id: str) -> dict[str, Any]:
        """One training: the same, with its `recipe` and `touched`, the time of its last step, where they lie here."""
        from turret.workspace import training_runs

        return training_runs.run(self.store, run_id)

    def curve(self, run_id: str, *, most: int = 2000) -> Sequence[StepRecord]:
        """The steps of a training so far, at most so many, evenly chosen; those that evaluated are all there."""
        from turret.workspace import training_runs

        return training_runs.curve(self.store, run_id, most)

    def comparisons(self) -> Sequence[dict[str, Any]]:
        """The reports that `compare` and `control` wrote in this store (`kind` says which), the newest first."""
        from turret.workspace.comparing import reports

        return reports.listed(self.store.root)

    def report(self, key: str) -> str:
        """One report, as HTML; key: as `comparisons` has it."""
        from turret.workspace.comparing import reports

        return reports.read(self.store.root, key)

    def evaluate(
        self, reference: str, data: str, *, columns: Mapping[str, Any] | None = None, on_stage: Say | None = None
    ) -> Evaluation:
        """Metrics of a stored version on other data: its test split where it has one, else all of it.

        columns: keys of a recipe's `[data]`, such as {"text": "review", "label": "stars"}, where they are not obvious.
        """
        from turret.workspace import answering

        return answering.evaluate(self.store, reference, data, columns or {}, on_stage)

    def predict(
        self, reference: str, texts: Sequence[str], *, bare: bool = False, on_stage: Say | None = None
    ) -> Sequence[dict[str, Any]]:
        """An answer per text: a label with probabilities, or a generated text with the reason it ended.

        bare: ask the base alone, with the same prompt and settings; only for a version that generates.
        """
        from turret.workspace import answering

        return answering.predict(self.store, reference, texts, on_stage, bare=bare)

    def engine(
        self,
        base: str,
        *,
        limits: Limits | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        on_stage: Say | None = None,
    ) -> Engine:
        """The base in memory, answering with any of the stored versions in any mixture: a context manager.

        limits: what it may hold and take, see `turret.engine.Limits`.
        """
        from turret.workspace import serving

        return serving.engine(self.store, base, limits, dtype, on_stage)

    def import_adapter(
        self,
        source: str | Path,
        name: str,
        *,
        base: str | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        on_stage: Say | None = None,
    ) -> Imported:
        """Check an adapter from outside on its base and store it as the next version of `name`.

        source: a PEFT folder, a bundle, either packed as zip or tar, or a Hub id. base: in place of the one that it
        names. task, labels, settings (keys of a recipe's `[task]`): what a PEFT folder does not say of itself.
        """
        from turret.workspace import importing

        wanted = importing.ImportRequest(base, task, labels, settings)
        return importing.import_adapter(self.store, str(source), name, wanted, on_stage)

    def export(
        self,
        reference: str,
        folder: str | Path,
        *,
        form: Literal["peft", "merged", "vllm"] = "peft",
        force: bool = False,
        on_stage: Say | None = None,
    ) -> Exported:
        """Write a version as a folder: a bundle that PEFT loads, a whole model, or a LoRA that vLLM takes.

        The folder is new or empty, unless `force`; it is whole or not there.
        """
        from turret.workspace import exporting

        return exporting.export(self.store, reference, folder, form, force=force, stage=on_stage)

    def inputs(self, reference: str, source: str, *, column: str | None = None) -> Sequence[str]:
        """The texts in a file that `predict` would answer: the lines of a .txt, a column of a table."""
        from turret.workspace import answering

        return answering.inputs(self.store, reference, source, column)

    def experiment(self, name: str, number: int | None = None) -> LiveExperiment:
        """The running experiment of an adapter name, or its last: start, ramp, outcome, status, stop, ..."""
        from turret.workspace.experimenting import LiveExperiment

        return LiveExperiment(self.store, name, number)

    def experiments(self, *, alpha: float = 0.05) -> Sequence[dict[str, Any]]:
        """Every experiment with its evidence, and which are discoveries, of which at most alpha are false."""
        from turret.workspace import experimenting

        return experimenting.listed(self.store, alpha)

    def course(self, name: str, number: int | None = None) -> EvidenceHistory:
        """How the evidence of an experiment grew, outcome by outcome; see `turret.experiments.evidence_history`."""
        from turret.workspace import evidence_histories

        return evidence_histories.course(self.store, name, number, self._courses)

    def settle(self) -> Sequence[ExperimentStatus]:
        """Carry out what the guards of all running experiments ask; a server calls it every few seconds."""
        from turret.workspace import experimenting

        return experimenting.settle_all(self.store, self._memories)

    def router(self, clock: Callable[[], float] = time.time) -> Router:
        """What a server asks which version answers a request, and tells what came of it; see `turret.experiments`."""
        from turret.experiments import Router

        return Router(self.store.database(make=True), clock)

    def replay(
        self,
        a: str,
        b: str,
        data: str | None = None,
        *,
        columns: Mapping[str, Any] | None = None,
        on_stage: Say | None = None,
    ) -> Replayed:
        """Compare two versions on the same labelled examples, paired, before traffic is spent.

        data: as for `evaluate`; where left out, the golden examples that a's alias `production` asks for.
        """
        from turret.workspace import replaying

        return replaying.replay(self.store, a, b, data, columns or {}, on_stage)

    def doctor(self) -> dict[str, Any]:
        """What this machine can run."""
        from turret.workspace import machine

        return machine.facts(self.store)
