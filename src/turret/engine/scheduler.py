"""What an engine's thread does next: which waiting requests begin, which are refused, and when a training has a turn.

A pass takes at most `batch_tokens` tokens: one for each row that generates, the rest for requests that begin. These
are chosen by priority, then by turns between tenants (`turret.turns`, which counts the tokens of prompts and of
answers), then by turns between the adapters of a tenant (deficit round robin with `QUANTUM` tokens, Shreedhar and
Varghese 1996), then by age. A request that was passed over `PATIENCE` times has the highest priority and goes before
the others of its tenant. While it waits for room in the KV cache, no request behind it takes any. So every request is
served eventually, and a tenant that floods the queue delays another one's first request by one pass.

A part of a training is about as long as one optimiser step. It calls `between_passes` after each of its passes, so
that answers wait for one pass of a training, not for a step. Trainings get a share of the time while answers wait, and
all of it else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TypeVar

from turret.engine.request import Histogram, Limits, Request, VersionStats
from turret.errors import Busy, Draining
from turret.turns import Places, TurnQueue, Turns

T = TypeVar("T")

# --- requests --------------------------------------------------------------------------------------------------------

QUANTUM = 256  # tokens of an adapter in one turn
PATIENCE = 64  # passes in which other requests begin before this one goes first


@dataclass
class _Flow:
    """The waiting requests of one adapter at one priority, oldest first."""

    requests: deque[Request] = field(default_factory=deque)
    deficit: int = 0  # tokens that may still begin
    turn: bool = False  # whether its turn has started


_Flows = dict[int, dict[str, _Flow]]  # of a tenant: by priority, then by adapter in the order of turns


class Scheduler:
    """The waiting requests that could begin, and the rows and cache in use.

    Args:
        batch_tokens: Limit of tokens of a pass.
        running: Limit of rows that generate; tenants that hold few find some more (`turret.turns.Places`).
        cache_tokens: Limit of tokens in the KV cache, as `running`.
        quantum: Tokens of an adapter in one turn.
        patience: Passes until a waiting request goes first.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        running: int,
        cache_tokens: int,
        quantum: int = QUANTUM,
        patience: int = PATIENCE,
    ) -> None:
        self.batch_tokens, self.running, self.cache_tokens = batch_tokens, running, cache_tokens
        self.quantum, self.patience = quantum, patience
        self._rows, self._cache = Places(running), Places(cache_tokens, guests=1)
        self._turns = Turns()
        self._passes = 0  # in which a request began
        self._tenants: dict[str, _Flows] = {}

    def __len__(self) -> int:
        return sum(1 for _ in self.waiting())

    @property
    def rows(self) -> int:
        """Rows that generate."""
        return self._rows.taken

    @property
    def held_tokens(self) -> int:
        """Tokens of the KV cache in use."""
        return self._cache.taken

    def waiting(self) -> Iterator[Request]:
        """All waiting requests."""
        for tenant in self._tenants.values():
            for flows in tenant.values():
                for flow in flows.values():
                    yield from flow.requests

    def add(self, request: Request) -> None:
        """Add a waiting request. Its rows and cache tokens are within the limits."""
        assert request.rows <= self.running
        assert request.cache_tokens <= self.cache_tokens
        flows = self._tenants.setdefault(request.tenant, {}).setdefault(request.priority, {})
        flows.setdefault(request.flow, _Flow()).requests.append(request)
        self._turns.join(request.tenant)
        request.joined = self._passes

    def remove(self, requests: Iterable[Request]) -> None:
        """Remove requests, waiting or not."""
        removed = set(map(id, requests))
        gone = [each for each in self.waiting() if id(each) in removed]
        for flow in {id(flow): flow for flow in map(self._flow, gone)}.values():
            flow.requests = deque(each for each in flow.requests if id(each) not in removed)
        for each in gone:
            self._leave_queue(each)
            self._turns.leave(each.tenant)

    def next(self) -> list[Request]:
        """Take the requests that begin in the next pass.

        Those that generate hold rows and cache until `free_request`.
        """
        for tenant, rows in self._rows.of.items():
            self._turns.charge(tenant, rows)  # each of them takes a token of this pass
        chosen: list[Request] = []
        room = self.batch_tokens - self.rows
        before = self._passes - self.patience
        lines = {tenant: _Line(flows, before, self.quantum) for tenant, flows in self._tenants.items()}
        highest = max((each.priority for each in lines.values()), default=0)
        full: set[int] = set()  # priorities at which a request did not fit into the pass
        closed = False  # a request that has waited too long waits for rows or cache
        while lines:
            tenant = self._first(lines, highest)
            line = lines[tenant]
            request = line.head(full)
            if request is None:
                del lines[tenant]
                continue
            tokens = request.tokens_after(chosen[-1] if chosen else None)
            if request.rows and (closed or not self._holds(request)):
                closed = closed or line.impatient
                line.stop()
            elif chosen and tokens > room:
                if not line.impatient:
                    full.add(line.priority)
                line.stop()
            else:
                line.take()
                self._take(request)
                room -= tokens
                chosen.append(request)
        self._passes += bool(chosen)
        return chosen

    def free_request(self, request: Request) -> None:
        """Free the rows and the cache of a request that generated."""
        self._rows.free(request.tenant, request.rows)
        self._cache.free(request.tenant, request.cache_tokens)
        self._turns.leave(request.tenant)

    def _first(self, lines: dict[str, _Line], highest: int) -> str:
        """The tenant whose turn it is: by priority, then the one that was served least, then the one with few rows."""
        if len(lines) == 1:
            return next(iter(lines))

        def order(tenant: str) -> tuple[int, float, int]:
            line = lines[tenant]
            priority = highest if line.impatient else line.priority
            return -priority, self._turns.served_cost(tenant), self._rows.of[tenant]

        return min(lines, key=order)

    def _holds(self, request: Request) -> bool:
        """Whether there are rows and cache for a request that generates."""
        return self._rows.has_room(request.tenant, request.rows) and (
            self._cache.has_room(request.tenant, request.cache_tokens)
        )

    def _take(self, request: Request) -> None:
        taken = self._flow(request).requests.popleft()
        assert taken is request
        self._leave_queue(request)
        self._turns.charge(request.tenant, request.tokens)
        if request.rows:
            self._rows.take(request.tenant, request.rows)
            self._cache.take(request.tenant, request.cache_tokens)
        else:
            self._turns.leave(request.tenant)

    def _flow(self, request: Request) -> _Flow:
        return self._tenants[request.tenant][request.priority][request.flow]

    def _leave_queue(self, request: Request) -> None:
        """Drop what is empty without a request that waits no more."""
        tenant = self._tenants.get(request.tenant, {})
        flows = tenant.get(request.priority, {})
        if request.flow in flows and not flows[request.flow].requests:
            del flows[request.flow]
        if not flows:
            tenant.pop(request.priority, None)
        if not tenant:
            self._tenants.pop(request.tenant, None)


