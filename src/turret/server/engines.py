"""The engines of a server, one for each base: which of them answers a request, and what one access sees of them.

Nothing else in the server knows how many bases there are. With one base, its engine answers everything, and no
reference is looked up here.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

from turret import data
from turret.access import Access
from turret.engine import LoadedAdapter, Named, SamplingParams, Stats, Ticket
from turret.engine.constraint import Constraint
from turret.engine.request import Row
from turret.errors import BadRequest, NotFound, ServeRefused, TurretError
from turret.reference import Reference, parts_of
from turret.store import Version
from turret.tasks.task import RequestKind
from turret.transformer import Tokenizer

if TYPE_CHECKING:
    from turret.engine import Engine  # tests replace it with an echo

Input: TypeAlias = data.Input | Row  # a text, two, a conversation, or token ids that are used unchanged
REMEMBERED = 4096  # versions whose base is known


@dataclass(frozen=True)
class ServedBase:
    """A base in memory, with the engine that answers on it."""

    engine: Engine

    @property
    def id(self) -> str:
        return self.engine.base.id

    @property
    def name(self) -> str:
        """What clients call it: its id; for a base in a folder, the folder's name."""
        is_folder = self.id.startswith(("/", ".", "~"))
        return self.id.replace("\\", "/").rstrip("/").rpartition("/")[2] if is_folder else self.id

    @property
    def fingerprint(self) -> str:
        return self.engine.base.fingerprint

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.base.tokenizer


class Engines:
    """The engines of one server, one for each base.

    Raises:
        ServeRefused: Two of the bases have one name, or equal weights.
    """

    def __init__(self, *engines: Engine) -> None:
        self.bases = [ServedBase(each) for each in engines]
        self.fingerprints = frozenset(each.fingerprint for each in self.bases)
        for place, base in enumerate(self.bases):
            for other in self.bases[:place]:
                if base.fingerprint == other.fingerprint:
                    raise ServeRefused(f"{other.id} and {base.id} have the same weights: name each base once")
                if base.name == other.name:
                    raise ServeRefused(
                        f"{other.id} and {base.id} are both called {base.name}: rename one of the folders"
                    )

    @property
    def only(self) -> ServedBase | None:
        """The base of a server that has one."""
        return self.bases[0] if len(self.bases) == 1 else None

    def of(self, fingerprint: str | None) -> ServedBase | None:
        """The base with this fingerprint, if it is served here."""
        return next((each for each in self.bases if each.fingerprint == fingerprint), None)

    def drain(self, timeout: float) -> None:
        """Take no new requests and wait for the others, for at most `timeout` seconds over all bases."""
        end = time.monotonic() + timeout
        for each in self.bases:
            each.engine.drain(max(0.0, end - time.monotonic()))


