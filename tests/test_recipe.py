"""A recipe is typed, survives a round trip through TOML exactly, and reports every mistake in one line."""

from __future__ import annotations

import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turret.errors import RecipeError
from turret.methods import Full, LoRA, Prefix
from turret.recipe import Data, Recipe, Task, Train, name_from, preset_text, presets, recipe_keys
from turret.tasks import TASKS


def recipe(**parts: Any) -> Recipe:
    return Recipe(**{"base": "b", "data": "reviews.csv", **parts})


# --- TOML ------------------------------------------------------------------------------------------------------------

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
size = st.none() | st.integers(1, 10**6) | st.floats(0.001, 0.999) | st.sampled_from(["train", "dev", "test[0]"])
methods = st.one_of(
    st.builds(
        LoRA,
        r=st.integers(1, 64),
        lora_alpha=st.floats(0.1, 100),
        target_modules=st.none() | st.just("all-linear") | st.lists(text, max_size=3).map(tuple),
        init_lora_weights=st.sampled_from([True, False, "pissa"]),
    ),
    st.builds(Prefix, num_virtual_tokens=st.integers(1, 50), init_text=st.none() | text, encoder=st.booleans()),
    st.just(Full()),
)
recipes = st.builds(
    Recipe,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True),
    base=text.filter(bool),
    seed=st.integers(0, 2**32 - 1),
    data=st.builds(Data, source=text.filter(bool), text=st.none() | text, train=size, validation=size, test=size),
    task=st.builds(
        Task,
        kind=st.sampled_from([None, "classify", "summarize", "generate"]),
        prefix_text=text,
        class_weights=st.none() | st.just("balanced") | st.dictionaries(text, st.floats(1e-6, 1e6), max_size=3),
    ),
    method=methods,
    train=st.builds(
        Train,
        lr=st.none() | st.floats(1e-9, 10),
        warmup=st.integers(0, 100) | st.floats(0, 0.99),
        evaluate=st.sampled_from(["epoch", "never", 50]),
        early_stopping=st.none() | st.integers(1, 9),
    ),
)


@given(recipes)
def test_a_recipe_survives_toml_exactly(made: Recipe) -> None:
    written = made.to_toml()
    back = Recipe.from_toml(written)
    assert back == made
    assert back.to_toml() == written
    assert [type(v) for v in (back.data.train, back.train.warmup)] == [
        type(v) for v in (made.data.train, made.train.warmup)
    ]


def test_defaults_are_written_out_so_that_a_kept_recipe_does_not_change_with_them() -> None:
    written = recipe().to_toml()
    for line in ("batch_size = 8", "lora_alpha = 32.0", "max_tokens = 256", "seed = 42", 'name = "reviews"'):
        assert line in written.splitlines()
    assert not {"lr", "epochs"} & {line.split(" ")[0] for line in written.splitlines()}  # the method's own


def test_a_control_character_in_a_prefix_text_survives() -> None:
    made = recipe(task={"prefix_text": 'a"b\\c\n\t\x00\x7f\u2028é'})
    assert Recipe.from_toml(made.to_toml()) == made


@pytest.mark.parametrize("broken", ["a = ", "[data", "name = 'x'\nname = 'y'", "a = " + "[" * 5000])
def test_what_is_not_toml_is_one_line(broken: str) -> None:
    with pytest.raises(RecipeError, match=r"is not TOML|nested") as caught:
        Recipe.from_toml(broken)
    assert "\n" not in str(caught.value)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_load_reads_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + recipe().to_toml().encode())
    assert Recipe.load(path) == recipe()


def test_load_of_something_that_is_not_there_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read .*book-lora, book-prefix"):
        Recipe.load(tmp_path / "nothing.toml")


def test_load_of_a_file_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(RecipeError, match="it is not UTF-8"):
        Recipe.load(tmp_path / "r.toml")


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('base = "b"\n[data]\nsource = "x"\n[train]\nepoch = 3\n')
    with pytest.raises(RecipeError, match=r"r\.toml: unknown key 'train.epoch': did you mean 'train.epochs'\?"):
        Recipe.load(path)


