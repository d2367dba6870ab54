"""What the server needs from an engine. `turret.engine.Engine` provides it; tests replace it with an echo.

`submit` returns a ticket. The ticket calls its listeners from the engine's own thread: with a `Piece` for each part of
a text, and at the end with one `Done` or `Failed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from turret import data
from turret.engine import Event, LoadedAdapter, Named, Receipt, SamplingParams, Stats
from turret.engine.constraint import Constraint
from turret.families.family import Family
from turret.tasks.shapes import Answer
from turret.tasks.task import RequestKind
from turret.transformer import Tokenizer

Input: TypeAlias = data.Input | Sequence[int]  # a text, two, a conversation, or token ids that are used unchanged


class TicketProtocol(Protocol):
    """One request that the engine has accepted."""

    cut: bool  # the prompt was too long, and lost a part

    @property
    def receipt(self) -> Receipt: ...
    def listen(self, listener: Callable[[Event], None]) -> None: ...
    def result(self, timeout: float | None = None) -> Answer: ...  # raises the error of the request
    def cancel(self) -> None: ...


class BaseProtocol(Protocol):
    """The base in memory."""

    @property
    def id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def family(self) -> Family: ...


class EngineProtocol(Protocol):
    """One base and the adapters on it."""

    @property
    def base(self) -> BaseProtocol: ...
    @property
    def longest(self) -> int: ...  # tokens of a prompt and its answer together
    def submit(
        self,
        kind: RequestKind,
        text: Input,
        adapter: str | None,
        options: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str = "",
    ) -> TicketProtocol: ...
    def together(self) -> AbstractContextManager[None]: ...  # what the thread submits in it is queued at once
    def compile(self, constraint: Constraint) -> None: ...  # may take seconds
    def is_compiled(self, constraint: Constraint) -> bool: ...
    def warm(self, reference: str, *, pin: bool = False) -> Named: ...
    def warm_ahead(self, reference: str) -> bool: ...
    def unload(self, reference: str) -> Named: ...
    def unpin(self, reference: str) -> Named: ...
    def loaded(self) -> Sequence[LoadedAdapter]: ...
    def stats(self) -> Stats: ...
    def drain(self, timeout: float) -> bool: ...
    def close(self) -> None: ...
