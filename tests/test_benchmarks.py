"""Benchmarks keep every run, and a report uses the newest run of its kind per processor."""

from __future__ import annotations

import argparse
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import load

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def record(tmp_path):
    module = load(BENCHMARKS / "record.py", "benchmark_record")
    module.RESULTS = tmp_path
    return module


def run(device: str, job: str, seconds: float) -> dict:
    return {"job": job, "seconds": seconds, "machine": {"device": device}}


def test_a_second_run_of_the_same_on_the_same_processor_is_kept_beside_the_first(record) -> None:
    for seconds in (1.0, 2.0):
        record.keep("speed", "it is fast", run("Zen 5", "short", seconds))
    assert [each["seconds"] for each in record.load("speed")] == [1.0, 2.0]


def test_a_report_takes_the_newest_run_of_each_kind_on_each_processor(record) -> None:
    for each in (run("Zen 5", "short", 1.0), run("Zen 4", "short", 3.0), run("Zen 5", "short", 2.0)):
        record.keep("speed", "it is fast", each)
    newest = record.newest(record.load("speed"), lambda each: each["job"])
    assert [(each["machine"]["device"], each["seconds"]) for each in newest] == [("Zen 5", 2.0), ("Zen 4", 3.0)]


def test_the_interval_of_a_median_holds_it_in_95_percent_of_samples(record) -> None:
    generator = random.Random(0)
    samples = [[generator.expovariate(1) for _ in range(20)] for _ in range(1000)]
    found = [record.median(sample) for sample in samples]
    held = sum(each.low <= math.log(2) <= each.high for each in found)
    assert 945 <= held <= 975  # exactly 95.9% for twenty values
    assert record.median(range(1, 11)) == record.Interval(5.5, 2, 9)
    assert record.median([1.0] * 5).high == math.inf


def test_the_machine_names_the_processor_by_generation_and_the_commit(record) -> None:
    assert record._generation("AuthenticAMD", 26, 2) == "Zen 5"
    assert record._generation("AuthenticAMD", 25, 0x11) == "Zen 4"
    assert record._generation("AuthenticAMD", 25, 0x01) == "Zen 3"
    assert {"device", "threads", "commit", "versions", "at"} <= set(record.machine(1))


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours, as a script does
    return load(BENCHMARKS / "gpu.py", "benchmark_gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_of_gpus_is_one_line_and_status_1(gpu, capsys) -> None:
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("bench-gpu: device cuda is not there: ")


@pytest.mark.slow
def test_the_benchmark_of_gpus_runs_through_on_the_cpu_with_the_same_loss_on_every_side(gpu, capfd) -> None:
    sizes = [
        "--steps",
        "4",
        "--rows",
        "2",
        "--length",
        "32",
        "--tokens",
        "64",
        "--decode",
        "3",
        "--prompt",
        "8",
        "--new",
        "12",
        "--forget",
    ]
    assert gpu.main(["--device", "cpu", "--base", "tiny", "--sides", "turret,hf,vllm", *sizes]) == 0
    said = capfd.readouterr()
    lines = [line for line in said.out.splitlines() if line]
    names = ["turret, trains", "hf, trains", "turret, decodes 3 rows", "hf, decodes 3 rows"]
    assert [line.partition(":")[0] for line in lines] == names, said.err
    for line in lines:
        (rate,) = re.findall(r"([\d,]+) tokens/s", line)
        assert float(rate.replace(",", "")) > 1
    losses = [re.findall(r"first loss ([\d.]+)$", line) for line in lines[:2]]
    assert float(losses[0][0]) == pytest.approx(float(losses[1][0]), rel=gpu.SAME)
    assert "vllm, decodes 3 rows: left out, it needs a GPU" in said.err


def test_a_side_of_the_benchmark_of_gpus_has_its_own_interpreter_and_imports_no_turret(gpu, tmp_path) -> None:
    asked = gpu._options(["--python", f"vllm={sys.executable}", "--python", f"hf={sys.executable}"])
    assert asked.python == {"vllm": sys.executable, "hf": sys.executable}
    for wrong in ("vllm=/no/python", "someone=/bin/sh", "vllm"):
        with pytest.raises(SystemExit):
            gpu._options(["--python", wrong])
    code = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu_side; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"turret", "torch", "transformers", "numpy"} & set(loaded), "only Python's own library at the top"
    source = (BENCHMARKS / "gpu_side.py").read_text()
    rivals = source.partition("# --- others ---")[2]
    assert rivals
    assert "import turret" not in rivals
    assert "from turret" not in rivals
    assert source.count("lora_dropout=0.0") + source.count('"lora_dropout": 0.0') == 3, "no side drops anything"


def test_a_side_whose_first_loss_is_another_is_noticed(gpu) -> None:
    losses = {"turret": 6.21, "hf": 6.20, "unsloth": 6.5}
    assert [gpu.agrees(losses, side) for side in losses] == [True, True, False]


# --- the study of defaults -------------------------------------------------------------------------------------------


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return load(BENCHMARKS / "defaults.py", "benchmark_defaults")


def asked(stage: str, **chosen: list) -> argparse.Namespace:
    return argparse.Namespace(
        **({"stage": stage, "seed": [0], "sets": None, "examples": None, "methods": None} | chosen)
    )


