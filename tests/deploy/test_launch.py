"""The files of `deploy/launch`: each starts a training on two hosts, as far as one machine can show.

Slurm is a real one with two nodes on this machine. Of SkyPilot and Kubeflow's Trainer, the commands of the files run
with the variables that these programs set on two hosts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
import yaml
from server.patience import until

from turret.store import Store

LAUNCH = Path(__file__).parents[2] / "deploy" / "launch"
SLURM = all(map(shutil.which, ("slurmctld", "slurmd", "srun", "sbatch", "munged"))) and os.getuid() == 0
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d-%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
SlurmdTimeout=10
KillWait=5
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=one,two Default=YES State=UP
"""

pytestmark = pytest.mark.slow


def free_ports(count: int) -> list[int]:
    open_ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [int(each.getsockname()[1]) for each in open_ports]
    for each in open_ports:
        each.close()
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a recipe, its base and its data."""
    base = small_models.save_base("bert", tmp_path / "bert")
    rows = [f"{'great film' if row % 2 else 'dull story'} {row},{'good' if row % 2 else 'bad'}" for row in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["review,sentiment", *rows]) + "\n")
    recipe = f'name = "films"\nbase = "{base}"\ndata = "{tmp_path / "films.csv"}"\n[train]\nlr = 1e-3\nbatch_size = 5\n'
    (tmp_path / "recipe.toml").write_text(recipe + 'epochs = 6\ncheckpoint_every = 2\ndtype = "float32"\n')
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    """With this environment's torchrun and turret first on PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "TURRET_STORE": str(place / "store"), **more}
    return {key: value for key, value in words.items() if key != "PYTHONPATH"}


def trained(place: Path) -> dict[str, Any]:
    """The version that was stored: once, in parts, by two processes."""
    store = Store(place / "store")
    assert [each["state"] for each in store.runs()] == ["finished"]
    return dict(store.show("films@1"))


def two_hosts(place: Path, command: list[str], variables: list[dict[str, str]]) -> list[str]:
    """Run a command as on two hosts. Returns what each wrote."""
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    hosts = [
        subprocess.Popen(command, cwd=place, env=environment(place, **each), stdout=pipe, stderr=both, text=True)
        for each in variables
    ]
    said = [each.communicate(timeout=400)[0] for each in hosts]
    assert [each.returncode for each in hosts] == [0, 0], said
    return said


def test_skypilots_file_trains_on_two_hosts(place: Path) -> None:
    file = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    assert file["num_nodes"] == 2
    port = str(free_ports(1)[0])
    common = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1", "SKYPILOT_NUM_NODES": "2", "PORT": port}
    common |= {"SKYPILOT_NUM_GPUS_PER_NODE": "1"}
    said = two_hosts(place, ["bash", "-c", file["run"]], [common | {"SKYPILOT_NODE_RANK": f"{n}"} for n in (0, 1)])
    assert "2 processes share every batch" in said[0]
    assert trained(place)


def test_kubeflows_file_trains_on_two_hosts(place: Path) -> None:
    trainer = yaml.safe_load((LAUNCH / "trainjob.yaml").read_text(encoding="utf-8"))["spec"]["trainer"]
    command = [*trainer["command"], *trainer["args"]]
    command[command.index("/data/recipe.toml")] = str(place / "recipe.toml")
    port = str(free_ports(1)[0])
    common = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    said = two_hosts(place, command, [common | {"PET_NODE_RANK": f"{n}"} for n in (0, 1)])
    assert "2 processes share every batch" in said[0]
    assert trained(place)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Slurm with two nodes on this machine."""
    if not SLURM:
        pytest.skip("needs root and Slurm: apt-get install slurmctld slurmd slurm-client munge")
    folder = tmp_path / "slurm"
    for name in ("state", "spool-one", "spool-two"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(host=socket.gethostname().partition(".")[0], ports=free_ports(3), folder=folder)
    )
    words = {"SLURM_CONF": str(configuration)}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock"]
    munge += [f"--{each}-file={folder}/munge.{each}" for each in ("pid", "log", "seed")]
    commands = [munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "one"], ["slurmd", "-D", "-N", "two"]]
    quiet = subprocess.DEVNULL
    started = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, env={**os.environ, **words}, stdout=quiet, stderr=quiet))
            if command is munge:
                until((folder / "munge.sock").exists, 20)

        def idle() -> bool:
            out = subprocess.run(
                ["sinfo", "-h", "-o", "%D %t"], env={**os.environ, **words}, capture_output=True, check=False
            )
            return out.stdout.strip() == b"2 idle"

        until(idle, 60)
        yield words
    finally:
        for each in reversed(started):
            each.terminate()
            try:
                each.wait(timeout=20)
            except subprocess.TimeoutExpired:
                each.kill()


def test_slurms_file_trains_on_two_hosts_and_after_a_lost_one_goes_on_from_the_checkpoint(
    slurm: dict[str, str], place: Path
) -> None:
    """`--requeue`: when a process of the job is killed, the operator or Slurm starts the job again, and it resumes."""
    words = environment(place, **slurm, PORT=str(free_ports(1)[0]), TURRET_LEASE_SECONDS="4")

    def run(*command: str) -> str:
        out = subprocess.run(command, cwd=place, env=words, capture_output=True, text=True, check=False)
        assert out.returncode == 0, out.stderr
        return out.stdout.strip()

    recipe = ["recipe.toml", "--set", "train.shard=fsdp2", "--set", "train.epochs=40", "--json"]
    job = run("sbatch", "--parsable", "--output=job.log", str(LAUNCH / "train.sbatch"), *recipe)
    log = place / "job.log"
    store = Store(place / "store")

    def checkpoint() -> bool:
        assert run("squeue", "-h", "-j", job, "-o", "%t"), log.read_text(errors="replace")
        return any((place / "store" / "runs").glob("*/checkpoint/*"))

    until(checkpoint, 200)
    processes = run("pgrep", "-f", "turret train recipe.toml").split()
    victim = next(each for each in processes if rank_of(int(each)) == "1")
    os.kill(int(victim), signal.SIGKILL)
    until(lambda: not run("squeue", "-h", "-j", job, "-o", "%t"), 120)
    assert [each["state"] for each in store.runs()] != ["finished"]
    again = run("sbatch", "--parsable", "--output=job.log", str(LAUNCH / "train.sbatch"), *recipe)
    until(lambda: not run("squeue", "-h", "-j", again, "-o", "%t"), 400)
    said = log.read_text(errors="replace")
    (result,) = re.findall(r"^\{.*\}$", said, re.MULTILINE)
    assert json.loads(result)["resumed_from"] > 0, said
    assert trained(place)


def rank_of(process: int) -> str | None:
    """The rank of a process of torchrun; None for others."""
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((each.partition(b"=")[2].decode() for each in words if each.startswith(b"RANK=")), None)
