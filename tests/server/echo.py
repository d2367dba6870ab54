"""An engine without a model. Its answer is a function of the version's digest and the text.

It has the engine's protocol, a thread, slots, a bounded queue, and switches that make it slow or make it fail.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from turret.access import Access
from turret.engine import Done, Embedding, Event, Failed, Named, Piece, Receipt
from turret.engine import SamplingParams as EngineOptions
from turret.errors import AdapterError, Busy, Cancelled, DeadlineExceeded, Draining, NotFound, WrongBase
from turret.families import FAMILIES
from turret.store import Store

FINGERPRINT = "sha256:echo"
LABELS = ("bad", "good", "so-so")
PLAIN = Embedding()
KILLER = "kill the server"  # a text that does


@dataclass(frozen=True)
class SamplingParams(EngineOptions):
    """The engine's options, without its checks."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True)
class Stats:
    queue_length: int
    waiting: int
    loads: int
    versions: dict[str, Any]
    waiting_adapters: tuple[str, ...] = ()


@dataclass
class Loaded:
    version: str
    digest: str
    bytes: int
    pinned: bool = False
    requests: int = 0
    tenant: str = ""
    slot: int = 1


def words(digest: str | None, text: Any, options: SamplingParams | None = None) -> list[str]:
    """The generated words: the end of the digest, the words of the text, and the seed."""
    found = [f"<{(digest or 'base')[-8:]}>", *str(text).split()]
    if options is not None and options.seed is not None:
        found.append(f"seed{options.seed}")
    found = found[: (options and options.max_tokens) or 16]
    return [found[0], *(f" {word}" for word in found[1:])]


def logprobs(tokens: Sequence[str], count: int) -> list[dict[str, Any]]:
    """A logprob for each word, and that many alternatives, the most probable first."""
    return [
        {"token": word, "id": place, "logprob": -0.25 * place, "top": [
            {"token": f"{word}{other}", "id": other, "logprob": -float(other)} for other in range(count)
        ]}
        for place, word in enumerate(tokens)
    ]  # fmt: skip


def probabilities(digest: str, text: str, labels: Sequence[str] = LABELS) -> dict[str, float]:
    """A probability of each label that depends on the version and the text."""
    raw = hashlib.sha256(f"{digest}\0{text}".encode()).digest()[: len(labels)]
    parts = [byte + 1 for byte in raw]
    return {label: part / sum(parts) for label, part in zip(labels, parts, strict=True)}


def vector(digest: str | None, text: Any, how: Embedding = PLAIN) -> list[float]:
    """Eight numbers that depend on the version, the text and the pooling."""
    raw = hashlib.sha256(f"{digest}\0{text}\0{how.pooling}".encode()).digest()[:8]
    found = [byte - 127.5 for byte in raw][: how.dimensions]
    length = sum(each * each for each in found) ** 0.5 if how.normalize is not False else 1.0
    return [each / length for each in found]


def label_set(found: dict[str, float], coverage: float) -> list[str]:
    """The most probable labels, as many as reach the coverage together."""
    ranked = sorted(found, key=lambda label: -found[label])
    return [label for place, label in enumerate(ranked) if sum(found[each] for each in ranked[:place]) < coverage]


class Ticket:
    def __init__(
        self,
        engine: Echo,
        receipt: Receipt,
        kind: str,
        text: Any,
        options: SamplingParams | None,
        deadline: float | None,
    ) -> None:
        self.receipt, self.kind, self.text = receipt, kind, text
        self.engine, self.options = engine, options
        self.said = words(receipt.digest, text, options) if kind == "generate" else []
        self.left = list(self.said)
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()
        self.over = self.cut = False
        self.until = None if deadline is None else time.monotonic() + deadline

    def listen(self, listener: Callable[[Event], None]) -> None:
        with self._lock:
            self._listeners.append(listener)
            for event in self._events:
                listener(event)

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        ends: queue.Queue[Event] = queue.Queue()
        self.listen(ends.put)
        while True:
            event = ends.get(timeout=timeout)
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Done):
                return event.answer

    def tell(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)
            for listener in self._listeners:
                listener(event)

    def cancel(self) -> None:
        if not self.over:
            self.over = True
            self.engine.cancelled.append(self.receipt.id)
            self.tell(Failed(Cancelled("taken back")))

    def step(self) -> bool:
        """Whether there is more to do."""
        if self.over:
            return False
        if self.until is not None and time.monotonic() > self.until:
            self.over = True
            self.tell(Failed(DeadlineExceeded("there was no time left")))
            return False
        if self.left:
            self.tell(Piece(self.left.pop(0)))
            return True
        self.over = True
        count = len(str(self.text).split())
        if self.kind == "classify" and (own := self.engine.heads.get(str(self.receipt.name))):
            self.tell(Done({**own, "prompt_tokens": count}))
        elif self.kind == "classify":
            found = probabilities(str(self.receipt.digest), self.text, self.engine.labels)
            label = max(found, key=lambda key: found[key])
            wanted = None if self.options is None else self.options.coverage
            more = {} if wanted is None else {"label_set": label_set(found, wanted)}
            self.tell(Done({"label": label, "probabilities": found, "prompt_tokens": count} | more))
        elif self.kind == "embed":
            how = (self.options and self.options.embedding) or Embedding()
            self.tell(Done({"embedding": vector(self.receipt.digest, self.text, how), "prompt_tokens": count}))
        else:
            answer = {"text": "".join(self.said), "finish_reason": "stop", "tokens": len(self.said)}
            wanted = None if self.options is None else self.options.logprobs
            more = {} if wanted is None else {"logprobs": logprobs(self.said, wanted)}
            self.tell(Done(answer | {"prompt_tokens": count} | more))
        return False


