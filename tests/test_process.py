"""OpenMP waiting and garbage collection of a `turret` process, the environment of its subprocesses, and helpers."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from turret.process import (
    FULL_COLLECTION_EVERY,
    KERNEL_CACHES,
    KERNELS,
    OPENMP_VARIABLES,
    SPIN,
    Died,
    HelperProcess,
    environment,
    keep_few_kernels,
    wait_briefly,
)

COMMAND = """
import os, sys
from turret.cli.main import main
sys.argv = ["turret", "--version"]
try:
    main()
except SystemExit:
    print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


def said(**variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in OPENMP_VARIABLES}
    done = subprocess.run([sys.executable, "-c", COMMAND], env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_the_command_says_how_threads_wait_before_any_library_reads_it() -> None:
    assert said() == f"{SPIN} False"


def test_the_command_has_all_objects_looked_through_seldom_and_young_ones_as_ever() -> None:
    program = COMMAND.replace('os.environ.get("GOMP_SPINCOUNT")', "__import__('gc').get_threshold()")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own = [sys.executable, "-c", "import gc; print(*gc.get_threshold()[:2], sep=', ')"]
    young = subprocess.run(own, capture_output=True, text=True, check=True).stdout.strip()
    assert done.stdout.splitlines()[-1] == f"({young}, {FULL_COLLECTION_EVERY}) False"


def test_what_the_user_said_of_it_stands() -> None:
    assert said(GOMP_SPINCOUNT="7") == "7 False"
    assert said(OMP_WAIT_POLICY="active") == "None False"


def test_processes_of_its_own_wait_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPENMP_VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("RANK", "1")
    assert "GOMP_SPINCOUNT" not in environment()
    wait_briefly()
    assert environment()["GOMP_SPINCOUNT"] == SPIN
    assert "RANK" not in environment()


def test_onednn_keeps_few_kernels_unless_the_user_said_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels, descriptions = KERNEL_CACHES
    monkeypatch.setenv(kernels, "7")
    monkeypatch.setenv(descriptions, "")  # so that monkeypatch restores it
    monkeypatch.delenv(descriptions)
    keep_few_kernels()
    assert environment()[kernels] == "7"
    assert environment()[descriptions] == KERNELS


def test_the_command_limits_the_kernels_before_any_library_reads_it() -> None:
    program = COMMAND.replace('os.environ.get("GOMP_SPINCOUNT")', f"[os.environ.get(name) for name in {KERNEL_CACHES}]")
    free = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    done = subprocess.run([sys.executable, "-c", program], env=free, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{[KERNELS, KERNELS]} False"


@pytest.mark.slow
def test_a_limit_that_is_set_before_the_first_product_bounds_the_memory_of_kernels() -> None:
    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN computes no bfloat16 here")
    limited, free = grown_by_kernels(limited=True), grown_by_kernels(limited=False)
    assert limited < free / 2, (limited, free)


def grown_by_kernels(*, limited: bool) -> int:
    """Bytes by which a process grows that multiplies 1,000 shapes in bfloat16."""
    code = f"""
import psutil
from turret.process import keep_few_kernels
{limited} and keep_few_kernels()
import torch
weight, memory = torch.ones(64, 64, dtype=torch.bfloat16), psutil.Process().memory_info
before = memory().rss
for tokens in range(1, 1001):
    torch.nn.functional.linear(torch.ones(tokens, 64, dtype=torch.bfloat16), weight)
print(memory().rss - before)
"""
    free = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    return int(subprocess.run([sys.executable, "-c", code], env=free, check=True, stdout=subprocess.PIPE).stdout)


def test_the_credentials_of_a_store_reach_only_processes_that_open_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"AWS_SECRET_ACCESS_KEY": "a", "AWS_ENDPOINT_URL": "http://s3", "PGPASSWORD": "b", "PGSSLMODE": "require"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert given.items() <= environment(store=True).items()
    assert not given.keys() & environment().keys()


def test_the_variables_of_a_gpu_reach_the_processes_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"CUDA_VISIBLE_DEVICES": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "TRITON_CACHE_DIR": "/t"}
    given |= {"NCCL_DEBUG": "INFO", "BNB_CUDA_VERSION": "128", "HIP_VISIBLE_DEVICES": "0", "CC": "gcc-13"}
    for name, value in {**given, "CCACHE": "x", "SECRET": "y"}.items():
        monkeypatch.setenv(name, value)
    assert given.items() <= environment().items()
    assert not {"CCACHE", "SECRET"} & environment().keys()


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HelperProcess[str, str]]:
    """One that answers with the question, or with a part of an answer if the question is empty."""
    program = (
        "import sys, time\n"
        "def answer(asked):\n"
        "    if asked: return asked\n"
        "    sys.stdout.buffer.write(b'[1, 2'); sys.stdout.buffer.flush(); time.sleep(600)\n"
        "def helper(about): return answer\n"
    )
    (tmp_path / "echoing.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    made = HelperProcess[str, str]("echoing", {}, 2.0, None, "nothing can be said")
    yield made
    made.close()


LONG = "question " * 1_000_000  # more than a pipe or a socket takes before somebody reads


def test_a_helper_gets_long_questions_and_gives_long_answers(helper) -> None:
    assert helper.ask(LONG) == LONG
    assert helper.ask("short") == "short"
    assert helper.started == 1


def test_a_helper_that_reads_no_more_or_stops_within_an_answer_is_given_up_in_time(helper) -> None:
    assert helper.ask("a") == "a"
    os.kill(helper.process.pid, signal.SIGSTOP)
    for asked in (LONG, ""):
        started = time.monotonic()
        assert helper.ask(asked) == Died(late=True)
        assert time.monotonic() - started < 20
        assert helper.ask("a") == "a"
    assert helper.started == 3


def test_a_helper_is_asked_by_a_process_with_many_open_files(helper) -> None:
    """`select` takes none of a number from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this machine allows a process fewer files")
    with ExitStack() as opened:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull))
        assert helper.ask("a") == "a"
