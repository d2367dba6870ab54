"""`turret serve`: answer over HTTP on one base, or on several."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from socket import gethostname
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from typer import Option

from turret.access import Access
from turret.cli import options
from turret.cli.output import console, emit, safe, status
from turret.errors import ServeRefused

if TYPE_CHECKING:
    from turret.engine import Engine
    from turret.engine.request import VllmServer
    from turret.server.oidc import OidcSettings
    from turret.server.services import ServerSettings
    from turret.workspace import Workspace
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
Bases = Annotated[
    list[str] | None,
    Option(
        "--base",
        help="The base to load; repeat it to serve several. Default: the one that all adapters in the store have.",
    ),
]
Memory = Annotated[
    str | None,
    Option("--memory", metavar="BYTES", help="Limit for the adapters of all bases in memory: 500MB, 2GB."),
]


def serve(
    *,
    base: Bases = None,
    host: Annotated[str, Option(help="Address; beyond loopback only with tokens.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    alias: Annotated[str, Option(help="Alias that plain names mean; loaded at start.")] = "production",
    memory: Memory = None,
    dtype: Annotated[Dtype, Option(help="Precision of the base.")] = "auto",
    base_quantization: options.BaseQuantization = "none",
    device: options.Device = "auto",
    requests: Annotated[
        int | None, Option("--adapter-requests-per-minute", min=1, help="Quota of requests for each adapter.")
    ] = None,
    tokens: Annotated[
        int | None, Option("--adapter-tokens-per-minute", min=1, help="Quota of tokens for each adapter.")
    ] = None,
    connections: Annotated[
        int, Option("--connections-per-client", min=0, help="Open connections from one address; 0: any number.")
    ] = 128,
    proxy: Annotated[
        list[str] | None, Option(metavar="ADDRESS", help="A reverse proxy: its connections have no limit.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, Option(metavar="ORIGIN", help="Pages of it may call the API: https://app.example, or *.")
    ] = None,
    otel: Annotated[bool, Option(help="Send a span of each request to OpenTelemetry.")] = False,
    queue_seconds: Annotated[int, Option(min=1, help="Longest expected wait; beyond it a request is refused.")] = 120,
    replica: Annotated[str | None, Option(metavar="NAME", help="Label of the metrics; default: host and port.")] = None,
    log_texts: Annotated[bool, Option(help="Write the texts of requests to the log.")] = False,
    oidc: Annotated[str | None, Option(metavar="URL", help="An OpenID Connect provider that signs people in.")] = None,
    oidc_client: Annotated[str, Option(metavar="ID", help="The id of this server at the provider.")] = "turret",
    oidc_claim: Annotated[str, Option(help="The claim that names a person's access token.")] = "preferred_username",
    oidc_tenant_claim: Annotated[str | None, Option(help="The claim that names their tenant; default: none.")] = None,
    public_url: Annotated[str | None, Option(metavar="URL", help="Where browsers reach this server.")] = None,
    alarm_url: Annotated[
        str | None, Option(metavar="URL", envvar="TURRET_ALARM_URL", help="Gets a POST when a promise breaks.")
    ] = None,
    watch_inputs: Annotated[
        bool,
        Option(
            "--watch-inputs/--no-watch-inputs",
            help="Keep embeddings of a few texts that promises cover, to warn when the texts change.",
        ),
    ] = True,
    train: Annotated[bool, Option(help="Train queued runs too, on the bases that serve.")] = False,
    train_slots: Annotated[int, Option(min=1, help="Trainings at once.")] = 4,
    train_percent: Annotated[
        int, Option(min=1, max=100, help="Share of trainings in the time, while answers wait.")
    ] = 50,
    train_pass_ms: Annotated[
        int, Option(min=1, help="Longest pass of a training, about: an answer waits for it.")
    ] = 250,
    engine: Annotated[
        Literal["turret", "vllm"], Option(help="Who computes: this process, or a vLLM server.")
    ] = "turret",
    engine_url: Annotated[str | None, Option(metavar="URL", help="Where the vLLM server listens.")] = None,
    engine_folder: Annotated[
        Path | None, Option(help="Where adapters are written for vLLM, which sees it under the same path.")
    ] = None,
    strict: Annotated[bool, Option(help="Refuse requests with unknown keys.")] = False,
    command: options.Command,
) -> None:
    """Answer over HTTP with one base and all its adapters, in the format of OpenAI's API.

    With several bases, a request goes to the base that its adapter was trained on.

    After SIGTERM or Ctrl-C running answers finish. A second signal ends the server at once.
    """
    from turret.engine import Limits, MemoryBudget
    from turret.server.auth import origins
    from turret.server.limits import Quota, RequestLimits, networks
    from turret.server.live_promises import AlarmSettings
    from turret.server.services import ServerSettings

    workspace = command.workspace
    settings = ServerSettings(
        host=host,
        port=port,
        alias=alias,
        limits=RequestLimits(connections_per_client=connections or None),
        per_adapter=Quota(requests, tokens),
        log_texts=log_texts,
        strict=strict,
        proxies=networks(proxy or ()),
        oidc=_provider(oidc, oidc_client, public_url or f"http://{host}:{port}", oidc_claim, oidc_tenant_claim),
        origins=origins(cors_origin or ()),
        otel=otel,
        alarm=AlarmSettings(alarm_url, os.environ.get("TURRET_ALARM_SECRET") or None) if alarm_url else None,
        watch_inputs=watch_inputs,
        replica=replica or f"{gethostname()}:{port or os.getpid()}",
    )
    limits = Limits(memory=MemoryBudget(size_of(memory)), queue_seconds=queue_seconds, train_percent=train_percent)
    names = list(base) if base else [only_base(workspace)]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise ServeRefused(f"--base {twice} is given twice: name each base once")
    training = Training(train_slots, train_pass_ms / 1000) if train else None
    given = {"--train": train, "--base-quantization": base_quantization != "none", "--dtype": dtype != "auto"}
    vllm = None if engine == "turret" else _vllm(engine_url, engine_folder, names, given)
    if vllm is None and (engine_url or engine_folder):
        raise ServeRefused("--engine-url and --engine-folder belong to --engine vllm: add it, or leave them out")
    if vllm is None:
        start = partial(workspace.engine, dtype=dtype, base_quantization=base_quantization, device=device)
    else:
        from turret.workspace.serving import vllm_engine

        start = partial(vllm_engine, workspace.store, server=vllm)
    _serve(workspace, names, settings, partial(start, limits=limits), training, vllm, command.as_json)


def _vllm(url: str | None, folder: Path | None, bases: Sequence[str], given: Mapping[str, bool]) -> VllmServer:
    """The server of `--engine vllm`. Raises ServeRefused. given: whether options are given that it does not take."""
    from turret.engine.request import VllmServer

    if url is None:
        raise ServeRefused("--engine vllm needs the address of the vLLM server: add --engine-url http://HOST:PORT")
    if not url.startswith(("http://", "https://")):
        raise ServeRefused(f"--engine-url {ascii(url)[:80]}: expected a URL such as http://127.0.0.1:8001")
    if len(bases) > 1:
        raise ServeRefused(f"--engine vllm serves one base, and {len(bases)} are given: start a server for each")
    if wrong := [name for name, each in given.items() if each]:
        raise ServeRefused(f"{wrong[0]} does not go with --engine vllm, which loads no weights here: leave it out")
    if folder is not None and not folder.is_dir():
        raise ServeRefused(f"--engine-folder {folder} is not a folder: make it, on a disk that vLLM sees too")
    return VllmServer(url, folder, os.environ.get("TURRET_ENGINE_KEY"))


class Training(NamedTuple):
    """What `--train` asks for."""

    slots: int
    pass_seconds: float


def _serve(
    workspace: Workspace,
    names: Sequence[str],
    settings: ServerSettings,
    start: Callable[..., Engine],
    training: Training | None,
    vllm: VllmServer | None,
    as_json: bool,
) -> None:
    from turret import process
    from turret.engine import SamplingParams
    from turret.server.app import bind, run
    from turret.server.auth import Guard
    from turret.server.engines import Engines
    from turret.server.services import Services

    process.use_one_heap()
    Guard(settings.host, workspace.tokens.of_all_tenants())  # refuses before the base is loaded
    with bind(settings.host, settings.port) as listening, ExitStack() as opened:
        with status() as show:
            loaded = [opened.enter_context(start(name, on_stage=show)) for name in names]
        engines = Engines(*loaded)
        services = Services(workspace, engines, SamplingParams, settings)
        bases, devices = [each.name for each in engines.bases], {str(each.base.model.device) for each in loaded}
        devices = devices if vllm is None else {f"vLLM at {vllm.url}"}
        with ExitStack() as trains:
            if training is not None:
                from turret.workspace.job_process import TrainingWhileServing

                say = lambda line: services.log.write("training", message=line)
                trains.enter_context(TrainingWhileServing(workspace.store, loaded, **training._asdict(), say=say))
            run(services, listening, lambda url: _announce(url, bases, ", ".join(sorted(devices)), as_json, training))
        engines.drain(services.limits.drain_seconds)


def _provider(
    issuer: str | None, client: str, public_url: str, claim: str, tenant_claim: str | None
) -> OidcSettings | None:
    """The provider of `--oidc`, with the secret in TURRET_OIDC_SECRET. Raises ServeRefused without it."""
    from turret.server.oidc import OidcSettings

    if issuer is None:
        return None
    secret = os.environ.get("TURRET_OIDC_SECRET")
    if not secret:
        raise ServeRefused("--oidc needs the client's secret: set the environment variable TURRET_OIDC_SECRET")
    return OidcSettings(issuer, client, secret, public_url, claim, tenant_claim)


def _announce(url: str, bases: Sequence[str], device: str, as_json: bool, training: Training | None) -> None:
    several = len(bases) > 1
    if as_json:
        emit({"url": url, "base": bases[0], **({"bases": bases} if several else {}), "device": device})
    else:
        where, verb = "" if device == "cpu" else f" on {device}", "answer" if several else "answers"
        names = " and ".join(f"[green]{safe(each)}[/]" for each in bases)
        console().print(f"{names}{where} {verb} at [bold]{safe(url)}[/]  [dim](Ctrl-C ends it)[/]")
        if training is not None:
            console().print(f"[dim]it trains what is in the queue, at most {training.slots} at once[/]")


def only_base(workspace: Workspace) -> str:
    """The base of all adapters in the store, of every tenant. Raises ServeRefused if they have several."""
    tenants = [workspace.with_access(Access(tenant)) for tenant in workspace.store.tenants()]
    found = sorted({str(each.base.get("id")) for tenant in tenants for each in tenant.list()})
    if len(found) == 1:
        return found[0]
    what = f"adapters of {', '.join(found[:5])}" if found else "no adapter"
    more = ", or several" if found else ""
    raise ServeRefused(f"cannot tell which base to serve: the store has {what}; name one with --base{more}")


def size_of(text: str | None) -> int | None:
    """`500MB` -> 500000000."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise ServeRefused(f"--memory {ascii(text)[:40]}: expected a number of bytes such as 500MB or 2GB")
    return int(float(found[1]) * UNITS[found[2]])
