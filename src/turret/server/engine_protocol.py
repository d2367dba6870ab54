"""What the server asks of an engine: the engine's public face, and no more of it. Refuses to know what answers.

An `Engine` resolves a reference when it is asked (`submit`), gives a `Ticket`, and tells whoever listens to it what
has been decided: events with `text` (a piece), `answer` (done) or `error` (failed), from a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from turret.tasks.task import RequestKind

Kind = RequestKind
Text = str | Sequence[int]


class ReceiptProtocol(Protocol):
    """Which version answers."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str | None: ...  # None: the bare base
    @property
    def number(self) -> int: ...
    @property
    def digest(self) -> str | None: ...
    @property
    def base(self) -> str: ...  # its fingerprint


class TicketProtocol(Protocol):
    """One request at work."""

    @property
    def receipt(self) -> ReceiptProtocol: ...
    def listen(self, fn: Callable[[Any], None]) -> None: ...
    def result(self, timeout: float | None = None) -> dict[str, Any]: ...  # raises what went wrong
    def cancel(self) -> None: ...


class BaseProtocol(Protocol):
    """The base in memory."""

    @property
    def id(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...


class EngineProtocol(Protocol):
    """One base and the adapters on it."""

    @property
    def base(self) -> BaseProtocol: ...
    def submit(
        self,
        kind: Kind,
        text: Text,
        adapter: str | None,
        options: Any = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> TicketProtocol: ...
    def warm(self, reference: str, *, pin: bool = False) -> Any: ...
    def unload(self, reference: str) -> Any: ...
    def unpin(self, reference: str) -> Any: ...
    def loaded(self) -> Sequence[Any]: ...
    def stats(self) -> Any: ...
    def drain(self, timeout: float) -> bool: ...
    def close(self) -> None: ...


def named(receipt: ReceiptProtocol) -> str | None:
    """`name@3`, or None for the bare base."""
    return f"{receipt.name}@{receipt.number}" if receipt.name else None
