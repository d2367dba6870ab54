"""Rows that are decoded, without the rest of their sequences, and settings for them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from turret.engine.request import GenerationSettings

SETTINGS: list[dict[str, Any]] = [  # greedy and sampled rows
    {},
    {"temperature": 0.8},
    {"temperature": 1.1, "top_k": 9},
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
]


@dataclass
class Row:
    settings: GenerationSettings
    past: list[int] = field(default_factory=list)
    new: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.settings.seed)

    def counted_tokens(self) -> list[int]:
        return self.past
