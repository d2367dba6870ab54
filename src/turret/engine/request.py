"""Requests, limits, events and tickets of the engine. Loads no torch."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from turret.data import Input
from turret.engine.sampling_params import SamplingParams
from turret.engine.slots import Entry, MemoryBudget
from turret.errors import Cancelled, DataError, DeadlineExceeded, EngineError, TurretError, one_line
from turret.tasks.shapes import Answer, TokenReport
from turret.tasks.task import RequestKind

if TYPE_CHECKING:
    from llguidance import LLMatcher


# --- histogram --------------------------------------------------------------------------------------------------------
# A histogram of seconds, as Prometheus counts them.


BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds


@dataclass(frozen=True)
class Seconds:
    """A histogram at one moment. buckets: upper bound as text -> values up to it, ending with "+Inf"."""

    buckets: dict[str, int]
    sum: float


class Histogram:
    """Counts values by the bound that they do not exceed."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self._counts[bisect_left(BOUNDS, seconds)] += times
        self._sum += seconds * times

    def now(self) -> Seconds:
        """What was counted so far."""
        total, buckets = 0, {}
        for bound, count in zip([*map(str, BOUNDS), "+Inf"], self._counts, strict=True):
            total += count
            buckets[bound] = total
        return Seconds(buckets, self._sum)


# --- request ----------------------------------------------------------------------------------------------------------


Kind = RequestKind
Row = Sequence[int] | Sequence[Sequence[int]]  # token ids, or [id, segment] of each token

MAX_TOKENS = 128  # default length of an answer, if neither the request nor the adapter sets one

log = logging.getLogger("turret.engine")


def log_failure(what: str, error: BaseException) -> None:
    """Log an error in one line, and at level debug its traceback.

    The line leaves out the text of an unexpected error, which may repeat a text of a request.
    """
    if isinstance(error, TurretError):
        log.error("%s: %s", what, one_line(str(error)))
        return
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    log.error("%s (%s%s)", what, type(error).__name__, where, extra={"bug": error})
    log.debug("%s", what, exc_info=error)


@dataclass(frozen=True)
class GenerationSettings:
    """All settings of one request that generates."""

    max_tokens: int
    eos: tuple[int, ...]
    temperature: float = 0.0  # temperature; 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    min_length: int = 0  # of all tokens that penalties count
    min_new_tokens: int = 0
    forced_bos: int | None = None
    forced_eos: tuple[int, ...] = ()
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None  # alternatives to report with each token; None: report nothing
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its score)
    strip: bool = True  # white space around the answer
    echo: bool = False  # the text and the logprobs begin with the prompt's
    cleans: bool = False  # the tokenizer removes spaces before punctuation and English contractions

    @property
    def plain(self) -> bool:
        """Whether `process_logits` changes nothing."""
        return (
            self.repetition_penalty == 1.0
            and not self.presence_penalty
            and not self.frequency_penalty
            and not self.logit_bias
            and not self.no_repeat_ngram_size
            and not self.min_length
            and not self.min_new_tokens
            and self.forced_bos is None
            and not self.forced_eos
        )


@dataclass(frozen=True)
class Named:
    """The version that a reference named when it was resolved. The digest identifies it, not the name.

    Two tenants with the same bytes have two versions: neither sees in the time of an answer that the other has them.
    """

    name: str
    number: int
    digest: str
    bytes: int  # of the bundle: the memory reserved before it is loaded
    tenant: str = ""  # whose it is; empty: of the tenant that the engine was started for

    @property
    def key(self) -> str:
        """What it is kept under in memory."""
        return f"{self.tenant}/{self.digest}" if self.tenant else self.digest

    @property
    def of_tenant(self) -> str:
        """`tenant/name@3`, or `name@3` for the engine's own tenant."""
        return f"{self.tenant}/{self}" if self.tenant else str(self)

    def __str__(self) -> str:
        return f"{self.name}@{self.number}"


