"""Promises: choose a threshold that bounds the errors of a version, say how it stands, and act if it broke.

A promise that breaks is recorded once. A stricter threshold replaces it in the same transaction. A rollback comes
before the record, so a kill between them repeats a step that changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Connection

from turret.amounts import percentage
from turret.data import Dataset, Example, Input, TextPair
from turret.data.memory import short_source
from turret.errors import AdapterError, Corrupt, DataError, NotFound, TurretError, count_of
from turret.experiments.experiment import MISSING_BOUND, OUTCOME_TTL, check_missing, check_ttl
from turret.experiments.outcomes import Recorded
from turret.json_types import AsJson, JsonMapping, JsonObject, Plain
from turret.recipe import Recipe
from turret.reference import Reference
from turret.store import Store, Version, promises
from turret.store.catalog import PRODUCTION, now
from turret.store.promises import (
    ALARM,
    NEVER,
    NOTHING_BUT_ALARM,
    ROLLBACK,
    STRICTER,
    WHEN_BROKEN,
    InputWatch,
    Promise,
    Terms,
)
from turret.tasks import Task, stored_task
from turret.tasks.calibration import Confidences, Sureness
from turret.tasks.shapes import Answer, TaskSpec
from turret.timestamp import to_minute
from turret.workspace.progress import Say, silent
from turret.workspace.reading import asked_in, read_dataset, read_labelled, training_inputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from turret.experiments.input_drift import InputTest
    from turret.experiments.risk_control import Bound, Choice, Standing, Watch
    from turret.train.asking import Asking

VALIDATION = (
    "this version has no test split, so its validation split was used, on which its temperature was fitted: the "
    "promise is optimistic; give fresh examples with --data"
)


# --- making -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromiseRequest:
    """What is asked of a promise.

    Args:
        error, confidence: shares, such as 0.02 and 0.95.
        metric: error, misses:LABEL or precision:LABEL.
        data: labelled examples; None: those that the version's training held out.
        columns: keys of a recipe's `[data]`; only with `data`.
        trained: whether the training data is read where its recipe says it is, to leave out what training used.
    """

    error: float
    confidence: float = 0.95
    metric: str = "error"
    data: str | None = None
    columns: JsonMapping = field(default_factory=dict)
    when_broken: str = ALARM
    outcome_ttl: float = OUTCOME_TTL
    missing_bound: float = MISSING_BOUND
    device: str = "auto"
    trained: bool = True

    def __post_init__(self) -> None:
        if self.when_broken not in WHEN_BROKEN:
            raise DataError(f"when_broken {self.when_broken[:40]!r}: expected {', '.join(WHEN_BROKEN)}")
        check_ttl(self.outcome_ttl)
        check_missing(self.missing_bound)


@dataclass(frozen=True)
class HeldOut:
    """The examples that a threshold is chosen on.

    Args:
        left_out: those whose texts training used too. Live texts are compared with them as well, because the most
            frequent texts are among them.
    """

    examples: Sequence[Example]
    source: str
    split: str
    notes: tuple[str, ...] = ()
    left_out: Sequence[Example] = ()

    @property
    def digest(self) -> str:
        """Of what is asked and what is right."""
        found = hashlib.sha256()
        for each in self.examples:
            found.update(json.dumps(each.parts(), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        return f"sha256:{found.hexdigest()}"


InputState = Literal["alike so far", "drifted", "not watched"]


@dataclass(frozen=True)
class InputStanding(AsJson):
    """Whether live texts are like the examples that a promise was chosen on.

    Args:
        texts: live ones that were compared, in all rounds.
        evidence: the e-value of the current round that they are not alike; `needed` warns.
        since: when they were found to have drifted.
    """

    state: InputState
    why: str
    texts: int = 0
    round: int = 0
    evidence: float = 1.0
    needed: float | None = None
    since: str | None = None


NOT_WATCHED = InputStanding("not watched", "no embeddings of its examples are kept: make the promise again")


@dataclass(frozen=True)
class PromiseStatus:
    """A promise of a version, what its outcomes say, and what was done just now."""

    version: str
    promise: Promise
    standing: Standing
    inputs: InputStanding
    answers: int  # of a server, that it covers
    decided: int  # of those
    breaks: int = 0  # promises of the version that outcomes have broken, this one included
    all_wrong: float | None = None  # share of all examples that is wrong without a threshold; known when it is made
    sureness: Sureness | None = None  # of the examples that the threshold was chosen on; where one promise is asked
    notes: tuple[str, ...] = ()
    done: tuple[str, ...] = ()

    def as_json(self) -> JsonObject:
        return {
            "version": self.version,
            **self.promise.as_json(),
            "standing": self.standing.as_json(),
            "inputs": self.inputs.as_json(),
            "live_answers": self.answers,
            "live_decided": self.decided,
            "breaks": self.breaks,
            "all_wrong": self.all_wrong,
            "notes": list(self.notes),
            "done": list(self.done),
        }


def make(store: Store, reference: str, request: PromiseRequest, say: Say) -> PromiseStatus:
    """Choose a threshold and store the promise.

    Raises:
        AdapterError: the answers of the version are not one label with a probability.
        DataError: the examples cannot carry the bound; the error says about how many would.
    """
    from turret.experiments.risk_control import Bound

    version = store.resolve(reference)
    spec = version.task
    labels = [str(each) for each in spec.get("labels") or ()]
    require_decisions(stored_task(spec), spec, str(version))
    bound = Bound.parse(request.metric, request.error, request.confidence, labels)
    held = (
        _given_examples(store, version, request, say)
        if request.data is not None
        else _held_out_examples(store, version, say)
    )
    from turret.workspace import answering  # loads torch

    with answering.mount_version(store, str(version), say, request.device) as ready:
        say(f"answering {count_of(len(held.examples), 'held-out example')}")
        found = ready.asking.answers([each.asked for each in held.examples])
        terms, sureness = choose_terms(bound, held, ready.task, found, request, str(version))
        inputs, notes = _embed_examples(ready.asking, held, say)
    with store.database().writing() as connection:
        promises.make(connection, version, terms, sureness, inputs=inputs)
    done = status(store, str(version))
    return replace(done, all_wrong=sureness.at(None).error, notes=(*held.notes, *notes))


def require_decisions(task: type[Task], spec: TaskSpec, version: str) -> None:
    """Raise AdapterError unless the answers of a version are one label with a probability."""
    labels = [str(each) for each in spec.get("labels") or ()]
    label = labels if spec.get("multi_label") else next(iter(labels), "")
    sample: Answer = {"label": label, "probabilities": dict.fromkeys(labels, 1.0)}
    if not task.calibrates or task.decision(sample) is None:
        raise AdapterError(
            f"{version} cannot make a promise: its answers are not one label with a probability, as those of classify, "
            "text_pairs and score are"
        )


def choose_terms(
    bound: Bound,
    held: HeldOut,
    task: Task,
    answers: Sequence[Answer],
    request: PromiseRequest,
    version: str,
) -> tuple[Terms, Sureness]:
    """What a promise says, and what can be drawn of the answers. Raises DataError if no threshold passes."""
    import numpy as np

    from turret.experiments.risk_control import choose_threshold

    decisions = [decision for answer in answers if (decision := task.decision(answer)) is not None]
    given, right = [label for label, _ in decisions], [str(each.output) for each in held.examples]
    probability = [each for _, each in decisions]
    found = choose_threshold(bound, given, right, np.array(probability))
    if found.threshold is None:
        raise DataError(refusal(bound, found, version))
    terms = Terms(
        metric=bound.metric,
        error=bound.error,
        confidence=bound.confidence,
        threshold=found.threshold,
        examples=found.examples,
        counted=found.counted,
        wrong=found.wrong,
        decided=found.decided,
        source=held.source,
        split=held.split,
        data_digest=held.digest,
        when_broken=request.when_broken,
        outcome_ttl=request.outcome_ttl,
        missing_bound=request.missing_bound,
    )
    agree = [answer == label for answer, label in zip(given, right, strict=True)]
    return terms, Confidences(probability, (), agree).sureness(found.threshold)


def require_carried(recipe: Recipe, dataset: Dataset, task: Task) -> None:
    """Raise an error, before a training begins, for a promise that its version could not make."""
    from turret.experiments.risk_control import Bound

    if recipe.promise is None:
        return
    require_decisions(type(task), task.spec(), recipe.name)
    Bound.parse(recipe.promise.metric, recipe.promise.error, recipe.promise.confidence, task.labels)
    _held_out(dataset, recipe)


def promise_after_training(
    recipe: Recipe, dataset: Dataset, task: Task, asking: Asking
) -> tuple[JsonObject | None, list[bytes], list[str]]:
    """The promise of a version that was just trained, for its bundle, embeddings of its examples, and warnings."""
    from turret.experiments.risk_control import Bound

    wanted = recipe.promise
    if wanted is None:
        return None, [], []
    bound = Bound.parse(wanted.metric, wanted.error, wanted.confidence, task.labels)
    held = _held_out(dataset, recipe)
    request = PromiseRequest(wanted.error, wanted.confidence, wanted.metric, when_broken=wanted.when_broken)
    found = asking.answers([each.asked for each in held.examples])
    try:
        terms, sureness = choose_terms(bound, held, task, found, request, recipe.name)
    except DataError as error:
        return None, [], [f"the version makes no promise: {error}"]
    inputs, notes = _embed_examples(asking, held, silent)
    return asdict(terms) | {"sureness": sureness.to_json()}, inputs, [*held.notes, *notes]


def embedded_text(asked: Plain | Input) -> str | None:
    """The text of a held-out example or of a live input, to be embedded; None if it is neither a text nor two."""
    return str(asked) if isinstance(asked, (str, TextPair)) else None


def _embed_examples(asking: Asking, held: HeldOut, say: Say) -> tuple[list[bytes], list[str]]:
    """Embeddings by the bare base of examples that live texts are compared with, and a note if there are none."""
    import numpy as np

    from turret.experiments import input_drift

    drawn = filter(None, (embedded_text(each.asked) for each in (*held.examples, *held.left_out)))
    texts = input_drift.reference_texts(list(drawn))
    say(f"embedding {count_of(len(texts), 'held-out example')}")
    try:
        vectors = asking.text_embeddings(texts, input_drift.MOST_TOKENS).numpy()
        kept = input_drift.pack_vectors(input_drift.distinct_vectors(vectors.astype(np.float64)))
    except (TurretError, ValueError) as error:
        return [], [f"input drift is not watched: {error}"]
    if len(kept) < input_drift.FEWEST_REFERENCES:
        fewest = input_drift.FEWEST_REFERENCES
        return [], [
            f"input drift is not watched: {count_of(len(kept), 'different text')} held out, {fewest} are needed"
        ]
    return kept, []


def refusal(bound: Bound, found: Choice, version: str) -> str:
    """Why the examples cannot carry a bound, and how many would."""
    few = f"{version}: {found.examples} held-out examples cannot carry {sentence(bound)}"
    if found.needed is None:
        return (
            f"{few}, and more of them would not: even the surest answers err too often; train longer, or promise less"
        )
    return f"{few}; about {found.needed:,} would: give more with --data, hold out more (data.test), or promise less"


def _held_out_examples(store: Store, version: Version, say: Say) -> HeldOut:
    """The examples that the version's training held out: the test split, which chose nothing."""
    lineage = version.lineage
    if not lineage.get("recipe"):
        raise DataError(
            f"{version} has no recipe that names held-out examples: give labelled examples with --data FILE"
        )
    recipe = Recipe.from_toml(str(lineage["recipe"]))
    try:
        dataset = read_dataset(store, recipe, say)
    except TurretError as error:
        raise DataError(f"the training data of {version} cannot be read ({error}): give --data FILE") from None
    if dataset.digest != lineage.get("data"):
        raise DataError(
            f"{recipe.data.source} is not what {version} was trained on, so its held-out rows are not known: give "
            "labelled examples with --data FILE"
        )
    return _held_out(dataset, recipe)


