"""From a source of data to examples: open -> columns -> cells -> splits -> examples, each stage a function.

Which columns are read, and what an example is made of, a `Schema` says, which each task has. Importing the package
loads neither numpy nor torch; `turret.data.dataset` loads numpy.
"""

from turret.data.columns import Schema
from turret.data.examples import Dataset, Example, Labelled, Pair, texts_of

__all__ = ["Dataset", "Example", "Labelled", "Pair", "Schema", "texts_of"]
