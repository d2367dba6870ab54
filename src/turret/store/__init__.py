"""Store adapters: immutable numbered versions, content-addressed files, aliases with gates, and training runs."""

from turret.store.access_tokens import AccessToken, AccessTokens
from turret.store.aliases import Move, Pointing
from turret.store.catalog import Compared, Deleted, Version, fold_comparisons
from turret.store.core import Store
from turret.store.gates import Gate, GateStatus
from turret.store.golden import Golden
from turret.store.jobs import JobQueue
from turret.store.panels import Panel, PanelMove, Panels, Question
from turret.store.runs import HeldRun
from turret.store.upkeep import Collected, Verified

__all__ = [
    "AccessToken",
    "AccessTokens",
    "Collected",
    "Compared",
    "Deleted",
    "Gate",
    "GateStatus",
    "Golden",
    "HeldRun",
    "JobQueue",
    "Move",
    "Panel",
    "PanelMove",
    "Panels",
    "Pointing",
    "Question",
    "Store",
    "Verified",
    "Version",
    "fold_comparisons",
]
