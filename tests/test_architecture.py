"""The house keeps its shape: layers, public names, and nothing heavy loaded before it is needed."""

from __future__ import annotations

import ast
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import turret

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "turret").rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "sklearn", "numpy")
QUICK = ("turret", "turret.errors", "turret.reference", "turret.methods", "turret.families", "turret.recipe")
QUICK += (
    "turret.location",
    "turret.sqlite",
    "turret.postgres",
    "turret.database",
    "turret.store",
    "turret.experiments",
    "turret.workspace",
    "turret.cli.main",
    "turret.engine.scheduler",
)
QUICK += ("turret.client", "turret.server.app", "turret.server.run")


def loaded_by(statement: str) -> set[str]:
    """The heavy modules that a fresh interpreter has loaded after `statement`."""
    program = f"import json, sys\n{statement}\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_rooms_import_downward_only_and_what_answers_quickly_imports_no_torch() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.fail("import-linter is not installed beside this Python: run the tests with `make test`")
    out = subprocess.run([command, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stdout


@pytest.mark.parametrize("module", QUICK)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_the_light_names_load_nothing_heavy() -> None:
    light = "turret.Recipe, turret.LoRA, turret.Prefix, turret.Head, turret.Full, turret.TurretError, turret.Workspace"
    assert loaded_by(f"import turret; {light}; turret.LoRA(r=4); dir(turret)") == set()


def test_the_public_names_are_these_and_each_is_there() -> None:
    names = [
        "AsyncClient",
        "Full",
        "Head",
        "LoRA",
        "Peft",
        "Prefix",
        "Recipe",
        "TurretError",
        "Workspace",
        "__version__",
    ]
    names += ["attach", "detach", "save"]
    assert sorted(turret.__all__) == names == dir(turret)
    for name in names:
        assert hasattr(turret, name), name


def test_every_public_object_calls_its_home_by_a_public_module() -> None:
    for name in set(turret.__all__) - {"__version__"}:
        value = getattr(turret, name)
        assert value.__module__.startswith("turret."), name
        assert value.__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'turret' has no attribute 'Lora'"):
        turret.Lora  # noqa: B018
    assert not hasattr(turret, "torch")


@pytest.mark.parametrize(
    "room",
    [
        "adapters",
        "bases",
        "compare",
        "engine",
        "experiments",
        "recipe",
        "server",
        "store",
        "tasks",
        "train",
        "workspace",
    ],
)
def test_what_a_room_exports_is_there(room: str) -> None:
    module = importlib.import_module(f"turret.{room}")
    for name in getattr(module, "__all__", ()):
        assert hasattr(module, name), name


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_the_command_answers_in_under_half_a_second(arguments: list[str]) -> None:
    best = float("inf")
    for _ in range(5):  # processor time, and the best of five: other tests may keep the machine busy
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = Path(sys.executable).with_name("turret")
        out = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert out.returncode == 0, out.stderr
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 0.5:
            return
    pytest.fail(f"turret {' '.join(arguments)} took {best:.2f} s at best: expected under 0.5 s")


def test_python_m_turret_is_the_same_command() -> None:
    out = subprocess.run([sys.executable, "-m", "turret", "--version"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert turret.__version__ in out.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_module_says_what_it_is_and_stays_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "migrations" not in path.parts:
        assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 450, "too long: a module is one thing"
    assert path.stem not in ("utils", "util", "common", "misc", "helpers", "helper")
    assert "trust_remote_code=True" not in text
    assert "pickle.load" not in text
