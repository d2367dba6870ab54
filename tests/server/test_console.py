"""The console without a browser: escaping, empty pages, and the actions of pages."""

from __future__ import annotations

import html
import json
import re
import subprocess
import time
from dataclasses import replace

import pytest
from server.console_forms import PAGES, SCRIPT, Fields, post, signed_in
from server.echo import FINGERPRINT, LABELS
from server.test_promises import TERMS
from server.test_train_pages import CSV, put_in
from store.bundles import tensors, write_bundle

import turret
from turret.compare.report import write_report
from turret.store import Question, promises
from turret.store.promises import LoggedAnswer
from turret.tasks.calibration import Confidences
from turret.timestamp import timestamp

# --- every page ------------------------------------------------------------------------------------------------------


def test_every_answer_of_a_page_has_the_strict_headers(serve, put) -> None:
    put()
    client = serve().client()
    for path in (*PAGES, "/adapters/a", "/adapters/none", "/static/console.js", "/runs/none", "/store/verify"):
        headers = client.get(path).headers
        content = headers["content-security-policy"]
        assert "script-src 'self';" in content, path
        assert "unsafe" not in content, path
        assert "frame-ancestors 'none'" in content, path
        assert headers["x-frame-options"] == "DENY", path
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "same-origin", path
        kept = "public" if path.startswith("/static/") else "no-store"
        assert headers["cache-control"].startswith(kept), path
    assert "content-security-policy" not in client.get("/api/status").headers


def test_no_page_has_a_script_or_a_style_inside_it(serve, put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    workspace.experiment("a").start(["a@2"])
    client = serve().client()
    for path in (*PAGES, "/adapters/a", "/adapters/a/1", "/experiments/a/1", "/adapters/a/move/promote"):
        got = client.get(path)
        assert got.status_code == 200, path
        text = got.text.replace(str(client.base_url).rstrip("/"), "")  # a line for a shell has this server's address
        assert re.findall(r"<script(?![^>]* src=\"/static/)", text) == [], path
        assert re.findall(r"<style| style=| on[a-z]+=\"|javascript:|https?://", text) == [], path


@pytest.mark.slow
def test_words_of_others_are_escaped_wherever_they_stand(serve, workspace, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TURRET_USER", SCRIPT)
    said = {
        "base": {"id": SCRIPT, "fingerprint": "sha256:echo"},
        "task": {"kind": "classify", "labels": [SCRIPT]},
        "lineage": {"seed": SCRIPT, "libraries": {SCRIPT: SCRIPT}, "recipe": SCRIPT},
    }
    for seed in (1, 2):
        bundle = write_bundle(tmp_path / "b", tensors(seed), said=said)
        workspace.store.put("a", bundle, metrics={SCRIPT: {SCRIPT: 0.5, "per_class": {SCRIPT: {"f1": 1.0}}}})
    workspace.promote("a@1", "production")
    workspace.experiment("a").start(["a@2"])
    run = workspace.store.new_run("a", f"# {SCRIPT}", "sha256:x")
    workspace.store.end_run(run, "failed", error=SCRIPT)
    client = serve().client()
    paths = ("/adapters", "/adapters/a", "/adapters/a/1", "/runs", f"/runs/{run.id}", "/experiments/a/1", "/playground")
    for path in paths:
        got = client.get(path)
        assert got.status_code == 200, path
        assert "<script>alert" not in got.text, path
    assert "&lt;script&gt;" in client.get("/adapters/a/1").text
    fields = {"model": SCRIPT, "text": f"{SCRIPT}\"'"}
    answers = [post(client, path, **fields) for path in ("/playground", "/playground/answer")]
    answers.append(client.get(f"/adapters/{SCRIPT.replace('/', '')}"))
    assert [got.status_code for got in answers] == [200, 404, 404]
    for got in answers:
        assert "&lt;script&gt;" in got.text
        assert "<script>alert" not in got.text
    elsewhere = client.get("/sign-in", params={"next": SCRIPT})
    assert (elsewhere.status_code, elsewhere.text) == (303, ""), elsewhere.headers
    assert elsewhere.headers["location"] == "/"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("/adapters", "turret train"),
        ("/runs", "turret train"),
        ("/comparisons", "turret compare"),
        ("/playground", "turret train"),
        ("/experiments", "turret experiment start"),
        ("/panels", "turret panel create"),
    ],
)
def test_an_empty_page_says_what_to_run(serve, path, command) -> None:
    assert f"<pre><code>{command}" in serve().client().get(path).text