def _held_out(dataset: Dataset, recipe: Recipe) -> HeldOut:
    """The test split, which chose nothing; without one the validation split."""
    if dataset.test:
        return _unseen(dataset.test, asked_in((*dataset.train, *dataset.validation)), recipe.data.source, "test")
    if dataset.validation:
        return _unseen(dataset.validation, asked_in(dataset.train), recipe.data.source, "validation", VALIDATION)
    raise DataError(f"{recipe.name} holds no examples out, which a promise needs: set data.test, or give --data FILE")


def _given_examples(store: Store, version: Version, request: PromiseRequest, say: Say) -> HeldOut:
    """The examples of a file, without those that were trained on."""
    labelled = read_labelled(store, version, str(request.data), request.columns)
    notes, examples = list(labelled.notes), list(labelled.examples)
    used = training_inputs(store, version, say) if request.trained else None
    if used is not None:
        return _unseen(examples, used, labelled.data.source, "given", *notes)
    notes.append(f"the training data of {version} is not here: nothing says whether these examples are in it")
    return HeldOut(examples, labelled.data.source, "given", tuple(notes))


def _unseen(examples: Sequence[Example], used: Collection[str], source: str, split: str, *notes: str) -> HeldOut:
    """The examples whose texts training did not use. Raises DataError if there are none."""
    fresh = [each for each in examples if str(each.asked) not in used]
    if not fresh:
        raise DataError(f"{source[:80]} has no example that training did not use: give other labelled examples")
    left_out = [each for each in examples if str(each.asked) in used]
    if left_out:
        notes = (*notes, f"{count_of(len(left_out), 'example')} left out, because training used the same texts")
    return HeldOut(fresh, source, split, notes, left_out)


