"""What an operator sees: metrics, the dashboard and the alerts that read them, and clients that left."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import small_models
import yaml
from shelf import Shelf

import turret
from turret.access import Access
from turret.engine import SamplingParams
from turret.server.limits import RequestLimits
from turret.server.metrics import Metrics
from turret.store.jobs import JobQueue

DEPLOY = Path(__file__).parents[2] / "deploy"
CURRENT = (
    "ready",
    "draining",
    "following",
    "follow_trouble",
    "jobs_waiting",
    "alarms_waiting",
)  # set by the server's state


@pytest.fixture(scope="module")
def exposed() -> str:
    """The metrics of an engine that has answered, in Prometheus' format."""
    shelf = Shelf("llama", "generate")
    shelf.put("g")
    with shelf.engine() as engine:
        engine.generate(["a great film"], "g", SamplingParams(max_tokens=4))
        figures = {"small": asdict(engine.stats())}
    gauges = dict.fromkeys(CURRENT, 1.0)
    return Metrics(lambda: gauges, lambda: figures, [{"version": "1", "base": "small"}]).text().decode()


def names(text: str) -> set[str]:
    """The names of all series that this text declares."""
    found: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        found |= {f"{name}_{end}" for end in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return found


def read_by(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:turret|process)_[a-z_]+", expression))


def test_what_only_grows_is_a_counter_and_the_rest_is_not(exposed: str) -> None:
    kinds = dict(re.findall(r"^# TYPE (turret_engine_\S+) (\S+)$", exposed, re.MULTILINE))
    for name in ("passes", "prompt_tokens", "tokens", "answers", "errors", "loads", "failed_loads", "evictions"):
        assert kinds.pop(f"turret_engine_{name}_total") == "counter", name
    for name in ("queue", "first_token", "between_tokens"):
        assert kinds.pop(f"turret_engine_{name}_seconds") == "histogram", name
    assert set(kinds.values()) == {"gauge"}
    values = dict(re.findall(r"^(turret_engine_\S+) (\S+)$", exposed, re.MULTILINE))
    assert float(values["turret_engine_tokens_total"]) == 4.0
    assert float(values["turret_engine_first_token_seconds_count"]) == 1.0
    assert float(values["turret_engine_between_tokens_seconds_count"]) == 3.0
    assert float(values["turret_engine_loads_total"]) == 1.0


def test_the_build_and_the_process_are_there(serve) -> None:
    text = serve().client().get("/metrics").text
    assert f'base="echo",fingerprint="sha256:echo",version="{turret.__version__}"' in text
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert f"# TYPE {name}" in text


def test_the_jobs_that_wait_are_counted_for_who_scales_workers(serve, workspace) -> None:
    queue = JobQueue.of(workspace.store, make=True)
    client = serve().client()

    def waiting() -> float:
        (found,) = re.findall(r"^turret_jobs_waiting (\S+)$", client.get("/metrics").text, re.MULTILINE)
        return float(found)

    assert waiting() == 0
    runs = [queue.submit("a", "x"), queue.submit("a", "y")]
    JobQueue.of(workspace.with_access(Access("legal")).store).submit("b", "z")
    assert waiting() == 3
    queue.cancel(runs[0])
    assert waiting() == 2


def test_the_dashboard_and_the_alerts_read_metrics_that_are_exposed(exposed: str) -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
    drawn = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    drawn += [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for chart in sorted((DEPLOY / "helm" / "templates").glob("*.yaml")):
        alerts += re.findall(r"printf `(.*)`", chart.read_text(encoding="utf-8"))
    assert len(drawn) > 20
    assert len(alerts) > 10
    for expression in drawn + alerts:
        assert read_by(expression) <= names(exposed), expression
        assert read_by(expression) or "up{" in expression, expression


def test_control_a_metric_that_is_not_exposed_would_be_noticed(exposed: str) -> None:
    for wrong in ("turret_engine_tokens", "turret_engine_queue_seconds", "turret_adapter_answers_count"):
        assert not read_by(f"rate({wrong}[5m])") <= names(exposed), wrong


def test_promtool_takes_the_alerts_and_the_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install prometheus")
    for each in DEPLOY.glob("*.yml"):
        shutil.copy(each, tmp_path)
    for kind, name in (("rules", "alerts.yml"), ("config", "prometheus.yml")):
        command = [promtool, "check", kind, *(["--syntax-only"] if kind == "config" else []), name]
        out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stdout + out.stderr


# --- clients that left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_left_is_499_and_no_error_of_ours(serve, put, until, stream: bool) -> None:
    put()
    running = serve(pace=0.05)
    body = json.dumps({"model": "a", "prompt": " ".join("abcdefghij"), "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream:
            assert connection.recv(12) == b"HTTP/1.1 200"
        else:
            until(lambda: running.engine.stats().queue_length == 1)
    until(lambda: any(line["event"] == "request" for line in running.log()))
    (line,) = [line for line in running.log() if line["event"] == "request"]
    assert (line["status"], line["level"]) == (499, "info")
    assert not [line for line in running.log() if line["level"] == "error"]
    metrics = running.client().get("/metrics").text
    assert 'turret_requests_total{route="/v1/completions",status="499"} 1.0' in metrics
    assert "turret_adapter_failures_total{" not in metrics


def test_control_an_answer_that_fails_is_an_error(serve, put) -> None:
    put()
    running = serve(pace=1.0, limits=RequestLimits(answer_seconds=0.2))
    client = running.client()
    assert client.post("/v1/completions", json={"model": "a", "prompt": "x y z"}).status_code == 504
    assert 'turret_adapter_failures_total{adapter="a@1",kind="generate"} 1.0' in client.get("/metrics").text


# --- a model that is not here -----------------------------------------------------------------------------------------


def test_a_missing_model_is_told_with_the_adapters_of_this_base_only(serve, put) -> None:
    put("mine")
    put("theirs", base="sha256:another")
    client = serve(tokenizer=small_models.tokenizer("llama")).client()
    told = "no adapter named 'nobody' on this server's base: expected one of mine, echo"
    for got in (
        client.post("/v1/completions", json={"model": "nobody", "prompt": "x"}),
        client.post("/v1/embeddings", json={"model": "nobody@3", "input": "x"}),
        client.post("/tokenize", json={"model": "nobody", "prompt": "x"}),
        client.get("/v1/models/nobody"),
    ):
        assert (got.status_code, got.json()["error"]["message"]) == (404, told)
    own = client.post("/v1/completions", json={"model": "mine@9", "prompt": "x"})
    assert (own.status_code, "mine has" in own.json()["error"]["message"]) == (404, True)
