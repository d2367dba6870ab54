"""A release is built and installed in a new environment, where its kernels work without a compiler."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs the development dependencies of pyproject.toml")
pytest.importorskip("build", reason="needs the development dependencies of pyproject.toml")
pytest.importorskip("cyclonedx", reason="needs the development dependencies of pyproject.toml")

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
compiled = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="kernels are shipped for Linux on x86-64"
)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release") / "dist"
    command = [sys.executable, str(ROOT / "release" / "make_release.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; it uses the other packages of this environment."""
    folder = tmp_path_factory.mktemp("new") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = release.glob("*.whl")
    command = [sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-index"]
    subprocess.run([*command, "--ignore-installed", "--no-deps", str(wheel)], check=True, timeout=300)
    subprocess.run([*command, str(wheel)], check=True, timeout=300)  # all that its metadata asks for is there
    return folder


def run(installed: Path, *command: str, **settings: str) -> str:
    """The output of a program in the new environment, without a compiler and without a writable folder."""
    environment = {"PATH": "/nowhere", "HOME": "/proc/nowhere", "TURRET_CACHE": "/proc/nowhere", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(installed / "bin" / command[0]), *command[1:]], capture_output=True, text=True, timeout=600, check=False,
        env=environment | settings, cwd=installed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_release_has_its_sums_and_lists_what_it_is_made_of(release: Path) -> None:
    lines = [line.split("  ") for line in (release / "SHA256SUMS").read_text().splitlines()]
    assert {name for _, name in lines} == {path.name for path in release.iterdir()} - {"SHA256SUMS"}
    for digest, name in lines:
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == digest
    (place,) = release.glob("*.cdx.json")
    bom = json.loads(place.read_text())
    assert bom["metadata"]["component"]["name"] == "turret"
    names = [component["name"] for component in bom["components"]]
    assert {"torch", "transformers", "sqlalchemy", "typing-extensions"} <= set(names)
    assert len(names) == len(set(names))
    assert not {"pytest", "ruff", "turret"} & set(names)
    said = {each["name"]: each["hashes"][0]["content"] for each in bom["metadata"]["component"]["components"]}
    assert said == {name: digest for digest, name in lines if name != place.name}


def test_the_sdist_has_what_a_build_and_the_tests_need(release: Path) -> None:
    (place,) = release.glob("*.tar.gz")
    with tarfile.open(place) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"hatch_build.py", "Makefile", "LICENSE", "requirements/common.txt", "release/make_release.py"}
    assert wanted <= names
    assert {"src/turret/ops/cpu/kernels.c", "tests/conftest.py"} <= names
    assert not any(name.endswith(".so") for name in names)


@compiled
def test_the_wheel_has_a_library_for_each_kind_of_processor_and_says_so_in_its_tag(release: Path) -> None:
    (wheel,) = release.glob("*.whl")
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith(("-manylinux_2_28_x86_64.whl", "-linux_x86_64.whl"))
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    kinds = ("avx2", "avx512", "avx512_bf16", "amx")
    assert shipped == {f"turret/ops/cpu/shipped/kernels-{kind}.so" for kind in kinds}


def test_the_wheel_runs_in_a_new_environment(installed: Path) -> None:
    assert "turret doctor" in run(installed, "turret", "--help") or "doctor" in run(installed, "turret", "--help")
    where = run(installed, "python", "-c", "import turret; print(turret.__file__)")
    assert where.startswith(str(installed))
    store = installed / "store"
    facts = json.loads(run(installed, "turret", "doctor", "--json", "--store", str(store)))
    assert facts["libraries"]["torch"]


@compiled
def test_the_wheels_kernels_need_no_compiler_and_write_nothing(installed: Path, tmp_path: Path) -> None:
    said = run(installed, "python", "-c", WHY, TMPDIR=str(tmp_path))
    assert said.startswith("shipped for"), said
    assert "turret/ops/cpu/shipped/kernels-" in said  # mapped from the wheel
    assert not list(tmp_path.iterdir())
    control = run(installed, "python", "-c", WHY, TMPDIR=str(tmp_path), TURRET_KERNELS="compile")
    assert control.startswith("no C compiler"), control


WHY = """
from turret.ops.cpu import compiled as kernels
kernels.library()
print(kernels.kernel_status())
print([line for line in open("/proc/self/maps") if "kernels-" in line])
"""