# --- watching ---------------------------------------------------------------------------------------------------------


@dataclass
class PromiseMemory:
    """The evidence of the outcomes and the texts of one promise that were read so far."""

    watch: Watch
    last: int = 0  # id of the last outcome
    inputs: InputMemory | None = None


@dataclass
class InputMemory:
    """The evidence of the texts of one round."""

    watch: InputWatch
    test: InputTest
    rows: int = 0  # that were read
    last: int = 0  # id of the last of them


def status(store: Store, reference: str) -> PromiseStatus:
    """The promise of a version, and what its outcomes say. Changes nothing. Raises NotFound."""
    version = store.resolve(reference)
    with store.database().reading() as connection:
        promise = promises.of_version(connection, version)
        sureness = promises.sureness_of(connection, promise)
    return replace(_status(store, promise, str(version), {}), sureness=sureness)


def list_promises(store: Store, memories: dict[int, PromiseMemory]) -> list[PromiseStatus]:
    """Every promise in force, with what its outcomes say.

    Args:
        memories: by the id of a promise; kept by the caller so that the next call reads only new outcomes.
    """
    with store.database().reading() as connection:
        found = [(each, promises.versions_of(connection, each)) for each in promises.in_force(connection)]
    for gone in set(memories) - {promise.id for promise, _ in found}:
        del memories[gone]
    return [_status(store, promise, versions[0], memories) for promise, versions in found if versions]


