"""One side of `gpu.py`, in an interpreter of its own: the same examples, loss and optimiser for all.

It imports nothing of turret, except for turret's own side, and at the top only Python's library.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RANK, ALPHA, RATE, CLIP = 16, 32, 1e-4, 1.0
WARMED = 3  # steps that are not timed
Job = dict[str, Any]  # see `gpu.job_of`
Step = Callable[[list[list[int]]], float]  # the ids of a batch's rows -> its mean loss
Decode = Callable[[int], int]  # rows -> tokens written


def batches(job: Job) -> list[list[list[int]]]:
    """Rows of token ids for each step. The last `target` ids of a row are what the loss counts."""
    draw = random.Random(0)
    row = lambda: [draw.randrange(5, job["vocabulary"]) for _ in range(job["length"])]
    return [[row() for _ in range(job["rows"])] for _ in range(job["steps"])]


def prompts(job: Job, rows: int) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(5, job["vocabulary"]) for _ in range(job["prompt"])] for _ in range(rows)]


def dtype_of(job: Job) -> Any:
    import torch

    return torch.bfloat16 if job["device"] != "cpu" else torch.float32


# --- turret -----------------------------------------------------------------------------------------------------------


def turret(job: Job) -> tuple[Step, Decode | None]:
    """By the parts that a training and an engine are made of."""
    import torch

    from turret import adapters, bases
    from turret.adapters.lifecycle import checkpoint_layers
    from turret.data import Dataset
    from turret.engine.protocol import OptimStep
    from turret.methods import LoRA
    from turret.recipe import Task as TaskSettings
    from turret.tasks import make_task
    from turret.train.adamw import AdamW
    from turret.train.batches import EncodedRow
    from turret.train.slot import LocalSlot

    quantization: Any = "nf4" if job["nf4"] else "none"
    base = bases.load(job["base"], task="generate", device=job["device"], quantization=quantization)
    method = LoRA(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    data = Dataset((), (), (), "generate", (), {}, (), 0, "")
    task = make_task(TaskSettings(kind="generate"), data, base.tokenizer, base.family.kind)
    if job["decode"]:
        return (lambda rows: 0.0), _decodes_by_turret(job, base, method, task)
    adapters.attach(base.model, method, generator=torch.Generator().manual_seed(0))
    if job["checkpoint"]:
        checkpoint_layers(base.model)
    base.model.train()
    optimiser, K = AdamW(adapters.trainable_parameters(base.model)), job["target"]
    slot = LocalSlot(base, task, optimiser, 0, job["pass"])

    def step(rows: list[list[int]]) -> float:
        own: Any = None
        items = [EncodedRow(own, torch.tensor(row[:-K]), torch.tensor(row[-K:])) for row in rows]
        return slot.train_step(items, OptimStep(RATE, clip=CLIP))[0]

    return step, None


def _decodes_by_turret(job: Job, base: Any, method: Any, task: Any) -> Decode:
    import torch

    from turret import adapters
    from turret.adapters import Adapter
    from turret.engine.request import GenerationSettings
    from turret.engine.runner import Runner
    from turret.engine.sampler import choose
    from turret.engine.sequence import DecodeStep, Prefill

    random_ones = method.model_copy(update={"init_lora_weights": False})
    adapters.attach(base.model, random_ones, generator=torch.Generator().manual_seed(0))
    tensors = adapters.extract(base.model)
    adapters.detach(base.model)
    runner = Runner(base)
    adapter = Adapter(tensors.method, tensors.tensors, {}, base.info, task={})
    prepare = lambda slot: runner.adapter_pool.prepare(adapter, f"sha256:{slot}", task)
    for slot in range(1, job["adapters"] + 1):
        runner.adapter_pool.mount(slot, prepare(slot))

    def decode(count: int) -> int:
        slots = [1 + row % job["adapters"] for row in range(count)]
        places = [runner.kv_slot(job["prompt"], job["new"], slot) for slot in slots]
        settings = GenerationSettings(job["new"], ())
        rows: Any = [
            type(
                "Row",
                (),
                {"settings": settings, "random": random.Random(0), "new": 0, "counted_tokens": lambda self: []},
            )()
            for _ in slots
        ]
        given = zip(prompts(job, count), slots, places, strict=True)
        scores = runner.run([Prefill(ids, slot, place) for ids, slot, place in given]).vocabulary
        longest = 0.0
        for number in range(job["new"] - 1):
            if number == 8 and job["load"]:
                loading = threading.Thread(target=prepare, args=["new"])
                loading.start()
            began = time.perf_counter()
            steps = zip(choose(scores, rows), slots, places, strict=True)
            scores = runner.run([], [DecodeStep(token or 0, slot, place) for token, slot, place in steps]).vocabulary
            longest = max(longest, time.perf_counter() - began) if number > 4 else 0.0
        for place in places:
            runner.cache.close(place)
        job["longest_step"] = longest
        return count * job["new"]

    return decode


# --- others -----------------------------------------------------------------------------------------------------------


def hf(job: Job, liger: bool = False) -> tuple[Step, Decode | None]:
    """transformers and PEFT, and with liger-kernel's programs in its modules."""
    import peft
    import torch
    import transformers

    if liger:
        from liger_kernel.transformers import AutoLigerKernelForCausalLM as Auto
    else:
        Auto = transformers.AutoModelForCausalLM
    settings: dict[str, Any] = {"dtype": dtype_of(job), "device_map": {"": job["device"]}}
    if job["nf4"]:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype_of(job),
        )
    torch.manual_seed(0)
    model: Any = Auto.from_pretrained(job["base"], local_files_only=True, **settings)
    if job["checkpoint"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear",
        init_lora_weights=not job["decode"],
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    if not job["decode"]:
        return _steps_of(job, model), None
    names = ["default", *(f"adapter{number}" for number in range(1, job["adapters"]))]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def decode(rows: int) -> int:
        ids = torch.tensor(prompts(job, rows), device=job["device"])
        mixed = {"adapter_names": [names[row % len(names)] for row in range(rows)]}
        length = {"max_new_tokens": job["new"], "min_new_tokens": job["new"], "do_sample": False}
        with torch.no_grad():
            written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length, **mixed)
        return int(written[:, job["prompt"] :].numel())

    return (lambda rows: 0.0), decode


