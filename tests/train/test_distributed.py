"""Several processes train the same adapter as one, stop and resume together, and notice a missing process."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import several_training as several
import sharded_training as sharded
import small_models
import tiny_training as tiny
import torch
import torch.distributed as dist
from several_launch import ended, launch

from turret.engine.protocol import OptimStep
from turret.errors import TrainingError
from turret.ops.dropout import Draws
from turret.train import distributed
from turret.train.adamw import AdamW
from turret.train.batches import EncodedRows
from turret.train.distributed import Processes
from turret.train.initialize import attach
from turret.train.slot import LocalSlot

pytestmark = pytest.mark.slow  # real trainings


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """The folder of one run of `several_training.py` by two real processes, its exit status and stderr."""
    folder = tmp_path_factory.mktemp("together")
    status, _, err = ended(launch(several.__file__, str(folder)))
    assert (folder / "said.json").exists(), err
    return folder, status, err


@pytest.fixture(scope="module")
def said(together: Any) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((together[0] / "said.json").read_text())
    return told


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- the same adapter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classify", "summarize"])
def test_two_processes_make_the_adapter_that_one_makes(together: Any, kind: str) -> None:
    """Equal within 1e-5; training moved the weights by more than a hundred times that."""
    got = torch.load(together[0] / f"{kind}.pt")
    alone = several.finish(several.still(kind)[1])
    assert far(got["weights"], alone["weights"]) < 1e-5
    on, data, made = tiny.base("bert", **several.BERT), tiny.dataset(kind), tiny.recipe(**several.STILL)
    if kind != "classify":
        on = tiny.base("llama", "generate")
    attach(made, on, tiny.task_of(made, data, on))
    start, head, _ = several.adapters.extract(on.model)
    assert far({**start, **head}, alone["weights"]) > 1e-3
    for one, two in zip(alone["records"], got["records"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert (two["examples"], two["tokens"]) == (one["examples"], one["tokens"])


def test_two_processes_draw_the_dropout_that_one_draws(together: Any) -> None:
    """Within 1e-4; the control has other masks and is a hundred times further."""
    got = torch.load(together[0] / "whole.pt")
    alone = several.finish(several.drawn(together[0] / "alone")[1])
    assert far(got["weights"], alone["weights"]) < 1e-4
    assert [each["loss"] for each in got["records"]] == pytest.approx([each["loss"] for each in alone["records"]], 1e-4)
    on, data, made = tiny.base("bert"), tiny.dataset(train=25, validation=8), tiny.recipe(**several.DRAWN)
    steps = tiny.fit(made, on, tiny.task_of(made, data, on), data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draws, "key", property(lambda self: 77 + self.step))
        other = several.finish(steps)
    assert far(other["weights"], alone["weights"]) > 1e-2


class Deaf(Processes):
    """One of two processes that never receives the other's gradients."""

    def sum(self, *tensors: torch.Tensor) -> None:
        self.__dict__.setdefault("kept", []).append([each.clone() for each in tensors])


@pytest.mark.parametrize("kind", ["classify", "summarize"])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_the_shares_of_a_batch_add_up_to_it_and_one_alone_does_not(kind: Any, count: int) -> None:
    on = tiny.base("bert", **several.BERT) if kind == "classify" else tiny.base("llama", "generate")
    data, made = tiny.dataset(kind), tiny.recipe(**several.STILL)
    task = tiny.task_of(made, data, on)
    attach(made, on, task)
    optimiser = AdamW(several.adapters.trainable_parameters(on.model))
    batch = EncodedRows(task, data.train).take(range(count))
    parts = []
    for here in (Deaf(0, 1), Deaf(0, 2), Deaf(1, 2)):
        start = optimiser.weights.clone()
        LocalSlot(on, task, optimiser, 42, 30, here).train_step(batch, OptimStep(0.0, clip=None))
        optimiser.set_weights(start)
        parts.append(here.__dict__["kept"][0])
    whole, first, second = ([gradient, loss] for gradient, loss in parts)
    for entire, one, two in zip(whole, first, second, strict=True):
        torch.testing.assert_close(one + two, entire, rtol=1e-4, atol=1e-6)
    if count > 1:
        assert not torch.allclose(first[0] * 2, whole[0], rtol=1e-2)
    else:
        assert not second[0].any()


def test_a_share_is_every_other_item_by_length_and_all_of_it_for_one() -> None:
    data, made, on = tiny.dataset(), tiny.recipe(), tiny.base("bert")
    batch = EncodedRows(tiny.task_of(made, data, on), data.train).take(range(7))
    assert distributed.ALONE.share(batch) is batch
    shares = [Processes(rank, 3).share(batch) for rank in range(3)]
    assert sorted(id(item) for share in shares for item in share) == sorted(map(id, batch))
    assert [len(share) for share in shares] == [3, 2, 2]
    assert Processes(2, 3).share(batch[:2]) == []


# --- stop, resume, drift ----------------------------------------------------------------------------------------------


def test_a_signal_to_one_stops_all_after_the_same_step_and_the_resumed_run_is_the_uninterrupted_one(
    together: Any, said: dict[str, Any]
) -> None:
    assert re.search(r"stopped by the user after step 3 of 8: .*the state after step 3 is kept", said["stopped"])
    whole, resumed = (torch.load(together[0] / f"{name}.pt") for name in ("whole", "stopped"))
    assert all(torch.equal(whole["weights"][name], resumed["weights"][name]) for name in whole["weights"])
    assert resumed["best"] == whole["best"]
    assert resumed["records"] == whole["records"][3:]