def test_a_study_runs_the_methods_and_sets_that_were_asked_for_and_the_regression_once(defaults) -> None:
    chosen = list(defaults.jobs(asked("confirm", seed=[0, 1], methods=["linear", "lora"], sets=["spam", "pairs"])))
    said = [(seed, job.set, job.examples, job.method[0][1]) for seed, job in chosen]
    assert [each for each in said if each[3] == "linear"] == [
        (0, name, examples, "linear") for examples in (200, 1000) for name in ("spam", "pairs")
    ]
    assert sorted(each[:3] for each in said if each[3] == "lora") == sorted(
        (seed, name, examples) for seed in (0, 1) for examples in (200, 1000) for name in ("spam", "pairs")
    )
    assert len(said) == 12
    assert len(list(defaults.jobs(asked("confirm", seed=list(range(5)))))) == 448


def test_a_study_reads_the_installed_sets_and_names_those_whose_files_are_missing(defaults, tmp_path, capsys) -> None:
    (tmp_path / "banking").mkdir()
    (tmp_path / "banking" / "train.jsonl").write_text('{"text": "a card", "label": "card"}\n', encoding="utf-8")
    lost = defaults.missing(tmp_path)
    assert not lost & {"news", "headlines", "banking"}
    assert {"clinc", "spam", "pairs"} <= lost
    assert "left out, because their data is missing: " in capsys.readouterr().out
    assert {row["label"] for row in defaults.news(tmp_path)} == {
        "business",
        "entertainment",
        "politics",
        "sports",
        "tech",
    }


def test_a_broken_reader_is_no_missing_set(defaults, tmp_path) -> None:
    def broken(folder: Path):
        yield from folder.rows

    defaults.SETS["broken"] = defaults.Set(broken, 32)
    with pytest.raises(AttributeError, match="rows"):
        defaults.missing(tmp_path)


def scored(defaults, name: str, method: str, seed: int, right: str) -> dict:
    key = defaults.Job(name, 200, (("kind", method),)).key(seed)
    found = {"key": key, "stage": "confirm", "set": name, "asked": 200, "seed": seed, "right": right}
    return {**found, "method": {"kind": method}, "code": defaults.code_of(method, 200, name)}


def test_a_study_names_what_is_missed_with_its_seeds_and_counts_what_was_not_measured(defaults) -> None:
    many, few, one_less = "1" * 80 + "0" * 20, "1" * 40 + "0" * 60, "1" * 79 + "0" * 21
    runs = [scored(defaults, name, "linear", 0, many) for name in ("spam", "news")]
    runs += [scored(defaults, "spam", "lora", seed, few) for seed in (0, 3)]
    runs += [scored(defaults, "news", "lora", 0, one_less), scored(defaults, "news", "prefix", 0, many)]
    table = [[each.strip() for each in line.strip("|").split("|")] for line in defaults.missed(runs).splitlines()]
    lost, comparisons, left = table[2:]
    assert lost[:2] == ["spam, 200 examples", "lora not below linear"]
    assert lost[3].startswith("-40.0 [")
    assert lost[4] == "0, 3"
    assert comparisons[2:4] == ["84", "3: 1 below, 1 lower with 0 in the interval, 1 not lower"]
    assert comparisons[4] == "0 (3), 3 (1)"
    assert left[2:4] == ["448", "6"]


# --- the fleet --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fleet():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return load(BENCHMARKS / "fleet.py", "benchmark_fleet")
    finally:
        sys.path.remove(str(BENCHMARKS))


def simulated(fleet, **more):
    names = ("look", "resolve", "load", "aliases of a tenant", "experiments of a tenant", "newest move", "tokens")
    costs = {name: fleet.Cost(5, 0.2, 1.0) for name in (*names, "guards", "no job waits", *fleet.WRITES)}
    small = {"replicas": 4, "tenants": 10, "adapters": 60, "slots": 20, "requests": 40.0, "workers": 1, "jobs": 0.1}
    settings = {**small, "promotes": 0.2, "seconds": 20.0, "warm_up": 5.0, **more}
    return fleet.Simulation(fleet.Fleet(**settings), costs, 20.0, 10.0).run()


def test_the_simulation_of_a_fleet_is_the_same_for_the_same_seed(fleet) -> None:
    assert simulated(fleet, seed=1) == simulated(fleet, seed=1) != simulated(fleet, seed=2)


def test_the_simulated_load_is_what_the_rates_say(fleet) -> None:
    """Four servers look four times a second; without a request nothing is written but promotes and jobs."""
    idle = simulated(fleet, requests=0.0, promotes=0.0, jobs=0.0, workers=0)
    assert idle["by_transaction"]["look"] == pytest.approx(4 * 4 * 5, rel=0.02)
    assert (idle["lock_use"], idle["hit_rate"]) == (0.0, 1.0)
    each = simulated(fleet, design="tenant", requests=0.0, promotes=0.0, jobs=0.0, workers=0)
    assert each["by_transaction"]["experiments of a tenant"] == pytest.approx(4 * 10 * 5, rel=0.02)
    assert simulated(fleet, slots=60, adapters=40, promotes=0.0)["hit_rate"] > simulated(fleet, slots=5)["hit_rate"]


def test_a_full_server_gives_a_request_to_its_neighbour(fleet) -> None:
    ring, loads = fleet.Ring(3, 200), [0, 0, 0]
    own = ring.own("a")
    assert ring.choose("a", loads, 0) == own
    loads[own] = 6
    assert ring.choose("a", loads, 6) != own
    loads[:] = [6, 6, 6]
    assert ring.choose("a", loads, 18) == own, "all have room"
