"""One row of a plan: what was checked, how bad it is, and what to do about it. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True)
class Check:
    """One row of a plan."""

    name: str
    level: Level
    text: str
    remedy: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.text if self.remedy is None else f"{self.text}: {self.remedy}"