def test_what_is_not_there_is_one_line_in_a_page(serve, put) -> None:
    put()
    client = serve().client()
    for path, words in (
        ("/adapters/none", "no adapter named"),
        ("/adapters/a/9", "no a@9"),
        ("/adapters/a/x", "valid integer"),
        ("/adapters/a/move/delete", "no move"),
        ("/runs/../../etc", ""),
        ("/runs/none", "no run"),
        ("/comparisons/none", "no comparison"),
        ("/comparisons/none/report", "no comparison"),
        ("/experiments/a/1", "no experiment"),
        ("/panels/none", "no panel"),
        ("/static/none.js", "no such file"),
        ("/static/../app.py", ""),
    ):
        got = client.get(path)
        assert got.status_code in (400, 404), path
        if words:
            assert words in got.text, path
            assert 'role="alert"' in got.text, path
    got = client.get("/adapters/none", headers={"hx-request": "true"})
    assert got.text.startswith('<p class="problem" role="alert">')


def test_pages_meet_the_log_the_limits_and_the_draining_like_every_route(serve, put, until) -> None:
    put()
    running = serve()
    client = running.client()
    client.get("/adapters/a?moved=production")
    until(lambda: any(line.get("route") == "/adapters/{name}" for line in running.log()))
    headers = {"sec-fetch-site": "same-origin", "content-type": "application/x-www-form-urlencoded"}
    got = client.post("/store/verify", headers=headers, content=b"x" * (5 << 20))
    assert got.status_code == 413
    assert 'role="alert"' in got.text
    running.served.load.draining = True
    got = running.client().get("/adapters")
    assert got.status_code == 503
    assert "shutting down" in got.text
    assert got.headers["retry-after"]


# --- forms -----------------------------------------------------------------------------------------------------------

ODD = "\"'&<b>\r\n"
FORMS = (  # the page, where its form is sent to, and what is written into it, of which something is wrong
    ("/store/tokens", "", {"name": "team", "scope": ["admin", "metrics"], "adapters": "*b", "requests": "5"}),
    ("/store/tokens", "", {"name": ODD, "scope": [], "expires": "12h", "sign_in": []}),
    ("/store/tokens/boss/rotate", "", {"overlap": "soon"}),
    ("/adapters/a/move/promote", "", {"version": "1", "alias": "Not An Alias"}),
    ("/adapters/a/gates", "", {"alias": "next", "add": "accuracy>=much", "golden": f"text,label{ODD}", "share": "5%"}),
    ("/adapters/a/1/promise", "", {"error": "3%", "confidence": "sure", "when_broken": "rollback"}),
    ("/adapters/a/1/promise", "", {"error": "nan", "outcome_ttl": "3d", "when_broken": "stricter"}),
    ("/experiments/start?name=a", "", {"candidates": "a@2", "share": "much", "guards.promote": "yes", "goal": "lower"}),
    ("/experiments/start", "", {"name": "a", "candidates": ODD, "unit": "request", "steps": "5%, x"}),
    ("/experiments/a/1/do/ramp", "", {"share": "lots"}),
    ("/playground", "", {"model": [], "text": f"a text{ODD}", "temperature": "1.5", "logprobs": "yes", "stop": "x"}),
    ("/playground", "", {"model": ["echo"], "text": "a text", "temperature": "much", "seed": "4"}),
    ("/playground?as=chat", "", {"model": ["echo"], "system": "Be brief.", "text": ODD, "tools": "[", "top_k": "7"}),
    ("/store/usage", "", {"since": "2026-01-09", "until": "2026-01-02", "adapter": "a", "count": "tokens"}),
    ("/store/audit", "", {"since": "2026-13-01", "who": "me", "verb": "promote"}),
    ("/runs", "/runs/overlay", {}),
)