def test_a_checkpoint_of_two_processes_is_refused_by_one(together: Any) -> None:
    _, steps = several.drawn(together[0] / "stopped")
    with pytest.raises(TrainingError, match="its world_size is 2, this run's is 1; resume with the same world_size"):
        next(steps)


def test_processes_that_came_apart_are_noticed(said: dict[str, Any]) -> None:
    assert re.search(r"weights of process 1 of 2 differs from process 0", said["apart"])
    assert "recipe of process 1 of 2 differs from process 0 (seed = 2, expected seed = 1)" in said["unlike"]


def test_an_error_in_one_process_ends_all_with_one_line(together: Any) -> None:
    _, status, err = together
    lines = [line for line in err.splitlines() if line.startswith("turret: ")]
    assert lines == ["turret: the table of process 1 is gone: bring it back"]
    assert status == 1


# --- who is there -----------------------------------------------------------------------------------------------------


def test_the_processes_were_there(said: dict[str, Any]) -> None:
    assert (said["size"], said["counted"]) == (2, 2)


def test_one_process_connects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.begin() is distributed.ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.begin() is distributed.ALONE
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("promised", "words"),
    [
        ("2", "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ("two", "WORLD_SIZE is 'two', expected a number"),
        ("0", "WORLD_SIZE is '0', expected a number"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(
    monkeypatch: pytest.MonkeyPatch, promised: str, words: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", promised)
    with pytest.raises(TrainingError, match=re.escape(words)):
        distributed.begin()


def test_a_group_smaller_than_promised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TrainingError, match="WORLD_SIZE is 2, the group has 1 processes and 1 answered"):
            distributed.begin()
    finally:
        dist.destroy_process_group()


# --- the command ------------------------------------------------------------------------------------------------------


def typed(folder: Path, *more: str) -> list[str]:
    settings = ("train.epochs=3", "train.batch_size=5", "train.checkpoint_every=1", "train.dtype=float32")
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["-m", "turret", "train", str(folder / "films.csv"), "--base", str(folder / "bert"), *sets, *more]


@pytest.fixture
def films(tmp_path: Path) -> Path:
    small_models.save_base("bert", tmp_path / "bert")
    rows = [f"{'great film' if row % 2 else 'dull story'} {row},{'good' if row % 2 else 'bad'}" for row in range(40)]
    (tmp_path / "films.csv").write_text("\n".join(["review,sentiment", *rows]) + "\n")
    return tmp_path


@pytest.mark.slow
def test_the_command_by_two_processes_speaks_and_stores_once_and_goes_on_after_ctrl_c(films: Path) -> None:
    versions = []
    for name in ("whole", "stopped"):
        command = typed(films, "--json", "--store", str(films / name))
        if name == "stopped":
            stopped = launch(*command)
            assert stopped.stderr is not None
            while "step 3/" not in (line := stopped.stderr.readline()):
                assert line, "it ended before its third step"
            stopped.send_signal(signal.SIGINT)  # torchrun passes it on to both
            status, out, err = ended(stopped)
            assert status != 0
            assert out == ""
            assert len(re.findall(r"^turret: stopped by the user after step \d+ of", err, re.MULTILINE)) == 1, err
            assert err.count("turret: ") == 1, err
        status, out, err = ended(launch(*command))
        assert status == 0, err
        assert out.count("\n") == 1
        versions.append(json.loads(out))
        runs = [each for each in (films / name / "runs").iterdir() if each.is_dir()]
        assert len(runs) == 1
        assert len((runs[0] / "curve.jsonl").read_text().splitlines()) == versions[-1]["timing"]["steps"]
    assert versions[1]["resumed_from"] >= 3
    assert versions[0]["digest"] == versions[1]["digest"]


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_one_line(films: Path) -> None:
    command = typed(films, "--set", "train.epochs=500", "--store", str(films / "store"))
    launched = launch(*command)
    assert launched.stderr is not None
    while "step " not in (line := launched.stderr.readline()):
        assert line, "it ended before its first step"
    children = psutil.Process(launched.pid).children()
    next(each for each in children if each.environ().get("RANK") == "1").kill()
    status, _, err = ended(launched)
    assert status != 0
    said = re.findall(r"^turret: .*", err, re.MULTILINE)
    assert len(said) == 1, err
    assert said[0].startswith("turret: process 0 of 2 lost the others")


@pytest.mark.slow
def test_a_mistake_by_two_processes_is_one_line(films: Path) -> None:
    for wrong in (["--set", "train.epoch=3"], ["--base", "nowhere"], ["--set", "data.text=nothing"]):
        status, out, err = ended(launch(*typed(films, *wrong, "--store", str(films / "store"))))
        assert status != 0
        assert out == ""
        assert len(re.findall(r"^turret: ", err, re.MULTILINE)) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_a_frozen_base_in_shares_trains_the_adapter_that_a_whole_one_trains(tmp_path: Path, kind: str) -> None:
    status, _, err = ended(launch(sharded.__file__, str(tmp_path / "shares"), kind))
    assert status == 0, err
    sharded.main(tmp_path / "whole", kind)
    shares, whole = (json.loads((tmp_path / name).read_text()) for name in ("shares", "whole"))
    assert shares == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < 0.95 * whole[0]
