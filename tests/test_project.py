"""Dependencies are unique and locked by hash, CI cannot skip pages, and scripts name files that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UNLOCKED = (
    "ray",
    "trackio",
    "mlflow",
    "wandb",
    "tensorboard",
    "sweep",
)  # large extras: their own tests run where they are installed
HASHES = r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
LOCKED = re.compile(rf"^([^\s;]+)==([^\s;]+)(?: ; [^\\]+?)? \\\n{HASHES}", re.MULTILINE)


def groups() -> dict[str, list[Requirement]]:
    texts = {"dependencies": PROJECT["project"]["dependencies"]}
    texts |= PROJECT["project"]["optional-dependencies"] | PROJECT["dependency-groups"]
    return {name: [Requirement(text) for text in some] for name, some in texts.items()}


def locked(*names: str) -> dict[str, list[str]]:
    """Package -> version."""
    found: dict[str, list[str]] = {}
    for name in names:
        text = (ROOT / "requirements" / name).read_text()
        every = LOCKED.findall(text)
        lines = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
        assert len(every) == len(lines), f"{name}: not every requirement has a version and hashes"
        for package, version in every:
            found.setdefault(canonicalize_name(package), []).append(version)
    return found


def test_no_dependency_stands_twice() -> None:
    for name, some in groups().items():
        packages = [canonicalize_name(each.name) for each in some]
        assert len(packages) == len(set(packages)), f"{name}: {sorted(packages)}"


@pytest.mark.parametrize("torch", ["cpu.txt", "cuda.txt"])
def test_the_locks_hold_every_dependency_in_a_version_that_the_project_allows(torch: str) -> None:
    versions = locked("build.txt", "common.txt", "interpreter.txt", torch)
    for name, some in groups().items():
        for each in some if name not in UNLOCKED else ():
            for version in versions[canonicalize_name(each.name)]:
                assert each.specifier.contains(version, prereleases=True), f"{each} is locked to {version}"
    common = set(locked("common.txt", "cpu.txt")) - {"nvidia-ml-py"}  # it asks a driver, and has no library of a GPU
    assert not any(name.startswith(("nvidia-", "cuda-", "triton")) for name in common)
    assert "nvidia-cublas" in locked("cuda.txt")


def test_the_locks_name_neither_a_file_nor_a_host() -> None:
    for place in (ROOT / "requirements").iterdir():
        assert not re.search(r"://|file:|\s@\s|--(extra-)?index-url|--find-links|\s/", place.read_text()), place.name


def test_without_a_browser_tests_of_pages_are_skipped_by_hand_and_fail_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    from browser import browser

    monkeypatch.setenv("PATH", "")
    for ci, outcome in (("", pytest.skip.Exception), ("true", pytest.fail.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match="needs chromium"), browser():
            pass


def test_every_pre_commit_hook_is_local_and_runs_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lint = "\n".join(makefile.split(f"\n{goal}:")[1].split("\n\n")[0] for goal in ("lint", "prose"))
    programs = set(re.findall(r"^\t\$\(BIN\)/(.+)$", lint, re.MULTILINE))
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert all(hook["language"] == "system" for hook in local["hooks"])
    run = {hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in local["hooks"]}
    assert run == {program.replace(" --check .", "").removesuffix(" .") for program in programs}


def test_the_workflow_runs_what_make_runs_with_the_fewest_rights() -> None:
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    jobs = workflow["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in steps if "uses" in step)
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert all(job["strategy"]["matrix"]["python"][0] == least for job in jobs.values())
    assert any(step.get("run", "").startswith("make lint test ") for step in jobs["make"]["steps"])
    makefile = (ROOT / "Makefile").read_text()
    goals = "\n".join(makefile.split(f"\n{goal}:")[1].split("\n\n")[0] for goal in ("prose", "lint", "test"))
    wanted = re.findall(r"^\t\$\(BIN\)/(.+)$", goals, re.MULTILINE)
    own = [line for step in jobs["windows"]["steps"] for line in step.get("run", "").splitlines()]
    assert own[-len(wanted) :] == [line.removesuffix(" $(ARGS)") for line in wanted]


def test_the_citation_names_this_version() -> None:
    import turret

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == turret.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_every_issue_template_can_be_read_by_the_host() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"):
        assert {"name", "about"} <= set(yaml.safe_load(path.read_text().split("---")[1])), path.name


def test_the_modules_and_tests_of_make_mutants_exist() -> None:
    targets = (ROOT / "release" / "mutants.py").read_text().partition("TARGETS = {")[2].partition("\n}")[0]
    modules, tests = re.findall(r'Target\(\s*"([^"]+)"', targets), re.findall(r'"([a-z_]+/test_[^"]+)"', targets)
    assert len(modules) == targets.count("Target(")
    assert len(tests) >= 9
    missing = [module for module in modules if not (ROOT / "src" / "turret" / module).is_file()]
    assert missing + [test for test in tests if not (ROOT / "tests" / test).is_file()] == []


def test_a_check_runs_the_tests_of_what_changed_and_the_quickest_of_what_imports_it(tmp_path: Path) -> None:
    files = {
        "src/turret/a.py": "",
        "src/turret/b.py": "",
        "tests/test_a.py": "",
        "tests/test_b.py": "import turret.b",
        "tests/c/test_quick.py": "from turret import a",
        "tests/c/test_slow.py": "from turret.a import something",
        ".pytest_cache/v/turret/seconds": json.dumps({"tests/c/test_quick.py": 1.0, "tests/c/test_slow.py": 70.0}),
        "release/touched_tests.py": (ROOT / "release/touched_tests.py").read_text(encoding="utf-8"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "src", "tests", "release"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "src/turret/a.py").write_text("something = 1", encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "release/touched_tests.py"], capture_output=True, text=True)
    assert done.stdout.split() == ["tests/test_a.py", "tests/c/test_quick.py"]
    assert done.stderr.startswith("1 more test files import what changed")