@dataclass(frozen=True)
class Limits:
    """Limits of the engine. The error of each names it."""

    memory: int | MemoryBudget | None = None  # bytes of mounted adapters; None: only `slots` limits them
    slots: int = 1024  # adapters mounted at a time
    queue_tokens: int = 65_536  # tokens that wait; `submit` raises Busy above it, and above the share of a tenant
    queue_seconds: int = 120  # that a request may wait, as predicted by `submit`, which raises Busy above it
    batch_tokens: int | None = None  # of one pass; None: chosen for the base (`runner.pass_tokens`)
    running: int = 64  # rows that generate at a time; a beam is a row; tenants that hold few find an eighth more
    cache_tokens: int = 65_536  # tokens in the KV cache; tenants that hold few find an eighth more
    max_inputs: int = 1024  # texts of one `classify` or `generate` call
    max_tokens: int = 4096  # of a prompt and its answer together
    train_percent: int = 50  # of the time, for trainings on this base, while answers wait

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | MemoryBudget | None) or (isinstance(value, int) and value < 1):
                raise DataError(f"limit {name} = {value!r}: expected a whole number of 1 or more")
        if self.train_percent > 100:
            raise DataError(f"limit train_percent = {self.train_percent}: expected at most 100")
        if self.memory is None and self.slots > 1 << 20:
            raise DataError(f"limit slots = {self.slots} with no limit of memory: give at most {1 << 20}, or a memory")


GPU_SHARE = 0.85  # of the free memory of a GPU: the rest is for what nobody counts
ROOM = 3  # times the keys and values of a token: slots and blocks of the cache grow by doubling


