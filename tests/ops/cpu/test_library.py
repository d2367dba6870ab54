"""Loading the kernels: every way to have none, the check at their first use, and their helper threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_kernels import BOTH, COMPILER, compiled, needed
from torch import Tensor

from turret.ops.cpu import build, compiler
from turret.ops.cpu.build import SWITCH, NotBuilt
from turret.ops.cpu.compiled import DECLARED, RETURNED, TOLERANCES, Argument, CpuOps, require_close
from turret.ops.cpu.compiler import LEVELS


@needed
def test_the_check_at_the_first_use_works_inside_inference_mode() -> None:
    use = "with torch.inference_mode(): assert compiled.library(), compiled.kernel_status()"
    code = f"import torch; from turret.ops.cpu import compiled\n{use}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needed
@BOTH
@pytest.mark.parametrize("name", sorted(DECLARED.keys() - RETURNED.keys()))
def test_the_check_notices_a_wrong_kernel(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last result is off by a few times what is allowed."""
    call, ops = CpuOps.call, compiled(dtype)
    if name == "linear" and not ops.few:
        pytest.skip("this processor does without the kernel")

    def wrong(self: CpuOps, called: str, *arguments: Argument | Tensor) -> None:
        call(self, called, *arguments)
        if called == name:
            [each for each in arguments if isinstance(each, Tensor)][-1].mul_(1.0 + 4.0 * TOLERANCES[dtype])

    monkeypatch.setattr(CpuOps, "call", wrong)
    with pytest.raises(NotBuilt, match=f"in {dtype} is off by"):
        require_close([ops])


@pytest.mark.parametrize("word", ["off", "0", "No"])
def test_the_switch_turns_the_kernels_off_and_names_itself(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, word)
    with pytest.raises(NotBuilt, match=f"switched off by {SWITCH}"):
        build.load()


@pytest.mark.skipif(sys.platform != "linux", reason="no kernels elsewhere")
@pytest.mark.parametrize(("compiler", "expected"), [("no-such-compiler", "not found"), ("false", "failed: status 1")])
def test_without_a_working_compiler_there_is_a_reason_and_no_half_library(
    compiler: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "compile")
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("TURRET_CACHE", str(tmp_path))
    with pytest.raises(NotBuilt, match=expected):
        build.load()
    assert not list(tmp_path.rglob("*.so"))


def test_the_build_of_the_wheel_can_read_the_compilers_command_without_the_package() -> None:
    """`hatch_build.py` runs in an environment that has neither Turret nor torch."""
    code = f"import runpy, sys; sys.modules['turret'] = None; assert runpy.run_path({compiler.__file__!r})['LEVELS']"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, timeout=60)
    control = code.replace(repr(compiler.__file__), repr(build.__file__))
    assert subprocess.run([sys.executable, "-I", "-S", "-c", control], capture_output=True, timeout=60).returncode
    build_hook = Path(__file__).parents[3] / "hatch_build.py"
    assert f'"{Path(compiler.__file__).name}"' in build_hook.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="no kernels elsewhere")
def test_a_wheels_library_is_the_best_one_that_the_processor_has_instructions_for(tmp_path: Path) -> None:
    every = frozenset[str]().union(*(level.features for level in LEVELS))
    for level in LEVELS:
        (tmp_path / f"kernels-{level.name}.so").write_text("no library")
        with pytest.raises(OSError, match=f"kernels-{level.name}.so"):  # chosen, but it does not load
            build.load_shipped(tmp_path, every)
        with pytest.raises(OSError, match=f"kernels-{level.name}.so"):
            build.load_shipped(tmp_path, level.features)
        lacking = level.features - {max(level.features)}
        assert build.load_shipped(tmp_path, lacking) is None
        (tmp_path / f"kernels-{level.name}.so").unlink()


