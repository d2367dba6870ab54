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
from syntax import module_of, nodes

import turret
from turret.families import FAMILIES
from turret.methods import METHODS
from turret.tasks import TASKS

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "turret").rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "sklearn", "numpy")
QUICK = ("turret", "turret.errors", "turret.reference", "turret.methods", "turret.families", "turret.recipe")
QUICK += ("turret.tasks", "turret.data")
QUICK += (
    "turret.location",
    "turret.sqlite",
    "turret.postgres",
    "turret.database",
    "turret.store",
    "turret.experiments",
    "turret.workspace",
    "turret.cli.main",
    "turret.engine",
    "turret.engine.scheduler",
)
QUICK += ("turret.client", "turret.server.app")


def loaded_by(*statements: str) -> dict[str, set[str]]:
    """The heavy modules that a fresh interpreter has loaded after each of the statements, carried out in turn."""
    told = f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    program = "\n".join(["import json, sys", *(f"{each}\n{told}" for each in statements)])
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return {each: set(json.loads(line)) for each, line in zip(statements, out.stdout.splitlines(), strict=True)}


def test_rooms_import_downward_only_and_what_answers_quickly_imports_no_torch() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.fail("import-linter is not installed beside this Python: run the tests with `make test`")
    out = subprocess.run([command, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert out.returncode == 0, out.stdout


def test_what_answers_quickly_loads_nothing_heavy() -> None:
    names = "turret.Recipe, turret.LoRA, turret.Prefix, turret.Head, turret.Full, turret.TurretError, turret.Workspace"
    light = f"import turret; {names}; turret.LoRA(r=4); dir(turret)"
    loaded = loaded_by(*(f"import {module}" for module in QUICK), light, "from turret.engine import Limits")
    assert {statement: heavy for statement, heavy in loaded.items() if heavy} == {}


@pytest.mark.slow
def test_what_conducts_a_comparison_loads_no_torch_beside_its_trainings() -> None:
    comparing, measure = "import turret.workspace.comparing", "import turret.workspace.measure"
    loaded = loaded_by(comparing, measure)
    assert loaded[comparing] <= {"numpy"}
    assert "torch" in loaded[measure]  # of a training's own process


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
    names += ["attach", "detach", "load", "save"]
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
        "data",
        "engine",
        "experiments",
        "families",
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


def test_every_module_says_what_it_is_and_runs_no_code_from_outside() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if "migrations" not in path.parts:
            assert ast.get_docstring(module_of(text)), f"{path}: no docstring"
        assert path.stem not in ("utils", "util", "common", "misc", "helpers", "helper"), path
        assert "trust_remote_code=True" not in text, path
        assert "pickle.load" not in text, path


def modules_in(source: Path) -> dict[str, Path]:
    """Every module below `source` by its dotted name; a package by its own."""
    found = {}
    for path in source.rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(path: Path, modules: dict[str, Path]) -> set[str]:
    """What a module imports of `modules`: at its top, for its types alone, or inside a function."""
    found = set()
    for node in nodes(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names | ({node.module} if names - modules.keys() else set())
    return found & modules.keys()


def cycles(source: Path) -> list[str]:
    """Every group of modules that import each other, directly or through others."""
    modules = modules_in(source)
    edges = {name: imported_by(path, modules) - {name} for name, path in modules.items()}

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = edges[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    below = {name: reached(name) for name in modules}
    groups = {frozenset(each for each in below[name] if name in below[each]) for name in modules if name in below[name]}
    return sorted(" <-> ".join(sorted(group)) for group in groups)


def test_no_modules_import_each_other_not_even_inside_functions_or_for_types_alone() -> None:
    assert cycles(ROOT / "src") == []


@pytest.mark.parametrize(
    "text",
    ["from house.b import x", "def f():\n    from house import b", "if TYPE_CHECKING:\n    import house.b"],
    ids=["at the top", "inside a function", "for types alone"],
)
def test_the_test_of_cycles_sees_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("")
    (tmp_path / "house" / "a.py").write_text(text)
    (tmp_path / "house" / "b.py").write_text("from house.c import y")
    (tmp_path / "house" / "c.py").write_text("from house.a import z")
    assert cycles(tmp_path) == ["house.a <-> house.b <-> house.c"]


def shadowing(source: Path) -> list[str]:
    """Modules called as their package is, and those that a name of their package hides."""
    modules = modules_in(source)
    found = [name for name in modules if name.split(".")[-2:-1] == name.split(".")[-1:]]
    for name, path in modules.items():
        if path.name != "__init__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        exported = {f"{name}.{alias.asname or alias.name}": f"{node.module}.{alias.name}" for node in nodes
                    for alias in node.names}  # fmt: skip
        found += [each for each, origin in exported.items() if each in modules and origin != each]
    return sorted(found)


def test_no_package_hides_one_of_its_modules() -> None:
    assert shadowing(ROOT / "src") == []


def test_the_test_of_hidden_modules_sees_both_kinds(tmp_path: Path) -> None:
    for name in ("house/house.py", "house/load.py", "house/seen.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "house" / "__init__.py").write_text("from house.load import load\nfrom house import seen")
    assert shadowing(tmp_path) == ["house.house", "house.load"]


def test_the_engine_is_where_one_looks_for_it() -> None:
    from turret.engine import Engine

    assert Engine.__name__ == "Engine"
    assert "Engine" in importlib.import_module("turret.engine").__all__


def words_of_families() -> set[str]:
    """Names that belong to one family: its own, and those of its classes."""
    words: set[str] = set()
    for family in FAMILIES.values():
        fast = family.fast
        words |= {family.name, *family.attention, *family.cross_attention}
        words |= {*fast.rms_norms, *fast.gated_mlps, *fast.added_norms, *fast.layers}
    return words


def asks_which_family(text: str, words: set[str]) -> list[int]:
    """Lines that hold a family's word, or compare the name or kind of a family, instead of asking the family."""
    lines = []
    for node in nodes(text):
        named = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared = any(
            isinstance(side, ast.Attribute)
            and side.attr in ("name", "kind")
            and ast.unparse(side.value).rpartition(".")[2] in ("family", "_family")
            for side in sides
        )
        if named or compared or (isinstance(node, ast.Attribute) and node.attr == "model_type"):
            lines.append(node.lineno)
    return lines


def test_nothing_outside_families_asks_which_family_it_is() -> None:
    words = words_of_families()
    found = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if path.parent.name != "families" and (lines := asks_which_family(path.read_text(encoding="utf-8"), words))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "if base.family.name in TABLES: pass",
        "wide = self._family.kind != 'encoder'",
        "CLASSES = ('T5LayerNorm',)",
        "fan_in = adapter.base.family == 'gpt2'",
        "config.model_type",
    ],
)
def test_the_test_of_family_names_sees_one(text: str) -> None:
    assert asks_which_family(text, words_of_families()) == [1]
    assert asks_which_family("if base.family.causal: pass", words_of_families()) == []


# --- the axis of methods ---------------------------------------------------------------------------------------------


TESTS = ("isinstance", "issubclass", "startswith")


def asks_which_method(text: str) -> list[int]:
    """Lines that test the class of a method or name a kind to compare with, instead of asking the method.

    Whether two methods are of one kind may be asked.
    """
    classes, lines = {each.__name__ for each in METHODS.values()}, []
    for node in nodes(text):
        sides: list[ast.expr | ast.pattern | None] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in TESTS:
            sides = [*node.args]
        elif isinstance(node, ast.match_case):
            sides = [node.pattern]
        elif isinstance(node, ast.Dict):
            sides = [*node.keys]
        inside = [each for side in sides if side is not None for each in (side, *ast.iter_child_nodes(side))]
        kinds = {each.value for each in inside if isinstance(each, ast.Constant)} & METHODS.keys()
        named = {ast.unparse(each).rpartition(".")[2] for each in inside if not isinstance(each, ast.Constant)}
        if len(kinds | named & classes) > isinstance(node, ast.Dict):  # a table has two at least
            lines.append(inside[0].lineno)
    return lines


def test_nothing_outside_methods_asks_which_method_it_is() -> None:
    found = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if not {"methods", "tuners"} & set(path.parts)
        and (lines := asks_which_method(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "text",
    [
        "isinstance(recipe.method, LoRA)",
        "isinstance(method, (Full, methods.Peft))",
        "type(method) is Prefix",
        "if method.kind == 'lora': pass",
        "wanted = row.kind in ('lora', 'prefix')",
        "match method.kind:\n    case 'full': pass",
        "match method:\n    case Head(): pass",
        "RATES = {'lora': 1e-3, 'full': 1e-4}",
        "said.startswith('lora')",
    ],
)
def test_the_test_of_methods_sees_one(text: str) -> None:
    assert len(asks_which_method(text)) == 1
    assert asks_which_method("if given.kind != method.kind or method.every_weight: pass") == []


# --- the axis of tasks -----------------------------------------------------------------------------------------------

REQUESTS = {"request.kind", "kind", "self.kind", "self._kind", "task"}  # what a request asks for
REQUESTS |= {"kind.request", "each.request", "mode", "mode_of(form)", "heads"}  # and what a page of the playground does
ASKED = ("engine", "server", "bases")  # rooms where these names mean a request's kind


def compared_kinds(text: str) -> list[ast.Compare]:
    """Comparisons with the name of a task, or of a task's `kind` with anything."""
    found = []
    for node in nodes(text):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            constants = {each.value for side in sides for each in ast.walk(side) if isinstance(each, ast.Constant)}
            owners = {ast.unparse(side).rpartition(".kind")[0].rpartition(".")[2] for side in sides}
            if owners & {"task", "dataset", "data"} or constants & TASKS.keys():
                found.append(node)
    return found


def of_a_request(node: ast.Compare) -> bool:
    """Whether nothing but the kind of a request is compared with `classify` or `generate`."""
    sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
    return "summarize" not in str(sides) and bool(REQUESTS & set(sides))


def test_a_comparison_of_a_tasks_kind_is_noticed() -> None:
    for text in ('task.kind == "classify"', "self.task.kind != x", 'x in ("summarize", "generate")', 'k == "generate"'):
        assert compared_kinds(text), text
    for text in ('method.kind == "lora"', "row.kind != 'base'", "task.generates"):
        assert not compared_kinds(text), text
    assert not of_a_request(compared_kinds('spec.get("kind") == "classify"')[0])
    assert of_a_request(compared_kinds('request.kind == "classify"')[0])


def test_nothing_outside_tasks_compares_a_tasks_kind() -> None:
    classes = {task.__name__ for task in TASKS.values()}
    for path in SOURCES:
        room = path.relative_to(ROOT / "src" / "turret").parts[0]
        if room == "tasks":
            continue
        text = path.read_text(encoding="utf-8")
        found = compared_kinds(text)
        assert [ast.unparse(node) for node in found if room not in ASKED or not of_a_request(node)] == [], path
        imports = [node for node in nodes(text) if isinstance(node, ast.ImportFrom)]
        names = {each.name for node in imports for each in node.names}
        assert not names & classes, f"{path}: ask the object, not for its class"


# --- one definition --------------------------------------------------------------------------------------------------

PROMOTES = {"cli/versions.py", "client.py", "store/core.py", "workspace/core.py"}  # a command, a client, and two layers
PROMOTES |= {"cli/panels.py", "store/panels.py"}  # of panels


def places_of(function: str, sources: dict[str, str]) -> list[str]:
    """The files that define a function of this name, one entry for each definition."""
    found = ((name, node) for name, text in sources.items() for node in nodes(text))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sorted(name for name, node in found if isinstance(node, kinds) and node.name == function)


def test_promote_is_defined_once_for_each_who_calls_it() -> None:
    package = ROOT / "src" / "turret"
    sources = {path.relative_to(package).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES}
    assert places_of("promote", sources) == sorted(PROMOTES)
    more = sources | {"server/moves.py": "async def promote(): ...", "x.py": "class A:\n    def promote(self): ..."}
    assert len(places_of("promote", more)) == len(PROMOTES) + 2  # the control
