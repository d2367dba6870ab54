"""A source of four small adapters for `bert`: `a` and `b` are LoRAs, `c` is a prefix, `d` only a head."""

from __future__ import annotations

import pytest
from shelf import Shelf


@pytest.fixture
def shelf() -> Shelf:
    filled = Shelf("bert")
    for seed, (name, method) in enumerate({"a": "lora", "b": "wide", "c": "prefix", "d": "head"}.items(), 1):
        filled.put(name, method, seed, labels=2 + seed % 4)
    return filled
