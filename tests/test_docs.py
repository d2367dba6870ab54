"""The documentation agrees with the code: tutorials run, links resolve, every option, key and route is described."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from docs_blocks import blocks, page, run_page
from syntax import module_of

from turret.cli.main import app
from turret.families import FAMILIES
from turret.methods import Full, Head, LoRA, Peft, Prefix
from turret.recipe import presets, recipe_keys

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SOURCE = ROOT / "src" / "turret"
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *sorted(DOCS.rglob("*.md")),
]
VERBS = [
    "train",
    "plan",
    "evaluate",
    "predict",
    "engine",
    "inputs",
    "list",
    "show",
    "resolve",
    "doctor",
    "compare",
    "plan_comparison",
    "control",
]
VERBS += ["import_adapter", "export", "diff", "promote", "rollback", "gate", "verify", "gc", "delete"]
VERBS += [
    "experiment",
    "experiments",
    "settle",
    "router",
    "replay",
    "runs",
    "run",
    "curve",
    "comparisons",
    "report",
    "course",
]
IMPORT = re.compile(r"^( *from (turret[\w.]*) import (\([^)]*\)|[^\n#]+))", re.MULTILINE)
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


# --- the marked blocks run -------------------------------------------------------------------------------------------


SMALLER = {"train": 24, "test": 8, "max_tokens": 16}  # the README as it stands takes minutes on one busy core


def smaller(text: str) -> str:
    """The same page with the sizes of its trainings, in a recipe's words or Python's, cut down."""
    for key, size in SMALLER.items():
        text = re.sub(rf'(\.{key}=|"{key}": )\d+', rf"\g<1>{size}", text)
    return text


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path) -> None:
    text = page("README.md")
    assert all(str(size) in smaller(text) for size in SMALLER.values())
    run_page(smaller(text), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in (DOCS / "tutorials").glob("*.md")))
def test_a_tutorial_runs(name: str, tmp_path: Path) -> None:
    run_page(page(f"docs/tutorials/{name}"), tmp_path)


# --- all that can be said is written down ----------------------------------------------------------------------------


def section(name: str, heading: str) -> str:
    """The text under the heading that begins with these words, up to the next of its level."""
    found = re.search(rf"^## {re.escape(heading)}(?!\w).*?(?=^## |\Z)", page(name), re.MULTILINE | re.DOTALL)
    assert found, f"{name} has no section {heading}"
    return found.group()


def test_the_reference_has_every_command_with_every_option() -> None:
    shared = page("docs/reference/commands.md").partition("\n## ")[0]  # --help, --store and --json are said once
    for command in COMMANDS:
        text = section("docs/reference/commands.md", f"`turret {command}")
        same = section("docs/reference/commands.md", "`turret train") if command == "plan" else ""
        for parameter in COMMANDS[command].params:
            names = [name for name in parameter.opts if name.startswith("--")]
            assert all(name in text + shared + same for name in names), f"turret {command} {names}"


def test_the_reference_has_every_verb_of_an_experiment_with_every_option() -> None:
    text = section("docs/reference/commands.md", "`turret experiment")
    for name, command in COMMANDS["experiment"].commands.items():
        assert f"`turret experiment {name} " in text or f"`turret experiment {name}`" in text, name
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        shared = ("--store", "--json")
        assert [option for option in options if option not in shared and f"`{option}" not in text] == [], name


def test_the_reference_has_every_key_of_a_recipe() -> None:
    for key in recipe_keys():
        if not key.startswith("method."):
            name, _, leaf = key.rpartition(".")
            text = section("docs/reference/recipe.md", f"`[{name}]`" if name else "The recipe itself")
            assert f"| `{leaf}` |" in text, key


@pytest.mark.parametrize("method", [LoRA, Prefix, Head, Full, Peft])
def test_the_reference_has_every_key_of_every_method_with_its_default(method: type[Any]) -> None:
    text = section("docs/reference/recipe.md", "`[method]`")
    for name, field in method.model_fields.items():
        row = re.search(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
        assert row, name
        default = field.default
        shown = str(default).lower() if isinstance(default, bool) else f'"{default}"' if name == "kind" else default
        assert (
            name == "kind" or default is None or field.is_required() or f"| {shown} |" in row.group().replace("`", "")
        ), row.group()


def test_the_reference_has_every_default_of_a_recipe() -> None:
    text = page("docs/reference/recipe.md").replace("`", "")
    for key, default in recipe_keys().items():
        if isinstance(default, (bool, int, float, str)) and not key.startswith("method."):
            leaf = key.rpartition(".")[2]
            shown = str(default).lower() if isinstance(default, bool) else default
            shown = f'"{default}"' if isinstance(default, str) else shown
            assert re.search(rf"^\| {leaf} \|[^|]*\| {re.escape(str(shown))} \|", text, re.MULTILINE), f"{key} {shown}"


def test_the_reference_has_every_preset() -> None:
    assert all(f"`{name}`" in page("docs/reference/recipe.md") for name in presets())


def test_the_reference_has_every_public_name() -> None:
    import turret

    assert all(f"`{name}" in page("docs/reference/python.md") for name in turret.__all__)


def test_the_reference_has_every_error() -> None:
    from turret import errors

    names = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(names) > 30
    assert [name for name in names if name not in page("docs/reference/python.md")] == []


def test_the_reference_has_every_verb_of_a_workspace_with_its_arguments() -> None:
    import inspect

    import turret

    for verb in VERBS:
        row = re.search(rf"^\| `{verb}\(.*$", page("docs/reference/python.md"), re.MULTILINE)
        assert row, verb
        arguments = [name for name in inspect.signature(getattr(turret.Workspace, verb)).parameters if name != "self"]
        assert all(name in row.group() for name in arguments), f"{verb}: {arguments}"


# --- HTTP -------------------------------------------------------------------------------------------------------------


def routes() -> dict[str, Any]:
    """`GET /v1/models` -> its part of the description that the server gives of itself."""
    from types import SimpleNamespace

    from turret.server.app import routes as app

    paths = app(SimpleNamespace()).openapi()["paths"]  # type: ignore[arg-type]
    return {f"{method.upper()} {path}": said for path, methods in paths.items() for method, said in methods.items()}


def test_the_reference_has_every_route_and_no_other() -> None:
    heads = re.findall(r"^### `([A-Z]+ /.*)`$", page("docs/reference/http.md"), re.MULTILINE)
    assert sorted(heads) == sorted(routes())


def test_the_reference_has_every_page_and_no_other() -> None:
    from turret.server.app import ROUTERS

    there = {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if not route.include_in_schema  # type: ignore[attr-defined]
        for method in route.methods  # type: ignore[attr-defined]
    }
    rows = section("docs/reference/http.md", "Pages")
    assert {each.replace(":path", "") for each in there} == set(re.findall(r"`((?:GET|POST) /[^`]*)`", rows))


def test_the_reference_has_every_key_of_every_request() -> None:
    from turret.server import moves
    from turret.server.admin import adapters, experiments
    from turret.server.openai import completions
    from turret.server.openai.classify import ClassifyRequest
    from turret.server.openai.completions import CompletionRequest

    text = page("docs/reference/http.md")
    requests = [CompletionRequest, completions.ChatRequest, ClassifyRequest]
    requests += [adapters.PromoteRequest, moves.StartRequest, experiments.RampRequest]
    requests += [experiments.StopRequest, moves.GuardsAsked]
    requests += [experiments.OutcomeOfAnswer, experiments.OutcomeOfUnit]
    for request in requests:
        assert [name for name in request.model_fields if f"`{name}`" not in text] == [], request.__name__
    for said in routes().values():
        names = [each["name"] for each in said.get("parameters", ()) if each["in"] == "query"]
        assert [name for name in names if f"`{name}`" not in text] == []


def test_the_reference_has_every_limit_of_a_server_with_its_value() -> None:
    from dataclasses import fields

    from turret.server.limits import RequestLimits

    for field in fields(RequestLimits):
        shown = str(field.default).removesuffix(".0")
        assert f"| `{field.name}` | {shown} |" in page("docs/reference/http.md"), field.name


def test_the_reference_has_every_metric_and_every_verb_of_the_client() -> None:
    from turret.client import AsyncClient
    from turret.server.metrics import Metrics

    names = set(re.findall(r"^# TYPE (\w+)", Metrics(dict).text().decode(), re.MULTILINE))
    assert [name for name in names if name not in page("docs/reference/http.md")] == []
    verbs = [name for name in vars(AsyncClient) if not name.startswith("_") and name != "close"]
    assert [name for name in verbs if f"`{name}" not in section("docs/reference/python.md", "The client")] == []


def test_the_first_page_names_every_family() -> None:
    text = section("docs/index.md", "What you can use").replace("-", "").lower()
    assert [name for name in FAMILIES if name.replace("-", "").removesuffix("_text").replace("_", "") not in text] == []


@pytest.mark.parametrize("name", ["README.md", "docs/tutorials/classifier.md", "docs/index.md", "docs/howto/serve.md"])
def test_a_page_names_no_command_that_is_not_there(name: str) -> None:
    said = re.findall(r"^ *turret +([a-z]+)|`turret ([a-z]+)", page(name), re.MULTILINE)
    assert {first or second for first, second in said} <= set(COMMANDS)


def test_the_first_screen_of_the_readme_says_what_it_is_installs_it_and_does_something() -> None:
    first = page("README.md").partition("\n## ")[0]
    title, sentence, *_ = first.split("\n\n")
    assert title == "# Turret"
    assert sentence.startswith("Turret ")
    assert len(re.findall(r"[.!?](?:\s|$)", sentence)) == 1
    assert "pip install" in first
    assert [each.language for each in blocks(first) if each.mark] == ["python"]
    assert len(re.findall(r"!\[.*\]\(.*\)", first)) == 1
    assert first.count("\n") < 40


# --- the tree and the links ------------------------------------------------------------------------------------------


def test_every_line_for_curl_is_complete() -> None:
    """With the address, the content type of what it sends, and the command that makes the token that it takes."""
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"^ *(curl (?:.*\\\n)*.*)$", text, re.MULTILINE):
            assert "http://127.0.0.1:8000/" in line, (path.name, line)
            assert " -d " not in line or "-H 'content-type: application/json'" in line, (path.name, line)
            assert "$TOKEN" not in line or "TOKEN=$(turret token create " in text, (path.name, line)


def test_the_layers_of_the_architecture_are_those_that_are_checked() -> None:
    """import-linter's list has every package and module of `src/turret`, so the table has them too."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", section("ARCHITECTURE.md", "Layers"), re.MULTILINE)
    said: dict[int, set[str]] = {}
    for number, names in rows:
        said.setdefault(int(number), set()).update(name.rstrip("/") for name in re.findall(r"`([^`]+)`", names))
    contract = tomllib.loads(page("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    assert contract["exhaustive"]
    checked = [set(re.split(r" [|:] ", layer)) for layer in reversed(contract["layers"])]
    assert said == dict(enumerate(checked))


def test_the_tree_in_contributing_is_the_tree() -> None:
    said = set(re.findall(r"^ {4}([A-Za-z/]+(?:/|\.md)) ", section("CONTRIBUTING.md", "Find your way"), re.MULTILINE))
    assert [name for name in said if not (ROOT / name).exists()] == []
    built = {"site", "dist", "__pycache__"}
    folders = {
        f"{each.name}/" for each in ROOT.iterdir() if each.is_dir() and each.name[0] != "." and each.name not in built
    }
    assert folders == {"src/" if name == "src/turret/" else name for name in said if name.endswith("/")}


def defined_in(path: Path) -> set[str]:
    """Functions, classes and methods of a module, as `name` and `Class.name`."""
    tree = module_of(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    return found | {
        f"{each.name}.{node.name}" for each in classes for node in each.body if isinstance(node, ast.FunctionDef)
    }


def test_what_the_architecture_says_is_where_it_says() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]*) ?\|$", section("ARCHITECTURE.md", "Where is"), re.MULTILINE)[
        2:
    ]
    assert len(rows) > 20
    for what, files, names in rows:
        there = [SOURCE / file for file in re.findall(r"`([\w/]+\.py)`", files)]
        wanted = set(re.findall(r"`([\w.]+)`", names))
        assert all(file.exists() for file in there), files
        assert wanted <= set().union(*map(defined_in, there)), f"{what}: {wanted}"
        assert bool(wanted) == bool(there) == (not files.startswith("none")), what
    assert "CUDA graphs" in [what for what, files, _ in rows if files.startswith("none")]
    assert not any("CUDAGraph" in path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))


