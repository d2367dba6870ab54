"""A training on two hosts: each has a torchrun and folders of its own; only the store is shared. One host is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import small_models
from servers import PostgresServer
from workspace.test_other_machine import until

from turret.store import Store

EPOCHS = 30
pytestmark = [pytest.mark.slow, pytest.mark.fleet]


class Host:
    """A machine: its torchrun is a process group of its own."""

    def __init__(self, rank: int, endpoint: str, url: str, local: Path, recipe: Path) -> None:
        self.rank, self.endpoint, self.local = rank, endpoint, local
        self._url, self._recipe = f"{url}&local={local}", recipe
        words = ["-m", "turret", "train", str(recipe), "--json", "--store", self._url]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TURRET_LEASE_SECONDS": "5"}
        environment["MKL_CBWR"] = "COMPATIBLE"  # else its products of a few rows depend on where they lie in memory
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    def lose(self) -> None:
        """The host is gone, with what was on it: torchrun, and its trainings, which are in sessions of their own."""
        for each in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.communicate(timeout=60)
        shutil.rmtree(self.local, ignore_errors=True)

    def ended(self, seconds: float = 900) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail(f"host {self.rank} is still there: {self.process.communicate()[1][-2000:]}")
        return self.process.returncode, out, err


@pytest.mark.parametrize("lost", [0, 1], ids=["main", "other"])
def test_a_training_that_lost_a_host_goes_on_from_the_stores_checkpoint_with_the_same_bits(
    lost: int, new_url: Callable[..., str], postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """FSDP2 on two hosts. The host that replaces the lost one has nothing of the run but the store and the data."""
    base = small_models.save_base("bert", tmp_path / "bert")
    rows = [f"{'great film' if row % 2 else 'dull story'} {row},{'good' if row % 2 else 'bad'}" for row in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["review,sentiment", *rows]) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'name = "films"\nbase = "{base}"\ndata = "{tmp_path / "films.csv"}"\n[train]\nepochs = {EPOCHS}\n'
        'batch_size = 5\nlr = 1e-3\ncheckpoint_every = 4\ndtype = "float32"\nshard = "fsdp2"\n'
    )
    digests = {}
    for name in ("whole", "cut"):
        url = new_url("s3").partition("&local=")[0]

        def hosts(life: int, name: str = name, url: str = url) -> list[Host]:
            with socket.create_server(("127.0.0.1", 0)) as free:
                endpoint = f"127.0.0.1:{free.getsockname()[1]}"
            return [Host(rank, endpoint, url, tmp_path / f"{name}-{rank}-{life}", recipe) for rank in (0, 1)]

        pair = hosts(1)
        store = Store(f"{url}&local={tmp_path / 'seen'}")
        if name == "cut":
            seen = lambda store=store: (
                store.exists() and any("/checkpoint/" in each.path for each in store.artifacts.list_files("runs/"))
            )
            until(seen, 600)
            pair[lost].lose()
            status, out, err = pair[1 - lost].ended()
            assert (status != 0, out) == (True, ""), err
            assert err.count("turret: ") <= 1, err
            pair = hosts(2)
        (status, out, err), (other, silent, errors) = pair[0].ended(), pair[1].ended()
        assert (status, other, silent) == (0, 0, ""), err + errors
        said = json.loads(out)
        assert (said["resumed_from"] or 0) >= (4 if name == "cut" else 0), "it began anew"
        digests[name] = store.show("films@1")["files"]["adapter_model.safetensors"]["digest"]
        assert [each["state"] for each in store.runs()] == ["finished"]
    assert digests["whole"] == digests["cut"]
