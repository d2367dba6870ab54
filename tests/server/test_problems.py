"""One table maps errors to responses without paths or tracebacks; the log and the metrics have the rest."""

from __future__ import annotations

import pytest

from turret import errors
from turret.errors import TurretError
from turret.server.error_responses import STATUSES, code_of, error_response, without_paths
from turret.server.metrics import MOST_VERSIONS, Metrics

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TurretError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_status_a_code_that_is_its_name_and_no_path(kind) -> None:
    words = "cannot read /var/lib/turret/blobs/ab: /etc/passwd, C:\\Users\\me"
    told = error_response(kind.__new__(kind, words))  # `__init__` may need more
    assert 400 <= told.status < 600
    body = told.body["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert getattr(errors, "".join(part.capitalize() for part in body["code"].split("_"))) is kind
    assert not any(part in str(told.body) for part in ("var/lib", "passwd", "Users"))


def test_the_statuses_that_clients_rely_on() -> None:
    statuses = {kind.__name__: status for kind, status in STATUSES.items()}
    expected = {"Unauthorized": 401, "Forbidden": 403, "NotFound": 404, "TooLarge": 413, "QuotaSpent": 429}
    expected |= {"Busy": 429, "Draining": 503, "DataError": 400, "DeadlineExceeded": 504, "Corrupt": 500}
    assert expected.items() <= statuses.items()
    assert error_response(errors.WrongBase("x")).status == 409
    assert error_response(errors.Busy("x", 7.2)).headers["retry-after"] == "8"


@pytest.mark.parametrize(
    ("path", "body", "where", "param"),
    [
        ("/api/outcomes", {"value": 1e20, "receipt": "x"}, "value: ", "value"),
        ("/api/outcomes", [{"value": 1, "receipt": "x"}] * 3 + [{"value": 1e20, "receipt": "x"}], "3.value: ", "3"),
        ("/api/outcomes", {"value": 1}, "receipt: ", "receipt"),
        ("/v1/decisions", {"model": "a", "input": "x", "questions": [{"type": "predicate"}]},
         "questions.0.instructions: ", "questions"),
        ("/v1/systemone", {"model": "a", "state": "x", "questions": {"Is it?": {"type": "noul", "criteria": {"a": 3}}}},
         "questions.criteria.a: ", "questions"),
        ("/v1/classify", {"model": "a", "input": "x", "OutcomeOfUnit": 1}, "OutcomeOfUnit: unknown", "OutcomeOfUnit"),
    ],
)  # fmt: skip
def test_a_body_that_does_not_fit_is_told_by_the_keys_that_were_sent(serve, put, path, body, where, param) -> None:
    put()
    got = serve().client().post(path, json=body)
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (400, param), error
    assert error["message"].startswith(where)


def test_a_bug_is_told_in_no_words_of_its_own() -> None:
    told = error_response(ValueError("the text was: my secret"))
    assert (told.status, code_of(ValueError("x"))) == (500, "internal_error")
    assert "secret" not in str(told.body)


def test_paths_are_taken_out_and_references_and_ratios_are_not() -> None:
    assert without_paths("no a: there is no store at /home/ana/.turret; make one") == (
        "no a: there is no store at (a file); make one"
    )
    for fine in ("expected 1/2", "HuggingFaceTB/SmolLM2-135M is it", "a@3 and pypi:x/y"):
        assert without_paths(fine) == fine


def test_a_bug_in_a_route_is_500_in_our_shape_and_in_the_log_without_words(serve, put, until, monkeypatch) -> None:
    put()
    running = serve()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the text was: my secret")

    monkeypatch.setattr(running.engine, "submit", broken)
    got = running.client().post("/v1/classify", json={"model": "a", "input": "my secret"})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert got.headers["x-request-id"]
    until(lambda: running.log() and running.log()[-1]["event"] == "request")  # the line is written after the last byte
    assert "secret" not in got.text + running.lines.getvalue()
    (bug,) = [line for line in running.log() if line["event"] == "bug"]
    assert bug["error"] == "RuntimeError"
    assert any("broken" in where for where in bug["where"])
    assert bug["request"] == got.headers["x-request-id"]


def test_a_line_of_the_log_a_request_and_no_texts_unless_asked_for(serve, put, until) -> None:
    put()
    running, chatty = serve(), serve(log_texts=True)
    for each in (running, chatty):
        got = each.client().post("/v1/classify", json={"model": "a", "input": "my secret"})
        each.client().post("/v1/classify", json={"model": "my-secret-name", "input": "x"})
    until(lambda: sum(each["event"] == "request" for each in running.log()) == 2)
    (line, missing) = [each for each in running.log() if each["event"] == "request"]
    wanted = {"route": "/v1/classify", "status": 200, "method": "POST", "adapter": "a@1", "inputs": 1, "level": "info"}
    assert wanted.items() <= line.items()
    assert {"time", "request", "seconds", "receipt", "tokens"} <= set(line)
    assert missing["status"] == 404
    assert "secret" not in running.lines.getvalue()
    assert "my secret" in chatty.lines.getvalue()
    assert got.status_code == 200


def test_metrics_count_answers_of_versions_requests_and_the_engine(serve, put) -> None:
    put()
    client = serve().client()
    client.post("/v1/classify", json={"model": "a", "input": ["x", "y"]})
    client.post("/v1/completions", json={"model": "echo", "prompt": "x"})
    client.post("/v1/classify", json={"model": "nobody-at-all", "input": "x"})
    client.get("/no/such/path/as-this")
    got = client.get("/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    for line in (
        'turret_adapter_answers_total{adapter="a@1",kind="classify"} 2.0',
        'turret_adapter_answers_total{adapter="base",kind="generate"} 1.0',
        'turret_requests_total{route="/v1/classify",status="200"} 1.0',
        'turret_requests_total{route="/v1/classify",status="404"} 1.0',
        'turret_requests_total{route="unknown",status="404"} 1.0',
        'turret_adapter_seconds_count{adapter="a@1"} 1.0',
        "turret_engine_queue_length 0.0",
        "turret_ready 1.0",
    ):
        assert line in got.text
    assert "nobody" not in got.text
    assert "as-this" not in got.text


def test_labels_stay_few_however_many_versions_answer() -> None:
    metrics = Metrics(dict)
    for number in range(MOST_VERSIONS * 3):
        metrics.count_request(f"a@{number}", "classify", 1, 0, 1, 0.1)
    text = metrics.text().decode()
    labels = {line for line in text.splitlines() if line.startswith("turret_adapter_answers_total{")}
    assert len(labels) == MOST_VERSIONS + 1
    assert f'turret_adapter_answers_total{{adapter="other",kind="classify"}} {MOST_VERSIONS * 2}.0' in text