def test_every_module_that_the_design_names_is_there() -> None:
    there = [f"/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("[a-z]*/**/*.py")]
    there += [f"/{path.name}" for path in ROOT.glob("*.py")]
    for path in (ROOT / "ARCHITECTURE.md", *(DOCS / "explanation").glob("*.md")):
        named = re.findall(r"`([\w/]+\.py)`", path.read_text(encoding="utf-8"))
        assert [name for name in named if not any(each.endswith(f"/{name}") for each in there)] == [], path


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)]


def test_every_link_leads_somewhere() -> None:
    for path, link in [(source, link) for source in PAGES for link in links(source)]:
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.exists(), f"{path}: {link}"
        if anchor and there.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}
            assert anchor in slugs, f"{path}: {link}"


def test_llms_txt_has_a_title_a_summary_and_pages_that_exist() -> None:
    title, summary, *_, last = re.split(r"\n\n(?=[>#])", page("llms.txt"))
    assert title == "# Turret"
    assert summary.startswith("> Turret ")
    assert last.startswith("## Optional")
    for line in re.findall(r"^- .*$", page("llms.txt"), re.MULTILINE):
        found = re.findall(r"\[[^\]]+\]\(([^)]+)\)", line)
        assert found, line
        assert [link for link in found if not (ROOT / link).is_file()] == []
        assert line in last or all(link.startswith("docs/") for link in found), f"not on the site: {line}"


