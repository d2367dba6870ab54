"""Reads tables into examples in stages: open the source, find columns, read cells, choose splits, make examples.

Each task has a `Schema`, which names its columns and makes its examples. Importing the package loads neither numpy nor
torch; `turret.data.dataset` loads numpy.
"""

from turret.data.columns import Schema
from turret.data.examples import (
    Conversation,
    Dataset,
    Example,
    Input,
    Labelled,
    Pair,
    Preferred,
    Prompt,
    Related,
    Scored,
    Tagged,
    TextPair,
    Turn,
)

__all__ = [
    "Conversation",
    "Dataset",
    "Example",
    "Input",
    "Labelled",
    "Pair",
    "Preferred",
    "Prompt",
    "Related",
    "Schema",
    "Scored",
    "Tagged",
    "TextPair",
    "Turn",
]
