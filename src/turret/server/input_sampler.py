"""Sample the texts that a promise covers, and embed them by the bare base, to notice that they have changed.

Of all texts of a few seconds one is drawn at random, for each promise. It is embedded after all requests, and only if
none waits. What fails is left out: a sample that is missing weakens the test, and does not mislead it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turret.database import Database
from turret.engine import SamplingParams
from turret.errors import EngineError, TurretError, one_line
from turret.server.engine_protocol import Input
from turret.server.engines import Engines, ServedBase
from turret.server.logs import Log
from turret.store import promise_inputs
from turret.tasks.tokens import Tokens
from turret.workspace.promising import embedded_text

SECONDS = 5.0  # in which one text of a promise is drawn
PATIENCE = 10.0  # seconds until an embedding is given up
LOWEST_PRIORITY = -2  # below that of shadows and batches


@dataclass
class _Drawn:
    """One text at random of those that came since `since`."""

    since: float
    base: str  # its fingerprint
    texts: int = 0
    text: str | None = None


class InputSampler:
    """The samples of one tenant. `turn` has a thread of its own; any thread calls `offer`, which returns at once.

    Args:
        options: makes the settings of an embedding.
    """

    def __init__(
        self,
        database: Database,
        engines: Engines,
        options: Callable[..., SamplingParams],
        tenant: str,
        log: Log,
        clock: Callable[[], float],
        seconds: float | None = None,
    ) -> None:
        self._database, self._engines, self._options, self._tenant = database, engines, options, tenant
        self._log, self._clock, self._seconds = log, clock, SECONDS if seconds is None else seconds
        self._random, self._lock = random.Random(), threading.Lock()
        self._drawn: dict[int, _Drawn] = {}  # by the id of a promise
        self._tokens: dict[str, Tokens] = {}  # by the fingerprint of a base
        self._unable = set[str]()  # fingerprints of bases that do not embed

    def offer(self, promise_id: int, base: str, inputs: Sequence[Input]) -> None:
        """Texts that a version with this promise has answered. base: the fingerprint of its base."""
        if base in self._unable or not inputs:
            return
        with self._lock:
            drawn = self._drawn.setdefault(promise_id, _Drawn(self._clock(), base))
            drawn.texts += len(inputs)
            if self._random.random() * drawn.texts < len(inputs):
                drawn.text = embedded_text(self._random.choice(inputs))

    def turn(self) -> None:
        """Embed and keep the texts that are due. Raises StoreError."""
        now = self._clock()
        with self._lock:
            due = {each: drawn for each, drawn in self._drawn.items() if now - drawn.since >= self._seconds}
        if not due or not self._database.writable():
            return
        for promise_id, drawn in due.items():
            base = self._engines.of(drawn.base)
            if base is not None and base.engine.stats().waiting:
                continue  # the text stays, or a later one takes its place
            with self._lock:
                del self._drawn[promise_id]
            if base is not None and drawn.text is not None:
                self._keep(promise_id, base, drawn.text)

    def _keep(self, promise_id: int, base: ServedBase, text: str) -> None:
        try:
            vector = self._embedded(base, text)
        except (EngineError, TimeoutError):
            return
        except (TurretError, ValueError) as error:
            if base.fingerprint not in self._unable:
                message = f"input drift is not watched: {one_line(str(error))}"
                self._log.write("promise", "warning", base=base.name, message=message)
            self._unable.add(base.fingerprint)
            return
        with self._database.writing() as connection:
            promise_inputs.add(connection, promise_id, vector)

    def _embedded(self, base: ServedBase, text: str) -> bytes:
        from turret.experiments.input_drift import MOST_TOKENS, packed  # loads numpy

        tokens = self._tokens.setdefault(base.fingerprint, Tokens(base.tokenizer))
        row = tokens.row(text, min(MOST_TOKENS, base.engine.longest))
        ticket = base.engine.submit(
            "embed", row, None, self._options(), priority=LOWEST_PRIORITY, deadline=PATIENCE, tenant=self._tenant
        )
        try:
            return packed([ticket.result(timeout=PATIENCE + 1)["embedding"]])[0]
        finally:
            ticket.cancel()
