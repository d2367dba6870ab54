"""Answer with a stored version: load its base, mount the adapter, then ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from turret import bases
from turret.adapters import Adapter, StoredAdapter, require_base
from turret.data import Input
from turret.engine import untrained
from turret.engine.core import Engine
from turret.engine.untrained import Question, Untrained
from turret.errors import AdapterError, BadReference, DataError, NotFound
from turret.json_types import JsonMapping
from turret.process import Closing
from turret.reference import Reference
from turret.store import Store, Version, promises
from turret.store.promises import Promise
from turret.tasks import Task, stored_task, task_from_spec
from turret.tasks.calibration import Calibration, require_calibration
from turret.tasks.shapes import Answer
from turret.train.asking import Asking
from turret.workspace.progress import Say, silent
from turret.workspace.resident import ALONE, OwnProcess, load_base, read_adapter

# --- predict options --------------------------------------------------------------------------------------------------
# The options of a prediction, and whether a version gives what they ask for. Loads no torch.


@dataclass(frozen=True)
class PredictOptions:
    """The options of a prediction.

    Args:
        columns: keys of a recipe's `[data]`, such as {"text": "body"}, which override those of the version's training.
        bare: ask the base without the adapter.
        top: the number of labels to write, the most probable first.
        coverage: also write sets of labels with this coverage.
        device: where the base computes.
    """

    columns: JsonMapping = field(default_factory=dict)
    bare: bool = False
    top: int = 1
    coverage: float | None = None
    device: str = "auto"


def check_options(version: Version, top: int, coverage: float | None) -> None:
    """Check before anything is loaded that the version gives what these options ask for."""
    if top < 1:
        raise DataError(f"--top {top}: expected 1 or more")
    task = stored_task(version.task)
    if top > 1 and not task.ranks_labels:
        raise AdapterError(f"{version} gives no probability of labels, which --top {top} needs: ask it without --top")
    if coverage is not None:
        require_coverage(version, coverage)


def require_coverage(version: Version, coverage: float) -> None:
    """Check before anything is loaded that a version gives sets of labels with this coverage.

    Raises:
        AdapterError: it has no calibration, or it generates text.
        DataError: its validation examples are too few for this coverage.
    """
    spec = version.task
    task, fitted = stored_task(spec), spec.get("calibration")
    if not task.ranks_labels:
        raise AdapterError(f"{version} gives no probability of labels: ask it without coverage")
    require_calibration(None if fitted is None else Calibration.from_json(fitted), str(version)).threshold(coverage)


def ranked_labels(answer: Answer) -> list[tuple[str, float]]:
    """The labels of an answer with their probabilities, the most probable first; none for a text."""
    probabilities = answer.get("probabilities")
    if not isinstance(probabilities, Mapping):
        return []
    return sorted(((str(label), float(p)) for label, p in probabilities.items()), key=lambda each: -each[1])


def other_labels(task: Task | type[Task], answer: Answer) -> list[tuple[str, float]]:
    """The labels that are not answered with their probabilities, the most probable first.

    The most probable label may be among them: `score` answers the median level.
    """
    given = task.prediction_of(answer)
    own = given if isinstance(given, list) else [given]
    return [(label, chance) for label, chance in ranked_labels(answer) if label not in own]


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mounted(Closing):
    """A stored version on its base, or the base alone, ready to be asked. A context manager, which ends its engine."""

    version: Version | None  # None: the base alone
    asking: Asking
    promise: Promise | None = None  # of the version

    def with_abstain(self, answer: Answer) -> Answer:
        """The answer, with `abstain` if the version has a promise."""
        if self.promise is None:
            return answer
        return answer | {"abstain": self.promise.abstains(type(self.task), answer)}

    @property
    def task(self) -> Task:
        """How it reads and answers texts."""
        return self.asking.task

    def close(self) -> None:
        """End its engine."""
        self.asking.close()


def mount_version(
    store: Store,
    reference: str,
    say: Say = silent,
    device: str = "auto",
    place: OwnProcess = ALONE,
    *,
    judged: bool = False,
) -> Mounted:
    """Load a version and its base. Closing it ends the engine that answers.

    Args:
        device: where the base computes; see `bases.choose_device`.
        place: where the base may be in memory already.
        judged: whether it is measured, which needs the version that a preference is compared with.

    Raises:
        AdapterError: the version does not store its task.
        DeviceError: the device is not there, or the base does not fit.
        WrongBase: the weights of the loaded base are not those that the adapter was trained on.
    """
    version, adapter = read_adapter(store, reference)
    if not adapter.task:
        raise AdapterError(f"{version} does not store its task, so it cannot answer: train it again")
    say(f"loading {adapter.base.id}")
    base = load_base(adapter, device=device, place=place)
    require_base(adapter, base.fingerprint)
    if judged:
        base = dataclasses.replace(base, reference=_compared_with(store, version, adapter))
    with store.database().reading() as connection:
        promise = promises.of_digest(connection, version.digest)
    return Mounted(version, Asking(base, adapter, task_from_spec(adapter.task, base.tokenizer)), promise)


def _compared_with(store: Store, version: Version, adapter: Adapter) -> StoredAdapter | None:
    """The version that a preference was compared with in its training; None: no version."""
    name = adapter.task.get("reference")
    if name is None:
        return None
    try:
        found, reference = read_adapter(store, str(name))
    except NotFound as error:
        raise AdapterError(f"{version} learnt by comparing with {name}, which measuring it needs: {error}") from error
    if found.digest != (learnt := adapter.lineage.get("reference")):
        raise AdapterError(
            f"{version} learnt by comparing with {name} ({str(learnt)[:19]}), and {name} here is another version "
            f"({found.digest[:19]}): measure it in the store where it was trained"
        )
    return StoredAdapter(str(found), found.digest, reference)


def predict(
    store: Store,
    reference: str,
    texts: Sequence[Input],
    say: Say = silent,
    *,
    bare: bool = False,
    coverage: float | None = None,
    device: str = "auto",
) -> list[Answer]:
    """One answer per text, in order."""
    if coverage is not None:
        require_coverage(store.resolve(reference), coverage)
    with mount_version(store, reference, say, device) as ready:
        many = f"{len(texts)} texts" if len(texts) > 1 else ""
        for note in ready.asking.notes:
            say(note)
        say(f"answering {many}".rstrip() + _where(ready))
        return answers(ready, texts, bare=bare, coverage=coverage)


def answers(
    ready: Mounted, texts: Sequence[Input], *, bare: bool = False, coverage: float | None = None
) -> list[Answer]:
    """One answer per text, in order, from a mounted version.

    Args:
        texts: conversations too, if the version generates.
        bare: ask the base without the adapter; only for a task that generates.
        coverage: also give sets of labels; only for a version that `require_coverage` accepts.
    """
    found = ready.asking.answers(texts, bare=bare, coverage=coverage)
    return found if bare else [ready.with_abstain(each) for each in found]


def _where(ready: Mounted) -> str:
    """Where its base computes, for a stage's text; empty for the CPU."""
    device = ready.asking.base.model.device
    return "" if device.type == "cpu" else f" on {device}"


