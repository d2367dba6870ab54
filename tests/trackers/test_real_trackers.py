"""Each tracker with its own library, on this machine: what was logged is read back, and a resume continues the run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from turret.trackers import TrackedRun
from turret.trackers.tracking import Patience, Tracking

pytestmark = pytest.mark.slow
RUN = "20260102-030405-abcdef"
SETTINGS = {"train.lr": 0.001, "method.kind": "lora", "base.fingerprint": "sha256:ab"}
TEXTS = {"recipe.toml": 'name = "tone"\n', "plan.json": '{"steps": 6}'}
PATIENT = Patience(call_seconds=300, end_seconds=300)


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install 'turret[{library}]'")


def follow(name: str, folder: Path) -> None:
    """A run of six steps that was interrupted after the third one, resumed after the second, and finished."""
    for after, last, state in ((0, 3, "interrupted"), (2, 6, "finished")):
        said: list[str] = []
        run = TrackedRun(RUN, "tone", str(folder), after, SETTINGS, TEXTS)
        made = Tracking([name], run, said.append, patience=PATIENT)
        for step in range(after + 1, last + 1):
            values = {"train/loss": 1 / step, "train/lr": 0.001}
            made.log(step, values | ({"validation/accuracy": step / 10} if step % 3 == 0 else {}))
        made.end(state, {"version": "tone@1", "test/accuracy": 0.75} if state == "finished" else {})  # type: ignore[arg-type]
        printed = (folder / f"tracker-{name}.log").read_text()
        assert said == [], printed
        time.sleep(1.1)  # the name of an event file has whole seconds


def read_by(program: str, *arguments: str) -> str:
    """What a program prints that reads the tracker's files, in a process of its own: some libraries keep threads."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    follow("tensorboard", tmp_path)
    program = (
        "import sys, json; from tensorboard.backend.event_processing.event_accumulator import EventAccumulator\n"
        "found = EventAccumulator(sys.argv[1]).Reload()\n"
        "print(json.dumps({n: [[e.step, e.value] for e in found.Scalars(n)] for n in found.Tags()['scalars']}))\n"
        "words = lambda n: [t.tensor_proto.string_val[0].decode() for t in found.Tensors(n)]\n"
        "print(json.dumps({n: words(n) for n in found.Tags()['tensors']}))\n"
    )
    scalars, texts = map(json.loads, read_by(program, str(tmp_path / "tensorboard")).splitlines())
    assert [step for step, _ in scalars["train/loss"]] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # step 3 once, though two processes wrote it
    assert scalars["train/loss"][3][1] == pytest.approx(0.25)
    assert [step for step, _ in scalars["validation/accuracy"]] == [3, 6]
    assert scalars["final/test/accuracy"] == [[6, 0.75]]
    assert 'name = "tone"' in texts["recipe.toml/text_summary"][0]
    assert texts["final/version/text_summary"] == ["tone@1"]
    assert texts["final/state/text_summary"][-1] == "finished"


@pytest.mark.parametrize("kind", ["sqlite", "file"])
def test_mlflow(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    where = f"sqlite:///{tmp_path}/mlflow.db" if kind == "sqlite" else f"file://{tmp_path}/mlruns"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", where)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    follow("mlflow", tmp_path)
    program = (
        "import json; from mlflow import MlflowClient; client = MlflowClient()\n"
        "(run,) = client.search_runs([client.get_experiment_by_name('tone').experiment_id])\n"
        "id = run.info.run_id\n"
        "print(json.dumps([run.info.status, run.info.run_name, run.data.params, run.data.tags, run.data.metrics]))\n"
        "print(json.dumps(sorted({(m.step, m.value) for m in client.get_metric_history(id, 'train/loss')})))\n"
        "print(json.dumps([client.download_artifacts(id, 'recipe.toml')]))\n"
    )
    lines = [line for line in read_by(program).splitlines() if line.startswith("[")]
    (status, name, params, tags, metrics), losses, (path,) = map(json.loads, lines)
    assert (status, name) == ("FINISHED", RUN)
    assert params == {"train.lr": "0.001", "method.kind": "lora", "base.fingerprint": "sha256:ab"}
    assert tags["turret.version"] == "tone@1"
    assert metrics["final/test/accuracy"] == 0.75
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert Path(path).read_text() == TEXTS["recipe.toml"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody has logged in
    follow("wandb", tmp_path)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [folder.name.endswith(RUN) for folder in folders] == [True, True]  # `wandb sync` sends both to one run
    program = (
        "import json, sys; from wandb.proto import wandb_internal_pb2\n"
        "def records(path):\n"  # 7 bytes, then LevelDB's log format: blocks of 32 KiB, records of up to four kinds
        "    data, at, parts = open(path, 'rb').read(), 7, b''\n"
        "    while at < len(data):\n"
        "        if 32768 - at % 32768 < 7: at += 32768 - at % 32768\n"
        "        size, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]\n"
        "        parts += data[at + 7 : at + 7 + size]; at += 7 + size\n"
        "        if kind in (1, 4): yield parts; parts = b''\n"
        "rows, read = [], lambda items: {i.key or '/'.join(i.nested_key): json.loads(i.value_json) for i in items}\n"
        "for path in sys.argv[1:]:\n"
        "    for data in records(path):\n"
        "        record = wandb_internal_pb2.Record(); record.ParseFromString(data)\n"
        "        kind = record.WhichOneof('record_type')\n"
        "        if kind == 'history':\n"
        "            rows.append(['history', record.history.step.num, read(record.history.item)])\n"
        "        elif kind == 'run':\n"
        "            config = read(record.run.config.update)\n"
        "            rows.append(['run', record.run.run_id, record.run.project, config])\n"
        "        elif kind == 'summary':\n"
        "            rows.append(['summary', read(record.summary.update)])\n"
        "        elif kind == 'exit':\n"
        "            rows.append(['exit', record.exit.exit_code])\n"
        "print(json.dumps(rows))\n"
    )
    files = [str(next(folder.glob("*.wandb"))) for folder in folders]
    rows = json.loads(read_by(program, *files).splitlines()[-1])
    runs = [row for row in rows if row[0] == "run"]
    assert {row[1] for row in runs} == {RUN}
    assert {row[2] for row in runs} == {"tone"}
    assert any(row[3].get("method.kind") == "lora" for row in runs)
    losses = {row[1]: row[2]["train/loss"] for row in rows if row[0] == "history" and "train/loss" in row[2]}
    assert losses == {step: 1 / step for step in range(1, 7)}
    summary: dict[str, Any] = {}
    for row in rows:
        summary |= row[1] if row[0] == "summary" else {}
    assert summary["version"] == "tone@1"
    assert summary["test/accuracy"] == 0.75
    assert summary["state"] == "finished"
    assert (folders[0] / "files" / "recipe.toml").read_text() == TEXTS["recipe.toml"]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    follow("trackio", tmp_path)
    program = (
        "import json; import trackio; from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('tone')\n"
        "print(json.dumps([run.name, run.config, SQLiteStorage.get_logs('tone', run.name)], default=str))\n"
    )
    name, config, logs = json.loads(read_by(program).splitlines()[-1])
    assert name == RUN
    assert config["method.kind"] == "lora"
    assert config["recipe.toml"] == TEXTS["recipe.toml"]
    losses = {row["step"]: row["train/loss"] for row in logs if "train/loss" in row}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 7)}
    (final,) = [row for row in logs if "final/version" in row]
    assert final["final/version"] == "tone@1"
    assert final["final/test/accuracy"] == 0.75