class _Line:
    """The waiting requests of one tenant during one choice, in the order in which they may begin.

    An adapter whose next request does not fit continues its turn in the next pass. Until then no other turn starts:
    else small requests would fill every pass, and large ones would get less than their share.

    Args:
        before: A request that was added at this pass, or earlier, has waited too long.
        quantum: Tokens of an adapter in one turn.
    """

    def __init__(self, flows: _Flows, before: int, quantum: int) -> None:
        self._flows, self._quantum = flows, quantum
        heads = [flow.requests[0] for each in flows.values() for flow in each.values()]
        self._impatient = deque(sorted((each for each in heads if each.joined <= before), key=lambda each: each.joined))
        self._priorities = sorted(flows)
        self._enter()

    @property
    def impatient(self) -> bool:
        """Whether its head has waited too long."""
        return bool(self._impatient)

    def head(self, full: set[int]) -> Request | None:
        """The request that begins next, if it can; None if nothing more can. full: priorities that start no turn."""
        if self._impatient:
            return self._impatient[0]
        while True:
            while self._open:
                key = self._open[0]
                flow = self._level.get(key)
                if flow is None:  # empty now
                    self._open.popleft()
                    continue
                if not flow.turn:
                    if self.priority in full:
                        self._open.popleft()
                        continue
                    flow.turn, flow.deficit = True, flow.deficit + self._quantum
                if flow.requests[0].tokens <= flow.deficit:
                    return flow.requests[0]
                flow.turn = False  # its turn is over
                self._level[key] = self._level.pop(key)
                self._open.rotate(-1)
            if not self._priorities:
                return None
            self._enter()

    def take(self) -> None:
        """Count the head as begun."""
        if self._impatient:
            self._impatient.popleft()
            return
        flow = self._level[self._open[0]]
        flow.deficit -= flow.requests[0].tokens

    def stop(self) -> None:
        """Begin no more of the head's adapter in this pass."""
        if self._impatient:
            self._impatient.popleft()
        else:
            self._open.popleft()

    def _enter(self) -> None:
        """Go on with the next lower priority."""
        self.priority = self._priorities.pop()
        self._level = self._flows.get(self.priority, {})
        self._open = deque(self._level)