def test_every_page_is_in_the_navigation() -> None:
    navigation = page("mkdocs.yml")
    assert [path for path in DOCS.rglob("*.md") if path.relative_to(DOCS).as_posix() not in navigation] == []


def test_every_test_that_a_page_names_is_there() -> None:
    """A page that says which test shows a thing names the file, or the file and the test."""
    for path in PAGES:
        for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", path.read_text(encoding="utf-8")):
            assert (ROOT / file).exists(), file
            assert not name or re.search(rf"^def {name}\b", page(file), re.MULTILINE), f"{file}::{name}"


def test_every_name_that_a_page_imports_from_turret_is_there() -> None:
    checked = 0
    for path in PAGES:
        found = [each for each in blocks(path.read_text(encoding="utf-8")) if each.language == "python"]
        own = {each.title for each in found}  # modules that the page writes
        for line, module, listed in (each for block in found for each in IMPORT.findall(block.content)):
            where = SOURCE.joinpath(*module.split(".")[1:])
            file = where / "__init__.py" if where.is_dir() else where.with_suffix(".py")
            if file.relative_to(ROOT).as_posix() not in own:
                names = {each.split(" as ")[0].strip() for each in listed.strip("()\n ").split(",")} - {""}
                assert names <= bound_in(file), f"{path}: {line}"
                checked += 1
    assert checked > 20


def bound_in(path: Path) -> set[str]:
    """The names of a module: what it defines, assigns and imports, what its `__all__` says, modules of a package."""
    text = path.read_text(encoding="utf-8")
    body = module_of(text).body
    imported = {
        each.asname or each.name
        for node in body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for each in node.names
    }
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    assigned = {each.id for each in targets if isinstance(each, ast.Name)}
    public = set(re.findall(r'^    "(\w+)",$', text, re.MULTILINE))
    modules = {each.stem for each in path.parent.iterdir()} if path.stem == "__init__" else set()
    return defined_in(path) | imported | assigned | public | modules
