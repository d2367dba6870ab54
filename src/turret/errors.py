"""All errors that this package raises on purpose.

TurretError                 base of all; its text is one line: what failed, expected, given, remedy
├── BadArgument             a Python call with an unknown, missing or ill-typed argument
├── NotInstalled            a package that a call needs is not installed
├── BadReference            a name, version, alias or gate that cannot be parsed
├── RecipeError             a recipe with an unknown key or an invalid value, or one that cannot be read
├── DataError               a table, column, label or split that cannot be used
│   ├── NoHeader            a CSV file whose first line looks like data
│   └── SeveralLabels       two columns fit equally well as the label; `columns` names them
├── BaseModelError          a base that cannot be found, read or used
│   └── UnknownFamily       an architecture without an entry in `families`
├── DeviceError             a device that is not there, or on which the base cannot compute
├── AdapterError            tensors or configuration of an adapter that do not fit
│   ├── BundleError         a bundle on disk that is broken, foreign or unsafe
│   └── WrongBase           the adapter belongs to another base
├── HubError                the Hub cannot be reached or refuses a request
├── PreflightRefused        the plan found a problem that would waste the run
├── TrainingError           training stopped
│   ├── LossNotFinite       NaN or infinity in the loss; the last good state is kept
│   ├── OutOfMemory         a training step did not fit into memory
│   ├── Interrupted         stopped by the user; resumable
│   ├── CheckpointMismatch  a checkpoint of another recipe, data, base, library or device
│   │   └── CheckpointTooOld  a checkpoint of an older turret; the run starts over
│   └── ProofFailed         the stored bundle did not reproduce the trained model
├── ExperimentError         an experiment that cannot be started, changed or settled as requested
│   └── BadExperiment       invalid settings of an experiment
├── StoreError              the store could not be opened, read or written
│   ├── BadLocation         a `--store` that is neither a folder nor a valid URL
│   ├── NotFound            no such adapter, version, alias or run
│   ├── InUse               a version that is still needed
│   ├── GateFailed          a version that does not pass the gates of an alias
│   │   └── ReplayNeeded    golden examples were not yet replayed on the version
│   ├── QueueFull           a tenant has as many waiting trainings as it may
│   ├── LeaseLost           another process took over the work of this one, which was silent too long
│   └── Corrupt             stored bytes do not match their digest
├── EngineError             the engine did not answer a request
│   ├── Busy                the queue is full; `retry_after` has the seconds to wait
│   ├── Draining            the engine takes no new request, because it stops or has stopped
│   ├── Cancelled           the request was withdrawn
│   │   └── Disconnected    the client left before it had its answer
│   ├── DeadlineExceeded    the request was not answered before its deadline
│   ├── NoRoom              an adapter or a text is larger than the engine's limit
│   └── NotFinite           an adapter's output was NaN or infinite
├── ServeRefused            a server that must not start with these settings
└── RequestError            an HTTP request that is not carried out
    ├── BadRequest          a request that cannot be read, or asks for something that does not exist
    ├── Unauthorized        no token, or an unknown one
    ├── Forbidden           a token without the scope
    ├── TooLarge            more bytes than the limit
    ├── HeadersTooLarge     more bytes of headers than the limit
    ├── TooSlow             the body did not arrive in time
    ├── WrongMediaType      a body that is not JSON
    └── QuotaSpent          a quota is used up; `retry_after` has the seconds to wait
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

LINE = 300  # characters of the line that the command line prints for an error


def printable(text: str) -> str:
    """A text with its control characters replaced, so that it cannot move the cursor or change colours."""
    return "".join(c if c.isprintable() else " " for c in text)


def one_line(text: str, most: int = LINE) -> str:
    """Put a text on one line without control characters, and shorten it in the middle to `most` characters.

    An error names the failure first and the remedy last, so both ends are kept. Long words are shortened first.
    """
    if len(text) > 20 * most:
        text = f"{text[: 10 * most]} {text[-10 * most :]}"
    line = " ".join(printable(text).split())
    if len(line) > most:
        line = " ".join(_cut(word, 80) for word in line.split(" "))
    return _cut(line, most)


def quote(value: object, most: int = 60) -> str:  # object: every value has a repr
    """Format any value for an error: its `repr` on one line, shortened in the middle to `most` characters."""
    try:
        return one_line(repr(value), most)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a deeply nested list
        return f"a very large {type(value).__name__}"


@contextmanager
def require_package(what: str, package: str, remedy: str, kind: type[TurretError]) -> Iterator[None]:
    """Turn an ImportError of the block into an error of this kind.

    Args:
        what: needs the package.
        remedy: after the error's text; the extra to install, and what to do instead.
    """
    try:
        yield
    except ImportError as error:
        raise kind(f"{what} needs {package} ({error}): {remedy}") from None


def quote_all(values: Iterable[str], most: int = 100) -> str:
    """Quote names and join them with commas, as many as fit in `most` characters, then count the rest."""
    names, line = list(values), ""
    for place, name in enumerate(names):
        longer = f"{line}, {quote(name, 40)}" if line else quote(name, 40)
        if place and len(longer) > most:
            return f"{line} and {len(names) - place} more"
        line = longer
    return line or "none"


def count_of(count: int, noun: str, verb: str = "") -> str:
    """A number with its noun, in the plural unless it is 1, and with `is` or `are`: `1 row is`, `2 rows are`."""
    words = f"{count} {noun}" if count == 1 else f"{count} {noun}s"
    return f"{words} {'is' if count == 1 else 'are'} {verb}" if verb else words


def join_sentences(sentences: Sequence[str], most: int = 230) -> str:
    """Join the first sentences up to `most` characters, and say how many more there are."""
    line = one_line(sentences[0], most)
    for place, sentence in enumerate(sentences[1:], 1):
        if len(line) + len(sentence) > most:
            return f"{line}; and {len(sentences) - place} more"
        line = f"{line}; {sentence}"
    return line


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    end = (most - 3) // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


class TurretError(Exception):
    """Base of all errors of this package: its text is one line. The command line exits with `exit_status`."""

    exit_status = 1

    def __str__(self) -> str:
        return one_line(super().__str__(), 4 * LINE)  # long paths leave the remedy whole


class BadArgument(TurretError):
    """A Python call has an unknown or missing argument, or one of another type."""

    exit_status = 2


class NotInstalled(TurretError):
    """A package that a call needs is not installed."""


class BadReference(TurretError):
    """A reference such as `sentiment@3`, or a gate such as `accuracy>=0.9`, cannot be parsed."""

    exit_status = 2


class RecipeError(TurretError):
    """A recipe cannot be read, or has an unknown key or a value out of range."""

    exit_status = 2


class DataError(TurretError):
    """A table, column, label or split cannot be used."""


class ContextLengthExceeded(DataError):
    """A prompt, or a prompt and its answer, has more tokens than the base or the adapter takes."""


class NoHeader(DataError):
    """The first line of a CSV file looks like data, and the recipe does not say what it is."""


class SeveralLabels(DataError):
    """Two columns or more fit equally well as the label, and only the user knows which one is meant.

    Args:
        columns: their names with some of their classes, the best first.
    """

    def __init__(self, message: str, columns: Mapping[str, Sequence[str]]) -> None:
        super().__init__(message)
        self.columns = columns


class BaseModelError(TurretError):
    """A base cannot be found, read or used."""


class UnknownFamily(BaseModelError):
    """The architecture has no entry in `turret.families`."""


class DeviceError(TurretError):
    """A device is not there, is misspelt, or cannot compute what is asked of it."""

    exit_status = 2


class AdapterError(TurretError):
    """Tensors or configuration of an adapter do not fit."""


class BundleError(AdapterError):
    """A bundle on disk is broken, foreign or unsafe."""


class WrongBase(AdapterError):
    """The adapter was made for a base with another fingerprint."""


class HubError(TurretError):
    """The Hub cannot be reached, or refuses a request. `unreachable`: it was not asked, or did not answer."""

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


class PreflightRefused(TurretError):
    """The plan found a problem that would waste the run."""


class TrainingError(TurretError):
    """Training stopped before it finished."""


class LossNotFinite(TrainingError):
    """The loss became NaN or infinite; the last good state is kept."""


class OutOfMemory(TrainingError):
    """A training step did not fit into memory."""


class Interrupted(TrainingError):
    """The user stopped the run; it can be resumed."""

    exit_status = 130


class CheckpointMismatch(TrainingError):
    """A checkpoint belongs to another recipe, data, base, library or device, so the run cannot resume from it."""


class CheckpointTooOld(CheckpointMismatch):
    """A checkpoint has the format of an older turret, whose steps were others, so the run starts over."""


class ProofFailed(TrainingError):
    """A fresh process that read the stored bundle did not reproduce the trained model."""


class ExperimentError(TurretError):
    """An experiment cannot be started, changed or settled as requested."""


class BadExperiment(ExperimentError):
    """A setting of an experiment is invalid: a share, a metric, a margin or an arm."""

    exit_status = 2


class StoreError(TurretError):
    """The store could not be opened, read or written.

    Attributes:
        outage: whether the catalog or the place of the files did not answer, so that the same may succeed later.
    """

    def __init__(self, text: str = "", *, outage: bool = False) -> None:
        super().__init__(text)
        self.outage = outage


class BadLocation(StoreError):
    """A `--store` is neither a folder nor a catalog URL with `files`. The text never contains a password."""

    exit_status = 2


class NotFound(StoreError):
    """No such adapter, version, alias or run."""


class InUse(StoreError):
    """An alias or a running experiment names the version, or another version was made from it."""


class GateFailed(StoreError):
    """A version does not pass the gates of an alias: its stored metrics or its golden examples."""


class ReplayNeeded(GateFailed):
    """Golden examples of an alias were not yet replayed on the version; `sets` has their digests."""

    def __init__(self, message: str, sets: tuple[str, ...]) -> None:
        super().__init__(message)
        self.sets = sets


class QueueFull(StoreError):
    """A tenant has as many waiting trainings as it may."""


class LeaseLost(StoreError):
    """Another process took over the work of this one, which had been silent for too long."""


class Corrupt(StoreError):
    """Stored bytes do not match their digest."""


class EngineError(TurretError):
    """The engine did not answer a request."""


class Busy(EngineError):
    """The queue of the engine is full; `retry_after` is the number of seconds to wait."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Draining(EngineError):
    """The engine takes no new request, because it stops or has stopped."""