class SeenEngines:
    """The engines as one access sees them. A reference of another tenant never reaches one.

    Args:
        resolve: The version of a reference, as the access sees it.
        home: The tenant that the engines were started for, whose references they take without a tenant.
    """

    def __init__(self, engines: Engines, resolve: Callable[[str], Version], access: Access, home: str) -> None:
        self._engines, self._resolve, self.access = engines, resolve, access
        self._tenant = "" if self.access.tenant == home else self.access.tenant  # as in `Named`
        self._known: dict[str, str | None] = {}  # version -> the fingerprint of its base

    # --- bases --------------------------------------------------------------------------------------------------------

    @property
    def fingerprints(self) -> frozenset[str]:
        """Of the bases of the whole server."""
        return self._engines.fingerprints

    @property
    def bases(self) -> Sequence[ServedBase]:
        """The bases that the access sees; the only one is named to all."""
        return self.askable if self._engines.only is None else self._engines.bases

    @property
    def only(self) -> ServedBase | None:
        """The base of a server that has one."""
        return self._engines.only

    @cached_property
    def askable(self) -> Sequence[ServedBase]:
        """The bases that the access may ask by their own names."""
        return [each for each in self._engines.bases if self.access.sees_base(each.id)]

    def bare(self, model: str) -> ServedBase | None:
        """The base that a request asks by its own name, if the access sees it."""
        return next((each for each in self.askable if each.name == model), None)

    def is_base(self, model: str) -> bool:
        """Whether a request for this model is for a bare base."""
        return self.bare(model) is not None

    def base_of(self, model: str | None) -> ServedBase:
        """The base that a model stands for: by its own name, or by the reference of an adapter. May read the store.

        Raises:
            NotFound: The adapter is not there, or is of no base of this server.
            BadRequest: The adapters of a composition are of different bases, or several bases leave a choice.
        """
        if (only := self._engines.only) is not None:
            return only
        if model is None:
            names = ", ".join(each.name for each in self.bases)
            raise BadRequest(f"model is missing: this server has several bases, {names}: name one, or an adapter")
        return self.bare(model) or self._adapters_base(model)

    def base_of_version(self, version: Version) -> ServedBase | None:
        """The base that a version was trained on, if it is served here."""
        return self._engines.of(version.base.get("fingerprint"))

    def is_on_base(self, version: Version) -> bool:
        """Whether the version was trained on a base of this server."""
        return self.base_of_version(version) is not None

    def sees(self, reference: str) -> bool:
        """Whether an adapter of this name may be seen; of the empty name, whether all bases may be. May read the store.

        An access with limited bases sees a name only if it finds its version in the store, and no experiment `name#1`.
        """
        if not reference:
            return len(self.askable) == len(self._engines.bases)
        return self._sees_names(reference) and ("*" in self.access.bases or self._finds(reference))

    # --- requests -----------------------------------------------------------------------------------------------------

    def submit(
        self,
        kind: RequestKind,
        text: Input,
        model: str,
        options: SamplingParams | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> Ticket:
        """As an engine's. Raises NotFound for what the access does not see, as for what is not there.

        Args:
            model: The name of a base, or a reference.
        """
        bare = self.bare(model)
        base, reference = (bare, None) if bare is not None else (self._adapters_base(model), self._within(model))
        tenant = self.access.tenant
        return base.engine.submit(kind, text, reference, options, priority=priority, deadline=deadline, tenant=tenant)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What this thread submits in the block is queued at once at its end, on each base."""
        with ExitStack() as stack:
            for each in self._engines.bases:
                stack.enter_context(each.engine.together())
            yield

    def compile(self, model: str, constraint: Constraint) -> None:
        """Compile a constraint for the base of a model. May take seconds. Raises as `submit`, and DataError."""
        (self.bare(model) or self._adapters_base(model)).engine.compile(constraint)

    def is_compiled(self, constraint: Constraint) -> bool:
        """Whether every base of the server has compiled a constraint."""
        return all(each.engine.is_compiled(constraint) for each in self._engines.bases)

    # --- adapters in memory -------------------------------------------------------------------------------------------

    def warm(self, reference: str, *, pin: bool = False) -> Named:
        return self._adapters_base(reference).engine.warm(self._within(reference), pin=pin)

    def warm_ahead(self, reference: str) -> bool:
        """Load a version unless it would evict another; whether it is in memory now."""
        return self._adapters_base(reference).engine.warm_ahead(self._within(reference))

    def unload(self, reference: str) -> Named:
        return self._adapters_base(reference).engine.unload(self._within(reference))

    def unpin(self, reference: str) -> Named:
        return self._adapters_base(reference).engine.unpin(self._within(reference))

    def loaded_adapters(self) -> Sequence[LoadedAdapter]:
        """The versions in memory that the access sees, base by base. The numbers of slots leave out those of others."""
        loaded = [each for base in self.askable for each in base.engine.loaded()]
        seen = [each for each in loaded if each.tenant == self._tenant and self._sees_names(each.version)]
        if self.access.operates:
            return seen
        slots = sorted(each.slot for each in seen)
        return [replace(each, slot=slots.index(each.slot) + 1) for each in seen]

    def in_memory(self, digest: str) -> bool:
        """Whether the version with this digest is loaded."""
        return any(each.digest == digest for each in self.loaded_adapters())

    def stats(self) -> dict[str, Stats]:
        """The figures of each engine by the name of its base, with the versions that the access sees."""
        return {base.name: self._seen_stats(base) for base in self.bases}

    # --- the inside ---------------------------------------------------------------------------------------------------

    def _seen_stats(self, base: ServedBase) -> Stats:
        stats, start = base.engine.stats(), f"{self._tenant}/" if self._tenant else ""
        sees_base = self.access.sees_base(base.id)
        versions = {
            key.removeprefix(start): each
            for key, each in stats.versions.items()
            if key.rpartition("/")[0] == self._tenant and sees_base and self._sees_names(each.version)
        }
        waiting = [
            key.removeprefix(start)
            for key in stats.waiting_adapters
            if key.rpartition("/")[0] == self._tenant and sees_base and self._sees_names(key.removeprefix(start))
        ]
        return replace(stats, versions=versions, waiting_adapters=waiting)

    def _sees_names(self, reference: str) -> bool:
        return all(self.access.sees(re.split("[@#]", part)[0]) for part in reference.split("+"))

    def _finds(self, reference: str) -> bool:
        try:
            for part in parts_of(reference):
                self._resolve(part)
        except TurretError:
            return False
        return True

    def _adapters_base(self, reference: str) -> ServedBase:
        """The base of an adapter or a composition that the access sees."""
        parts = parts_of(reference)
        for part in parts:
            Reference.parse(part)  # raises BadReference: the tenant is written in `_within` and nowhere else
        only = self._engines.only
        if only is not None and self.access.whole:
            return only
        found = {part: self._fingerprint(part) for part in parts}
        if only is not None:
            return only
        if len(set(found.values())) > 1:
            raise BadRequest(
                f"{ascii(reference)[:120]} composes adapters of different bases: compose those of one base"
            )
        base = self._engines.of(found[parts[0]])
        if base is None:
            raise NotFound(f"no {ascii(reference)[:60]} here: it was trained on another base than this server's")
        return base

    def _fingerprint(self, reference: str) -> str | None:
        """The fingerprint of the base of a version. One that the access does not see is not there: NotFound."""
        if (known := self._known.get(reference)) is not None:
            return known
        version = self._resolve(reference)
        found = version.base.get("fingerprint")
        if self.access.whole and reference == str(version):  # a numbered version never changes its base
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[reference] = found
        return found

    def _within(self, reference: str) -> str:
        """The reference, or the composition, as an engine takes it; limited bases mean exact versions."""
        if "*" not in self.access.bases:
            reference = "+".join(str(self._resolve(part)) for part in parts_of(reference))
        return f"{self._tenant}/{reference}" if self._tenant else reference
