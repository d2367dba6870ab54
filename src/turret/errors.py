"""Every error this package raises on purpose, on one page. Knows nothing else.

TurretError                 anything a user can mend; its text is one line: what failed, expected, given, remedy
├── BadReference            a name, version, alias or gate that cannot be parsed
├── RecipeError             a recipe that cannot be read or makes no sense
├── DataError               a table, column, label or split that is not usable
├── BaseModelError          a base that cannot be found, read or used
│   └── UnknownFamily       an architecture without an entry in `families`
├── AdapterError            tensors or configuration of an adapter that do not fit
│   ├── BundleError         a bundle on disk that is broken, foreign or unsafe
│   └── WrongBase           an adapter offered to another base than its own
├── PreflightRefused        the plan found something that would waste the run
├── TrainingError           training stopped
│   ├── LossNotFinite       NaN or infinity in the loss; the last good state is kept
│   ├── OutOfMemory         the machine could not hold the step
│   ├── Interrupted         stopped by the user; resumable
│   └── ProofFailed         the stored bundle did not reproduce the trained model
├── ExperimentError         an experiment that cannot be begun, changed or carried out as it was asked
│   └── BadExperiment       settings of an experiment that make no sense
├── StoreError              the store could not be opened, read or written
│   ├── BadLocation         a `--store` that is neither a folder nor the URL of one
│   ├── NotFound            no such adapter, version or alias
│   ├── InUse               a version that something still needs
│   ├── GateFailed          a version that does not pass what its alias asks for
│   │   └── ReplayNeeded    golden examples that were never put to the version
│   └── Corrupt             stored bytes do not match their digest
├── EngineError             the engine did not answer a request
│   ├── Busy                too much is waiting; it says when to come again
│   ├── Draining            the engine takes no new request: it is about to stop, or has stopped
│   ├── Cancelled           the request was withdrawn
│   ├── DeadlineExceeded    the request was not answered in the time it was given
│   ├── NoRoom              an adapter or a text is larger than what the engine was given to hold it
│   └── NotFinite           an adapter's answer was not a number
├── ServeRefused            a server that must not start as it was asked to
└── RequestError            an HTTP request that is not carried out
    ├── BadRequest          it cannot be read, or asks for what is not offered
    ├── Unauthorized        no token, or none that is known
    ├── Forbidden           a token without the scope
    ├── TooLarge            more bytes than the limit
    ├── TooSlow             its bytes did not come in time
    ├── WrongMediaType      a body that is not JSON
    └── QuotaSpent          a quota is used up; `retry_after` says for how many seconds
"""

from __future__ import annotations

from collections.abc import Iterable

LINE = 300  # characters, at most, of the line that an error is printed as


def one_line(text: str, most: int = LINE) -> str:
    """The text on one line of at most `most` characters: without control characters, and cut in the middle.

    What failed is at the start of an error and the remedy at its end, so both stay. Long words are cut first.
    """
    if len(text) > 20 * most:
        text = f"{text[: 10 * most]} {text[-10 * most :]}"
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > most:
        line = " ".join(_cut(word, 80) for word in line.split(" "))
    return _cut(line, most)


def shown(value: object, most: int = 60) -> str:
    """A value that somebody gave, as an error shows it: its repr on one line, cut in the middle."""
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list in lists in lists
        return f"a very large {type(value).__name__}"


def listed(values: Iterable[str], most: int = 100) -> str:
    """Names that somebody gave, quoted, with commas: as many as fit, and how many more there are."""
    names, line = list(values), ""
    for place, name in enumerate(names):
        longer = f"{line}, {shown(name, 40)}" if line else shown(name, 40)
        if place and len(longer) > most:
            return f"{line} and {len(names) - place} more"
        line = longer
    return line or "none"


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


class TurretError(Exception):
    """Base of all; `exit_status` is what the command line returns for it."""

    exit_status = 1


class BadReference(TurretError):
    """A reference such as `sentiment@3`, or a gate such as `accuracy>=0.9`, is malformed."""

    exit_status = 2


class RecipeError(TurretError):
    """A recipe cannot be read, has an unknown key or a value out of range."""

    exit_status = 2


class DataError(TurretError):
    """A table, column, label or split is not usable."""


class BaseModelError(TurretError):
    """A base cannot be found, read or used."""


class UnknownFamily(BaseModelError):
    """The architecture has no entry in `turret.families`."""


class AdapterError(TurretError):
    """Tensors or configuration of an adapter do not fit."""


class BundleError(AdapterError):
    """A bundle on disk is broken, foreign or unsafe."""


class WrongBase(AdapterError):
    """An adapter was offered to a base with another fingerprint."""


class PreflightRefused(TurretError):
    """The plan found something that would waste the run."""


class TrainingError(TurretError):
    """Training stopped before its end."""


class LossNotFinite(TrainingError):
    """The loss became NaN or infinite; the last good state is kept."""


class OutOfMemory(TrainingError):
    """The machine could not hold a training step."""


class Interrupted(TrainingError):
    """The user stopped the run; it can be resumed."""

    exit_status = 130


class ProofFailed(TrainingError):
    """The bundle read back in a fresh process did not reproduce the trained model."""


class ExperimentError(TurretError):
    """An experiment cannot be begun, changed or carried out as it was asked."""


class BadExperiment(ExperimentError):
    """Settings of an experiment make no sense: a share, a metric, a margin, an arm."""

    exit_status = 2


class StoreError(TurretError):
    """The store could not be opened, read or written."""


class BadLocation(StoreError):
    """What is said to be a store is neither a folder nor a catalog's URL with its files; never repeats a password."""

    exit_status = 2


class NotFound(StoreError):
    """No such adapter, version, alias or run."""


class InUse(StoreError):
    """An alias names the version, or another version was made from it."""


class GateFailed(StoreError):
    """A version does not pass the gates of an alias: its stored metrics, or its answers to golden examples."""


class ReplayNeeded(GateFailed):
    """Golden examples that an alias asks for were never put to the version; `sets` has their digests."""

    def __init__(self, message: str, sets: tuple[str, ...]) -> None:
        super().__init__(message)
        self.sets = sets


class Corrupt(StoreError):
    """Stored bytes do not match their digest."""


class EngineError(TurretError):
    """The engine did not answer a request."""


class Busy(EngineError):
    """Too much is waiting already; `retry_after` says in how many seconds to come again."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Draining(EngineError):
    """The engine takes no new request: it is about to stop, or has stopped."""


class Cancelled(EngineError):
    """The request was withdrawn before it was answered."""


class DeadlineExceeded(EngineError):
    """The request was not answered in the time it was given."""


class NoRoom(EngineError):
    """An adapter or a text needs more than the engine was given to hold it."""


class NotFinite(EngineError):
    """An adapter's logits were NaN or infinite for a row."""


class ServeRefused(TurretError):
    """A server must not start as it was asked to."""

    exit_status = 2


class RequestError(TurretError):
    """An HTTP request is not carried out, or a server cannot be asked."""


class BadRequest(RequestError):
    """A request cannot be read, or asks for what is not offered."""


class Unauthorized(RequestError):
    """No token came with the request, or none that is known."""


class Forbidden(RequestError):
    """The token lacks the scope."""


class TooLarge(RequestError):
    """The request has more bytes than the limit."""


class TooSlow(RequestError):
    """The bytes of the request did not come in time."""


class WrongMediaType(RequestError):
    """The body is not JSON."""


class QuotaSpent(RequestError):
    """A quota of requests or tokens a minute is used up; `retry_after` says in how many seconds to come again."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after