@pytest.mark.parametrize("name", presets())
def test_a_preset_loads_and_survives_toml(name: str) -> None:
    made = Recipe.load(name)
    assert made.name == name
    assert Recipe.from_toml(made.to_toml()) == made
    assert preset_text(name).startswith("# ")


def test_book_lora_is_the_chapters_run() -> None:
    made = Recipe.load("book-lora")
    assert made.base == "bert-base-uncased"
    assert made.seed == 42
    assert made.data == Data(source="stanfordnlp/imdb", train=2000, test=500)
    assert made.task.max_tokens == 256
    assert made.method == LoRA(r=8, lora_alpha=32, lora_dropout=0.1)
    assert (made.train.batch_size, made.train.lr, made.train.epochs) == (8, 2e-5, 3)


def test_book_prefix_is_the_chapters_run() -> None:
    made = Recipe.load("book-prefix")
    assert made.base == "t5-small"
    assert made.data == Data(source="abisee/cnn_dailymail:3.0.0", train=1000, test=200)
    assert (made.task.prefix_text, made.task.max_tokens, made.task.max_target_tokens) == ("summarize: ", 512, 150)
    assert isinstance(made.method, Prefix)
    assert made.method.num_virtual_tokens == 20
    assert (made.train.batch_size, made.train.lr, made.train.epochs) == (4, 3e-5, 3)


def test_recipes_and_presets_load_without_torch() -> None:
    code = "import sys; from turret.recipe import Recipe; Recipe.load('book-lora'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- in Python -------------------------------------------------------------------------------------------------------


def test_data_may_be_a_path_and_a_method_a_word() -> None:
    made = Recipe(base=Path("folder"), data=Path("a/My Reviews.csv"), method="prefix")  # type: ignore[arg-type]
    assert made.data.source == str(Path("a/My Reviews.csv"))
    assert (made.name, made.base, made.method) == ("my-reviews", "folder", Prefix())


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Reviews 2.csv", "reviews-2"),
        ("stanfordnlp/imdb", "imdb"),
        ("abisee/cnn_dailymail:3.0.0", "cnn_dailymail-3.0.0"),
        ("pypi:aclsum?aspect=challenge", "aclsum"),
        ("../data/imdb/", "imdb"),
        ("C:\\data\\x.parquet", "x"),
        ("..", "adapter"),
        ("日本", "adapter-cf2a"),
        ("çıkış görüşmeleri.xlsx", "cikis-gorusmeleri"),
        ("enquête.csv", "enquete"),
        ("a..b", "a-b"),
    ],
)
def test_a_name_is_made_from_the_source(source: str, name: str) -> None:
    assert name_from(source) == name


