"""Preferences: rows, losses against formulas and PEFT's model, their reference, no dropout."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import small_models
import tiny_training as tiny
import torch
from small_tables import load
from torch.nn import functional as F

from turret import adapters
from turret.data import Preferred, Prompt, Turn
from turret.errors import AdapterError, DataError, RecipeError
from turret.methods import Full, LoRA
from turret.recipe import Recipe, Task
from turret.tasks import make_task, task_from_spec
from turret.tasks.preference import Preference
from turret.train.adamw import AdamW
from turret.train.batches import EncodedRows, encode, micro_batches
from turret.train.evaluation import evaluate
from turret.train.losses import compare_answers, eval_mode, loss_of, mount_reference
from turret.train.slot import LocalSlot
from turret.workspace import Workspace

ROWS = [
    Preferred((Turn("user", "a quick fox"),), "a great film", "dull"),
    Preferred((Turn("user", "the bank"), Turn("assistant", "lazy"), Turn("user", "a story")), "a lazy dog", "great"),
    Preferred((Turn("system", "be good"), Turn("user", "quick")), "a", "a boring story about the bank"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def task_on(base: Any, **settings: Any) -> Preference:
    known = Task(kind="preference", **settings)
    data: Any = type("Data", (), {"kind": "preference", "labels": (), "train": ROWS, "columns": {}})()
    made = make_task(known, data, base.tokenizer, "decoder")
    assert isinstance(made, Preference)
    return made


def attached(dropout: float = 0.3) -> Any:
    base = tiny.base("llama", "generate")
    method = LoRA(r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False)
    adapters.attach(base.model, method, generator=torch.Generator().manual_seed(0))
    base.model.train()
    return base


def log_probabilities(model: Any, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Of the target's tokens after the source, by a model of transformers or PEFT."""
    ids = torch.cat([source, target])[None]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    every = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return every[-len(target) :]


# --- tables ----------------------------------------------------------------------------------------------------------


