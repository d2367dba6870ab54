"""Requests and responses of the control plane: adapters, aliases, experiments. Unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from turret.json_types import JsonObject, JsonValue
from turret.server.limits import MOST_OUTCOMES, MOST_UNIT
from turret.server.routes import AdapterName, AliasName, ArmName, Gate, Model, Shares


class LoadRequest(Model):
    pin: bool = False


class PromoteRequest(Model):
    alias: AliasName
    require: Annotated[list[Gate], Field(max_length=32, fail_fast=True)] = Field(default_factory=list)
    replay: bool = Field(False, description="Ask golden examples again that this version has answered before.")


class Adapter(BaseModel):
    """As in `turret list --json`, and whether it is in memory."""

    version: str
    digest: str
    created: str
    aliases: list[str]
    base: str | None
    method: str | None
    task: str | None
    metrics: JsonObject
    bytes: int
    run: str | None
    comparison: str | None = Field(description="The comparison that trained it; then a plain name never means it.")
    loaded: bool


class Compared(BaseModel):
    """The trainings of one comparison under one name that no alias names."""

    name: str
    comparison: str = Field(description="Its folder in the store, which `?comparison=` takes.")
    first: str = Field(description="The version with the lowest number.")
    last: str
    versions: int
    methods: list[str]
    bytes: int
    created: str = Field(description="When the newest was stored.")


class Adapters(BaseModel):
    adapters: list[Adapter]
    comparisons: list[Compared] = Field(description="The trainings of comparisons; on the first page.")
    after: str | None = Field(description="The `after` of the next page; null on the last one.")


class Alias(BaseModel):
    name: str
    alias: str
    version: str = Field(description="The version in the store.")
    serving: str | None = Field(description="The version in force here; null if it is of another base.")
    problem: str | None = Field(description="Why the two differ.")
    moved: str


class Aliases(BaseModel):
    aliases: list[Alias]


class GateShown(BaseModel):
    """A gate of an alias, or a set of golden examples."""

    gate: str
    alias: str
    holder: str | None = Field(description="The version that the alias names.")
    passes: bool | None = Field(description="Whether that passes; null if nothing is known.")
    found: str
    examples: int | None = Field(default=None, description="Golden ones.")


class Gates(BaseModel):
    gates: list[GateShown]


class Replay(BaseModel):
    """The result of a version on a set of golden examples."""

    golden: str = Field(description="The digest of the set.")
    passed: int
    total: int
    first: JsonObject | None = Field(description="The first example that failed, if the gate allows some to fail.")
    replayed: str


class Moved(BaseModel):
    name: str
    alias: str
    version: str
    before: str | None
    changed: bool
    skipped: list[str]
    replays: list[Replay]
    serving: str | None = Field(description="The version in force here now.")


# --- experiments -----------------------------------------------------------------------------------------------------

Value = bool | Annotated[float, Field(ge=-1e15, le=1e15)]
RightLabel = Annotated[str, Field(min_length=1, max_length=1000)]


class OutcomeOfAnswer(Model):
    """The outcome of one answer."""

    value: Value | RightLabel = Field(
        description="0 or 1, or a number within the bounds of the experiment's metric; of an answer that a promise "
        "covers, also the right label."
    )
    receipt: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="The answer's `turret-receipt`, or the `id` in its body."
    )


class OutcomeOfUnit(Model):
    """The outcome of the last answer that an experiment gave to a unit."""

    value: Value
    unit: Annotated[str, Field(min_length=1, max_length=MOST_UNIT)]
    adapter: AdapterName


Outcome = OutcomeOfAnswer | OutcomeOfUnit
Told = Outcome | Annotated[list[Outcome], Field(min_length=1, max_length=MOST_OUTCOMES, fail_fast=True)]


class BecameOf(BaseModel):
    status: Literal["counted", "noted", "repeated", "unknown", "late", "refused"]
    text: str
    experiment: str | None
    arm: str | None


class Outcomes(BaseModel):
    outcomes: list[BecameOf] = Field(description="The result of each, in the same order.")
    counts: dict[str, int]


class RampRequest(Model):
    share: Shares | None = Field(None, description="Default: the next planned one.")


class StopRequest(Model):
    promote: ArmName | None = Field(default=None, description="The arm that takes the alias.")
    rollback: bool = Field(default=False, description="Give the alias to the control.")


class Experiments(BaseModel):
    alpha: float
    experiments: list[JsonObject]


class Diff(BaseModel):
    versions: list[str] = Field(description="The two.")
    differs: dict[str, list[JsonValue]] = Field(description="By setting: its value in each of the two.")
    metrics: dict[str, dict[str, JsonObject]] = Field(description="By split and metric: `a`, `b` and `difference`.")
    bytes: list[int]


class LoadedList(BaseModel):
    loaded: list[JsonObject]


class Version(BaseModel):
    version: str
    digest: str


class UsageOfDay(BaseModel):
    tenant: str
    adapter: str = Field(description="Empty for the bare base.")
    day: str
    requests: int
    answers: int = Field(description="A request with many inputs has many.")
    prompt_tokens: int
    completion_tokens: int


class UsageList(BaseModel):
    usage: list[UsageOfDay]


class Action(BaseModel):
    id: int
    tenant: str
    adapter: str | None = Field(description="Null for an action on a token.")
    at: str
    who: str | None = Field(description="The user, or `token NAME`.")
    verb: str
    what: str
    before: JsonObject | None
    after: JsonObject | None


class AuditLog(BaseModel):
    actions: list[Action]
    before: int | None = Field(description="The `before` of the next page; null on the last one.")


class BaseStatus(BaseModel):
    id: str
    fingerprint: str
    engine: JsonObject | None = Field(description="Its engine's figures; null but for the tenant default.")


class Status(BaseModel):
    base: dict[str, str] | None = Field(description="Null if there are several.")
    ready: bool
    draining: bool
    in_flight: int
    engine: JsonObject | None = Field(
        description="The whole engine's figures; null but for the tenant default, and if there are several bases."
    )
    bases: list[BaseStatus] = Field(default_factory=list, description="Missing if there is one.")