def settle(store: Store, memories: dict[int, PromiseMemory]) -> list[PromiseStatus]:
    """Look at all promises in force, and do what those ask that outcomes have broken. Returns all of them.

    Also warns if live texts are unlike the examples of a promise, and begins a new round once these are used up.
    """
    return [
        _settle_promise(store, _record_drift(store, each, memories), memories)
        for each in list_promises(store, memories)
    ]


def record(store: Store, told: Iterable[tuple[str, Plain]]) -> list[Recorded]:
    """Record outcomes of answers that promises cover: (receipt, value) each."""
    with store.database(make=True).writing() as connection:
        return [Recorded(*promises.record(connection, receipt, value)) for receipt, value in told]


def _status(store: Store, promise: Promise, version: str, memories: dict[int, PromiseMemory]) -> PromiseStatus:
    from turret.experiments.risk_control import Watch, promise_state

    memory = memories.setdefault(promise.id, PromiseMemory(Watch(bound_of(promise), promise.missing_bound)))
    with store.database().reading() as connection:
        new = promises.list_outcomes(connection, promise, memory.last)
        counts = promises.counts(connection, promise)
        answers, decided = promises.count_decided(connection, promise)
        breaks = promises.count_broken(connection, promise)
        inputs = _inputs(connection, promise, memory)
    memory.watch, memory.last = memory.watch.after(wrong_of(new)), new[-1].id if new else memory.last
    found = promise_state(
        memory.watch,
        silent=counts.silent / max(counts.answers, 1),
        missing=counts.missing / max(counts.due, 1),
    )
    if promise.broken is not None:
        found = replace(found, state="broken", why=str((promise.verdict or {}).get("why", found.why)))
    return PromiseStatus(version, promise, found, inputs, answers, decided, breaks=breaks)