@pytest.mark.parametrize(("path", "action", "written"), FORMS, ids=[each[0] for each in FORMS])
def test_a_form_with_a_wrong_field_comes_back_as_it_was_sent(serve, put, workspace, path, action, written) -> None:
    for _ in range(2):
        put(accuracy=0.9)
    workspace.promote("a@1", "production")
    workspace.experiment("a").start(["a@2"], steps=[0.2, 0.5])
    runs = [workspace.store.new_run("a", "", "sha256:x").id for _ in range(7)]
    secret = workspace.tokens.create("boss", ["admin", "infer"])[1]
    client = signed_in(serve(), secret)
    shown = client.get(path)
    first = Fields(shown.text).found
    assert set(written) <= set(first), "the page has these fields"
    wanted = first | {name: [each] if isinstance(each, str) else each for name, each in written.items()}
    if action:
        wanted["run"] = sorted(runs)
    hidden = {"as": "chat"} if "as=chat" in path else {}
    if path in ("/store/usage", "/store/audit", "/runs"):
        got = client.get(action or path, params=wanted)
    else:
        got = post(client, path.partition("?")[0], **wanted, **hidden)
    assert got.status_code == (200 if written.get("model") else 400), (
        "each panel of the playground says its own problem"
    )
    (line,) = re.findall(r'<p class="problem" role="alert">(.*?)</p>', got.text)
    assert "match pattern" not in line
    found = Fields(got.text).found
    assert found | {"run": sorted(found.get("run", ()))} == {"run": []} | wanted


def test_a_wrong_setting_of_a_table_takes_no_other_with_it(client) -> None:
    source = put_in(client, "a.csv", CSV).headers["location"].partition("=")[2]
    first = Fields(client.get(f"/train/recipe?source={source}").text).found
    kinds = {
        "questions": {"data.label": ["Anliegen", "Bereich"], "data.text": [""]},
        "classify": {"data.label": ["Anliegen"], "data.text": [""]},
    }
    for kind, columns in kinds.items():
        shown = Fields(post(client, "/train/recipe", source=source, **{"task.kind": kind}).text).found
        for key, wrong in (("data.header_row", "x"), ("data.test", "much"), ("name", ODD)):
            wanted = first | shown | columns | {"name": ["own"], "data.validation": ["0.3"], key: [wrong]}
            wanted["method"] = ["head"]
            for path in ("/train/recipe", "/train/plan", "/comparisons/start/sweep"):
                got = post(client, path, source=source, guessed=kind, then="sweep", **wanted)
                assert got.status_code == 400, (kind, key, path)
                assert len(re.findall(r'class="problem" role="alert"', got.text)) == 1
                assert Fields(got.text).found == wanted, (kind, key, path)
                assert 'name="then" value="sweep"' in got.text


def test_a_wrong_option_or_source_comes_back(client) -> None:
    for verb, wrong in (("compare", {"seeds": "many", "texts": [], "budget": "2h"}), ("sweep", {"trials": "x"})):
        wrong |= {"recipe": f"name = {ODD}", "do": "plan"}
        got = post(client, f"/comparisons/start/{verb}", **wrong)
        assert got.status_code == 400
        found = Fields(got.text).found
        assert {key: found[key] for key in wrong if key != "do"} == {
            key: each if isinstance(each, list) else [each] for key, each in wrong.items() if key != "do"
        }
    got = client.get("/train/recipe", params={"source": "nothing.csv", "then": "sweep"})
    assert got.status_code == 400, got.text
    assert Fields(got.text).found == {"source": ["nothing.csv"]}


# --- actions ---------------------------------------------------------------------------------------------------------