@given(st.text(max_size=300))
def test_a_name_made_from_any_source_is_a_name(source: str) -> None:
    assert recipe(name=name_from(source)).name


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"sed": 1}, r"unknown key 'sed': did you mean 'seed'\?"),
        ({"train": {"learning_rate": 1e-3}}, r"did you mean 'train.lr'\?"),
        ({"train": {"batchsize": 1}}, r"did you mean 'train.batch_size'\?"),
        ({"lr": 1e-3}, r"did you mean 'train.lr'\?"),
        (
            {"xyzzy": 1},
            "unknown key 'xyzzy': known are name, base, base_quantization, seed, data, task, method, train, promise$",
        ),
        ({"data": {"source": "x", "lable": "y"}}, r"did you mean 'data.label'\?"),
        ({"method": {"kind": "lora", "alpha": 4}}, r"did you mean 'method.lora_alpha'\?"),
        ({"method": {"kind": "prefix", "r": 4}}, r"belongs to method.kind = \"lora\", this method is \"prefix\""),
        ({"task": {"xyzzy": 1}}, r"unknown key 'task.xyzzy': known in \[task\] are kind, max_tokens"),
        ({"train": {"lr": "fast"}}, "train.lr: expected a number or 'auto', given 'fast'"),
        ({"train": {"lr": 0}}, "train.lr: expected greater than 0 or 'auto', given 0"),
        ({"train": {"lr": float("nan")}}, "train.lr: .*finite"),
        ({"train": {"epochs": 2.5}}, "train.epochs: expected a whole number, given 2.5"),
        ({"train": {"epochs": True}}, "train.epochs: expected a whole number, given True"),
        ({"train": {"evaluate": 0}}, "train.evaluate: expected 'epoch' or 'never' or greater"),
        ({"train": {"keep": "worst"}}, "train.keep: expected 'last' or 'best', given 'worst'"),
        ({"data": {"source": "x", "test": 1.5}}, "data.test: expected a number of at least 1, a fraction between"),
        ({"data": {"source": "x", "train": 0}}, "data.train: expected a number of at least 1"),
        ({"data": {"source": "x", "train": True}}, "data.train: expected a number of at least 1"),
        ({"data": {"source": ""}}, "data.source: .*at least 1 character"),
        ({"data": {}}, "data.source is missing: say where the examples are"),
        ({"data": None}, "data"),
        ({"method": {"r": 8}}, "method.kind: expected lora, prefix, head, full, peft, none given"),
        ({"method": "lara"}, "method.kind: expected lora, prefix, head, full, peft, given 'lara'"),
        ({"method": {"kind": "lora", "r": 0}}, "method.r: expected greater than or equal to 1, given 0"),
        ({"task": {"class_weights": {"a": -1}}}, "task.class_weights: expected greater than 0, given -1"),
        ({"task": {"class_weights": "even"}}, "task.class_weights: expected 'balanced' or"),
        ({"seed": -1}, "seed: expected greater than or equal to 0"),
        ({"train": 3}, "train: expected a table, given 3"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe(**parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a/b", "a\\b", "..", "a..b", "a b", "a" * 101, "ａ", "a\0", "a\n", "%2e%2e", "é"]
)
def test_a_name_that_could_be_a_path_an_option_or_a_look_alike_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="bad adapter name"):
        recipe(name=name)


def test_a_recipe_without_a_base_leaves_it_to_the_task() -> None:
    assert Recipe.from_toml('[data]\nsource = "x"').base == "auto"


def test_settings_of_data_that_are_not_given_leave_the_text_of_a_recipe_as_it_was() -> None:
    keys = ("encoding", "delimiter", "header", "sheet", "separator", "normalize_labels", "drop_duplicates", "group")
    written = recipe().to_toml()
    assert not [key for key in (*keys, "stratify") if f"{key} =" in written]


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(RecipeError, match=r"train.epochs: .*; train.keep: "):
        recipe(train={"epochs": 0, "keep": "x"})


# --- settings that a task does not read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("regression", {"task": {"class_weights": "balanced"}}, 'task.class_weights = "balanced" is not read by'),
        ("classify", {"task": {"max_new_tokens": 8}}, "task.max_new_tokens = 8 is not read by the task classify, only"),
        ("score", {"task": {"class_weights": {"a": 2.0}}}, 'task.class_weights = {"a" = 2.0} is not read by'),
        ("questions", {"task": {"levels": ["a", "b"]}}, "only by score: leave it out, or set task.kind"),
        ("rerank", {"task": {"pooling": "mean"}}, 'task.pooling = "mean" is not read by the task rerank, only'),
        ("embedding", {"train": {"head_lr_ratio": 5.0}}, "train.head_lr_ratio = 5.0 is not read by the task embedding"),
        ("generate", {"data": {"source": "x", "separator": ";"}}, 'data.separator = ";" is not read by'),
        ("classify", {"data": {"source": "x", "separator": ";"}}, 'data.separator = ";" is between the labels'),
        ("score", {"data": {"source": "x", "separator": ";"}}, "here each has one: leave data.separator out"),
        ("chat", {"task": {"beta": 0.2}}, "task.beta = 0.2 is not read by the task chat, only by preference"),
        ("summarize", {"task": {"multi_label": True}}, "task.multi_label = true is not"),
    ],
)  # fmt: skip
def test_a_setting_that_the_task_does_not_read_is_one_line(kind: str, parts: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**parts).require_read(kind)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_setting_of_a_task_is_read_by_one_of_them() -> None:
    read = {key for task in TASKS.values() for key in task.settings}
    assert read <= recipe_keys().keys()
    assert {f"task.{name}" for name in Task.model_fields} - read == {"task.kind", "task.max_tokens", "task.prefix_text"}


