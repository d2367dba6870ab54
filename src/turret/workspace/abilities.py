"""What each method can do on each family: the generated tables of the reference, and `turret doctor --base`.

The families and the methods are asked; the tests try every answer on small models. Loads no torch.
"""

from __future__ import annotations

from typing import get_args

from turret.families import Family
from turret.families.family import HeadKind
from turret.methods import Method
from turret.methods.method import Operation

OPERATIONS: tuple[Operation, ...] = get_args(Operation)


def refusals(method: Method, family: Family) -> dict[Operation, dict[str, str]]:
    """Why an operation is not possible, by operation and by "classify" or "generate"; nothing for what is possible."""
    found: dict[Operation, dict[str, str]] = {}
    for operation in OPERATIONS:
        reasons = {kind: method.refusal(operation, family, writes) for kind, writes in kinds(family).items()}
        found[operation] = {kind: reason for kind, reason in reasons.items() if reason is not None}
    return found


def kinds(family: Family) -> dict[HeadKind, bool]:
    """What bases of a family are asked to do, and whether it generates text."""
    writes: dict[HeadKind, bool] = {"classify": False, "generate": True}
    return {kind: text for kind, text in writes.items() if kind in family.head_kinds}


def fast_paths(family: Family) -> list[str]:
    """The fast paths of docs/explanation/fast-paths.md that depend on the family and that it takes."""
    fast = family.fast
    taken = {
        "flash": not family.rows_alone,
        "rms_norm": bool(fast.rms_norms),
        "first_token": bool(fast.added_norms),
        "trained_layer": bool(fast.layers),
        "layer": bool(fast.layers),
        "layer_calls": bool(fast.layers),
    }
    return [name for name, is_taken in taken.items() if is_taken]