def test_a_refused_gate_is_told_and_a_promote_and_a_rollback_move_the_alias(serve, put, workspace) -> None:
    put(accuracy=0.9)
    put(accuracy=0.5)
    workspace.promote("a@1", "production")
    workspace.gate("a", "production", add=["accuracy>=0.8"])
    client = serve().client()
    got = post(client, "/adapters/a/move/promote", version="2", alias="production")
    assert got.status_code == 409
    assert "test.accuracy&gt;=0.8 is required" in got.text
    assert post(client, "/adapters/a/move/promote", version="2", alias="candidate").status_code == 303
    assert str(workspace.resolve("a@candidate")) == "a@2"
    workspace.gate("a", "production", remove=["accuracy"])
    assert post(client, "/adapters/a/move/promote", version="2", alias="production").status_code == 303
    got = post(client, "/adapters/a/move/rollback", alias="production")
    assert got.headers["location"] == "/adapters/a?moved=production"
    assert str(workspace.resolve("a")) == "a@1"
    assert "names <b>a@1</b> now" in client.get(got.headers["location"]).text
    for fields in ({"version": "x", "alias": "production"}, {"version": "1", "alias": "BAD"}, {}):
        assert post(client, "/adapters/a/move/promote", **fields).status_code == 400


def test_the_versions_of_a_comparison_are_one_line_and_promoting_one_keeps_it(serve, put, workspace) -> None:
    put()
    for _ in range(3):
        put(comparison="comparisons/a-0123456789")
    put("only", comparison="comparisons/only-0123456789")
    client = serve().client()
    names = client.get("/adapters").text
    assert "newest, a@1" in names
    assert "+ 3 of comparisons" in names
    assert "none: only comparisons" in names
    page = client.get("/adapters/a").text
    assert "the plain name means the newest version, a@1." in page
    assert "<summary>a@2 to @4</summary>" in page
    assert 'id="promote-1"' in page
    assert 'id="promote-2"' not in page
    assert "the plain name a does not mean it" in client.get("/adapters/a/2").text
    chosen = client.get("/adapters/a/move/promote", params={"version": 2}).text
    assert '<option value="2" selected>a@2, of a comparison</option>' in chosen
    assert "all versions are of comparisons" in client.get("/adapters/only").text
    assert 'value="a@1" checked' in client.get("/playground").text
    workspace.promote("a@2", "production")
    assert "<summary>a@3 to @4</summary>" in client.get("/adapters/a").text


def test_a_panel_shows_its_questions_and_is_moved_by_its_buttons(serve, put, workspace) -> None:
    put("topic", ece=0.034, accuracy=0.9), put("other")
    asked = [Question("what", "topic@1", threshold=0.75), Question("how", "other", "score", ("bad", "so-so", "good"))]
    for questions in (asked, asked[:1]):
        workspace.panels.create("tickets", questions)
    client = serve().client()
    assert "tickets@2" in client.get("/panels").text
    first = html.unescape(client.get("/panels/tickets?version=1").text)
    for words in (
        "topic@1",
        "0.75",
        "3.4%",
        "bad < so-so < good",
        "90.0%",
        "Promote tickets@1",
        "tickets means tickets@2",
    ):
        assert words in re.sub(r"</?b>", "", first), words
    assert post(client, "/panels/tickets/promote", version="1").status_code == 303
    assert str(workspace.panels.show("tickets")) == "tickets@1"
    assert "Promote tickets@1" not in client.get("/panels/tickets").text
    post(client, "/panels/tickets/promote", version="2")
    assert post(client, "/panels/tickets/rollback").status_code == 303
    assert str(workspace.panels.show("tickets")) == "tickets@1"
    assert client.get("/panels/tickets").text.count("promoted to <b>tickets@") == 2
    assert post(client, "/panels/tickets/promote", version="x").status_code == 400
    assert post(client, "/panels/tickets/promote", "forged", version="2").status_code == 403
    assert str(workspace.panels.show("tickets")) == "tickets@1"
    workspace.delete("topic@1", force=True)
    gone = client.get("/panels/tickets")
    assert gone.status_code == 200
    assert "no topic@1" in gone.text or "no adapter named" in gone.text


