"""One row of a plan: the check, its result and a remedy. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from turret.json_types import JsonObject

Level = Literal["ok", "warn", "refuse"]


@dataclass(frozen=True)
class Check:
    """One row of a plan."""

    name: str
    level: Level
    text: str
    remedy: str | None = None

    def to_json(self) -> JsonObject:
        return asdict(self)

    def __str__(self) -> str:
        return self.text if self.remedy is None else f"{self.text}: {self.remedy}"