@pytest.mark.parametrize("kind", TASKS)
def test_defaults_that_are_written_out_are_read_by_every_task(kind: str) -> None:
    Recipe.from_toml(recipe().to_toml()).require_read(kind)


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_only_settings_that_its_task_reads(name: str) -> None:
    made = Recipe.load(name)
    assert made.task.kind is not None
    made.require_read(made.task.kind)


# --- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("train.lr", "2e-5", 2e-5),
        ("train.lr", "1", 1.0),
        ("train.lr", "auto", "auto"),
        ("train.max_steps", "none", None),
        ("train.warmup", "10", 10),
        ("train.warmup", "0.1", 0.1),
        ("train.evaluate", "50", 50),
        ("train.evaluate", "never", "never"),
        ("data.train", "500", 500),
        ("data.test", "0.2", 0.2),
        ("data.test", "dev", "dev"),
        ("data", "other.csv", Data(source="other.csv")),
        ("data.source", "7", "7"),
        ("data.text", "[body]", "[body]"),
        ("name", "123", "123"),
        ("task.multi_label", "true", True),
        ("task.prefix_text", "summarize: ", "summarize: "),
        ("task.prefix_text", '"quoted "', "quoted "),
        ("task.class_weights", "balanced", "balanced"),
        ("task.class_weights", "{a = 1, b = 2.5}", {"a": 1.0, "b": 2.5}),
        ("method.r", "4", 4),
        ("method.target_modules", "all-linear", "all-linear"),
        ("method.target_modules", "q,v", ("q", "v")),
        ("method.target_modules", "q_proj", ("q_proj",)),
        ("method.target_modules", '["q"]', ("q",)),
        ("method.init_lora_weights", "pissa", "pissa"),
        ("method.init_lora_weights", "false", False),
    ],
)
def test_an_override_takes_the_type_of_its_key(key: str, given: str, value: Any) -> None:
    changed: Any = recipe().with_overrides({key: given})
    assert Recipe.from_toml(changed.to_toml()) == changed
    for part in key.split("."):
        changed = getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


def test_no_overrides_change_nothing() -> None:
    assert recipe().with_overrides({}) == recipe()


def test_a_class_with_dots_in_its_name_gets_a_weight() -> None:
    made = recipe(task={"class_weights": {"x": 1}}).with_overrides({"task.class_weights.a.b": "2"})
    assert made.task.class_weights == {"x": 1.0, "a.b": 2.0}


def test_another_kind_of_method_starts_from_its_own_defaults() -> None:
    made = recipe(method=LoRA(r=3)).with_overrides({"method.num_virtual_tokens": "7", "method": "prefix"})
    assert made.method == Prefix(num_virtual_tokens=7)


def test_the_same_kind_of_method_keeps_its_settings() -> None:
    assert recipe(method=LoRA(r=3)).with_overrides({"method.kind": "lora"}).method == LoRA(r=3)


