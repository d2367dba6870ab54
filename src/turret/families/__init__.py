"""The axis of families: one file for each architecture, and a table of them. Loads no torch."""

from turret.families.family import (
    Family,
    FastPaths,
    Group,
    Kind,
    Layout,
    Pooling,
    RelativeBias,
    Site,
    Stream,
    first,
    last,
)
from turret.families.table import FAMILIES, family_named, family_of

__all__ = [
    "FAMILIES",
    "Family",
    "FastPaths",
    "Group",
    "Kind",
    "Layout",
    "Pooling",
    "RelativeBias",
    "Site",
    "Stream",
    "family_named",
    "family_of",
    "first",
    "last",
]
