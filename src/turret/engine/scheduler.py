"""Continuous batching: which waiting requests begin in the next pass.

A pass takes at most `batch_tokens` tokens: one for each row that generates, the rest for requests that begin. These
are chosen by priority, then by turns between tenants (`turret.turns`, which counts the tokens of prompts and of
answers), then by turns between the adapters of a tenant (deficit round robin with `QUANTUM` tokens, Shreedhar and
Varghese 1996), then by age. A request that was passed over `PATIENCE` times has the highest priority and goes before
the others of its tenant. While it waits for room in the KV cache, no request behind it takes any. So every request is
served eventually, and a tenant that floods the queue delays another one's first request by one pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from turret.engine.request import Request
from turret.turns import Places, Turns

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
        self.waiting_tokens = 0
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
        self.waiting_tokens += request.tokens

    def remove(self, requests: Iterable[Request]) -> None:
        """Remove requests, waiting or not."""
        removed = set(map(id, requests))
        gone = [each for each in self.waiting() if id(each) in removed]
        for flow in {id(flow): flow for flow in map(self._flow, gone)}.values():
            flow.requests = deque(each for each in flow.requests if id(each) not in removed)
        for each in gone:
            self._left(each)
            self._turns.leave(each.tenant)

    def next(self) -> list[Request]:
        """Take the requests that begin in the next pass. Those that generate hold rows and cache until `finished`."""
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

    def finished(self, request: Request) -> None:
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
            return -priority, self._turns.served(tenant), self._rows.of[tenant]

        return min(lines, key=order)

    def _holds(self, request: Request) -> bool:
        """Whether there are rows and cache for a request that generates."""
        return self._rows.has_room(request.tenant, request.rows) and (
            self._cache.has_room(request.tenant, request.cache_tokens)
        )

    def _take(self, request: Request) -> None:
        taken = self._flow(request).requests.popleft()
        assert taken is request
        self._left(request)
        self._turns.charge(request.tenant, request.tokens)
        if request.rows:
            self._rows.take(request.tenant, request.rows)
            self._cache.take(request.tenant, request.cache_tokens)
        else:
            self._turns.leave(request.tenant)

    def _flow(self, request: Request) -> _Flow:
        return self._tenants[request.tenant][request.priority][request.flow]

    def _left(self, request: Request) -> None:
        """Count a request that waits no more, and drop what is empty without it."""
        self.waiting_tokens -= request.tokens
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
