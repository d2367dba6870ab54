"""Reads tables into examples in stages: open the source, find columns, read cells, choose splits, make examples.

Each task has a `Schema`, which names its columns and makes its examples. Importing the package loads neither numpy nor
torch; `turret.data.dataset` loads numpy.
"""

from turret.data.columns import Schema
from turret.data.examples import Dataset, Example, Labelled, Pair, references_of, texts_of

__all__ = ["Dataset", "Example", "Labelled", "Pair", "Schema", "references_of", "texts_of"]
