"""Several adapters on one row equal PEFT's sum of them; what cannot be composed is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import byte_level
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from turret.bundles import read_bundle
from turret.engine import SamplingParams
from turret.errors import AdapterError, BadReference, NotFound
from turret.workspace import Workspace

PROMPT = "the film "
TOKENS = 12


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Iterator[SimpleNamespace]:
    folder: Path = tmp_path_factory.mktemp("house")
    base = byte_level.save_base(folder / "base")
    workspace = Workspace(folder / "store")
    byte_level.store_to_compose(workspace, folder, base)
    with workspace.engine(str(base), dtype="float32") as engine:
        yield SimpleNamespace(folder=folder, base=base, engine=engine, workspace=workspace)


def prompt(house) -> torch.Tensor:
    """The prompt as the adapters' template writes it: (1, T)."""
    task = byte_level.Generate(byte_level.tokenizer(), "decoder", max_tokens=32, max_target_tokens=24)
    return task.encode_sources([PROMPT])[0].ids[None]


def greedy(model: Any, ids: torch.Tensor) -> list[int]:
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, num_beams=1,
        eos_token_id=byte_level.tokenizer().eos_token_id, pad_token_id=0,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist()


def asked(house, model: str) -> dict[str, Any]:
    return house.engine.submit("generate", PROMPT, model, SamplingParams(max_tokens=TOKENS, logprobs=3)).result(30)


def logprobs_of(answer: dict[str, Any]) -> list[float]:
    return [each["logprob"] for each in answer["logprobs"][0]["top"]]


@pytest.mark.parametrize("names", ["xy", "yx", "xyz", "yz"])
def test_loras_are_added_as_by_peft(house, names) -> None:
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(house.base), house.folder / names[0], adapter_name=names[0]
    )
    for name in names[1:]:
        model.load_adapter(house.folder / name, name)
    model.base_model.set_adapter(list(names))
    ids = prompt(house)
    answer = asked(house, "+".join(names))
    assert [each["id"] for each in answer["logprobs"]] == greedy(model, ids)[: answer["tokens"]]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    first = answer["logprobs"][0]
    assert first["logprob"] == pytest.approx(float(expected[first["id"]]), abs=1e-4)
    for name in names:
        assert logprobs_of(asked(house, name)) != pytest.approx(logprobs_of(answer)), "each part changes the answer"


def test_a_composition_equals_peft_s_cat(house) -> None:
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(house.base), house.folder / "x", adapter_name="x"
    )
    model.load_adapter(house.folder / "y", "y")
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    model.eval()  # the dropout of a new adapter would be on
    answer = asked(house, "x@1+y@1")
    assert [each["id"] for each in answer["logprobs"]] == greedy(model, prompt(house))[: answer["tokens"]]


def test_a_prefix_stands_beside_loras(house) -> None:
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(house.base), house.folder / "x")
    (prefix,) = read_bundle(house.folder / "p").tensors.values()  # (L, 2, H, P, D)
    ids, cache = prompt(house), DynamicCache()
    for number, (keys, values) in enumerate(prefix.float()):
        cache.update(keys[None], values[None], number)
    length = ids.shape[1] + prefix.shape[3]
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache, attention_mask=torch.ones(1, length)).logits[0, -1]
    expected = logits.log_softmax(-1)
    for names in ("x+p", "p+x"):
        top = asked(house, names)["logprobs"][0]["top"]
        assert [each["id"] for each in top] == expected.topk(3).indices.tolist()
        assert [each["logprob"] for each in top] == pytest.approx(expected.topk(3).values.tolist(), abs=1e-4)
    assert logprobs_of(asked(house, "x")) != pytest.approx([each["logprob"] for each in top])


def test_compositions_share_a_batch_with_their_parts(house) -> None:
    names = ["x", "y", "x+y", "x+p", "y+z+p", None]
    alone = [asked(house, name) for name in names]
    tickets = [
        house.engine.submit("generate", PROMPT, name, SamplingParams(max_tokens=TOKENS, logprobs=3))
        for name in names * 2
    ]
    for ticket, answer in zip(tickets, alone * 2, strict=True):
        assert ticket.result(30)["text"] == answer["text"]
    assert len({answer["text"] for answer in alone}) == len(names)


def test_a_composition_names_the_versions_that_it_is_of(house) -> None:
    receipt = house.engine.submit("generate", PROMPT, "x@production+y", SamplingParams(max_tokens=1)).receipt
    assert f"{receipt.name}@{receipt.number}" == "x@1+y@1"
    other = house.engine.submit("generate", PROMPT, "y+x", SamplingParams(max_tokens=1)).receipt
    assert receipt.digest != other.digest, "the first one gives the template"


def test_what_cannot_be_composed_is_refused(house) -> None:
    for names, kind, said in (
        ("p+q", AdapterError, "2 of the composed adapters have a prefix: expected at most one"),
        ("x+i", AdapterError, "only LoRAs and one prefix can be composed"),
        ("x+x", BadReference, "names an adapter twice"),
        ("+".join(f"n{number}" for number in range(9)), BadReference, "composes 9 adapters: expected at most 8"),
        ("x+nothing", NotFound, "nothing"),
        ("x+", BadReference, "bad adapter name"),
    ):
        with pytest.raises(kind, match=said):
            asked(house, names)