def _inputs(connection: Connection, promise: Promise, memory: PromiseMemory) -> InputStanding:
    """Whether live texts are like the examples of a promise; not watched if what is kept of them is damaged."""
    try:
        return _input_standing(connection, promise, memory)
    except Corrupt as error:
        memory.inputs = None
        return replace(NOT_WATCHED, why=str(error))


def _input_standing(connection: Connection, promise: Promise, memory: PromiseMemory) -> InputStanding:
    """As `_inputs`, with the texts that came since the last look. Raises Corrupt."""
    from turret.experiments import input_drift

    watch = promises.watch_of(connection, promise.id)
    if watch is None:
        return NOT_WATCHED
    needed = input_drift.needed_e_value(1 - promise.confidence, watch.round)
    if watch.drifted is not None:
        memory.inputs, evidence = None, watch.evidence or needed
        why = f"have drifted since {to_minute(watch.drifted)}: e-value {evidence:.3g}, and {needed:.3g} warns"
        return InputStanding("drifted", why, watch.earlier, watch.round, evidence, needed, watch.drifted)
    if memory.inputs is None or memory.inputs.watch != watch:
        rows = [row for _, row in promises.vectors_of(connection, watch, promises.REFERENCE_ROUND)]
        memory.inputs = InputMemory(watch, input_drift.InputTest(input_drift.unpack_vectors(rows, watch.size)))
    seen = memory.inputs
    new = promises.vectors_of(connection, watch, watch.round, seen.last)
    if new:
        seen.test.see(input_drift.unpack_vectors([row for _, row in new], watch.size))
        seen.rows, seen.last = seen.rows + len(new), new[-1][0]
    texts = watch.earlier + seen.test.pairs
    why = f"like the held-out ones so far, {count_of(texts, 'text')} seen"
    return InputStanding("alike so far", why, texts, watch.round, seen.test.peak, needed)


def bound_of(promise: Promise) -> Bound:
    from turret.experiments.risk_control import Bound

    labels = [] if promise.label is None else [promise.label]
    return Bound.parse(promise.metric, promise.error, promise.confidence, labels)


def wrong_of(told: Sequence[promises.Told]) -> NDArray[np.bool_]:
    """Which of these outcomes are of answers that were decided wrongly: (N,)."""
    import numpy as np

    return np.array([bool(each.wrong and each.decided) for each in told], dtype=bool)


# --- acting -----------------------------------------------------------------------------------------------------------


def _settle_promise(store: Store, found: PromiseStatus, memories: Mapping[int, PromiseMemory]) -> PromiseStatus:
    """Do what a promise asks for, if outcomes have broken it and this was not done yet."""
    promise = found.promise
    if found.standing.state != "broken" or promise.broken is not None:
        return found
    why = f"the promise of {found.version} is broken: {found.standing.why}"
    rolled = _rolled_back(store, promise) if promise.when_broken == ROLLBACK else ""
    with store.database().writing() as connection:
        current = promises.of_digest(connection, promise.digest)
        if current is None or current.id != promise.id:
            return found
        stricter = _stricter(promise, memories[promise.id], promises.list_outcomes(connection, promise), found.version)
        did = rolled or (_says(stricter[0]) if stricter is not None else "")
        said = {"why": why, "did": did or NOTHING_BUT_ALARM, "promise": sentence(promise)}
        verdict: JsonObject = {**said, "standing": found.standing.as_json()}
        if not promises.mark_broken(connection, promise, verdict):
            return found
        if stricter is not None:
            version = store.resolve(found.version)
            promises.make(connection, version, *stricter, why={"why": why})
    return replace(
        found, promise=replace(promise, broken=now(), verdict=verdict), done=(*found.done, *filter(None, (why, did)))
    )


