"""Every public name answers a wrong argument with a TurretError of one line, and a right one as its docs say."""

from __future__ import annotations

import asyncio
import inspect
import pydoc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pytest
import small_models
import torch
from torch import nn

import turret
from turret import AsyncClient, LoRA, Prefix, Recipe, TurretError, Workspace
from turret.arguments import check_arguments
from turret.data import Prompt
from turret.errors import AdapterError, BadArgument, DataError, RecipeError, WrongBase
from turret.recipe import Data, Task, Train
from turret.store import Store
from turret.workspace import reading

WRONG = (
    3,
    -1.5,
    None,
    True,
    b"bytes",
    [],
    ["a", 3],
    {},
    {"a": object()},
    object(),
    "",
    "a\0b",
    "../x@y",
    "\n",
)
RIGHT: dict[str, Any] = {  # by the name of an argument: of the right type, though nothing is there
    "recipe": Recipe(name="x", base="no-base", data="nowhere.csv"), "reference": "x@1", "references": ["x@1", "x@2"],
    "first": "x@1", "second": "x@2", "a": "x@1", "b": "x@2", "name": "x", "alias": "production", "run_id": "none",
    "key": "none", "composition": "x@1+x@2", "data": "nowhere.csv", "source": "nowhere.csv", "out": "out.csv",
    "aspects": ["a", "b"], "texts": ["a"], "base": "no-base", "folder": "out", "access": Workspace().store.access,
    "id": "none",
    "hub_id": "a/b", "run": "none", "tenant": "x", "candidates": ["x@1", "x@2"], "unit": "u", "value": 1.0,
    "many": [], "receipt": "r", "scopes": ["infer"], "files": {}, "text": "", "prompt": "a", "messages": [],
    "model": "x", "overrides": {"seed": "1"}, "method": LoRA(), "control": None, "arm": None, "peft_type": "IA3",
    "outcomes": [], "settings": {"method.r": "2,4"}, "labels": ["a", "b"], "questions": [],
}  # fmt: skip


