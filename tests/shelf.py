"""A source of adapters for the engine's tests: in memory, with names, aliases, and ways to go wrong on purpose."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_training
import torch
from adapters_at_hand import METHODS, alone, made
from small_models import tokenizer

from turret.adapters import Adapter, classify_logits
from turret.engine import Engine, Limits, Named
from turret.errors import NotFound
from turret.families import family_of
from turret.methods import Method
from turret.tasks.classify import Classify
from turret.tasks.generate import Summarize

LABELS = ("bad", "good", "odd", "dull", "fine")
TEXTS = ["a great film", "dull and boring", "the market fell", "x", "why not?"]


class Shelf:
    """`name@1` is an adapter; `aliases` name others. What a reference means, and how long a load takes, can change."""

    def __init__(self, family: str, task: Any = "classify") -> None:
        self.family, self.task = family, task
        self.adapters: dict[str, Adapter] = {}
        self.aliases: dict[str, str] = {}
        self.broken: dict[str, BaseException] = {}
        self.gate = threading.Event()  # loads wait for it
        self.gate.set()
        self.loads: list[str] = []

    def spec(self, labels: int = 3, **settings: Any) -> dict[str, Any]:
        words = tokenizer(self.family)
        if words.pad_token_id is None:
            words.pad_token = words.eos_token
        if self.task == "classify":
            return Classify(LABELS[:labels], words, 32, **settings).spec()
        kind = tiny_training.base(self.family, "generate").family.kind
        return Summarize(words, kind, 64, **({"max_target_tokens": 12} | settings)).spec()

    def put(self, name: str, method: Method | str = "lora", seed: int = 1, labels: int = 3, **settings: Any) -> Adapter:
        chosen = METHODS[method] if isinstance(method, str) else method
        adapter = made(self.family, self.task, chosen, seed, labels, self.spec(labels, **settings))
        self.adapters[f"{name}@1"] = adapter
        return adapter

    def resolve(self, reference: str) -> Named:
        key = self.aliases.get(reference, reference if "@" in reference else f"{reference}@1")
        if key not in self.adapters and key not in self.broken:
            raise NotFound(f"no {reference}: the shelf has {', '.join(self.adapters)}")
        name, _, number = key.partition("@")
        return Named(name, int(number), f"sha256:{key}", 1)

    def load(self, named: Named) -> Adapter:
        assert self.gate.wait(30)
        self.loads.append(str(named))
        if str(named) in self.broken:
            raise self.broken[str(named)]
        return self.adapters[str(named)]

    def engine(self, base: Any = None, **limits: Any) -> Engine:
        return Engine(self.base() if base is None else base, self, Limits(**limits))

    def base(self, **changes: Any) -> Any:
        base = tiny_training.base(self.family, self.task, **changes)
        if base.tokenizer.pad_token_id is None:
            base.tokenizer.pad_token = base.tokenizer.eos_token
        assert family_of(base.model.config)
        return base


def reference(shelf: Shelf, name: str, texts: list[str]) -> list[dict[str, Any]]:
    """What the adapter says alone, on a model of its own, text by text."""
    adapter = shelf.adapters[f"{name}@1"]
    task = Classify.from_spec(adapter.task, shelf.base().tokenizer)
    model = alone(shelf.family, shelf.task, adapter, len(task.labels))
    with torch.no_grad():
        return [task.answers(classify_logits(model, [task.encode_sources([text])[0].ids]))[0] for text in texts]


def agree(answers: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer["label"] == wanted["label"]
        assert answer["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
