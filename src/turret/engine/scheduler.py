"""Who goes next: policy alone. Knows counts of tokens; refuses to know threads, clocks, adapters and tensors.

A pass takes at most `batch_tokens` tokens: one for every generating row, the rest for requests that begin. Those are
chosen by priority, then by turns between adapters (deficit round robin: an adapter may send `QUANTUM` tokens a turn),
then by age. So that nobody waits for ever, whoever was passed over `PATIENCE` times goes before all others, and while
such a one waits for room in the key-value cache no other takes any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from turret.engine.request import Request

QUANTUM = 256  # tokens an adapter may send in its turn
PATIENCE = 64  # passes that may go by with others


@dataclass
class _Flow:
    """The waiting requests of one adapter at one priority, oldest first."""

    requests: deque[Request] = field(default_factory=deque)
    deficit: int = 0  # tokens it may still send
    turn: bool = False  # and it is its turn


class Scheduler:
    """The waiting requests that could begin, and the room that is taken."""

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
        self.rows = 0  # generating now
        self.held_tokens = 0  # of the key-value cache
        self.waiting_tokens = 0
        self._passes = 0  # in which somebody began
        self._flows: dict[int, dict[str, _Flow]] = {}  # by priority, by adapter; the first in a dictionary is next

    def __len__(self) -> int:
        return sum(len(flow.requests) for flows in self._flows.values() for flow in flows.values())

    def waiting(self) -> Iterator[Request]:
        for flows in self._flows.values():
            for flow in flows.values():
                yield from flow.requests

    def add(self, request: Request) -> None:
        """It waits from now on. It must fit: its rows and cache tokens are within the limits."""
        assert request.rows <= self.running
        assert request.cache_tokens <= self.cache_tokens
        flow = self._flows.setdefault(request.priority, {}).setdefault(request.flow, _Flow())
        flow.requests.append(request)
        request.joined = self._passes
        self.waiting_tokens += request.tokens

    def remove(self, requests: Iterable[Request]) -> None:
        """They wait no longer."""
        gone = set(map(id, requests))
        for priority, flows in list(self._flows.items()):
            for key, flow in list(flows.items()):
                kept = deque(each for each in flow.requests if id(each) not in gone)
                self.waiting_tokens -= sum(each.tokens for each in flow.requests) - sum(each.tokens for each in kept)
                flow.requests = kept
                if not kept:
                    del flows[key]
            if not flows:
                del self._flows[priority]

    def next(self) -> list[Request]:
        """The requests that begin in the next pass; those that generate hold rows and cache until `finished`."""
        chosen: list[Request] = []
        self._room = self.batch_tokens - self.rows
        if self._serve_impatient(chosen):
            for priority in sorted(self._flows, reverse=True):
                self._serve(priority, chosen)
        self._passes += bool(chosen)
        return chosen

    def finished(self, request: Request) -> None:
        """A generating request gives its rows and its part of the cache back."""
        self.rows -= request.rows
        self.held_tokens -= request.cache_tokens

    def _serve_impatient(self, chosen: list[Request]) -> bool:
        """Those who have waited too long, longest first. Says whether others may begin as well."""
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
        """Turns between the adapters of one priority, until the pass is full or none of them can send more.

        One whose next request finds the pass full goes on with its turn in the next; until then nobody begins another
        turn, or small requests would fill every pass and large ones get less than their share.
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
        """Whether there are rows and cache for it."""
        if request.kind == "classify":
            return True
        return self.rows + request.rows <= self.running and (
            self.held_tokens + request.cache_tokens <= self.cache_tokens
        )

    def _fits(self, request: Request, chosen: list[Request]) -> bool:
        """Whether the pass has tokens left for it; the first of a pass may have any number."""
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
        if request.kind == "generate":
            self.rows += request.rows
            self.held_tokens += request.cache_tokens
        chosen.append(request)
