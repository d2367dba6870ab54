"""A real server on a small base with a chat template, and a way to run a program with another client's packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_models
from clients import scribe as scribes
from clients.environments import Unavailable, environment
from server import conftest as servers
from server.conftest import Running
from server.test_end_to_end import bundle

from turret import engine as engine_room
from turret.server.services import ServerSettings
from turret.tasks.classify import Classify
from turret.tasks.score import Score
from turret.workspace import Question, Workspace

put, serve, workspace = servers.put, servers.serve, servers.workspace  # fixtures
PROGRAMS = Path(__file__).parent / "programs"


@dataclass
class House:
    """A server with an adapter `a` and two tokens of the scope infer."""

    workspace: Workspace
    running: Running
    engine: Any
    token: str
    other: str

    @property
    def url(self) -> str:
        return f"{self.running.url}/v1"


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("clients")
    base = small_models.save_base("qwen3", folder / "qwen3")
    workspace = Workspace(folder / "store")
    workspace.store.put("a", bundle(folder / "bundle", base, "qwen3", "generate", 1))
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("one", "two")]
    engine = workspace.engine(str(base), dtype="float32")
    running = Running(workspace, engine, ServerSettings(), options=engine_room.SamplingParams).start()
    yield House(workspace, running, engine, *tokens)
    running.stop()


@pytest.fixture(scope="session")
def deciders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A server with a panel `tickets` of adapters that decide: `topic`, `urgent` and `stars`."""
    folder = tmp_path_factory.mktemp("deciders")
    base, words = small_models.save_base("bert", folder / "bert"), small_models.tokenizer("bert")
    workspace = Workspace(folder / "store")
    tasks = {
        "topic": Classify(("bank", "film"), words, 32),
        "urgent": Classify(("no", "yes"), words, 32),
        "stars": Score(("1", "2", "3"), words, 32),
    }
    for seed, (name, task) in enumerate(tasks.items(), 1):
        workspace.store.put(name, bundle(folder / name, base, "bert", "classify", seed, task))
    asked = [Question(name, name) for name in tasks]
    workspace.panels.create("tickets", [*asked, Question("sure", "topic", threshold=0.999999)])
    tokens = [workspace.tokens.create(name, scopes=("infer",))[1] for name in ("one", "two")]
    engine = workspace.engine(str(base), dtype="float32")
    running = Running(workspace, engine, ServerSettings(), options=engine_room.SamplingParams).start()
    yield House(workspace, running, engine, *tokens)
    running.stop()


@pytest.fixture(scope="session")
def scribe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """URL and token of a server whose adapters have learnt a form each: see `clients.scribe`."""
    folder = tmp_path_factory.mktemp("scribe")
    workspace = scribes.build(folder)
    engine = workspace.engine(str(folder / "base"), dtype="float32")
    running = Running(workspace, engine, ServerSettings(), options=engine_room.SamplingParams).start()
    yield {"URL": f"{running.url}/v1", "TOKEN": "none"}
    running.stop()


@pytest.fixture
def run(house: House) -> Callable[..., Any]:
    """`run("openai", "openai_python.py", ...)`: what a program of `programs/` prints as JSON on its last line."""

    def run(client: str, program: str, *arguments: str, seconds: float = 200, **more: str) -> Any:
        try:
            folder = environment(client)
        except Unavailable as error:
            if os.environ.get("CI"):
                pytest.fail(f"{client}: {error}")
            pytest.skip(f"{client}: {error}")
        node = shutil.which("node") or "node"
        runner = [node] if program.endswith(".mjs") else [str(folder / "bin" / "python"), "-W", "ignore"]
        path = PROGRAMS / program
        if program.endswith(".mjs"):  # node looks for packages beside the program
            path = Path(shutil.copy(path, folder))
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TMPDIR") if key in os.environ}
        words = {**kept, "URL": house.url, "TOKEN": house.token, "OTHER": house.other, "HF_HUB_OFFLINE": "1", **more}
        words |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [*runner, str(path), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=words, cwd=folder, timeout=seconds, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run