@pytest.mark.parametrize(
    ("key", "given", "said"),
    [
        ("lr", "1", r"did you mean 'train.lr'\?"),
        ("train.lrr", "1", r"did you mean 'train.lr'\?"),
        ("train.lr", "fast", "train.lr: expected a number or 'auto', given 'fast'"),
        ("train.lr", "-1", "train.lr: expected greater than 0 or 'auto', given -1"),
        ("train.epochs", "2.5", "train.epochs: expected a whole number"),
        ("data.test", "1.2", "data.test: expected a number of at least 1, a fraction"),
        ("task.multi_label", "yes", "task.multi_label: expected true or false, given 'yes'"),
        ("method.num_virtual_tokens", "7", 'belongs to method.kind = "prefix"'),
        ("method", "lara", "method.kind: expected lora, prefix, head, full, peft, given 'lara'"),
        ("task.class_weights.a", "x", "task.class_weights.a: expected a number"),
        ("train", "x", "unknown key 'train'"),
        ("nothing.at.all", "x", "unknown key 'nothing.at.all'"),
        ("", "x", "unknown key ''"),
        ("name", "../x", "bad adapter name"),
        ("base", "", "base: .*at least 1 character"),
    ],
)
def test_a_wrong_override_is_one_line(key: str, given: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        recipe().with_overrides({key: given})
    assert "\n" not in str(caught.value)


@given(st.sampled_from(sorted(recipe_keys())), st.text(string.printable, max_size=12))
def test_any_override_of_any_key_is_applied_or_is_one_line(key: str, given_text: str) -> None:
    said = ""
    changed = recipe()
    try:
        changed = changed.with_overrides({key: given_text})
    except RecipeError as error:
        said = str(error)
    assert "\n" not in said
    assert Recipe.from_toml(changed.to_toml()) == changed


COSTLY = {  # each with what is wrong with it
    "a key of many parts": ("a" + ".a" * 20_000 + " = 1", "20001 parts"),
    "a quoted key of many parts": ('"a"' + ' . "a"' * 16_000 + " = 1", "16001 parts"),
    "a table of many parts": ("[" + "a." * 40_000 + "a]", "40001 parts"),
    "many tables": ("[a.b]\n" * 9000, "keys and tables"),
    "many keys": ("a = 1\n" * 9000, "9000 keys"),
    "nested lists": ("a = " + "[" * 50_000, "nested 50000 deep"),
    "nested tables": ("a = {" * 900, "nested 900 deep"),
    "characters": ("#" * 100_001, "100001 characters"),
    "quotes that nobody closes": ('\\"' * 50_000, "is not TOML"),
    "long quotes that nobody closes": ('\\"""' * 25_000, "is not TOML"),
    "long apostrophes that nobody closes": ("\na''" * 25_000, "is not TOML"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_recipe_that_is_costly_to_read_is_refused_before_it_is_read(name) -> None:
    text, why = COSTLY[name]
    started = time.perf_counter()
    with pytest.raises(RecipeError, match=why) as refused:
        Recipe.from_toml(text)
    assert len(str(refused.value)) < 300
    assert time.perf_counter() - started < 1  # tomllib takes 13 s for a key of 20,000 parts


def test_dots_and_brackets_in_strings_and_comments_are_none() -> None:
    many = "a.b." * 20 + "[" * 40 + "{" * 40 + "=" * 1001
    for quoted in (
        f'"{many}"',
        f"'{many}'",
        f'"""{many}\n"{many}"""',
        f"'''{many}\n'{many}'''",
        f'"\\"{many}"',
        f"1 # {many}",
    ):
        with pytest.raises(RecipeError, match="unknown key"):  # it was read
            Recipe.from_toml(f"x = {quoted}")


def test_steps_in_8_bits_which_were_removed_are_refused_and_their_absence_is_read() -> None:
    plain = 'name = "a"\nbase = "b"\n\n[data]\nsource = "x.csv"\n\n[train]\nepochs = 2\n'
    assert Recipe.from_toml(plain + "int8 = false\n") == Recipe.from_toml(plain)
    with pytest.raises(RecipeError, match=r"train\.int8: steps in 8 bits were removed, .*train\.dtype to bfloat16"):
        Recipe.from_toml(plain + "int8 = true\n")
    with pytest.raises(RecipeError, match=r"train\.int8: steps in 8 bits were removed"):
        Recipe.from_toml(plain).with_overrides({"train.int8": "true"})