def test_columns_of_texts_and_of_turns_are_read_alike(tmp_path: Path) -> None:
    texts = [{"system": "be good", "prompt": f"q {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]
    turns = [
        {
            "prompt": [{"role": "system", "content": "be good"}, {"role": "user", "content": f"q {i}"}],
            "chosen": [{"role": "assistant", "content": f"yes {i}"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for i in range(12)
    ]
    whole = [
        {**each, "chosen": each["prompt"] + each["chosen"], "rejected": each["prompt"] + each["rejected"]}
        for each in turns
    ]
    found = [load(write(tmp_path / f"{n}.jsonl", rows)) for n, rows in enumerate((texts, turns, whole))]
    assert [each.kind for each in found] == ["preference"] * 3
    assert found[0].columns == {"system": "system", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    assert found[0].digest == found[1].digest == found[2].digest
    assert found[0].train[0].asked.turns[0] == Turn("system", "be good")


def test_a_list_with_several_answers_is_one_line(tmp_path: Path) -> None:
    two = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": f"q {i}", "chosen": two, "rejected": "no"} for i in range(12)]
    with pytest.raises(
        DataError, match=r"line 1, column 'chosen': expected one answer of the assistant, found 2 turns"
    ):
        load(write(tmp_path / "a.jsonl", rows))


def test_an_example_survives_a_file_and_a_task_its_spec() -> None:
    base = tiny.base("llama", "generate")
    task = task_on(base, beta=0.3, loss="orpo")
    again = task_from_spec(json.loads(json.dumps(task.spec())), base.tokenizer)
    assert again.spec() == task.spec()
    assert (again.objective, again.beta) == ("orpo", 0.3)
    rows = EncodedRows(task, ROWS)
    first, kept = rows.take(range(3)), rows.take(range(3))
    for one, other in zip(first, kept, strict=True):
        assert torch.equal(one.rival, other.rival)
        assert one.tokens == 2 * len(one.source) + len(one.target) + len(one.rival)
        assert one.weight == 1
    with pytest.raises(DataError, match=r"leave task\.loss_on out"):
        task_on(base, loss_on="assistant")


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_its_formula_on_pefts_model_with_the_adapter_on_and_off(beta: float) -> None:
    base = attached()
    task = task_on(base, beta=beta)
    adapter = adapters.extract(base.model)
    rows = encode(task, ROWS)
    with eval_mode(base.model), torch.no_grad():
        found = float(loss_of(base.model, task, rows))
        compared = compare_answers(base.model, task, rows)
    adapters.detach(base.model)
    other = tiny.base("llama", "generate").model
    wrapped = peft.get_peft_model(
        other,
        peft.LoraConfig(
            r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]
        ),
    ).eval()
    own = {name: each for name, each in wrapped.named_parameters() if "lora_" in name}
    for name, tensor in adapter[0].items():
        stem = name.removesuffix(".weight")
        own[f"{stem}.default.weight"].data.copy_(tensor)
    losses = []
    with torch.no_grad():
        for place, row in enumerate(rows):
            policy = [log_probabilities(wrapped, row.source, each).sum() for each in (row.target, row.rival)]
            with wrapped.disable_adapter():
                bare = [log_probabilities(wrapped, row.source, each).sum() for each in (row.target, row.rival)]
            assert compared.scores[place].tolist() == pytest.approx([float(each) for each in policy], abs=1e-4)
            assert compared.reference[place].tolist() == pytest.approx([float(each) for each in bare], abs=1e-4)
            losses.append(-F.logsigmoid(beta * ((policy[0] - bare[0]) - (policy[1] - bare[1]))))
    assert found == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert abs(found - math.log(2)) > 1e-4, "the control: the adapter changes the loss"


def test_a_stored_version_is_the_reference_as_pefts_second_adapter_is() -> None:
    base, method = attached(), LoRA(r=2, lora_alpha=8, init_lora_weights=False)
    other = tiny.base("llama", "generate")
    adapters.attach(other.model, method, generator=torch.Generator().manual_seed(5))
    second = adapters.Adapter(method, *adapters.extract(other.model)[:2], base.info)
    base = dataclasses.replace(base, reference=adapters.StoredAdapter("helper@3", "sha256:0", second))
    task, rows = task_on(base, reference="helper@3"), encode(task_on(base), ROWS)
    with pytest.raises(AdapterError, match="the reference helper@3 is not in memory"):
        loss_of(base.model, task, rows)
    trained = set(adapters.trainable_parameters(base.model))
    mount_reference(base, base.model)
    assert set(adapters.trainable_parameters(base.model)) == trained, "the reference does not train"
    assert base.model.training
    with eval_mode(base.model), torch.no_grad():
        compared = compare_answers(base.model, task, rows)
        against_base = compare_answers(base.model, task_on(base), rows)
    model = other.model
    with torch.no_grad(), eval_mode(model):
        for place, row in enumerate(rows):
            expected = [float(log_probabilities(model, row.source, each).sum()) for each in (row.target, row.rival)]
            assert compared.reference[place].tolist() == pytest.approx(expected, abs=1e-4)
    assert torch.equal(compared.scores, against_base.scores)
    assert not torch.allclose(compared.reference, against_base.reference, atol=1e-3), "the control: it is another one"


def test_the_reference_of_a_training_of_all_weights_is_on_the_bases_own() -> None:
    base, method = tiny.base("llama", "generate"), LoRA(r=2, lora_alpha=8, init_lora_weights=False)
    adapters.attach(base.model, method, generator=torch.Generator().manual_seed(5))
    second = adapters.Adapter(method, *adapters.extract(base.model)[:2], base.info)
    rows = encode(task_on(base), ROWS)
    with eval_mode(base.model), torch.no_grad():
        expected = compare_answers(base.model, task_on(base), rows).scores
    adapters.detach(base.model)
    adapters.attach(base.model, Full())
    base = dataclasses.replace(base, reference=adapters.StoredAdapter("helper@3", "sha256:0", second))
    mount_reference(base, base.model)
    with torch.no_grad():
        for weight in adapters.trainable_parameters(base.model).values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    with eval_mode(base.model), torch.no_grad():
        found = compare_answers(base.model, task_on(base, reference="helper@3"), rows)
    assert torch.allclose(found.reference, expected, atol=1e-4)
    assert not torch.allclose(found.scores, expected, atol=1e-2), "the control: the trained weights are others"


def test_a_training_that_begins_as_its_reference_begins_at_ln_2() -> None:
    base = attached(dropout=0.0)
    own = adapters.Adapter(LoRA(r=4, lora_alpha=8, lora_dropout=0.0), *adapters.extract(base.model)[:2], base.info)
    base = dataclasses.replace(base, reference=adapters.StoredAdapter("helper@3", "sha256:0", own))
    mount_reference(base, base.model)
    rows = encode(task_on(base), ROWS)
    with eval_mode(base.model), torch.no_grad():
        found = float(loss_of(base.model, task_on(base, reference="helper@3"), rows))
        bare = float(loss_of(base.model, task_on(base), rows))
    assert found == pytest.approx(math.log(2), abs=1e-6)
    assert abs(bare - math.log(2)) > 1e-4, "the control: the bare base is another reference"


def test_orpo_has_no_reference() -> None:
    with pytest.raises(DataError, match=r"orpo compares with nothing: leave task\.reference out"):
        task_on(tiny.base("llama", "generate"), loss="orpo", reference="helper@3")


def test_orpo_is_its_formula() -> None:
    base = attached()
    task = task_on(base, loss="orpo", beta=0.4)
    rows = encode(task, ROWS)
    with eval_mode(base.model), torch.no_grad():
        found = float(loss_of(base.model, task, rows))
        compared = compare_answers(base.model, task, rows)
    assert compared.reference is None
    model, losses, tokens = base.model, [], []
    with eval_mode(model), torch.no_grad():
        for row in rows:
            p, q = (log_probabilities(model, row.source, each).mean().exp() for each in (row.target, row.rival))
            losses.append(-0.4 * F.logsigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
            whole = torch.cat([row.source, row.target])
            tokens.append(-log_probabilities(model, whole[:1], whole[1:]))
    expected = torch.cat(tokens).mean() + torch.stack(losses).mean()
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_the_first_loss_is_ln_2_and_steps_prefer_the_chosen_answers() -> None:
    base = tiny.base("llama", "generate")
    adapters.attach(base.model, LoRA(r=4, lora_dropout=0.5), generator=torch.Generator().manual_seed(0))
    base.model.train()
    task, optimiser = task_on(base), AdamW(adapters.trainable_parameters(base.model))
    rows, losses = encode(task, ROWS), []
    before = evaluate(base.model, task, ROWS)
    from turret.engine.protocol import OptimStep

    slot = LocalSlot(base, task, optimiser, 0, 4096)
    for _ in range(20):
        losses.append(slot.forward_backward(rows))
        slot.optim_step(OptimStep(1e-2, clip=None))
    assert base.model.training
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.1
    metrics, answers = evaluate(base.model, task, ROWS)
    assert metrics["accuracy"] == 1.0
    assert [task.score(task.prediction_of(each), row) for each, row in zip(answers, ROWS, strict=True)] == [1.0] * 3
    assert before[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_dividing_a_batch_changes_nothing_and_there_is_no_dropout(objective: str) -> None:
    """Rows of several lengths: all at once, each alone, and two beside one."""
    gradients, losses, evaluated = [], [], []
    for count, step in ((1, 1), (3, 1), (2, 1), (1, 2)):
        base = attached(dropout=0.5)
        task, optimiser = task_on(base, loss=objective), AdamW(adapters.trainable_parameters(base.model))
        optimiser.steps = step - 1
        rows = encode(task, ROWS)
        most = {1: 4096, 2: rows[0].tokens + rows[1].tokens, 3: 20}[count]
        assert len(micro_batches(rows, most)) == count
        losses.append(LocalSlot(base, task, optimiser, 0, most).forward_backward(rows))
        gradients.append(optimiser.gradients.clone())
        evaluated.append(evaluate(base.model, task, ROWS, most_tokens=most)[0]["loss"])
    assert len({len(row.target) for row in rows}) > 1
    scale = float(gradients[0].abs().max())
    assert evaluated == pytest.approx([losses[0]] * 4, rel=1e-5)
    for place in (1, 2):
        assert losses[place] == pytest.approx(losses[0], rel=1e-5)
        assert torch.allclose(gradients[0], gradients[place], atol=1e-5 * scale)
    assert torch.equal(gradients[0], gradients[3]), "another step has other masks, if there were any"


def test_a_prompt_is_encoded_as_a_chat_of_this_base() -> None:
    base = tiny.base("llama", "generate")
    task = task_on(base)
    (row,) = encode(task, ROWS[:1])
    (asked,) = task.encode_sources([Prompt(ROWS[0].turns)])
    assert torch.equal(row.source, asked.ids)
    assert small_models.tokenizer("llama").decode(row.target.tolist()).startswith("a great film")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_a_preference_goes_from_a_table_to_answers(loss: str, tmp_path: Path) -> None:
    base = small_models.save_base("llama", tmp_path / "llama")
    rows = [{"prompt": f"a fox {i}", "chosen": "a great film", "rejected": "a dull story"} for i in range(40)]
    source, store = write(tmp_path / "a.jsonl", rows), Workspace(tmp_path / "store")
    train: Any = {"epochs": 4, "lr": 1e-2, "batch_size": 4}
    result = store.train(store_recipe(base, source, loss, train))
    assert result.timing["proof_seconds"] > 0
    assert result.metrics["test"]["accuracy"] == 1.0
    version = store.resolve("better")
    assert (version.task["kind"], version.task["objective"]) == ("preference", loss)
    found = store.evaluate("better", str(source))
    assert set(found.metrics) == {"accuracy", "margin", "loss"}
    assert found.metrics["margin"] == pytest.approx(result.metrics["test"]["margin"], rel=0.2)
    (answer,) = store.predict("better", ["a fox 3"])
    assert set(answer) == {"text", "finish_reason", "tokens"}
    turned = [{"prompt": each["prompt"], "chosen": each["rejected"], "rejected": each["chosen"]} for each in rows]
    worse = store.evaluate("better", str(write(tmp_path / "turned.jsonl", turned)))
    assert worse.metrics["accuracy"] < 0.5, "the control: the other way round it is wrong"
    assert worse.details.mistakes
    store.export("better", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    again = Workspace(tmp_path / "again")
    assert again.import_adapter(tmp_path / "peft", "better").digest == version.digest
    compared = store.compare(store_recipe(base, source, loss, train), methods="base,lora", against="lora", seeds=1)
    assert (compared.task, compared.metric) == ("preference", "accuracy")
    row = next(row for row in compared.rows if row.spec == "lora")
    assert row.score.mean == 100.0


def store_recipe(base: Path, source: Path, loss: Any, train: Any) -> Recipe:
    return Recipe(name="better", base=str(base), data=str(source), task={"loss": loss}, train=train)


@pytest.mark.slow
def test_a_preference_is_compared_with_a_stored_version(tmp_path: Path) -> None:
    base = small_models.save_base("llama", tmp_path / "llama")
    rows = [{"prompt": f"a fox {i}", "chosen": "a great film", "rejected": "a dull story"} for i in range(40)]
    source, store = write(tmp_path / "a.jsonl", rows), Workspace(tmp_path / "store")
    turns = [
        [{"role": "user", "content": f"a fox {i}"}, {"role": "assistant", "content": "a lazy dog"}] for i in range(40)
    ]
    chats = write(tmp_path / "chats.jsonl", [{"messages": each} for each in turns])
    helper = store.train(Recipe(name="helper", base=str(base), data=str(chats), train={"epochs": 2, "lr": 1e-2}))
    train: Any = {"epochs": 1, "lr": 1e-2, "batch_size": 4, "init_from": "helper", "dtype": "float32"}
    recipe = store_recipe(base, source, "dpo", train)

    def row(recipe: Recipe) -> Any:
        return next(check for check in store.plan(recipe).plan.checks if check.name == "reference")

    beside = row(recipe)
    assert (beside.level, beside.remedy) == ("warn", 'set task.reference = "helper@1"')
    assert "the bare base, and the training starts from helper@1, so the first loss is not ln 2" in beside.text
    recipe = recipe.with_overrides({"task.reference": "helper"})
    assert (row(recipe).level, row(recipe).text.split(" (")[0]) == ("ok", "helper@1")
    assert "the first loss is ln 2" in row(recipe).text
    result = store.train(recipe)
    version = store.resolve("better")
    assert version.task["reference"] == "helper@1"
    assert version.lineage["reference"] == version.lineage["parent"] == helper.digest
    assert 'reference = "helper@1"' in version.lineage["recipe"]
    assert store.curve(result)[0].loss == pytest.approx(math.log(2), abs=1e-4)

    found = store.evaluate("better", str(source))
    assert found.metrics["margin"] == pytest.approx(result.metrics["test"]["margin"], rel=0.2)
    assert store.predict("better", ["a fox 3"])[0]["text"]
    again = Workspace(tmp_path / "again")
    store.export("better", tmp_path / "peft")
    again.import_adapter(tmp_path / "peft", "better")
    with pytest.raises(AdapterError, match="better@1 learnt by comparing with helper@1, which measuring it needs"):
        again.evaluate("better", str(source))
    assert again.predict("better", ["a fox 3"]), "answering needs no reference"

    other = small_models.save_base("llama", tmp_path / "other", seed=9)
    elsewhere = recipe.with_overrides({"base": str(other), "train.init_from": "none"})
    refused = row(elsewhere)
    assert (refused.level, "helper@1 was trained on another base" in refused.text) == ("refuse", True)
    with pytest.raises(
        RecipeError, match=r"task\.reference = .helper. is not read by the task chat, only by preference"
    ):
        store.plan(Recipe(name="x", base=str(base), data=str(chats), task={"reference": "helper"}))
