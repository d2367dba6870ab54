"""Continuous batching: which waiting requests begin in the next pass.

A pass takes at most `batch_tokens` tokens: one for each row that generates, the rest for requests that begin. These
are chosen by priority, then by turns between adapters (deficit round robin with `QUANTUM` tokens, Shreedhar and
Varghese 1996), then by age. A request that was passed over `PATIENCE` times goes first, and while it waits for room in
the KV cache no other request takes any. So every request is served eventually.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from turret.engine.request import Request

QUANTUM = 256  # tokens of an adapter in one turn
PATIENCE = 64  # passes in which other requests begin before this one goes first


@dataclass
class _Flow:
    """The waiting requests of one adapter at one priority, oldest first."""

    requests: deque[Request] = field(default_factory=deque)
    deficit: int = 0  # tokens that may still begin
    turn: bool = False  # whether its turn has started


class Scheduler:
    """The waiting requests that could begin, and the rows and cache in use.

    Args:
        batch_tokens: Limit of tokens of a pass.
        running: Limit of rows that generate.
        cache_tokens: Limit of tokens in the KV cache.
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
        self.rows = 0  # that generate
        self.held_tokens = 0  # of the KV cache
        self.waiting_tokens = 0
        self._passes = 0  # in which a request began
        self._flows: dict[int, dict[str, _Flow]] = {}  # by priority, then by adapter in the order of turns

    def __len__(self) -> int:
        return sum(len(flow.requests) for flows in self._flows.values() for flow in flows.values())

    def waiting(self) -> Iterator[Request]:
        """All waiting requests."""
        for flows in self._flows.values():
            for flow in flows.values():
                yield from flow.requests

    def add(self, request: Request) -> None:
        """Add a waiting request. Its rows and cache tokens are within the limits."""
        assert request.rows <= self.running
        assert request.cache_tokens <= self.cache_tokens
        flow = self._flows.setdefault(request.priority, {}).setdefault(request.flow, _Flow())
        flow.requests.append(request)
        request.joined = self._passes
        self.waiting_tokens += request.tokens

    def remove(self, requests: Iterable[Request]) -> None:
        """Remove requests, waiting or not."""
        removed = set(map(id, requests))
        for priority, flows in list(self._flows.items()):
            for key, flow in list(flows.items()):
                left = deque(each for each in flow.requests if id(each) not in removed)
                self.waiting_tokens -= sum(each.tokens for each in flow.requests) - sum(each.tokens for each in left)
                flow.requests = left
                if not left:
                    del flows[key]
            if not flows:
                del self._flows[priority]

    def next(self) -> list[Request]:
        """Take the requests that begin in the next pass. Those that generate hold rows and cache until `finished`."""
        chosen: list[Request] = []
        self._room = self.batch_tokens - self.rows
        if self._serve_impatient(chosen):
            for priority in sorted(self._flows, reverse=True):
                self._serve(priority, chosen)
        self._passes += bool(chosen)
        return chosen

    def finished(self, request: Request) -> None:
        """Free the rows and the cache of a request that generated."""
        self.rows -= request.rows
        self.held_tokens -= request.cache_tokens

    def _serve_impatient(self, chosen: list[Request]) -> bool:
        """Take requests that have waited too long, the longest first. Returns whether others may begin too."""
        heads = [flow.requests[0] for flows in self._flows.values() for flow in flows.values()]
        for request in sorted(heads, key=lambda each: each.joined):
            if self._passes - request.joined < self.patience:
                break
            if not self._holds(request):
                return False
            if self._fits(request, chosen):
                self._take(request, chosen)
        return True

    def _serve(self, priority: int, chosen: list[Request]) -> None:
        """Take turns between the adapters of one priority, until the pass is full or no request fits.

        An adapter whose next request does not fit continues its turn in the next pass. Until then no other turn starts:
        else small requests would fill every pass, and large ones would get less than their share.
        """
        flows = self._flows[priority]
        stopped: set[str] = set()
        full = False
        while len(stopped) < len(flows):
            for key in [key for key in flows if key not in stopped]:
                flow = flows[key]
                if not flow.turn:
                    if full:
                        stopped.add(key)
                        continue
                    flow.turn, flow.deficit = True, flow.deficit + self.quantum
                while flow.requests and flow.requests[0].tokens <= flow.deficit:
                    request = flow.requests[0]
                    fits = self._fits(request, chosen)
                    if not fits or not self._holds(request):
                        full = full or not fits
                        stopped.add(key)
                        break
                    flow.deficit -= request.tokens
                    self._take(request, chosen)
                if key in flows and key not in stopped:  # its turn is over
                    flow.turn = False
                    flows[key] = flows.pop(key)
        if not flows:
            del self._flows[priority]

    def _holds(self, request: Request) -> bool:
        """Whether there are rows and cache for a request."""
        if not request.generates:
            return True
        return self.rows + request.rows <= self.running and (
            self.held_tokens + request.cache_tokens <= self.cache_tokens
        )

    def _fits(self, request: Request, chosen: list[Request]) -> bool:
        """Whether a request fits into the rest of the pass; the first one always does."""
        return not chosen or request.tokens <= self._room

    def _take(self, request: Request, chosen: list[Request]) -> None:
        flows = self._flows[request.priority]
        flow = flows[request.flow]
        taken = flow.requests.popleft()
        assert taken is request
        if not flow.requests:
            del flows[request.flow]
        self.waiting_tokens -= request.tokens
        self._room -= request.tokens
        if request.generates:
            self.rows += request.rows
            self.held_tokens += request.cache_tokens
        chosen.append(request)