def limits_within(limits: Limits, free: int, token_bytes: int, pass_bytes: int) -> Limits:
    """The limits that fit into the free memory of a GPU, less what a pass takes, shared by keys and adapters.

    Args:
        limits: `cache_tokens` is lowered to what `memory` leaves; if `memory` is open, adapters get half.
        free: bytes.
        token_bytes: of the keys and values of a token.
        pass_bytes: of the largest pass.
    """
    room = max(0, round(GPU_SHARE * free) - pass_bytes)
    given = limits.memory if isinstance(limits.memory, (int, type(None))) else limits.memory.limit
    adapters = room // 2 if given is None else 2 * given  # rows that decode have a copy of theirs
    cache_tokens = max(1, min(limits.cache_tokens, (room - adapters) // (ROOM * max(1, token_bytes))))
    memory = max(1, adapters // 2) if limits.memory is None else limits.memory
    return replace(limits, cache_tokens=cache_tokens, memory=memory)


@dataclass(frozen=True)
class VllmServer:
    """A vLLM server that computes answers.

    Args:
        url: Where it listens.
        folder: Where adapters are written for it, under the same path there; None: a folder for temporary files.
        key: Its API key.
    """

    url: str
    folder: Path | None = None
    key: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Receipt:
    """The version that answers, fixed at submission. The bare base has no name, number 0 and no digest."""

    id: str
    name: str | None
    number: int
    digest: str | None
    base: str  # fingerprint

    @property
    def version(self) -> str | None:
        """`name@3`; None for the bare base."""
        return f"{self.name}@{self.number}" if self.name else None


@dataclass(frozen=True)
class Piece:
    """The next part of a text. It is final. With logprobs requested, also those of the tokens that end in it."""

    text: str
    logprobs: tuple[TokenReport, ...] = ()


@dataclass(frozen=True)
class Done:
    """The whole answer: the last event."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """The error of the request: the last event."""

    error: BaseException


Event = Piece | Done | Failed
OPERATOR = "report it to the operator of this engine"


def failed(error: Exception, what: str = "the answer", remedy: str = OPERATOR) -> Failed:
    """The end of a request by an error, which is logged if it is a bug."""
    if isinstance(error, TurretError):
        return Failed(error)
    log_failure(f"{what} failed", error)
    return Failed(EngineError(one_line(f"{what} failed ({type(error).__name__}: {error}): {remedy}")))


Listener = Callable[[Event], None]


class Ticket:
    """The handle of a submitted request. It ends exactly once, with an answer or an error."""

    def __init__(self, receipt: Receipt, cancel: Callable[[], None]) -> None:
        self.receipt = receipt
        self._cancel = cancel
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._end: Done | Failed | None = None
        self._pieces: list[Piece] = []
        self._listeners: list[Listener] = []
        self.streamed = False  # a listener wants pieces
        self.cut = False  # the prompt was too long, and lost a part

    @property
    def done(self) -> bool:
        return self._end is not None

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the answer.

        Args:
            timeout: Seconds; None waits as long as needed.

        Raises:
            TimeoutError: After `timeout` seconds.
            BaseException: The error that the request ended with.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(
                f"request {self.receipt.id} is not answered after {timeout} s: wait longer, or cancel it"
            )
        assert self._end is not None
        if isinstance(self._end, Failed):
            raise self._end.error
        return self._end.answer

    def error(self) -> BaseException | None:
        """The error that the request ended with, or None."""
        return self._end.error if isinstance(self._end, Failed) else None

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every event in order: the text so far at once, later events from the engine's thread."""
        with self._lock:
            self.streamed = True
            if self._pieces:
                self._call(listener, self.whole)
            if self._end is None:
                self._listeners.append(listener)
            else:
                self._call(listener, self._end)

    def add_done_callback(self, function: Callable[[Ticket], None]) -> None:
        """Call `function` with this ticket when it ends; at once if it has ended."""

        def ended(event: Event) -> None:
            if not isinstance(event, Piece):
                function(self)

        with self._lock:
            if self._end is None:
                self._listeners.append(ended)
                return
        self._call(ended, self._end)

    def stream(self) -> Iterator[str]:
        """The pieces of the text as they become final; joined they are the answer's text. Raises as `result` does."""
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
        """Cancel the request: it ends with Cancelled before the next pass, unless it has ended."""
        if not self.done:
            self._cancel()

    # --- the engine's side --------------------------------------------------------------------------------------------

    @property
    def whole(self) -> Piece:
        """All that was sent."""
        text = "".join(piece.text for piece in self._pieces)
        return Piece(text, tuple(each for piece in self._pieces for each in piece.logprobs))

    def send(self, text: str, logprobs: Sequence[TokenReport] = ()) -> None:
        """Give the listeners the next part of the text, and the logprobs of the tokens that end in it."""
        with self._lock:
            if (text or logprobs) and self._end is None:
                self._pieces.append(Piece(text, tuple(logprobs)))
                self._notify(self._pieces[-1])

    def end(self, end: Done | Failed) -> bool:
        """End the ticket; a second call does nothing. Returns whether this was the first."""
        with self._lock:
            if self._end is not None:
                return False
            self._end = end
            self._ended.set()
            self._notify(end)
            self._listeners.clear()
            return True

    def _notify(self, event: Event) -> None:
        for listener in tuple(self._listeners):
            if not self._call(listener, event):
                self._listeners.remove(listener)

    def _call(self, listener: Listener, event: Event) -> bool:
        try:
            listener(event)
        except Exception as error:  # an error of a listener must not stop the engine
            log_failure(f"a listener of request {self.receipt.id} failed and is not called again", error)
            return False
        return True


Window = tuple[Sequence[int], Sequence[int]]  # token ids, and the places among them that a head reads


@dataclass(eq=False)
class Group:
    """Requests that enter the queue at once. The engine's lock guards it, that of the tokenizer `encoded`."""

    closed: bool = False  # all are submitted
    admitted: bool = False  # the queue had room for the first one
    ready: list[Request] = field(default_factory=list)  # encoded before it was closed
    encoded: dict[Hashable, tuple[list[int], list[int] | None, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ask:
    """One request, as `Engine.submit` takes it.

    Args:
        adapter: a reference, or what `Engine.hold` returned; None: the bare base.
    """

    kind: Kind
    text: Input | Row
    adapter: str | Named | None = None
    options: SamplingParams = field(default_factory=SamplingParams)


@dataclass(eq=False)
class Request:
    """One text on its way through the engine."""

    kind: Kind
    ticket: Ticket
    named: Named | None  # None: the bare base
    text: Input | None
    options: SamplingParams
    tokens: int  # of the prompt: an estimate until it is `ready`
    arrived: float
    priority: int = 0
    deadline: float | None = None  # on the engine's clock
    ids: Sequence[int] | None = None  # the prompt
    segments: Sequence[int] | None = None  # of its tokens; None: all are in the first
    windows: Sequence[Window] = ()  # the rows of a text whose tokens are read; `ids` is the first
    rows: int = 0  # of the KV cache, which it holds until its end: its beams; 0 if one pass answers it
    cache_tokens: int = 0  # of the KV cache, all rows together
    cancelled: bool = False
    joined: int = 0  # passes before it was scheduled
    settings: GenerationSettings | None = None  # complete; set when its adapter is loaded
    entry: Entry | None = None  # the slot that it holds
    ready: bool = False  # encoded
    matcher: LLMatcher | None = None  # of its constraint
    counted: int = 0  # its share of the engine's `waiting_tokens`
    error: TurretError | None = None  # why it cannot be answered
    tenant: str = ""  # who asks: the scheduler takes turns between tenants
    group: Group | None = None

    def __post_init__(self) -> None:
        if self.kind == "generate" and self.options.scored is None:
            self.rows = max(1, self.rows)

    @property
    def embeds(self) -> bool:
        """Whether it is answered by a vector."""
        return self.kind == "embed"

    @property
    def scores(self) -> bool:
        """Whether it is answered by the log-probabilities of given answers."""
        return self.options.scored is not None

    def tokens_after(self, other: Request | None) -> int:
        """Its tokens that a pass reads in which another request has begun: prompts of scored answers are shared."""
        if other is None or not (self.scores and other.scores and self.flow == other.flow):
            return self.tokens
        return self.tokens - common_prefix_length(self.ids or (), other.ids or ())

    @property
    def flow(self) -> str:
        """The key of its adapter, "" for the bare base: the scheduler takes turns between these."""
        return self.named.key if self.named else ""

    def end_of_time(self, now: float) -> Cancelled | DeadlineExceeded | None:
        """The error of a cancelled or late request, or None."""
        if self.cancelled:
            return Cancelled(f"request {self.ticket.receipt.id} was cancelled: ask again if the answer is still wanted")
        if self.deadline is not None and now >= self.deadline:
            waited = now - self.arrived
            return DeadlineExceeded(
                f"request {self.ticket.receipt.id} has no answer after {waited:.3g} s: give it more time, or ask less"
            )
        return None


@dataclass(frozen=True)
class PassListener:
    """The methods of an engine that its passes call.

    Args:
        ended: A request has ended; the number is that of its generated tokens.
        freed: A request that generates gave its rows and KV slots back.
        passed: A pass is over: the requests that began in it, the number of decode rows, and its seconds.
        stepped: One row got further tokens; the seconds are those between two of them.
        wake: The engine's lock, notified when there is something new.
    """

    ended: Callable[[Request, Done | Failed, int], None]
    freed: Callable[[Request], None]
    passed: Callable[[Sequence[Request], int, float], None]
    stepped: Callable[[int, float], None]
    wake: threading.Condition


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter in memory."""

    version: str  # name@number, as last requested
    digest: str
    slot: int
    bytes: int
    pinned: bool
    last_used: float  # on the engine's clock
    requests: int  # that need it now
    tenant: str = ""  # as of `Named`


@dataclass(frozen=True)
class VersionStats:
    """Counts of one version since the engine started."""

    version: str
    requests: int = 0
    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0  # generated


@dataclass(frozen=True)
class Stats:
    """The engine at one moment."""

    waiting: int  # requests that have not begun, also those whose adapter is loading
    waiting_tokens: int
    running: int  # rows that generate
    cache_tokens: int  # in use
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
    versions: Mapping[str, VersionStats]  # by `Named.key`, "" for the bare base
    queue_seconds: Seconds  # from submission to the first pass
    first_token_seconds: Seconds  # from submission to the first token
    between_tokens_seconds: Seconds  # between two tokens of one row
    most_adapters: int  # in memory at a time
    most_cache_tokens: int  # in the KV cache
    waiting_adapters: Sequence[str]  # versions that requests wait for, as `tenant/name@3`; without the engine's tenant


def common_prefix_length(first: Sequence[int], last: Sequence[int]) -> int:
    """How many tokens two rows have in common at their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
