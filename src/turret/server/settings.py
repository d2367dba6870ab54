"""The options of `turret serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from turret.server.alarms import AlarmSettings
from turret.server.limits import Network, RequestLimits
from turret.server.oidc import OidcSettings
from turret.server.quotas import Quota


@dataclass(frozen=True)
class ServerSettings:
    """The options of `turret serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    alias: str = "production"  # what plain names mean; its versions are loaded in advance
    limits: RequestLimits = field(default_factory=RequestLimits)
    per_adapter: Quota = field(default_factory=Quota)
    log_texts: bool = False
    strict: bool = False  # unknown keys of a request are an error, not a header
    proxies: Sequence[Network] = ()  # networks without a limit per client
    origins: Sequence[str] = ()  # of pages that may call the API; "*" for any
    otel: bool = False  # spans of requests go to OpenTelemetry
    replica: str | None = None  # the name of this server in metrics
    oidc: OidcSettings | None = None  # who signs people in to the console, besides access tokens
    alarm: AlarmSettings | None = None  # where alarms are sent
    watch_inputs: bool = True  # embed samples of the texts that promises cover
