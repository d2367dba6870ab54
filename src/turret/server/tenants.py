"""What a server keeps for each tenant.

The tenants of a server share its engines, its limits and its threads. Each has its own aliases, experiments, shadows
and metrics, so a name means only what it means for its tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turret.server.alias_watcher import AliasWatcher
from turret.server.engines import SeenEngines
from turret.server.limits import RequestLimits
from turret.server.logs import Log
from turret.server.metrics import Metrics
from turret.server.routing import Routing
from turret.server.shadows import Shadows
from turret.workspace import Workspace


@dataclass(frozen=True)
class Tenant:
    """What a server keeps for one tenant."""

    workspace: Workspace
    engines: SeenEngines
    aliases: AliasWatcher
    routing: Routing
    shadows: Shadows
    metrics: Metrics

    @classmethod
    def open(
        cls,
        workspace: Workspace,
        engines: SeenEngines,
        metrics: Metrics,
        alias: str,
        limits: RequestLimits,
        clock: Callable[[], float],
        log: Log | None,
    ) -> Tenant:
        """What a server keeps for the tenant of a workspace.

        Args:
            engines: As the tenant sees them.
            alias: What plain names mean.
            log: Gets the answers of shadows; None if texts are not logged.
        """
        store, bases = workspace.store, engines.fingerprints
        aliases = AliasWatcher(
            store.last_move,
            store.pointing,
            engines.warm,
            engines.in_memory,
            bases=bases,
            alias=alias,
            clock=clock,
        )
        routing = Routing(workspace.router(), aliases, engines.warm, workspace.resolve, bases=bases, clock=clock)
        shadows = Shadows(
            engines,
            routing,
            metrics,
            limit=limits.shadow_inputs,
            seconds=limits.answer_seconds,
            clock=clock,
            log=log,
        )
        return cls(workspace, engines, aliases, routing, shadows, metrics)

    @property
    def ready(self) -> bool:
        """Whether the versions to load in advance are loaded, or failed to load."""
        return self.aliases.ready and self.routing.ready

    def refresh(self) -> None:
        """Follow aliases and experiments once."""
        self.aliases.poll()
        self.routing.refresh()


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