# --- counts and admission -------------------------------------------------------------------------------------------

HALF_LIFE = 5.0  # seconds of work after which a measurement counts half
MEASURED = 1.0  # seconds of work that are measured before a wait is predicted
SHORTEST, LONGEST = 0.1, 600.0  # bounds of `Busy.retry_after`, in seconds
UNKNOWN = 1.0  # seconds until a client should ask again, if no pass was measured
KEPT = 4096  # versions whose counts are kept: the most recently requested


class Counters:
    """Counts of passes, tokens, answers and errors since the engine started, and how fast the queue is served."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.passes = self.prompt_tokens = self.tokens = self.answers = self.errors = 0
        self.queue, self.first_token, self.between_tokens = Histogram(), Histogram(), Histogram()
        self._served = self._worked = 0.0  # tokens that began and the seconds this took, the older the less
        self._measured = 0.0  # all seconds of work
        self._last = clock()  # the end of the last pass
        self._waited = False  # whether requests waited then
        self._versions: dict[str, VersionStats] = {}

    def count_request(self, request: Request) -> None:
        """Count a request that was taken."""
        known = self._versions.pop(request.flow, None) or VersionStats("")
        name = str(request.named) if request.named else ""
        self._versions[request.flow] = replace(known, version=name, requests=known.requests + 1)
        if len(self._versions) > KEPT:
            del self._versions[next(iter(self._versions))]

    def count_pass(self, begin: Sequence[Request], steps: int, seconds: float, waits: bool) -> None:
        """Count a pass.

        Args:
            begin: The requests that began in it.
            steps: Rows that decoded one token.
            seconds: How long it took.
            waits: Whether other requests still wait.
        """
        now = self._clock()
        read = sum(request.tokens for request in begin)
        self.passes += 1
        self.prompt_tokens += read
        self.tokens += steps + sum(request.rows > 0 for request in begin)
        for request in begin:
            self.queue.observe(max(0.0, now - seconds - request.arrived))
            if request.rows:
                self.first_token.observe(max(0.0, now - request.arrived))
        if steps:  # their token before this one came at the end of the last pass
            self.between_tokens.observe(max(0.0, now - self._last), steps)
        if begin or waits:  # also a pass in which none began, because there was no room for them
            self._serve(read, max(now - self._last, seconds) if self._waited else seconds)
        self._last, self._waited = now, waits

    def count_tokens(self, tokens: int, seconds: float) -> None:
        """Count further tokens of one row. seconds: between two of them."""
        self.tokens += tokens
        self.between_tokens.observe(max(0.0, seconds), tokens)

    def _serve(self, tokens: int, seconds: float) -> None:
        """Measure how fast the queue is served: tokens that began in these seconds."""
        decay = 0.5 ** (seconds / HALF_LIFE)
        self._served = self._served * decay + tokens
        self._worked = self._worked * decay + seconds
        self._measured += seconds

    def count_end(self, request: Request, answered: bool, tokens: int) -> None:
        """Count the end of a request that generated so many tokens. One that was cancelled is no error."""
        failed = not answered and not request.cancelled
        self.answers += answered
        self.errors += failed
        known = self._versions.get(request.flow)
        if known is not None:
            self._versions[request.flow] = replace(
                known,
                answers=known.answers + answered,
                errors=known.errors + failed,
                prompt_tokens=known.prompt_tokens + (request.tokens if answered else 0),
                tokens=known.tokens + tokens,
            )

    def wait_for(self, tokens: int) -> float | None:
        """Seconds until so many waiting tokens have begun, at the measured speed; None if it is not known yet."""
        return tokens * self._worked / self._served if self._served and self._worked else None

    def admit(self, request: Request, waiting: Mapping[str, int], limits: Limits) -> None:
        """Raise Busy if the queue has no room for a request, or if it would wait too long.

        A tenant may fill the queue while it is alone in it. When others wait too, each has its share: what one of them
        has waiting keeps no other out. The error says when the request will be admitted, if the queue is served as fast
        as now and nothing is added.

        Args:
            request: With an estimate of its tokens.
            waiting: Tokens that wait already, by tenant.
            limits: Of the engine.
        """
        own = waiting.get(request.tenant, 0)
        if not own:
            return  # only others wait, and the turn of this tenant comes next
        others = sum(min(each, own + request.tokens) for tenant, each in waiting.items() if tenant != request.tenant)
        wait, too_many = self.wait_for(own + others), sum(waiting.values()) + request.tokens - limits.queue_tokens
        if too_many > 0 and own + request.tokens > limits.queue_tokens // len(waiting):
            again = self.wait_for(min(own, too_many))
            raise self._busy(f"{own} tokens wait already and the limit of queue_tokens is {limits.queue_tokens}", again)
        most = float(limits.queue_seconds)
        if request.deadline is not None:
            most = min(most, request.deadline - request.arrived)
        if wait is not None and wait > most and self._measured >= MEASURED:
            raise self._busy(
                f"{own} tokens wait, which takes {wait:.0f} s, and a request may wait {most:g} s", wait - most
            )

    def _busy(self, why: str, seconds: float | None) -> Busy:
        again = UNKNOWN if seconds is None else min(LONGEST, max(SHORTEST, seconds))
        return Busy(f"{why}: ask again in {again:.1f} s", retry_after=again)

    def versions(self) -> Mapping[str, VersionStats]:
        """The counts of each version, by key; "" is the bare base."""
        return dict(self._versions)


# --- trainings -------------------------------------------------------------------------------------------------------

_thread = threading.local()  # `pause`: what the thread of an engine does between two passes of a training


def between_passes() -> None:
    """Let others have their turn: a training calls it after each of its passes. Outside an engine it does nothing."""
    pause: Callable[[], None] | None = getattr(_thread, "pause", None)
    if pause is not None:
        pause()


class Part:
    """A part of a training, and where its end is told."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self.future = work, Future[None]()

    def run(self, pause: Callable[[], None] | None = None) -> None:
        """Run it, with gradients enabled by the caller. pause: called between its passes."""
        _thread.pause = pause
        try:
            self._work()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(None)
        finally:
            _thread.pause = None