def unsloth(job: Job) -> tuple[Step, Decode | None]:
    """Training alone."""
    from unsloth import FastLanguageModel  # first, as it asks

    model, _ = FastLanguageModel.from_pretrained(
        job["base"], max_seq_length=job["length"], load_in_4bit=job["nf4"], dtype=dtype_of(job)
    )
    checkpoint = "unsloth" if job["checkpoint"] else False
    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "use_gradient_checkpointing": checkpoint}
    return _steps_of(job, FastLanguageModel.get_peft_model(model, **settings)), None


def _steps_of(job: Job, model: Any) -> Step:
    """Steps of a PEFT model: its own loss, in passes of as many rows as turret's, and torch's fused AdamW."""
    import torch

    model.train()
    trained = [each for each in model.parameters() if each.requires_grad]
    for each in trained:
        each.data = each.data.float()
    cuda = job["device"] != "cpu"
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=cuda)
    per_pass = max(1, job["pass"] // job["length"])

    def step(rows: list[list[int]]) -> float:
        total, pieces = 0.0, [rows[at : at + per_pass] for at in range(0, len(rows), per_pass)]
        for piece in pieces:
            ids = torch.tensor(piece).to(job["device"])
            labels = ids.clone()
            labels[:, : -job["target"]] = -100
            with torch.autocast("cuda" if cuda else "cpu", torch.bfloat16, enabled=cuda):
                loss = model(input_ids=ids, labels=labels, use_cache=False).loss * (len(piece) / len(rows))
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return total

    return step


def vllm(job: Job) -> tuple[Step, Decode | None]:
    """Decoding alone, with adapters of the same shapes that PEFT has written for it."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=job["base"], enable_lora=True, max_lora_rank=RANK, max_loras=job["adapters"],
        max_model_len=job["prompt"] + job["new"] + 8, skip_tokenizer_init=True, gpu_memory_utilization=0.8,
    )  # fmt: skip
    loras = [LoRARequest(f"a{each}", each + 1, job["written"]) for each in range(job["adapters"])]
    sampling = SamplingParams(temperature=0.0, max_tokens=job["new"], ignore_eos=True, detokenize=False)

    def decode(rows: int) -> int:
        given: Any = [{"prompt_token_ids": ids} for ids in prompts(job, rows)]
        chosen = [loras[row % len(loras)] for row in range(rows)]
        answers = engine.generate(given, sampling, lora_request=chosen, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in answers)

    return (lambda rows: 0.0), decode


SIDES: dict[str, Callable[[Job], tuple[Step, Decode | None]]] = {
    "turret": turret,
    "hf": hf,
    "hf-liger": lambda job: hf(job, liger=True),
    "unsloth": unsloth,
    "vllm": vllm,
}


# --- measuring --------------------------------------------------------------------------------------------------------


def measured(job: Job) -> dict[str, Any]:
    """What one side of a job costs."""
    began = time.perf_counter()
    step, decode = SIDES[job["side"]](job)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began}
    if decode is None:
        losses, seconds, given = [], [], batches(job)
        for rows in given:
            with waiting(job):
                began = time.perf_counter()
                losses.append(step(rows))
            seconds.append(time.perf_counter() - began)
        timed = seconds[min(WARMED, len(seconds) - 1) :]
        found["tokens_per_second"] = job["rows"] * job["length"] / statistics.median(timed)
        found |= {"first_loss": losses[0], "last_loss": losses[-1], "seconds": seconds}
        found["launches"] = launches(job, lambda: step(given[-1]))
    else:
        decode(job["decode"])
        with waiting(job):
            began = time.perf_counter()
            written = decode(job["decode"])
        found["tokens_per_second"] = written / (time.perf_counter() - began)
        found["longest_step"] = job.get("longest_step")
    import torch

    cuda = job["device"] != "cpu"
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda and job["side"] != "vllm" else None
    found["turret_imported"] = "turret" in sys.modules
    found["torch"] = torch.__version__
    found["device"] = torch.cuda.get_device_name() if cuda else "cpu"
    return found


@contextlib.contextmanager
def waiting(job: Job) -> Iterator[None]:
    """Wait for a GPU at both ends of the block."""
    import torch

    for _ in range(2):
        if job["device"] != "cpu":
            torch.cuda.synchronize()
        if _ == 0:
            yield


def launches(job: Job, run: Callable[[], object]) -> int | None:
    """Kernels that a step starts on a GPU."""
    if job["device"] == "cpu":
        return None
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(each.device_type == torch.autograd.DeviceType.CUDA for each in profile.events())


if __name__ == "__main__":
    given: Job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(measured(given)))
