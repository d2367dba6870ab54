"""The first axis: what a base is. One file a family, one table of them all; nothing here loads torch."""

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
