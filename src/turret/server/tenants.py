"""What a server keeps for each tenant, and the engine as one access sees it.

The tenants of a server share its engine, its limits and its threads. Each has its own aliases, experiments, shadows and
metrics, so a name means only what it means for its tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from turret.engine import LoadedAdapter, Named, Options, Stats
from turret.reference import Reference, parts_of
from turret.server.alias_watcher import AliasWatcher
from turret.server.engine_protocol import BaseProtocol, EngineProtocol, Input, TicketProtocol
from turret.server.limits import RequestLimits
from turret.server.logs import Log
from turret.server.metrics import Metrics
from turret.server.routing import Routing
from turret.server.shadows import Shadows
from turret.tasks.task import RequestKind
from turret.workspace import Workspace


@dataclass(frozen=True)
class Tenant:
    """What a server keeps for one tenant."""

    workspace: Workspace
    engine: EngineProtocol
    aliases: AliasWatcher
    routing: Routing
    shadows: Shadows
    metrics: Metrics

    @classmethod
    def open(
        cls,
        workspace: Workspace,
        engine: EngineProtocol,
        metrics: Metrics,
        alias: str,
        limits: RequestLimits,
        clock: Callable[[], float],
        log: Log | None,
    ) -> Tenant:
        """What a server keeps for the tenant of a workspace.

        Args:
            engine: As the tenant sees it.
            alias: What plain names mean.
            log: Gets the answers of shadows; None if texts are not logged.
        """
        store, base = workspace.store, engine.base.fingerprint
        aliases = AliasWatcher(
            store.last_move,
            store.pointing,
            engine.warm,
            lambda digest: in_memory(engine, digest),
            base=base,
            alias=alias,
            clock=clock,
        )
        routing = Routing(workspace.router(), aliases, engine.warm, workspace.resolve, base=base, clock=clock)
        shadows = Shadows(
            engine,
            routing,
            metrics,
            limit=limits.shadow_inputs,
            seconds=limits.answer_seconds,
            clock=clock,
            log=log,
        )
        return cls(workspace, engine, aliases, routing, shadows, metrics)

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return self.aliases.ready and self.routing.ready

    def refresh(self) -> None:
        """Follow aliases and experiments once."""
        self.aliases.poll()
        self.routing.refresh()


class TenantEngine:
    """The server's engine as one access sees it. A reference of another tenant never reaches the engine.

    Args:
        workspace: Of the access.
        home: The tenant that the engine was started for, whose references it takes without a tenant.
    """

    def __init__(self, engine: EngineProtocol, workspace: Workspace, home: str) -> None:
        self._engine, self._workspace = engine, workspace
        self.access = workspace.store.access
        self._tenant = "" if self.access.tenant == home else self.access.tenant  # as in `Named`

    @property
    def base(self) -> BaseProtocol:
        return self._engine.base

    @property
    def longest(self) -> int:
        return self._engine.longest

    def submit(
        self,
        kind: RequestKind,
        text: Input,
        adapter: str | None,
        options: Options | None = None,
        *,
        priority: int = 0,
        deadline: float | None = None,
    ) -> TicketProtocol:
        """As the engine's. Raises NotFound for what the access does not see, as for what is not there."""
        reference = None if adapter is None else self._reference(adapter)
        return self._engine.submit(kind, text, reference, options, priority=priority, deadline=deadline)

    def warm(self, reference: str, *, pin: bool = False) -> Named:
        return self._engine.warm(self._reference(reference), pin=pin)

    def unload(self, reference: str) -> Named:
        return self._engine.unload(self._reference(reference))

    def unpin(self, reference: str) -> Named:
        return self._engine.unpin(self._reference(reference))

    def loaded(self) -> Sequence[LoadedAdapter]:
        """The versions in memory that the access sees."""
        return [each for each in self._engine.loaded() if each.tenant == self._tenant and self.sees(each.version)]

    def stats(self) -> Stats:
        """The figures of the whole engine, with the versions that the access sees."""
        stats, start = self._engine.stats(), f"{self._tenant}/" if self._tenant else ""
        versions = {
            key.removeprefix(start): each
            for key, each in stats.versions.items()
            if key.rpartition("/")[0] == self._tenant and self.sees(each.version)
        }
        return replace(stats, versions=versions)

    def drain(self, timeout: float) -> bool:
        return self._engine.drain(timeout)

    def close(self) -> None:
        self._engine.close()

    def sees(self, reference: str) -> bool:
        """Whether the access may see an adapter of this name on this base; of the empty name, the base itself."""
        names = [part.partition("@")[0] for part in reference.split("+")] if reference else []
        return self.access.sees_base(self.base.id) and all(map(self.access.sees, names))

    def _reference(self, reference: str) -> str:
        """The reference, or the composition, as the engine takes it."""
        for part in parts_of(reference):
            Reference.parse(part)  # raises BadReference: the tenant is written here and nowhere else
            if not self.access.whole:
                self._workspace.resolve(part)
        return f"{self._tenant}/{reference}" if self._tenant else reference


def in_memory(engine: EngineProtocol, digest: str) -> bool:
    """Whether the version with this digest is loaded."""
    return any(each.digest == digest for each in engine.loaded())


def each_tenant(tenants: Callable[[], Sequence[Tenant]], follow: Callable[[Tenant], None]) -> Callable[[], None]:
    """A function that follows the store for every tenant, also if one fails. It raises the first error at its end."""

    def every() -> None:
        failed: Exception | None = None
        for tenant in tenants():
            try:
                follow(tenant)
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    return every