class TrainingTurns:
    """The parts that wait, and what is owed to answers. Only `run` is thread-safe: the caller has a lock.

    Args:
        share: Of the time, for trainings, while answers wait. Between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        self._share, self._owed = share, 0.0
        self._queue: TurnQueue[Part] = TurnQueue(Places(1, guests=0))

    def run(self, work: Callable[[], T], tenant: str, wake: threading.Condition, ends: Callable[[], bool]) -> T:
        """Queue a part, wake the thread that takes it, and wait for its result, or raise its error.

        Args:
            wake: The caller's lock, which that thread waits on.
            ends: Whether the thread takes no more parts.

        Raises:
            Draining: It takes no more.
        """
        results: list[T] = []
        part = Part(lambda: results.append(work()))
        with wake:
            if ends():
                raise draining_error()
            self.put(tenant, part)
            wake.notify_all()
        part.future.result()
        return results[0]

    def put(self, tenant: str, part: Part) -> None:
        """Add a part of a tenant's training."""
        self._queue.put(tenant, part)

    def take(self, *, answers_wait: bool) -> tuple[str, Part] | None:
        """The part that begins now, with its tenant: of the tenant that was given the fewest seconds. None: no part."""
        if not answers_wait:
            self._owed = 0.0
        return None if self._owed > 0.0 else self._queue.take()

    @property
    def waiting(self) -> bool:
        """Whether a part waits."""
        return self._queue.waiting

    @property
    def owes(self) -> bool:
        """Whether answers go first if some wait."""
        return self._owed > 0.0

    def charge_training(self, seconds: float) -> None:
        """A pass of a training took so long."""
        self._owed += seconds * (1.0 - self._share) / self._share

    def credit_answers(self, seconds: float) -> None:
        """A pass of answers took so long."""
        self._owed = max(0.0, self._owed - seconds)

    def end_part(self, tenant: str, seconds: float) -> None:
        """A part has ended. seconds: that it trained."""
        self._queue.end_turn(tenant, seconds)

    def abandon(self) -> None:
        """End all parts that wait with Draining."""
        for part in self._queue.clear():
            part.future.set_exception(draining_error())


def draining_error() -> Draining:
    """The error of a training whose engine ends."""
    return Draining("no more trainings run here: this process is being stopped")