def calls(door: Callable[..., Any], base: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments with one of them wrong, and with one too many or too few."""
    parameters = {
        name: each
        for name, each in inspect.signature(door).parameters.items()
        if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
    }
    needed = {name: base[name] for name, each in parameters.items() if each.default is each.empty}
    yield {**needed, "no_such_argument": 1}
    yield {name: each for name, each in needed.items() if name != next(iter(needed), None)}
    for name in parameters:
        for wrong in WRONG:
            yield {**needed, name: wrong}


def require_plain(door: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """The call succeeds, or raises a TurretError of one line."""
    try:
        found = door(**arguments)
        if inspect.iscoroutine(found):
            asyncio.run(found)
    except TurretError as error:
        said = str(error)
        assert said, arguments
        assert "\n" not in said, said
        assert len(said) < 300, said
    except Exception as error:
        pytest.fail(f"{door.__qualname__}({arguments!r}) raised {type(error).__name__}: {error}")


LEFT_OUT = ("Queue.work", "AsyncClient.close")  # it waits; it ends the client of the others


def doors() -> dict[str, Callable[..., Any]]:
    """Every public call but those that take a model, wait or run for ever."""
    store = Workspace("nowhere")
    client = AsyncClient("http://127.0.0.1:9", retries=0, longest_wait=0.0)
    recipe = RIGHT["recipe"]
    objects: dict[str, object] = {
        "Workspace": store, "Queue": store.queue, "Hub": store.hub, "AccessTokens": store.tokens, "Recipe": recipe,
        "LiveExperiment": store.experiment, "AsyncClient": client,
    }  # fmt: skip
    found: dict[str, Callable[..., Any]] = {
        name: getattr(turret, name)
        for name in turret.__all__
        if inspect.isclass(getattr(turret, name)) and name != "TurretError"
    }
    for title, each in objects.items():
        names = {"load", "from_toml", "with_overrides", "to_toml"} if title == "Recipe" else vars(type(each))
        for name in sorted(names):
            value = getattr(each, name) if not isinstance(getattr(type(each), name), property) else None
            if inspect.isroutine(value) and not name.startswith("_") and f"{title}.{name}" not in LEFT_OUT:
                found[f"{title}.{name}"] = value
    return found


DOORS = doors()


def test_the_walk_meets_every_public_name_and_every_method_of_the_workspace() -> None:
    tested = {"attach", "detach", "load", "save"}  # with a model, below
    assert {name for name in turret.__all__ if not name.startswith("__")} - set(DOORS) - tested == {"TurretError"}
    methods = {name for name, each in vars(Workspace).items() if inspect.isfunction(each) and name[0] != "_"}
    assert {f"Workspace.{name}" for name in methods} <= set(DOORS)
    assert len(DOORS) > 80


@pytest.mark.parametrize("name", [name for name in DOORS if name != "Workspace.engine"])
def test_a_wrong_argument_costs_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    door = DOORS[name]
    for arguments in calls(door, RIGHT | {"path": "store", "url": "http://127.0.0.1:9"}):
        if name in ("LoRA", "Prefix", "Head", "Full", "Peft") and "kind" in arguments:
            continue
        require_plain(door, arguments)


def test_data_where_a_recipe_is_expected_says_how_to_make_one(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "b"}]
    with pytest.raises(BadArgument, match=r"expected a Recipe, .*: make one of data with turret.Recipe\(data=...\)"):
        Workspace(tmp_path).train(rows)  # type: ignore[arg-type]


def test_control_the_walk_notices_a_plain_python_error() -> None:
    def door(recipe: Recipe) -> str:
        return recipe.name

    wrong = next(calls(door, RIGHT))
    with pytest.raises(pytest.fail.Exception, match="TypeError"):
        require_plain(door, wrong)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: LoRA(rank=8), RecipeError, "unknown key 'method.rank': did you mean 'method.r'?"),
        (lambda: LoRA(8), RecipeError, "LoRA takes its settings by name"),
        (lambda: LoRA(lr=1e-3), RecipeError, "did you mean 'train.lr'?"),
        (lambda: LoRA(r=0), RecipeError, "method.r: expected greater than or equal to 1, given 0"),
        (lambda: Prefix(num_virtual_token=8), RecipeError, "did you mean 'method.num_virtual_tokens'?"),
        (lambda: Recipe("reviews.csv"), RecipeError, "Recipe takes its settings by name"),
        (lambda: Workspace().train("reviews.csv"), BadArgument, "recipe: expected a Recipe, given 'reviews.csv'"),
        (lambda: Workspace().train(RIGHT["recipe"], epochs=3), BadArgument, "unexpected keyword argument 'epochs'"),
        (lambda: Workspace().train(RIGHT["recipe"], on_stages=print), BadArgument, "did you mean on_stage?"),
        (lambda: Workspace().merge("a@1", "b"), BadArgument, "references: expected a list of texts, given 'a@1'"),
        (lambda: Workspace().export("a", "b", form="pt"), BadArgument, "expected peft or merged or vllm or gguf"),
        (lambda: Workspace(Store("x"), tenant="a"), BadArgument, "tenant: an open store has one already: leave it out"),
    ],
)
def test_the_error_names_what_was_meant(call: Callable[[], Any], error: type[TurretError], words: str) -> None:
    with pytest.raises(error) as found:
        call()
    assert words in str(found.value)


# --- a model and an adapter -------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> Any:
    return small_models.build("bert", "classify", num_labels=2)


@pytest.mark.parametrize(
    ("name", "method"), [("lora", LoRA()), ("prefix", Prefix()), ("peft:IA3", turret.Peft(peft_type="IA3"))]
)
def test_a_method_is_attached_by_its_name(name: str, method: Any, model: Any, tmp_path: Path) -> None:
    assert turret.attach(model, name) is model
    assert any(each.requires_grad for each in model.parameters())
    other = turret.attach(small_models.build("bert", "classify", num_labels=2), method)
    assert turret.save(model, tmp_path / "a")["method"] == turret.save(other, tmp_path / "b")["method"]


@pytest.mark.parametrize("wrong", ["lore", "peft", "lora:8", "", 3, None, {"kind": "lora"}, "a\nb"])
def test_a_wrong_method_or_model_costs_one_line_and_leaves_the_model_alone(wrong: Any, model: Any) -> None:
    before = list(model.state_dict())
    require_plain(turret.attach, {"model": model, "method": wrong})
    with pytest.raises(TurretError):
        turret.attach(model, wrong)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("wrong", [3, "bert", None, nn.Linear(2, 2), b""])
def test_what_is_no_model_of_transformers_costs_one_line(wrong: Any, tmp_path: Path) -> None:
    for call in (
        lambda: turret.attach(wrong, "lora"),
        lambda: turret.detach(wrong),
        lambda: turret.save(wrong, tmp_path / "x"),
        lambda: turret.load(tmp_path, wrong),
    ):
        with pytest.raises(TurretError) as found:
            call()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("wrong", [3, None, "a\0b", "/proc/1/x", b"x", ["a"]])
def test_a_folder_that_cannot_be_used_costs_one_line(wrong: Any, model: Any) -> None:
    for call in (lambda: turret.load(wrong, model), lambda: turret.save(turret.attach(model, "lora"), wrong)):
        with pytest.raises(TurretError) as found:
            call()
        assert "\n" not in str(found.value)


@torch.no_grad()
def test_a_saved_adapter_is_loaded_answers_the_same_and_is_taken_off_again(tmp_path: Path) -> None:
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    one, other = (small_models.build("bert", "classify", num_labels=2).eval() for _ in range(2))
    bare = other(**batch).logits
    turret.attach(one, LoRA(r=4, init_lora_weights=False), generator=torch.Generator().manual_seed(0))
    turret.save(one, tmp_path / "a")
    assert turret.load(tmp_path / "a", other) is other
    assert torch.equal(other.eval()(**batch).logits, one.eval()(**batch).logits)
    assert not torch.equal(other(**batch).logits, bare)
    assert not any(each.requires_grad for each in other.parameters())
    assert torch.equal(turret.detach(other)(**batch).logits, bare)
    turret.load(tmp_path / "a", other, trainable=True)
    assert torch.equal(other.eval()(**batch).logits, one(**batch).logits)
    assert any(each.requires_grad for each in other.parameters())


def test_an_adapter_of_another_base_is_not_loaded_and_the_model_stays_as_it_is(model: Any, tmp_path: Path) -> None:
    turret.save(turret.attach(model, "lora"), tmp_path / "a")
    other = small_models.build("bert", "classify", num_labels=2, seed=1)
    with pytest.raises(WrongBase):
        turret.load(tmp_path / "a", other)
    with pytest.raises(AdapterError, match="already carries an adapter"):
        turret.load(tmp_path / "a", model)
    three = small_models.build("bert", "classify", num_labels=3)
    before = list(three.state_dict())
    with pytest.raises(AdapterError, match="num_labels"):
        turret.load(tmp_path / "a", three)
    assert list(three.state_dict()) == before


# --- texts to answer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        ["a b", "c"],
        ("a b", "c"),
        pandas.Series(["a b", "c"], index=[7, 9]),
        numpy.array(["a b", "c"]),
        datasets.Dataset.from_dict({"text": ["a b", "c"]})["text"],
        (text for text in ("a b", "c")),
    ],
)
def test_texts_come_in_a_list_a_series_an_array_or_a_column(texts: Any) -> None:
    found = reading.inputs_in(texts)
    assert found == ["a b", "c"]
    assert all(type(each) is str for each in found)


@pytest.mark.parametrize("text", ["cat", numpy.array("cat"), Prompt.of("cat")])
def test_one_text_is_one_input_and_not_its_letters(text: Any) -> None:
    assert len(reading.inputs_in(text)) == 1


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (3, "given a int"),
        ([], "nothing to answer"),
        (["a", None], "text 2 of 2: expected a text, given None"),
        (pandas.Series(["a", float("nan")]), "text 2 of 2: expected a text, given nan"),
        (pandas.DataFrame({"text": ["a"]}), 'such as data["text"]'),
        (datasets.Dataset.from_dict({"text": ["a"]}), 'such as data["text"]'),
        ({"text": "a"}, "given a dict"),
        (b"a", "given a bytes"),
    ],
)
def test_what_holds_no_texts_is_an_error_that_says_what_does(texts: Any, words: str) -> None:
    with pytest.raises(DataError) as found:
        reading.inputs_in(texts)
    assert words in str(found.value)


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [LoRA, Prefix, turret.Peft, Recipe, Data, Task, Train])
def test_help_describes_every_field(model_class: Any) -> None:
    text = pydoc.plain(pydoc.render_doc(model_class)).split("Method resolution order")[0]
    missing = [name for name in model_class.model_fields if name != "kind" and f"  {name}: " not in text]
    assert missing == []


def test_a_number_of_numpy_is_a_number() -> None:
    @check_arguments
    def door(most: int, share: float) -> int:
        return most

    assert door(numpy.int64(3), numpy.float32(0.5)) == 3
    with pytest.raises(BadArgument, match="most: expected a whole number"):
        door(numpy.float64(0.5), 0.5)