def test_a_panel_draws_the_errors_of_its_thresholds_and_the_state_of_its_promises(
    serve, put, workspace, tmp_path
) -> None:
    topic, old, bare = put("topic"), put("old"), put("bare")
    task = {"kind": "questions", "labels": ["urgent: no", "urgent: yes"]}
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": task}
    measured = {"test": {"ece": 0.5, "per_question": {"urgent": {"ece": 0.123}}}}
    workspace.store.put("mail", write_bundle(tmp_path, tensors(99), said=said), metrics=measured)
    sure, right = [each / 100 for each in range(1, 101)], [each % 10 != 3 or each > 60 for each in range(1, 101)]
    sureness = Confidences(sure, (), right).sureness(0.45)
    with workspace.store.database().writing() as connection:
        promise = promises.make(connection, topic, TERMS, sureness)
        promises.make(connection, old, TERMS)
        now = timestamp(time.time())
        seen = [LoggedAnswer(promise.id, f"r{n}", "good", 0.9 if n < 30 else 0.2, int(n < 30), now) for n in range(40)]
        promises.log(connection, seen)
    workspace.promise_outcomes([(f"r{n}", "good" if n != 7 else "bad") for n in range(30)])
    asked = [Question("what", "topic@1"), Question("how", "topic@1", threshold=0.7), Question("then", "old@1")]
    workspace.panels.create("tickets", [*asked, Question("none", str(bare)), Question("urgent", "mail@1#urgent")])
    page = html.unescape(serve().client().get("/panels/tickets").text)
    what, how, then, none, urgent = page.split('class="card question"')[1:]
    assert what.count("<svg") == how.count("<svg") == 2
    assert then.count("<svg") == none.count("<svg") == 0
    decided = [good for each, good in zip(sure, right, strict=True) if each >= 0.45]
    error = 100 * decided.count(False) / len(decided)
    assert f'<tr class="chosen"><td class="n">0.45</td><td class="n">{len(decided):.1f}%</td>' in what
    assert f'<td class="n">{error:.1f}%</td>' in what.split('class="chosen"')[1].split("</tr>")[0]
    assert '<tr class="chosen"><td class="n">0.7</td><td class="n">31.0%</td><td class="n">0.0%</td>' in how
    assert "threshold 0.45" in what
    assert "threshold 0.7" in how
    for words in (
        "holds so far</b>: 1 of 30 outcomes are wrong",
        "30 of 40 live answers were decided",
        "promised: at most 5%",
    ):
        assert words in what, words
    assert "live outcomes: 3.3% of 75.0% are wrong" in what
    assert 'aria-label="wrong among these, % by share of the answers that is decided, %"' in what
    assert "its promise is older than these plots" in then
    assert "bare@1 has no promise" in none
    assert "turret promise bare@1 --error 2%" in none
    assert "turret evaluate tickets@1 FILE --report page.html" in none
    assert "mail@1 answers several questions, and makes no promise" in urgent
    assert "12.3%" in page.split("<h2>Errors and thresholds")[0], "the calibration error of the question alone"


