"""The image that deploy/Dockerfile makes: its settings, and its commands as its user on a read-only root.

TURRET_IMAGE names the image in buildah's storage. The tests mount it and change into it, so they need root.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import small_models
from server.patience import until

import turret

IMAGE = os.environ.get("TURRET_IMAGE", "")
USER = 10001

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not IMAGE or shutil.which("buildah") is None or os.getuid() != 0,
        reason="needs buildah, root and TURRET_IMAGE: buildah build -f deploy/Dockerfile -t turret . makes one",
    ),
]
MOUNTS = """
set -e
mount --make-rprivate /
mount --bind {root} {root}
mount -o remount,bind,ro {root}
mount -t proc proc {root}/proc
mount --rbind /dev {root}/dev
mount -t tmpfs tmpfs {root}/tmp
mount -t tmpfs -o uid={user},gid={user} tmpfs {root}/var/lib/turret
mkdir {root}/var/lib/turret/base && mount --bind {base} {root}/var/lib/turret/base
exec chroot --userspec={user}:{user} {root} "$@"
"""


def buildah(*words: str) -> str:
    out = subprocess.run(["buildah", *words], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout.strip()


@dataclass
class Image:
    """The files of the image, mounted, and its settings."""

    root: Path
    base: Path
    config: dict[str, object]

    def command(self, *words: str) -> list[str]:
        """A command line that runs these words in the image, in a mount namespace of its own."""
        script = MOUNTS.format(root=self.root, base=self.base, user=USER)
        settings = ["env", "-i", *map(str, self.config["Env"]), "HF_HUB_OFFLINE=1", "OMP_NUM_THREADS=1"]  # type: ignore[call-overload]
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh", *settings, *words]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    base = small_models.save_base("qwen3", tmp_path_factory.mktemp("image") / "qwen3")
    for each in (base, *base.iterdir()):
        each.chmod(0o755)
    config = json.loads(buildah("inspect", "--type", "image", IMAGE))["OCIv1"]["config"]
    container = buildah("from", "--pull-never", IMAGE)
    try:
        yield Image(Path(buildah("mount", container)), base, config)
    finally:
        buildah("rm", container)


def test_it_runs_turret_as_a_user_without_a_shell_and_declares_where_it_writes(image: Image) -> None:
    assert (image.config["User"], image.config["Entrypoint"]) == (f"{USER}:{USER}", ["turret"])
    assert set(image.config["Volumes"]) == {"/var/lib/turret"}  # type: ignore[call-overload]
    owned = [str(path) for path in image.root.glob("*/*") if path.lstat().st_uid == USER]
    assert owned == []


def test_it_has_the_version_of_this_tree_the_kernels_and_no_tools_to_install_or_compile(image: Image) -> None:
    out = image.run("turret", "--version")
    assert (out.returncode, out.stdout.strip()) == (0, f"turret {turret.__version__}"), out.stderr
    out = image.run("turret", "doctor")
    assert out.returncode == 0, out.stdout + out.stderr
    program = "import os; from turret.ops.cpu import compiled; print(os.getuid(), compiled.__file__)"
    assert image.run("python3", "-c", program).stdout.split()[0] == str(USER)
    for each in ("gcc", "pip"):
        assert not list(image.root.glob(f"usr/bin/{each}")) + list(image.root.glob(f"opt/turret/bin/{each}"))
    assert list(image.root.glob("opt/turret/lib/python3*/site-packages/turret/ops/cpu/shipped/*.so"))


@pytest.mark.parametrize("place", ["/opt/turret/x", "/usr/x", "/etc/x", "/x"])
def test_nothing_can_be_written_outside_its_folders(image: Image, place: str) -> None:
    assert image.run("touch", place).returncode != 0
    assert image.run("touch", "/tmp/x", "/var/lib/turret/x").returncode == 0


def test_it_serves_on_a_read_only_root_its_health_check_passes_and_it_drains(image: Image) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ("turret", "serve", "--base", "/var/lib/turret/base", "--port", str(port))
    with subprocess.Popen(image.command(*words), stderr=subprocess.PIPE, text=True) as process:
        try:
            client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)

            def ready() -> bool:
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                try:
                    return client.get("/readyz").status_code == 200
                except httpx2.TransportError:
                    return False

            until(ready, 180)
            body = {"model": "base", "prompt": "the market", "max_tokens": 4}
            got = client.post("/v1/completions", json=body)
            assert got.status_code == 200, got.text
            kind, *check = image.config["Healthcheck"]["Test"] if "Healthcheck" in image.config else healthcheck()  # type: ignore[index]
            assert kind == "CMD"
            check = [each.replace(":8000/", f":{port}/") for each in check]
            assert image.run(*check).returncode == 0
            client.close()
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
            os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
            assert process.wait(timeout=90) == 0
            assert image.run(*check).returncode != 0, "control: without a server the check fails"
        finally:
            process.kill()


def healthcheck() -> list[str]:
    """The health check of the Dockerfile: an image in OCI's format, as buildah makes it, has no place for it."""
    text = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    return ["CMD", *json.loads(text.partition("HEALTHCHECK")[2].partition("CMD ")[2].partition("\n")[0])]