# A compiler that quickly makes another library, with `ready` and `mark` only.
QUICK = """#!/bin/sh
[ "$1" = --version ] && exec echo quick
while [ "$1" != -o ]; do shift; done
echo 'int ready(void) { return 1; } int mark(void) { return 42; }' | exec COMPILER -shared -fPIC -x c - -o "$2"
"""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, with a quick compiler."""
    compiler = tmp_path / "quick"
    compiler.write_text(QUICK.replace("COMPILER", str(COMPILER)))
    compiler.chmod(0o700)
    for name, value in {SWITCH: "compile", "CC": compiler, "TURRET_CACHE": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path / "cache" / "kernels"


# The module alone, without torch, which takes seconds to load.
ALONE = f"""
import sys, types
sys.modules["turret.ops.cpu"] = package = types.ModuleType("turret.ops.cpu")
package.__path__ = [{str(build.FOLDER)!r}]
from turret.ops.cpu import build
"""
LOAD = f"{ALONE}\nlibrary, said = build.load(); print(library.mark(), said)"


def loaded() -> tuple[str, str]:
    """(mark and origin of the library, warnings) of a new process."""
    done = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout.strip(), done.stderr.strip()


@needed
def test_processes_that_build_at_once_end_with_one_library(quick: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {each.communicate(timeout=120)[0].strip() for each in started}
    assert [each.returncode for each in started] == [0, 0, 0]
    (made,) = quick.iterdir()
    assert said == {f"42 compiled as {made.name}"}
    assert made.stat().st_mode & 0o777 == quick.stat().st_mode & 0o777 == 0o700


def marked(place: Path, mark: int) -> Path:
    """A library without kernels that returns a mark."""
    source = f"int ready(void) {{ return 1; }} int mark(void) {{ return {mark}; }}"
    command = [str(COMPILER), "-shared", "-fPIC", "-x", "c", "-", "-o", str(place)]
    subprocess.run(command, input=source, text=True, check=True)
    place.chmod(0o700)
    return place


def planted(quick: Path) -> Path:
    """Replace the cached library with another one; returns its path."""
    assert loaded()[1] == ""
    (made,) = quick.iterdir()
    source = "int ready(void) { return 1; } int mark(void) { return 666; }"
    other = quick.parent / "other.so"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-x", "c", "-", "-o", other], input=source, text=True, check=True
    )
    other.chmod(0o700)
    os.replace(other, made)
    assert loaded()[0].startswith("666 compiled as")  # the control: it is loaded while the folder is private
    return made


@needed
@pytest.mark.parametrize("how", ["folder for all", "folder above for all", "file for all", "a link to the folder"])
def test_a_cache_that_others_can_write_to_is_not_loaded_from(how: str, quick: Path) -> None:
    made = planted(quick)
    match how:
        case "folder for all":
            quick.chmod(0o777)
        case "folder above for all":
            quick.parent.chmod(0o770)
        case "file for all":
            made.chmod(0o766)
        case _:
            quick.rename(quick.parent / "elsewhere")
            quick.symlink_to(quick.parent / "elsewhere")
    said, warned = loaded()
    assert said.startswith("42 compiled for this process only, because the cache is not used: /")
    assert len(warned.splitlines()) == 1
    assert "kernels are compiled in every process" in warned


@needed
@pytest.mark.skipif(sys.platform == "linux" and os.getuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_cache_of_another_user_is_not_loaded_from(what: str, quick: Path) -> None:
    os.chown(planted(quick) if what == "file" else planted(quick).parent, 65534, 65534)
    assert "belongs to user 65534" in loaded()[0]
    assert loaded()[0].startswith("42 ")


@needed
def test_a_library_swapped_after_the_check_is_not_the_one_that_runs(quick: Path) -> None:
    made = planted(quick)
    swap = (
        f"{ALONE}import ctypes, os\n"
        "descriptor = build.open_private(sys.argv[1])\n"
        "os.replace(sys.argv[2], sys.argv[1])\n"
        "build.open_private = lambda path: descriptor\n"
        "print(build._load(sys.argv[1]).mark(), ctypes.CDLL(sys.argv[1]).mark())"
    )
    source = "int ready(void) { return 1; } int mark(void) { return 13; }"
    other = quick / "other.so"
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-x", "c", "-", "-o", other], input=source, text=True, check=True
    )
    said = subprocess.run(
        [sys.executable, "-c", swap, str(made), str(other)], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["666", "13"]


@needed
def test_a_cache_that_cannot_be_written_costs_a_compilation_and_not_the_kernels(quick: Path) -> None:
    quick.parent.mkdir(mode=0o700)
    quick.write_text("in the way")
    said, warned = loaded()
    assert said.startswith("42 compiled for this process only")
    assert "is not a folder" in warned


@needed
def test_without_a_private_folder_there_are_no_kernels(quick: Path) -> None:
    quick.mkdir(parents=True)
    quick.parent.chmod(0o777)
    code = f"{ALONE}\ntry: build.load()\nexcept build.NotBuilt as error: print(error)"
    said = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(quick.parent)}, capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    assert said.count("is writable for others") == 2
    assert not list(quick.parent.rglob("*.so"))


@pytest.mark.slow
@needed
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted where Linux tells them")
def test_ending_idle_threads_ends_the_helpers_of_its_thread_only() -> None:
    script = """
import os, threading, torch
from turret.ops.cpu import compiled as kernels
torch.set_num_threads(2)
def count(): return len(os.listdir("/proc/self/task"))
def work(): torch.randn(600, 600) @ torch.randn(600, 600); kernels.library().gelu(torch.randn(100_000))
before = count()
work()
mine = count()
done, go = threading.Event(), threading.Event()
def other():
    work(); done.set(); go.wait(); work()
thread = threading.Thread(target=other, daemon=True)
thread.start(); done.wait()
both = count()
kernels.end_idle_threads(); kernels.end_idle_threads()
left = count()
go.set(); thread.join()
work()
print(mine - before, both - mine, left - both)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said == ["1", "2", "-1"]
