"""What the engine has done, counted. Knows numbers alone; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from turret.engine.request import Request, VersionStats

SMOOTHING = 0.2  # weight of the newest pass in the tokens a second
SHORTEST, LONGEST = 0.1, 60.0  # seconds that a Busy asks to wait
KEPT = 4096  # versions whose counts are kept; those asked for least lately go


class Counters:
    """Counts since the engine began."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.passes = self.prompt_tokens = self.tokens = self.answers = self.errors = 0
        self._speed = 0.0  # tokens a second
        self._versions: dict[str, VersionStats] = {}

    def asked(self, request: Request) -> None:
        known = self._versions.pop(request.flow, None) or VersionStats("")
        name = str(request.named) if request.named else ""
        self._versions[request.flow] = replace(known, version=name, requests=known.requests + 1)
        if len(self._versions) > KEPT:
            del self._versions[next(iter(self._versions))]

    def passed(self, begin: Sequence[Request], steps: int, seconds: float) -> None:
        read = sum(request.tokens for request in begin)
        self.passes += 1
        self.prompt_tokens += read
        self.tokens += steps + sum(request.kind == "generate" for request in begin)
        speed = (read + steps) / max(seconds, 1e-6)
        self._speed += (speed - self._speed) * (SMOOTHING if self._speed else 1.0)

    def ended(self, request: Request, answered: bool, tokens: int) -> None:
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
        """How long so many tokens take at the speed of late."""
        return min(LONGEST, max(SHORTEST, tokens / self._speed if self._speed else 1.0))

    def versions(self) -> Mapping[str, VersionStats]:
        return dict(self._versions)