# --- questions without training ---------------------------------------------------------------------------------------


def decide(
    store: Store,
    model: str,
    texts: Sequence[str],
    question: Question,
    say: Say = silent,
    *,
    prior: bool = False,
    device: str = "auto",
) -> list[Untrained]:
    """What a base, alone or with a version that was not trained for the question, answers about each text.

    Args:
        model: a stored version, or else a base.

    Raises:
        AdapterError: the version was trained to classify.
    """
    adapter, task, base = None, None, None
    if (version := _stored_version(store, model)) is not None:
        version, adapter = read_adapter(store, str(version))
        own = stored_task(adapter.task)
        if not own.generates and own.request != "embed":
            raise AdapterError(f"{version} was trained for its own question ({own.kind}): ask it by turret predict")
        say(f"loading {adapter.base.id}")
        base = load_base(adapter, device=device)
        require_base(adapter, base.fingerprint)
        task = task_from_spec(adapter.task, base.tokenizer)
    else:
        say(f"loading {model}")
        base = bases.load(model, device=device)
    with Engine(base, None) as engine:
        named = None if adapter is None else engine.hold(model, 1, adapter)
        say(f"answering {len(texts)} texts")
        return untrained.decide(engine, question, texts, named, task, prior=prior)


def _stored_version(store: Store, model: str) -> Version | None:
    """The version that a name means; None if it is no name of a version."""
    try:
        reference = Reference.parse(model)
    except BadReference:
        return None
    return store.resolve(reference)
