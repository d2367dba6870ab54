"""Who asks: a tenant, and which of its adapters and bases. Everything that is not theirs does not exist for them.

A connection to the catalog carries one `Access` (`turret.database`), and `turret.database` turns it into the
conditions of every query. A pattern is a name, or the start of one and `*`: `legal-*`, `*`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from turret.errors import BadReference

DEFAULT = "default"  # the tenant of the command line, and of everything that older stores hold
ANY = ("*",)
MOST_PATTERNS = 64
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
ADAPTERS = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}\*?|\*", re.ASCII)
BASES = re.compile(r"[!-)+-~]{1,200}\*?|\*", re.ASCII)  # any printable ASCII without blanks and `*`


@dataclass(frozen=True)
class Access:
    """A tenant, and the adapters and bases of it that may be seen."""

    tenant: str = DEFAULT
    adapters: tuple[str, ...] = ANY
    bases: tuple[str, ...] = ANY

    @property
    def whole(self) -> bool:
        """Whether it sees everything of its tenant."""
        return "*" in self.adapters and "*" in self.bases

    @property
    def operates(self) -> bool:
        """Whether it may see what concerns the whole store or server: the tenant `default` without limits."""
        return self.tenant == DEFAULT and self.whole

    def sees(self, name: str) -> bool:
        """Whether an adapter of this name could be seen."""
        return _matches(name, self.adapters)

    def sees_report(self, name: str) -> bool:
        """Whether comparisons of a recipe of this name could be seen. They name no base, so limited bases see none."""
        return self.sees(name) and "*" in self.bases

    def sees_base(self, id: str) -> bool:
        """Whether the base with this id may be used."""
        return _matches(id, self.bases)


OPERATOR = Access()
NOBODY = Access("", (), ())


_ACTING: ContextVar[str | None] = ContextVar("acting", default=None)


@contextmanager
def acting(name: str | None) -> Iterator[None]:
    """Record changes in this block as made by `name`; None: by the user of the process."""
    before = _ACTING.set(name)
    try:
        yield
    finally:
        _ACTING.reset(before)


def acting_name() -> str | None:
    """The name in `acting`, if there is one."""
    return _ACTING.get()


def check_tenant(tenant: str) -> str:
    """Return `tenant` if it is a valid name of a tenant. Raises BadReference."""
    if not _TENANT.fullmatch(tenant):
        raise BadReference(
            f"bad tenant {ascii(tenant)[:60]}: expected 1 to 63 of a-z 0-9 - _, a letter or digit first, such as legal"
        )
    return tenant


def tenant_access(tenant: str | None) -> Access:
    """All that a tenant has; None: the tenant in TURRET_TENANT, else `default`. Raises BadReference."""
    return Access(check_tenant(tenant or os.environ.get("TURRET_TENANT") or DEFAULT))


def check_patterns(adapters: Iterable[str], bases: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return both lists without repetition, each with `*` alone if it has it. Raises BadReference."""
    return _patterns_of("adapter", adapters, ADAPTERS, "legal-*"), _patterns_of("base", bases, BASES, "org/base-*")


def _patterns_of(what: str, patterns: Iterable[str], form: re.Pattern[str], example: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(patterns))
    for each in found:
        if not form.fullmatch(each):
            raise BadReference(
                f"bad {what} pattern {ascii(each)[:60]}: expected a name, or the start of one and *, such as {example}"
            )
    if not 1 <= len(found) <= MOST_PATTERNS:
        raise BadReference(f"{len(found)} {what} patterns: expected 1 to {MOST_PATTERNS}, or * for all")
    return ANY if "*" in found else found


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name == each or (each.endswith("*") and name.startswith(each[:-1])) for each in patterns)
