"""Counts of passes, tokens, answers and errors, in total and for each version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from turret.engine.request import Request, VersionStats
from turret.errors import Busy

SMOOTHING = 0.2  # weight of the newest pass in the average speed
SHORTEST, LONGEST = 0.1, 60.0  # bounds of `Busy.retry_after`, in seconds
KEPT = 4096  # versions whose counts are kept: the most recently requested


class Counters:
    """Counts since the engine started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.passes = self.prompt_tokens = self.tokens = self.answers = self.errors = 0
        self._speed = 0.0  # tokens per second
        self._versions: dict[str, VersionStats] = {}

    def submitted(self, request: Request) -> None:
        """Count a request that was taken."""
        known = self._versions.pop(request.flow, None) or VersionStats("")
        name = str(request.named) if request.named else ""
        self._versions[request.flow] = replace(known, version=name, requests=known.requests + 1)
        if len(self._versions) > KEPT:
            del self._versions[next(iter(self._versions))]

    def passed(self, begin: Sequence[Request], steps: int, seconds: float) -> None:
        """Count a pass: the requests that began in it, and how many rows decoded one token."""
        read = sum(request.tokens for request in begin)
        self.passes += 1
        self.prompt_tokens += read
        self.tokens += steps + sum(request.generates for request in begin)
        speed = (read + steps) / max(seconds, 1e-6)
        self._speed += (speed - self._speed) * (SMOOTHING if self._speed else 1.0)

    def ended(self, request: Request, answered: bool, tokens: int) -> None:
        """Count the end of a request that generated so many tokens."""
        self.answers += answered
        self.errors += not answered
        known = self._versions.get(request.flow)
        if known is not None:
            self._versions[request.flow] = replace(
                known,
                answers=known.answers + answered,
                errors=known.errors + (not answered),
                prompt_tokens=known.prompt_tokens + (request.tokens if answered else 0),
                tokens=known.tokens + tokens,
            )

    def seconds_for(self, tokens: int) -> float:
        """Seconds for that many tokens at the recent speed, within `SHORTEST` and `LONGEST`."""
        return min(LONGEST, max(SHORTEST, tokens / self._speed if self._speed else 1.0))

    def busy(self, waiting: int, limit: int) -> Busy:
        """The error of a request for which the queue has no room. Args in tokens."""
        again = self.seconds_for(waiting)
        return Busy(
            f"{waiting} tokens wait already and the limit of queue_tokens is {limit}: ask again in {again:.1f} s",
            retry_after=again,
        )

    def versions(self) -> Mapping[str, VersionStats]:
        """The counts of each version, by key; "" is the bare base."""
        return dict(self._versions)
