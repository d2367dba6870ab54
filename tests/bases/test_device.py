"""One decision on the device: names, GPUs that are there or not, what fits, and why."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import small_models
import torch

from turret import bases
from turret.bases import choose_device, device
from turret.bases.base import dtype_on
from turret.bases.device import Gpu, Machine, default_dtype, this_machine
from turret.bases.meta_model import CONTEXT, parameters_of, room_to_answer, skeleton
from turret.errors import BaseModelError, DeviceError

GB = 1_000_000_000
SMALL = Gpu(torch.device("cuda", 0), "Small", 3 * GB, 8 * GB)
LARGE = Gpu(torch.device("cuda", 1), "Large", 20 * GB, 24 * GB)
TWO = Machine((SMALL, LARGE))
NONE = Machine(missing="torch is built for CUDA and finds no GPU (Found no NVIDIA driver on your system)")


def test_auto_takes_the_emptiest_gpu_if_what_is_needed_fits_and_says_why() -> None:
    chosen = choose_device("auto", lambda at: 6 * GB, TWO)
    assert str(chosen.device) == "cuda:1"
    assert str(chosen) == "cuda:1: cuda:1 (Large, 20.0 GB of 24.0 GB free), about 6.0 GB are needed"
    assert chosen.notes == (f"computes on {chosen}",)


def test_auto_takes_the_cpu_if_nothing_fits_or_nothing_is_there_and_says_why() -> None:
    chosen = choose_device("auto", lambda at: 21 * GB, TWO)
    assert chosen.device.type == "cpu"
    assert "about 21.0 GB are needed, and the GPU with the most free memory is cuda:1 (Large" in chosen.reason
    assert chosen.notes
    chosen = choose_device("auto", None, NONE)
    assert chosen.device.type == "cpu"
    assert "no NVIDIA driver" in chosen.reason
    assert not chosen.notes  # there was nothing to decide


def test_what_is_needed_is_asked_only_of_a_machine_with_a_gpu() -> None:
    def fails(device: torch.device) -> int:
        raise AssertionError("nobody has to know")

    for name, machine in (("auto", NONE), ("cpu", TWO), ("cuda:1", TWO)):
        choose_device(name, fails, machine)


def test_auto_does_not_take_mps_and_tells_how_to_ask_for_it() -> None:
    chosen = choose_device("auto", None, Machine(missing="this torch is built without CUDA", mps=True))
    assert chosen.device.type == "cpu"
    assert "ask for --device mps" in chosen.reason
    assert choose_device("mps", None, Machine(mps=True)).device.type == "mps"


@pytest.mark.parametrize(
    ("name", "machine", "said"),
    [
        ("cuda:7", TWO, r"device cuda:7 is not there: this machine has cuda:0 \(Small\) and cuda:1 \(Large\)"),
        ("cuda", NONE, r"device cuda is not there: torch is built for CUDA and finds no GPU .*no NVIDIA driver.*cpu"),
        ("cuda", Machine(), "device cuda is not there: this machine has no GPU; give --device cpu"),
        ("mps", TWO, "device mps is not there: "),
        ("gpu", TWO, "device 'gpu' is not known: expected auto, cpu, cuda, cuda:1 or mps"),
        ("cuda:-1", TWO, "is not known"),
        ("cuda:1\n", TWO, "is not known"),
        ("", TWO, "is not known"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(name: str, machine: Machine, said: str) -> None:
    with pytest.raises(DeviceError, match=said) as caught:
        choose_device(name, None, machine)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert caught.value.exit_status == 2


def test_cuda_without_a_number_is_the_first_gpu() -> None:
    assert str(choose_device("cuda", None, TWO).device) == "cuda:0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_without_a_gpu_says_what_is_missing() -> None:
    machine = this_machine()
    assert machine.gpus == ()
    assert machine.missing == "this torch is built without CUDA" or "finds no GPU" in machine.missing
    with pytest.raises(DeviceError, match="device cuda:1 is not there"):
        choose_device("cuda:1")


def test_the_precision_follows_the_device_on_which_the_base_computes() -> None:
    cpu = torch.device("cpu")
    assert default_dtype(cpu) == (torch.bfloat16 if bases.native_bfloat16(cpu) else torch.float32)
    assert default_dtype(torch.device("mps")) == torch.float32
    assert dtype_on(cpu, "float16") == torch.float16
    with pytest.raises(DeviceError, match="dtype bfloat16 is not supported on mps"):
        dtype_on(torch.device("mps"), "bfloat16")


def test_a_gpu_without_native_bfloat16_gets_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index else (8, 0))
    bases.native_bfloat16.cache_clear()
    try:
        assert default_dtype(torch.device("cuda", 0)) == torch.bfloat16
        assert default_dtype(torch.device("cuda", 1)) == torch.float16
    finally:
        bases.native_bfloat16.cache_clear()


def test_a_base_says_what_it_needs_before_its_weights_are_read(tmp_path: Path) -> None:
    folder = str(small_models.save_base("llama", tmp_path))
    source = bases.resolve(folder)
    base = bases.load(folder, task="generate", dtype="float32")
    weights = {id(each): each.numel() for each in base.model.parameters()}
    assert parameters_of(source) == sum(weights.values())
    assert room_to_answer(source, torch.bfloat16) == round(1.2 * 2 * sum(weights.values())) + CONTEXT
    bare = skeleton(source, "generate")
    assert all(each.is_meta for each in (*bare.parameters(), *bare.buffers()))
    assert {name: each.shape for name, each in bare.named_parameters()} == {
        name: each.shape for name, each in base.model.named_parameters()
    }


def test_a_loaded_base_is_where_it_was_asked_for_and_auto_says_so(tmp_path: Path) -> None:
    folder = str(small_models.save_base("bert", tmp_path))
    plain = bases.load(folder, task="classify", num_labels=2, dtype="float32")
    auto = bases.load(folder, task="classify", num_labels=2, dtype="float32", device="auto")
    assert plain.model.device.type == "cpu"
    if not torch.cuda.is_available():
        assert auto.model.device.type == "cpu"
        assert auto.notes == plain.notes
        with pytest.raises(DeviceError, match="device cuda is not there"):
            bases.load(folder, task="classify", device="cuda")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = small_models.build("bert", "body")
    with torch.no_grad():
        next(model.parameters()).mul_(1e6)
    model.save_pretrained(tmp_path)
    small_models.tokenizer("bert").save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match="beyond the range of float16"):
        bases.load(str(tmp_path), task="classify", num_labels=2, dtype="float16")


def test_a_full_gpu_is_left_to_others() -> None:
    full = Machine((replace(LARGE, free=1 * GB),))
    assert choose_device("auto", lambda at: 2 * GB, full).device.type == "cpu"


class Driver(ModuleType):
    """NVIDIA's library as `pynvml` shows it, with two GPUs; a third one it does not know."""

    NVMLError = RuntimeError

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid == "GPU-2":
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(free=5 * GB if handle == "GPU-0" else 7 * GB, total=8 * GB)


def test_the_free_memory_of_a_gpu_is_asked_without_starting_cuda_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", Driver("pynvml"))
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": lambda at: SimpleNamespace(uuid=at.index),
        "get_device_name": lambda at: "Small",
        "memory_reserved": lambda at: 0,
        "memory_allocated": lambda at: 0,
        "mem_get_info": lambda at: (touched.append(str(at)), (GB, 8 * GB))[1],
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert [gpu.free for gpu in this_machine().gpus] == [5 * GB, 7 * GB, GB]
    assert touched == ["cuda:2"], "only where the driver cannot say"
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert {gpu.free for gpu in this_machine().gpus} == {GB}
    assert len(touched) == 4, "the control: without the library each is touched"