def _record_drift(store: Store, found: PromiseStatus, memories: Mapping[int, PromiseMemory]) -> PromiseStatus:
    """Record that live texts have drifted, if the evidence says so; it changes nothing else about the promise."""
    inputs, seen = found.inputs, memories[found.promise.id].inputs
    if seen is None or inputs.needed is None:
        return found
    watch = seen.watch
    if inputs.evidence < inputs.needed:
        if seen.test.over or seen.rows >= promises.SPARE * watch.examples:
            with store.database().writing() as connection:
                promises.begin_round(connection, watch, seen.test.pairs)
        return found
    why = (
        f"the texts that {found.version} gets are unlike the examples that its promise was chosen on: e-value "
        f"{inputs.evidence:.3g} after {count_of(inputs.texts, 'text')}, and {inputs.needed:.3g} warns"
    )
    said = {"why": why, "did": NOTHING_BUT_ALARM, "promise": sentence(found.promise)}
    with store.database().writing() as connection:
        evidence, texts = inputs.evidence, inputs.texts
        if not promises.mark_drifted(connection, found.promise, watch, said, evidence=evidence, texts=texts):
            return found
        inputs = _inputs(connection, found.promise, memories[found.promise.id])
    return replace(found, inputs=inputs, done=(*found.done, why))


def _stricter(
    promise: Promise, memory: PromiseMemory, told: Sequence[promises.Told], version: str
) -> tuple[Terms, Sureness] | None:
    """A promise with a stricter threshold, from the outcomes since the old one probably broke."""
    import numpy as np

    from turret.experiments.risk_control import choose_threshold

    if promise.when_broken != STRICTER:
        return None
    recent = told[memory.watch.since :]
    given, right = [each.label for each in recent], [each.right_label or "" for each in recent]
    probability = [each.probability for each in recent]
    found = choose_threshold(bound_of(promise), given, right, np.array(probability))
    threshold = NEVER if found.threshold is None else max(found.threshold, promise.threshold)
    terms = {each.name: getattr(promise, each.name) for each in fields(Terms)}
    made = Terms(
        **terms
        | {
            "threshold": threshold,
            "examples": found.examples,
            "counted": found.counted,
            "wrong": found.wrong,
            "decided": found.decided,
            "source": f"outcomes of {version}",
            "split": "outcomes",
        }
    )
    agree = [not each.wrong for each in recent]
    return made, Confidences(probability, (), agree).sureness(threshold)


def _says(stricter: Terms) -> str:
    if stricter.threshold >= NEVER:
        return f"its {count_of(stricter.examples, 'outcome')} carry no threshold, so every answer goes to a person now"
    return f"its threshold is {stricter.threshold:.4g} now, chosen from {count_of(stricter.examples, 'outcome')}"


def _rolled_back(store: Store, promise: Promise) -> str:
    """Move `production` back, of each name where it names the version. Says what was done or why not."""
    with store.database().reading() as connection:
        references = promises.versions_of(connection, promise)
    said = []
    for reference in references:
        name = reference.partition("@")[0]
        try:
            if str(store.resolve(Reference(name, alias=PRODUCTION))) == reference:
                said.append(f"{name}@{PRODUCTION} names {store.rollback(name).version} again")
        except (NotFound, Corrupt) as error:
            said.append(f"not rolled back: {error}")
    return "; ".join(said) or f"not rolled back: {PRODUCTION} does not name it"


# --- in words ---------------------------------------------------------------------------------------------------------


def sentence(promise: Terms | Bound) -> str:
    """What a promise says: `at most 2% wrong among what it decides, at 95% confidence`."""
    of = {
        "error": "wrong among what it decides",
        "precision": f"wrong among what it decides as {promise.label}",
        "misses": f"of the texts of {promise.label} decided as something else",
    }
    kind = promise.metric.partition(":")[0]
    return f"at most {100 * promise.error:g}% {of[kind]}, at {100 * promise.confidence:g}% confidence"


def threshold(promise: Terms) -> str:
    if promise.threshold >= NEVER:
        return "none passes: every answer goes to a person"
    if promise.threshold <= 0:
        return "none needed: every answer is decided"
    return f"{promise.threshold:.4g}: an answer with a lower probability goes to a person"


def cost(promise: Terms) -> str:
    """The share of the examples that is decided, and what was wrong."""
    share = promise.decided / max(promise.examples, 1)
    decided = f"{percentage(share)} of {promise.examples:,} examples"
    return f"{decided}; {promise.wrong} of {promise.counted:,} that count were wrong"


def chosen_on(promise: Terms) -> str:
    """Where the examples are from."""
    which = {"test": "the test split of ", "validation": "the validation split of "}.get(promise.split, "")
    return f"{which}{short_source(promise.source)} ({promise.data_digest[:19]})"
