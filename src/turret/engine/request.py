"""What is asked of the engine and what it answers: small objects, their limits, and the ticket of an answer to come.

Knows words, numbers and threads. Refuses to know tensors, adapters' contents and how a pass is run; loads no torch.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turret.errors import Cancelled, DataError, DeadlineExceeded, TurretError
from turret.tasks.task import RequestKind

Kind = RequestKind
Answer = dict[str, Any]

MAX_TOKENS = 128  # of an answer, where neither the request nor the adapter says
STOPS = 16  # most stop strings of one request
STOP_CHARACTERS = 256  # of one stop string
BEAMS = 16  # most beams of one request
TOP = 20  # most alternatives that are told beside a token

log = logging.getLogger("turret.engine")


@dataclass(frozen=True)
class Named:
    """What a reference meant when it was asked. Adapters are known by their digest, never by their name."""

    name: str
    number: int
    digest: str
    bytes: int  # of the bundle; how much room is made before it is loaded

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Limits:
    """What the engine may hold and take. Every one is enforced with an error that names it."""

    memory: int | None = None  # bytes of mounted adapters; None: no bound but `slots`
    slots: int = 1024  # adapters mounted at a time
    queue_tokens: int = 65_536  # tokens that wait; beyond it a submit is Busy
    batch_tokens: int | None = None  # of one pass; None: as many as suit the base (`runner.pass_tokens`)
    running: int = 64  # generating rows at a time; a beam is a row
    cache_tokens: int = 65_536  # tokens whose keys and values are held
    max_inputs: int = 1024  # of one `classify` or `generate` call
    max_tokens: int = 4096  # of a prompt and its answer together

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"limit {name} = {value!r}: expected a whole number of 1 or more")
        if self.memory is None and self.slots > 1 << 20:
            raise DataError(f"limit slots = {self.slots} with no limit of memory: give at most {1 << 20}, or a memory")


@dataclass(frozen=True)
class Options:
    """How a text is generated. What is None is the adapter's own setting, else greedy and `MAX_TOKENS`.

    A temperature above zero samples; top_p or top_k without a temperature sample at temperature 1. logprobs: so many
    most probable tokens are told beside each token of the answer, 0 the token's own probability alone.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_beams: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given: Any = self.stop
        object.__setattr__(self, "stop", (given,) if isinstance(given, str) else tuple(given))
        _between("max_tokens", self.max_tokens, 1, 1 << 31, whole=True)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_p", self.top_p, 0.0, 1.0, above=True)
        _between("top_k", self.top_k, 1, 1 << 31, whole=True)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _between("seed", self.seed, -(1 << 63), 1 << 64, whole=True)
        _between("num_beams", self.num_beams, 1, BEAMS, whole=True)
        _between("logprobs", self.logprobs, 0, TOP, whole=True)
        if len(self.stop) > STOPS or not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARACTERS for s in self.stop):
            raise DataError(f"stop: expected at most {STOPS} texts of 1 to {STOP_CHARACTERS} characters each")
        if self.samples and (self.num_beams or 1) > 1:
            raise DataError("num_beams searches and temperature samples: give one of them")

    @property
    def samples(self) -> bool:
        return self.heat > 0.0

    @property
    def heat(self) -> float:
        """The temperature in force; 0 is greedy."""
        if self.temperature is not None:
            return self.temperature
        return 1.0 if self.top_k is not None or (self.top_p is not None and self.top_p < 1.0) else 0.0


def _between(name: str, value: Any, low: float, high: float, *, whole: bool = False, above: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int) if whole else isinstance(value, int | float) and math.isfinite(value)
    if isinstance(value, bool) or not number or not (low < value if above else low <= value) or value > high:
        kind = "a whole number" if whole else "a number"
        raise DataError(f"{name} = {value!r}: expected {kind} {'above' if above else 'from'} {low:g} to {high:g}")


@dataclass(frozen=True)
class Receipt:
    """Who answers: fixed when the request is taken. The bare base has no name, number 0 and no digest."""

    id: str
    name: str | None
    number: int
    digest: str | None
    base: str  # fingerprint


@dataclass(frozen=True)
class Piece:
    """More of a text, decided for good."""

    text: str