class Cancelled(EngineError):
    """The request was withdrawn before it was answered."""


class Disconnected(Cancelled):
    """The client left before it had its answer."""


class DeadlineExceeded(EngineError):
    """The request was not answered before its deadline."""


class NoRoom(EngineError):
    """An adapter or a text is larger than the limit of the engine."""


class NotFinite(EngineError):
    """An adapter's logits were NaN or infinite for a row."""


class ServeRefused(TurretError):
    """A server must not start with these settings."""

    exit_status = 2


class RequestError(TurretError):
    """An HTTP request is not carried out, or a server cannot be reached."""


class BadRequest(RequestError):
    """A request cannot be read, or asks for something that does not exist."""


class Unauthorized(RequestError):
    """The request has no token, or an unknown one."""


class Forbidden(RequestError):
    """The token lacks the scope."""


class TooLarge(RequestError):
    """The request is larger than the limit."""


class HeadersTooLarge(RequestError):
    """The headers of the request are larger than the limit."""


class TooSlow(RequestError):
    """The body of the request did not arrive in time."""


class WrongMediaType(RequestError):
    """The body is not JSON."""


class QuotaSpent(RequestError):
    """A quota of requests or tokens per minute is used up; `retry_after` is the number of seconds to wait."""

    def __init__(self, text: str, retry_after: float) -> None:
        super().__init__(text)
        self.retry_after = retry_after


_NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "DefaultCPUAllocator", "bad_alloc")


def memory_ran_out(error: Exception) -> bool:
    """Whether an error of Python or torch means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in _NO_MEMORY)
