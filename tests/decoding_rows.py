"""A row that is decoded, without the rest of its sequence."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from turret.engine.request import GenerationSettings


@dataclass
class Row:
    settings: GenerationSettings
    past: list[int] = field(default_factory=list)
    new: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.settings.seed)

    def counted_tokens(self) -> list[int]:
        return self.past