@pytest.mark.slow
def test_an_experiment_ramps_and_ends_by_its_buttons(serve, put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    live = workspace.experiment("a")
    live.start(["a@2"], steps=[0.2, 0.5])
    for number in range(60):
        live.assign(f"u{number}")
    live.outcomes((None, f"u{number}", number % 2) for number in range(60))
    client = serve().client()
    assert post(client, "/experiments/a/1/do/ramp", share="50%").status_code == 303
    assert live.status().experiment.next_share() is None
    assert post(client, "/experiments/a/1/do/ramp", share="lots").status_code == 400
    points = client.get("/experiments/a/1/course").json()["points"]
    assert [each["outcomes"] for each in points] == list(range(1, 61))
    assert points[-1]["means"].keys() == {"control", "candidate"}
    assert "missing" not in points[-1]["against"]["candidate"], "a course does not compute the tipping point"
    assert "missing" in live.status().analysis.arms[1].against.as_json(), "the control: the status does"
    assert post(client, "/experiments/a/1/do/promote", arm="nobody").status_code == 400
    assert post(client, "/experiments/a/1/do/promote", arm="candidate").status_code == 303
    assert str(workspace.resolve("a")) == "a@2"
    got = post(client, "/experiments/a/1/do/rollback")
    assert got.status_code == 409
    assert "has ended" in got.text


@pytest.mark.slow
def test_the_last_point_of_a_course_is_what_the_status_says(put, workspace) -> None:
    put()
    put()
    workspace.promote("a@1", "production")
    live = workspace.experiment("a")
    live.start(["a@2"], share=0.5)
    for number in range(900):
        live.assign(f"u{number}")
    live.outcomes((None, f"u{number}", int(number % 3 > 0)) for number in range(450))
    assert len(workspace.course("a").points) <= 400
    live.outcomes((None, f"u{number}", int(number % 3 > 0)) for number in range(450, 900))
    points = workspace.course("a").points
    assert len(points) < 400
    last, analysis = points[-1], live.status().analysis
    assert last.outcomes == sum(arm.outcomes for arm in analysis.arms)
    assert last.against["candidate"].better == pytest.approx(analysis.arms[1].against.better)
    assert last.against["candidate"].interval == pytest.approx(analysis.arms[1].against.interval)
    assert last.means["control"] == pytest.approx(analysis.arms[0].mean)


@pytest.mark.slow
def test_a_run_shows_its_curve_while_it_trains(serve, workspace) -> None:
    from turret.train.curve import Curve, StepRecord

    run = workspace.store.new_run("a", 'name = "a"\n', "sha256:x")
    step = StepRecord(1, 4, 0.5, 0.7, 1e-3, 1.0, 8, 80, 0.1, 800.0, 10**8)
    curve = Curve(run.curve)
    client = serve().client()
    assert client.get(f"/runs/{run.id}/curve").json() == {"steps": [], "of": None, "metric": None}
    curve.append(step)
    curve.append(replace(step, step=2, loss=0.5, metrics={"accuracy": 0.75, "loss": 0.6}, split="test"))
    said = client.get(f"/runs/{run.id}/curve").json()
    assert [each["loss"] for each in said["steps"]] == [0.7, 0.5]
    assert said["of"] == 4
    assert said["metric"] == {"key": "accuracy", "name": "accuracy"}
    page = client.get(f"/runs/{run.id}").text
    assert 'hx-trigger="every 2s"' in page
    assert "step 2 of 4" in page
    workspace.store.end_run(run, "finished", result={"version": "a@1"})
    assert "hx-trigger" not in client.get(f"/runs/{run.id}/state").text
    assert len(workspace.curve(run.id, most=1)) == 2  # the last step, and the one that was evaluated
    numbers = workspace.store.new_run("b", 'name = "b"\n', "sha256:x")
    Curve(numbers.curve).append(replace(step, metrics={"nearness": 0.8, "mae": 0.3, "loss": 0.6}, split="test"))
    found = client.get(f"/runs/{numbers.id}/curve").json()
    assert found["metric"] == {"key": "nearness", "name": "1 - MAE / range"}


@pytest.mark.slow
def test_a_report_is_served_as_it_was_written_and_may_run_nothing(serve, workspace, tmp_path) -> None:
    from simulated_comparison import made

    found = made("head,full,lora", seeds=2, count=60, falling=["lora"])
    folder = workspace.store.root / "comparisons" / "news-0123456789"
    folder.mkdir(parents=True)
    write_report(found, folder, lambda path, text: path.write_text(text, encoding="utf-8"))
    (one,) = workspace.comparisons()
    assert one["key"] == "news-0123456789"
    assert one["headline"]
    client = serve().client()
    page = client.get("/comparisons").text
    assert one["headline"][:20] in page
    assert '<span class="badge open">not trained out</span>' in page
    assert 'src="/comparisons/news-0123456789/report"' in client.get("/comparisons/news-0123456789").text
    got = client.get("/comparisons/news-0123456789/report")
    assert got.text == (folder / "report.html").read_text(encoding="utf-8")
    assert got.headers["content-security-policy"].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert got.headers["x-frame-options"] == "SAMEORIGIN"
    (folder / "report.json").write_text("[")
    assert "cannot be read" in client.get("/comparisons").text


def test_a_finding_on_control_is_listed_beside_the_comparisons_and_opened(serve, workspace) -> None:
    from simulated_control import found

    from turret.compare.control_rates import write_report as write_control

    folder = workspace.store.root / "controls" / "aspects-0123456789"
    folder.mkdir(parents=True)
    write_control(found(), folder, lambda path, text: path.write_text(text, encoding="utf-8"))
    (one,) = workspace.comparisons()
    assert (one["key"], one["kind"]) == ("aspects-0123456789", "control")
    client = serve().client()
    page = client.get("/comparisons").text
    assert "control over short, long" in page
    assert "80% <span" in page
    assert SCRIPT not in page
    assert 'src="/comparisons/aspects-0123456789/report"' in client.get("/comparisons/aspects-0123456789").text
    got = client.get("/comparisons/aspects-0123456789/report")
    assert got.text == (folder / "report.html").read_text(encoding="utf-8")


def test_the_playground_says_who_answered_and_what_the_switch_took(serve, put) -> None:
    version = put()
    running = serve(load_seconds=0.05)
    client = running.client()
    first = post(client, "/playground/answer", model="a@1", text="a text").text
    assert "to load" in first
    again = post(client, "/playground/answer", model="a@1", text="a text").text
    assert "in memory already" in again
    for text in (first, again):
        assert version.digest.removeprefix("sha256:")[:12] in text
        assert "Receipt" in text
    page = post(client, "/playground", model="a@1", text='say "<b>"').text
    assert version.digest.removeprefix("sha256:")[:12] in page
    assert "in memory already" in page
    got = post(client, "/playground/stream", model="a@1", text="one two", max_tokens="2", temperature="0")
    assert got.headers["turret-adapter"] == "a"
    assert got.text.endswith("data: [DONE]\n\n")
    for wrong in ({"text": " "}, {"max_tokens": "0"}, {"temperature": "hot"}, {"model": ""}):
        fields = {"model": "a@1", "text": "x", **wrong}
        assert post(client, "/playground/stream", **fields).status_code == 400
    rows = running.served.metrics.traffic()
    assert [(row.version, row.requests, row.failures) for row in rows] == [("a@1", 4, 0)]
    assert 0 < rows[0].percentiles[0] <= rows[0].percentiles[-1]


def test_the_line_for_a_shell_on_the_store_page_is_complete_and_works(serve, put, workspace) -> None:
    put("b", base="sha256:another")
    put()
    open_page = serve().client()
    line = html.unescape(re.search(r"<pre><code>(.*?)</code></pre>", open_page.get("/store").text, re.DOTALL)[1])
    done = subprocess.run(["bash", "-c", line.replace("curl ", "curl -s ")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "a@1"
    _, secret = workspace.tokens.create("me", ["admin"])
    running = serve()
    page = signed_in(running, secret).get("/store").text
    make, line = html.unescape(re.search(r"<pre><code>(.*?)</code></pre>", page, re.DOTALL)[1]).splitlines()
    assert make == "TOKEN=$(turret token create shell --store STORE)"
    line = line.replace("curl ", "curl -s ")
    done = subprocess.run(["bash", "-c", f"TOKEN={secret}; {line}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["model"] == "a@1"


def test_a_killed_run_has_one_box_and_a_waiting_one_its_place_and_no_charts(serve, workspace) -> None:
    recipe = 'name = "a"\nbase = "org/base"\n[data]\nsource = "org/data"\n'
    first, second = (workspace.queue.submit(turret.Recipe.from_toml(recipe)) for _ in range(2))
    client = serve().client()
    page = client.get(f"/runs/{second['id']}").text
    assert "It waits for a worker, at place 2 of the 2 trainings that wait." in page
    assert '<div class="plots" hidden' in page
    killed = workspace.store.new_run("a", 'name = "a"\n', "sha256:x")
    assert '<div class="plots" data-plots' in client.get(f"/runs/{killed.id}").text
    workspace.store.end_run(killed, "interrupted", error="its process ended: the same command goes on")
    page = client.get(f"/runs/{killed.id}").text
    assert page.count('class="problem"') + page.count('class="note"') == 1
    assert first["id"] != second["id"]


def test_a_method_is_named_first_and_a_metric_has_a_name_and_a_unit(serve, workspace, tmp_path) -> None:
    method = {
        "init_lora_weights": True,
        "kind": "lora",
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
        "r": 4,
        "use_rslora": True,
    }
    bundle = write_bundle(tmp_path, tensors(1), said={"method": method})
    metrics = {"test": {"rougeL": 0.5, "bleu": 12.3, "loss": 0.7, "own_score": 3.0}}
    workspace.store.put("a", bundle, metrics=metrics)
    page = " ".join(serve().client().get("/adapters/a/1").text.split())
    settings = ("r 4", "lora_alpha 32.0", "use_rslora True")
    assert "<b>lora</b>" + "".join(f' <span class="pairing">{each}</span>' for each in settings) + "</dd>" in page
    assert '(key: rougeL)">ROUGE-L</dt><dd>50.0%</dd>' in page
    assert '>BLEU</dt><dd>12.3<span class="soft"> of 100</span></dd>' in page
    assert '>loss</dt><dd>0.7<span class="soft"> nats</span></dd>' in page
    assert '<dt title="key: own_score">own score</dt><dd>3</dd>' in page
    numbers = write_bundle(tmp_path / "numbers", tensors(2), said={"method": method, "task": {"kind": "regression"}})
    workspace.store.put("b", numbers, metrics={"test": {"nearness": 0.9, "mae": 0.2, "loss": 0.7}})
    page = " ".join(serve().client().get("/adapters/b/1").text.split())
    assert '>loss</dt><dd>0.7<span class="soft"> × variance</span></dd>' in page
    assert "nats" not in page
    assert ">1 - MAE / range</dt><dd>90.0%</dd>" in page


def test_the_store_is_verified_on_demand_and_gc_is_only_asked(serve, put, workspace) -> None:
    put()
    client = serve().client()
    assert "No problem in" in post(client, "/store/verify").text
    assert "No problem in" in post(client, "/adapters/a/1/verify").text
    workspace.delete("a@1")
    said = post(client, "/store/gc").text
    assert "A gc would remove" in said
    assert "Nothing is removed here" in said
    assert workspace.gc(dry_run=True).removed
    path = next(workspace.store.root.glob("blobs/sha256/*/*"))
    put()
    broken = max(workspace.store.files("a@2").values(), key=lambda each: each.stat().st_size)
    broken.chmod(0o644)
    broken.write_bytes(b"x")
    assert "problem" in post(client, "/store/verify").text
    assert "1 problem" in client.get("/store").text
    assert path.exists()


def test_vendored_files_have_their_licence_and_version_beside_them() -> None:
    from turret.server.console.render import FOLDER

    folder = FOLDER / "static" / "vendor"
    said = (folder / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in folder.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"`([\w.]+)`", said))
    for name in ("htmx", "uPlot", "pico"):
        assert (folder / f"{name}.LICENSE.txt").stat().st_size > 300


# --- what speaks against a version ------------------------------------------------------------------------------------


def by_class(accuracy: float, ece: float = 0.02) -> dict:
    return {"accuracy": accuracy, "ece": ece, "per_class": {"ham": {"support": 90}, "spam": {"support": 10}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({}, []),
        ({"test": by_class(0.95)}, []),
        ({"test": by_class(0.9)}, ["below the largest class"]),
        ({"validation": by_class(0.2)}, ["below the largest class"]),
        ({"test": by_class(0.95, 0.18)}, ["badly calibrated"]),
        ({"test": {"loss": 3.0, "rougeL": 0.2}, "test bare base": {"loss": 2.9}}, ["below the bare base"]),
        ({"test": {"loss": 2.8, "rougeL": 0.2}, "test bare base": {"loss": 2.9}}, []),
    ],
)
def test_a_badge_says_what_speaks_against_a_version(serve, workspace, tmp_path, metrics, words) -> None:
    said = {"base": {"id": "echo", "fingerprint": FINGERPRINT}, "task": {"kind": "classify", "labels": list(LABELS)}}
    workspace.store.put("news", write_bundle(tmp_path / "bundles", tensors(1), said=said), metrics=metrics)
    client = serve().client()
    for path in ("/adapters", "/adapters/news/1"):
        assert re.findall(r'<span class="badge bad" title="[^"]+">([^<]+)</span>', client.get(path).text) == words
