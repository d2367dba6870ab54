"""Counts of passes, tokens, answers and errors, in total and for each version, and how fast the queue is served."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from turret.engine.request import Histogram, Limits, Request, VersionStats
from turret.errors import Busy

HALF_LIFE = 5.0  # seconds of work after which a measurement counts half
MEASURED = 1.0  # seconds of work that are measured before a wait is predicted
SHORTEST, LONGEST = 0.1, 600.0  # bounds of `Busy.retry_after`, in seconds
UNKNOWN = 1.0  # seconds until a client should ask again, if no pass was measured
KEPT = 4096  # versions whose counts are kept: the most recently requested


class Counters:
    """Counts since the engine started."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.passes = self.prompt_tokens = self.tokens = self.answers = self.errors = 0
        self.queue, self.first_token, self.between_tokens = Histogram(), Histogram(), Histogram()
        self._served = self._worked = 0.0  # tokens that began and the seconds this took, the older the less
        self._measured = 0.0  # all seconds of work
        self._last = clock()  # the end of the last pass
        self._waited = False  # whether requests waited then
        self._versions: dict[str, VersionStats] = {}

    def submitted(self, request: Request) -> None:
        """Count a request that was taken."""
        known = self._versions.pop(request.flow, None) or VersionStats("")
        name = str(request.named) if request.named else ""
        self._versions[request.flow] = replace(known, version=name, requests=known.requests + 1)
        if len(self._versions) > KEPT:
            del self._versions[next(iter(self._versions))]

    def passed(self, begin: Sequence[Request], steps: int, seconds: float, waits: bool) -> None:
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

    def stepped(self, tokens: int, seconds: float) -> None:
        """Count further tokens of one row. seconds: between two of them."""
        self.tokens += tokens
        self.between_tokens.observe(max(0.0, seconds), tokens)

    def _serve(self, tokens: int, seconds: float) -> None:
        """Measure how fast the queue is served: tokens that began in these seconds."""
        decay = 0.5 ** (seconds / HALF_LIFE)
        self._served = self._served * decay + tokens
        self._worked = self._worked * decay + seconds
        self._measured += seconds

    def ended(self, request: Request, answered: bool, tokens: int) -> None:
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