@dataclass(frozen=True)
class Done:
    """The whole answer; nothing follows."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """Why there is no answer; nothing follows."""

    error: BaseException


Event = Piece | Done | Failed
Listener = Callable[[Event], None]


class Ticket:
    """What a submit hands over: it ends exactly once, with an answer or an error, whatever happens to the engine."""

    def __init__(self, receipt: Receipt, cancel: Callable[[], None]) -> None:
        self.receipt = receipt
        self._cancel = cancel
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._end: Done | Failed | None = None
        self._said: list[str] = []
        self._listeners: list[Listener] = []
        self.heard = False  # somebody wants pieces
        self.said = 0  # characters of the answer so far

    @property
    def done(self) -> bool:
        return self._end is not None

    def result(self, timeout: float | None = None) -> Answer:
        """The answer, or its error; raises TimeoutError where it takes longer than `timeout` seconds."""
        if not self._ended.wait(timeout):
            raise TimeoutError(
                f"request {self.receipt.id} is not answered after {timeout} s: wait longer, or cancel it"
            )
        assert self._end is not None
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._end.answer

    def error(self) -> BaseException | None:
        """The error it ended with, if it did."""
        return self._end.error if isinstance(self._end, Failed) else None

    def listen(self, listener: Listener) -> None:
        """Call `listener` with what was said so far and every further event, in order, from the engine's thread."""
        with self._lock:
            self.heard = True
            if self._said:
                self._call(listener, Piece("".join(self._said)))
            if self._end is None:
                self._listeners.append(listener)
            else:
                self._call(listener, self._end)

    def add_done_callback(self, function: Callable[[Ticket], None]) -> None:
        """Call `function` with this ticket when it has ended, at once where it has already."""

        def ended(event: Event) -> None:
            if not isinstance(event, Piece):
                function(self)

        with self._lock:
            if self._end is None:
                self._listeners.append(ended)
                return
        self._call(ended, self._end)

    def stream(self) -> Iterator[str]:
        """Pieces of the text as they are decided; joined they are the answer's text. Raises as `result` does."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.listen(events.put)
        while True:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                return
            yield event.text

    def cancel(self) -> None:
        """Withdraw the request; it ends with Cancelled between two passes, unless it has ended already."""
        if not self.done:
            self._cancel()

    # --- the engine's side --------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        with self._lock:
            if text and self._end is None:
                self._said.append(text)
                self.said += len(text)
                self._tell(Piece(text))

    def end(self, end: Done | Failed) -> bool:
        """The first end counts; says whether this was it."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = end
            self._ended.set()
            self._tell(end)
            self._listeners.clear()
            return True

    def _tell(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            if not self._call(listener, event):
                self._listeners.remove(listener)

    def _call(self, listener: Listener, event: Event) -> bool:
        try:
            listener(event)
        except Exception:  # a listener's mistake must not stop the engine
            log.exception("a listener of request %s failed and is not called again", self.receipt.id)
            return False
        return True


@dataclass(eq=False)
class Request:
    """One text on its way through the engine."""

    kind: Kind
    ticket: Ticket
    named: Named | None  # None: the bare base
    text: str | None
    options: Options
    tokens: int  # of the prompt: guessed until it is `ready`
    arrived: float
    priority: int = 0
    deadline: float | None = None  # on the engine's clock
    ids: Sequence[int] | None = None  # the prompt
    rows: int = 1  # beams
    cache_tokens: int = 0  # keys and values to be held for it, all rows together
    cancelled: bool = False
    joined: int = 0  # the number of the pass before which it could have gone
    settings: Any = None  # of a generation, with nothing left open; once its adapter is there
    entry: Any = None  # the slot it holds
    ready: bool = False  # encoded, and what it needs is known
    counted: int = 0  # of its tokens among those that wait
    error: TurretError | None = None  # why it cannot be

    @property
    def flow(self) -> str:
        """Whose turn it counts for: the digest of its adapter, or nothing for the bare base."""
        return self.named.digest if self.named else ""

    def end_of_time(self, now: float) -> Cancelled | DeadlineExceeded | None:
        """Why it must not go on, if so."""
        if self.cancelled:
            return Cancelled(f"request {self.ticket.receipt.id} was cancelled: ask again if the answer is still wanted")
        if self.deadline is not None and now >= self.deadline:
            waited = now - self.arrived
            return DeadlineExceeded(
                f"request {self.ticket.receipt.id} has no answer after {waited:.3g} s: give it more time, or ask less"
            )
        return None


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter in memory."""

    version: str  # name@number, as it was last asked for
    digest: str
    slot: int
    bytes: int
    pinned: bool
    last_used: float  # on the engine's clock
    requests: int  # that hold it now


@dataclass(frozen=True)
class VersionStats:
    """What one version has done since the engine began."""

    version: str
    requests: int = 0
    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0  # generated


@dataclass(frozen=True)
class Stats:
    """The engine at one moment."""

    waiting: int  # requests that have not begun, those whose adapter is being loaded among them
    waiting_tokens: int
    running: int  # rows that generate
    cache_tokens: int  # held for them
    passes: int
    prompt_tokens: int
    tokens: int  # generated
    answers: int
    errors: int
    loads: int
    failed_loads: int
    evictions: int
    adapters: int
    adapter_bytes: int
    versions: Mapping[str, VersionStats]  # by digest, "" for the bare base