@dataclass
class Echo:
    """slots: of versions in memory; waiting: limit of tickets; pace: seconds per step; load_seconds: of a load."""

    store: Store
    slots: int = 64
    waiting: int = 4096
    pace: float = 0.0
    load_seconds: float = 0.0
    broken: set[str] = field(default_factory=set)  # versions that cannot be loaded
    tokenizer: Any = None
    longest: int = 4096
    base_id: str = "echo"
    labels: Sequence[str] = LABELS
    fingerprint: str = FINGERPRINT  # of the base whose adapters it answers with
    heads: Mapping[str, Any] = field(default_factory=dict)  # name of an adapter -> what its head answers
    constraints: Any = None  # `turret.engine.structured_output.Constraints`

    def __post_init__(self) -> None:
        self.base = SimpleNamespace(
            id=self.base_id, fingerprint=self.fingerprint, tokenizer=self.tokenizer, family=FAMILIES["llama"]
        )
        self.loads: list[str] = []
        self.cold: list[str] = []  # versions that a question had to wait for
        self.cancelled: list[str] = []
        self.priorities: list[int] = []
        self._numbers = itertools.count(1)
        self._slots: OrderedDict[str, Loaded] = OrderedDict()
        self._tickets: list[Ticket] = []
        self._lock = threading.RLock()
        self._work = threading.Condition()
        self._over = threading.Event()
        self._closed = self._draining = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # --- the protocol -----------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: str,
        text: Any,
        adapter: str | None,
        options: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
    ) -> Ticket:
        if self._draining:
            raise Draining("the echo is going down")
        if adapter is None and kind == "classify":
            raise AdapterError("the bare base has no head: name an adapter")
        receipt = Receipt(f"echo-{next(self._numbers)}", None, 0, None, self.fingerprint)
        if adapter is not None:
            named = self._resolve(adapter)
            receipt = Receipt(receipt.id, named.name, named.number, named.digest, self.fingerprint)
            with self._lock:
                if named.key not in self._slots:
                    self.cold.append(str(named))
            self._load(named).requests += 1
        if text == KILLER:
            os.kill(os.getpid(), signal.SIGKILL)
        ticket = Ticket(self, receipt, kind, text, options, deadline)
        with self._work:
            if len(self._tickets) >= self.waiting:
                raise Busy(f"{self.waiting} requests are waiting: try again", retry_after=2.4)
            self._tickets.append(ticket)
            self.priorities.append(priority)
            self._work.notify()
        return ticket

    def together(self) -> Any:
        """It has no passes to share."""
        return nullcontext()

    def compile(self, constraint: Any) -> None:
        """It compiles nothing, unless it has `constraints`; its answers do not keep to one."""
        if self.constraints is not None:
            self.constraints.compile_matcher(constraint)

    def is_compiled(self, constraint: Any) -> bool:
        return self.constraints is None or self.constraints.is_compiled(constraint)

    def warm(self, reference: str, *, pin: bool = False) -> Named:
        named = self._resolve(reference)
        self._load(named).pinned |= pin
        return named

    def warm_ahead(self, reference: str) -> bool:
        self.warm(reference)
        return True

    def unload(self, reference: str) -> None:
        named = self._resolve(reference)
        with self._lock:
            if self._slots.pop(named.key, None) is None:
                raise NotFound(f"{named} is not in memory")

    def unpin(self, reference: str) -> None:
        with self._lock:
            if (found := self._slots.get(self._resolve(reference).key)) is not None:
                found.pinned = False

    def loaded(self) -> Sequence[Loaded]:
        with self._lock:
            return list(self._slots.values())

    def stats(self) -> Stats:
        with self._lock:
            return Stats(
                queue_length=len(self._tickets), waiting=len(self._tickets), loads=len(self.loads), versions={}
            )

    def drain(self, timeout: float) -> bool:
        self._draining = True
        until = time.monotonic() + timeout
        while self._tickets and time.monotonic() < until:
            time.sleep(0.005)
        return not self._tickets

    def close(self) -> None:
        self._over.set()
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()
        if self.constraints is not None:
            self.constraints.close()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- internals --------------------------------------------------------------------------------------------------

    def _resolve(self, reference: str) -> Named:
        tenant, _, own = reference.rpartition("/")
        found = (self.store.with_access(Access(tenant)) if tenant else self.store).resolve(own)
        if (found.manifest.get("base") or {}).get("fingerprint") != self.fingerprint:
            raise WrongBase(f"{found} was trained on another base: start that one")
        return Named(found.name, found.number, found.digest, found.bytes, tenant)

    def _load(self, named: Named) -> Loaded:
        with self._lock:
            if named.key in self._slots:
                self._slots.move_to_end(named.key)
                return self._slots[named.key]
        if self.load_seconds:
            time.sleep(self.load_seconds)
        if str(named) in self.broken:
            raise AdapterError(f"{named} cannot be mounted: /secret/place/adapter.safetensors has no rank")
        with self._lock:
            self.loads.append(str(named))
            loaded = Loaded(str(named), named.digest, named.bytes, tenant=named.tenant, slot=len(self._slots) + 1)
            made = self._slots.setdefault(named.key, loaded)
            while len(self._slots) > self.slots:
                oldest = next(key for key, each in self._slots.items() if not each.pinned)
                del self._slots[oldest]
            return made

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._tickets and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                tickets = list(self._tickets)
            for ticket in tickets:
                if not ticket.step():
                    with self._work:
                        self._tickets.remove(ticket)
            if self.pace:
                self._over.wait(self.pace)
