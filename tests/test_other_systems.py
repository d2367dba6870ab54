"""Turret where a system lacks what only Linux or POSIX has: it imports, and says what it cannot do. A simulation: what
is missing there is taken away here, once other libraries are loaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import importlib, json, os, pkgutil, platform, signal, sys
import turret
EXTRAS = ("mlflow", "wandb", "trackio", "tensorboard", "ray", "optuna")  # which nobody needs to have
def every(): return [each.name for each in pkgutil.walk_packages(turret.__path__, "turret.") if each.name[-2:] != "__"]
def load(name):
    try: importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in EXTRAS: raise
for name in every(): load(name)  # and so all libraries
for name in [each for each in sys.modules if each.partition(".")[0] == "turret"]: del sys.modules[name]
for name in ("getuid", "geteuid", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK", "sched_getaffinity", "fork", "posix_fadvise",
             "pread", "killpg", "getloadavg"):
    if hasattr(os, name): delattr(os, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios"): sys.modules[name] = None
for name in ("SIGKILL", "SIGHUP", "SIGALRM"): delattr(signal, name)
platform.system = lambda: SYSTEM
import turret
for name in every(): load(name)
from turret.ops.cpu import compiled as kernels
from turret.cli.main import run
assert kernels.library() is None
print(kernels.kernel_status())
sys.exit(run(["doctor", "--json", "--store", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["Windows", "Darwin"])
def test_on_another_system_everything_imports_and_there_are_no_kernels(system: str, tmp_path: Path) -> None:
    code = WITHOUT.replace("SYSTEM", repr(system))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    why, _, facts = done.stdout.partition("\n")
    assert why == f"no kernels for {system} yet"
    assert json.loads(facts)["processor"]["kernels"] == why
