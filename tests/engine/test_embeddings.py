"""Embeddings of the base and of adapters, in passes with other work, equal transformers and PEFT alone."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from peft_twins import lora_twin
from shelf import TEXTS, Shelf
from small_models import build

from turret.engine import Embedding, SamplingParams
from turret.errors import DataError


def states(model: Any, ids: list[int]) -> torch.Tensor:
    """The hidden states (T, D) of the stack that reads a text, by transformers or PEFT alone."""
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    reads = inner.get_encoder() if inner.config.is_encoder_decoder else inner.base_model
    with torch.no_grad():
        hidden: torch.Tensor = reads(input_ids=torch.tensor([ids]))[0][0]
    return hidden


def pooled(hidden: torch.Tensor, how: str) -> torch.Tensor:
    vector = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[how]
    return vector / vector.norm()


def tokens(shelf: Shelf, text: str) -> list[int]:
    return list(shelf.base().tokenizer(text)["input_ids"])


CASES = [("bert", "classify"), ("modernbert", "classify"), ("distilbert", "classify"), ("llama", "generate"),
         ("gpt2", "generate"), ("t5", "generate"), ("bart", "generate")]  # fmt: skip


@pytest.mark.parametrize(("family", "task"), CASES)
def test_embeddings_in_a_mixed_batch_equal_the_model_alone(family: str, task: str) -> None:
    shelf = Shelf(family, task)
    shelf.put("a", "lora", 1)
    shelf.put("b", "wide", 2)
    alone = {None: build(family, task)}
    alone |= {name: lora_twin(family, task, shelf.adapters[f"{name}@1"]) for name in "ab"}
    with shelf.engine() as engine:
        default = "last" if family in ("llama", "gpt2") else "mean"
        others = [engine.submit(task, text, "a") for text in TEXTS]
        asked = [(name, text, how) for name in (None, "a", "b") for text in TEXTS[:3]
                 for how in (None, "mean", "first", "last")]  # fmt: skip
        tickets = [
            engine.submit("embed", text, name, SamplingParams(embedding=Embedding(how))) for name, text, how in asked
        ]
        for (name, text, how), ticket in zip(asked, tickets, strict=True):
            answer = ticket.result(60)
            ids = tokens(shelf, text)
            assert answer["prompt_tokens"] == len(ids)
            expected = pooled(states(alone[name], ids), how or default)
            torch.testing.assert_close(torch.tensor(answer["embedding"]), expected, atol=1e-5, rtol=1e-5)
        assert all(ticket.result(60) for ticket in others)
        assert engine.stats().passes < len(asked) + len(others)  # they shared passes


def test_an_adapter_moves_the_embedding() -> None:
    shelf = Shelf("bert")
    shelf.put("a", "lora", 1)
    with shelf.engine() as engine:
        own, base = (engine.submit("embed", TEXTS[0], name).result(30)["embedding"] for name in ("a", None))
        assert math.dist(own, base) > 0.05


def test_a_prefix_takes_no_place_in_the_embedding() -> None:
    shelf = Shelf("bert")
    shelf.put("p", "prefix", 3)
    with shelf.engine() as engine:
        one = engine.submit("embed", TEXTS[0], "p", SamplingParams(embedding=Embedding("first"))).result(30)
        whole = engine.submit("embed", TEXTS[0], "p", SamplingParams(embedding=Embedding("mean"))).result(30)
        assert one["prompt_tokens"] == len(tokens(shelf, TEXTS[0]))
        assert math.dist(one["embedding"], whole["embedding"]) > 0.01


def test_a_cut_embedding_is_scaled_again_and_a_raw_one_is_not() -> None:
    shelf = Shelf("bert")
    hidden = states(build("bert", "classify"), tokens(shelf, TEXTS[0])).mean(0)
    with shelf.engine() as engine:

        def ask(how: Embedding) -> torch.Tensor:
            return torch.tensor(
                engine.submit("embed", TEXTS[0], None, SamplingParams(embedding=how)).result(30)["embedding"]
            )

        cut = hidden[:10]
        torch.testing.assert_close(ask(Embedding(dimensions=10)), cut / cut.norm(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ask(Embedding(normalize=False)), hidden, atol=1e-5, rtol=1e-5)
        with pytest.raises(DataError, match="dimensions = 65: a vector of this base has 64 numbers"):
            ask(Embedding(dimensions=65))
    for wrong in ({"pooling": "max"}, {"dimensions": 0}):
        with pytest.raises(DataError, match=next(iter(wrong))):
            Embedding(**wrong)  # type: ignore[arg-type]
