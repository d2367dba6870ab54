"""A checkpoint is complete or the previous one stays; errors name a full disk, a broken file and another run's file."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import failing_disk
import pytest
import torch

from turret.errors import CheckpointMismatch, CheckpointTooOld, TrainingError
from turret.train import checkpoint

IDENTITY = {"recipe": "r1", "data": "d1"}


def save(folder: Path, step: int = 3, identity: dict[str, Any] = IDENTITY) -> dict[str, torch.Tensor]:
    tensors = {"weights": torch.arange(5.0) + step, "exp_avg": torch.arange(5.0)}
    checkpoint.save(folder, tensors, identity=identity, layout={"a": [5]}, progress={"step": step})
    return tensors


def test_what_is_saved_is_loaded_and_replaces_the_one_before(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, identity=IDENTITY) is None
    assert checkpoint.step_of(tmp_path) == 0
    save(tmp_path, 3)
    tensors = save(tmp_path, 4)
    found = checkpoint.load(tmp_path, identity=IDENTITY)
    assert found is not None
    assert found.progress == {"step": 4}
    assert found.layout == {"a": [5]}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert checkpoint.step_of(tmp_path) == 4
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_checkpoint_of_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    save(tmp_path)
    with pytest.raises(TrainingError, match="another run: its data is d1, this run's is d2"):
        checkpoint.load(tmp_path, identity={**IDENTITY, "data": "d2"})


def test_a_checkpoint_of_a_device_is_refused_where_the_run_names_none(tmp_path: Path) -> None:
    """A run on the CPU names no device; one on a GPU does."""
    save(tmp_path, identity={**IDENTITY, "device": "cuda"})
    with pytest.raises(CheckpointMismatch, match="its device is cuda, this run's is none"):
        checkpoint.load(tmp_path, identity=IDENTITY)
    save(tmp_path)
    with pytest.raises(CheckpointMismatch, match="its device is none, this run's is cuda"):
        checkpoint.load(tmp_path, identity={**IDENTITY, "device": "cuda"})
    assert checkpoint.load(tmp_path, identity=IDENTITY) is not None


def test_a_checkpoint_of_an_older_turret_is_told_from_a_foreign_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, kind, resumes in ((1, CheckpointTooOld, 0), (3, TrainingError, 3)):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", number)
            save(tmp_path)
        with pytest.raises(TrainingError, match=f"has format {number}, expected 2: delete it to start over") as caught:
            checkpoint.load(tmp_path, identity=IDENTITY)
        assert type(caught.value) is kind
        assert checkpoint.step_of(tmp_path) == resumes


@pytest.mark.parametrize("damage", ["cut", "not ours", "empty"])
def test_a_broken_checkpoint_says_which_file_to_delete(tmp_path: Path, damage: str) -> None:
    save(tmp_path)
    path = tmp_path / checkpoint.NAME
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-7], "not ours": b"PK" + whole, "empty": b""}[damage])
    for read in (lambda: checkpoint.load(tmp_path, identity=IDENTITY), lambda: checkpoint.step_of(tmp_path)):
        with pytest.raises(TrainingError, match=r"cannot be read .* delete it"):
            read()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond `size`: the same error as for a quota or a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_previous_checkpoint_and_names_the_disk(tmp_path: Path) -> None:
    save(tmp_path, 3)
    large = {"weights": torch.zeros(1_000_000)}
    with files_no_larger_than(65536), pytest.raises(TrainingError) as caught:
        checkpoint.save(tmp_path, large, identity=IDENTITY, layout={"a": [1_000_000]}, progress={"step": 9})
    assert "disk full: checkpoint of step 9 needs 4 MB" in str(caught.value)
    assert "the disk at /" in str(caught.value)
    assert "the previous checkpoint is intact" in str(caught.value)
    found = checkpoint.load(tmp_path, identity=IDENTITY)
    assert found is not None
    assert found.progress == {"step": 3}
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NAME]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"could not be written to .*file/run"):
        save(tmp_path / "file" / "run")


FAILING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from failing_disk import fail_at, what_failed
from turret.errors import CheckpointMismatch, TrainingError
from turret.train import checkpoint
folder, told = Path(sys.argv[2]), Path(sys.argv[3])
def save(step):
    tensors = {"weights": torch.arange(50.0) + step}
    checkpoint.save(folder, tensors, identity={}, layout={}, progress={"step": step})
save(1)
for number in range(1, 50):
    fail_at(number, folder, told)
    try:
        save(number + 1)
        said = None
    except TrainingError as error:
        said = str(error)
    failed = what_failed(told)
    if failed is None:
        break
    assert said is not None, f"nobody heard that {failed} failed"
    assert checkpoint.load(folder, identity={}) is not None
    print(said)
"""


@pytest.mark.slow
@failing_disk.needed
def test_a_failing_disk_is_named_and_never_passed_over(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    arguments = [str(Path(failing_disk.__file__).parent), str(tmp_path / "run"), str(tmp_path / "failed")]
    found = subprocess.run(
        [sys.executable, "-c", FAILING, *arguments],
        capture_output=True, text=True, env=failing_disk.environment(tmp_path), check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    said = found.stdout.splitlines()
    assert len(said) >= 3  # a write, its flush, and that of the folder
    for line in said:
        assert re.search(r"Input/output error: .*: the disk at /.* fails, look at its health", line), line
        assert "the previous checkpoint is intact" in line or line == said[-1]
    assert said[-1].endswith("the checkpoint may not survive a power cut")
