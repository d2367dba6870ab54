"""Reading any file gives rows or a DataError of one line, never another error."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import math
import time
import tomllib
from collections import deque
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_tables import load

from turret.data.dataset import read_inputs, read_test
from turret.data.source import open_source
from turret.data.table import Table, from_rows
from turret.data.text_file import UNPACKED_BYTES, UNPACKED_TIMES
from turret.errors import LINE, DataError, RecipeError, TurretError
from turret.recipe import Data, Recipe
from turret.tasks import task_of

FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60, deadline=None
)
PREFIX = len("turret: ")
KINDS = ("classify", "summarize", "generate", None)
SUFFIXES = ("csv", "tsv", "jsonl", "json", "parquet", "txt")

NUMBERS = (
    st.integers()
    | st.integers(-(10**600), 10**600)
    | st.sampled_from([-1, 2**63, 2**1024])
    | st.just(5000).map(lambda power: 10**power)
)
FLOATS = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, -0.0])
DATES = st.dates() | st.datetimes() | st.times() | st.timedeltas()
PLAIN = st.none() | st.booleans() | NUMBERS | FLOATS | st.text(max_size=20) | st.text(min_size=1001, max_size=1100)
CELLS = st.recursive(
    PLAIN | DATES | st.binary(max_size=20) | st.just(Decimal("1e999")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
ROWS = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6)
NAMES = (
    st.sampled_from(["text", "label", "document", "prompt"]) | st.text(min_size=1, max_size=80) | st.just("é\n" * 99)
)


def checked(error: TurretError) -> str:
    """The error's text, checked to be one line that is short enough to print."""
    said = str(error)
    assert said.isprintable(), said
    assert len(said) <= LINE - PREFIX, (len(said), said)
    return said


def read(path: Path | str, **more: Any) -> None:
    """Read the table in every way. Only DataError may be raised."""
    for kind in KINDS:
        for many in (False, True):
            try:
                load(path, kind, multi_label=many, **more)
            except TurretError as error:
                checked(error)
        if kind is not None:
            for ask in (read_test, read_inputs):
                try:
                    ask(Data(source=str(path), **more), task_of(kind).schema())
                except TurretError as error:
                    checked(error)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b'{"text": "a", "label": ' + b"9" * 5000 + b"}")
@example(content=b"[" * 100_000)
@example(content=b'{"text":' * 100_000)
@example(content=b"text,label\n" + b'"' * 999)
@example(content=b"PAR1" + b"\xff" * 40 + b"PAR1")
def test_any_bytes_are_a_table_or_one_error(suffix: str, content: bytes, tmp_path: Path) -> None:
    read(put(tmp_path / f"t.{suffix}", content))


@pytest.mark.slow
@FUZZ
@given(first=NAMES, second=NAMES, rows=ROWS)
def test_any_json_is_a_table_or_one_error(first: str, second: str, rows: Any, tmp_path: Path) -> None:
    lines = []
    for a, b in rows:
        with suppress(TypeError, ValueError):
            lines.append(json.dumps({first: a, second: b}))
    read(put(tmp_path / "t.jsonl", "\n".join(lines).encode("utf-8", "surrogatepass")))
    read(put(tmp_path / "t.json", f"[{','.join(lines)}]".encode("utf-8", "surrogatepass")))


PARQUET = st.sampled_from(
    [pa.date64(), pa.date32(), pa.timestamp("us"), pa.timestamp("ns", "UTC"), pa.duration("s"), pa.time64("ns")]
    + [pa.int64(), pa.uint64(), pa.float16(), pa.float64(), pa.decimal128(38), pa.binary(), pa.list_(pa.int64())]
)


@FUZZ
@given(
    kinds=st.tuples(PARQUET, PARQUET),
    names=st.tuples(NAMES, NAMES),
    numbers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
)
@example(kinds=(pa.date64(), pa.date64()), names=("text", "label"), numbers=[2**62])
@example(kinds=(pa.int64(), pa.duration("s")), names=("text", "label"), numbers=[1, 2**62])
def test_any_parquet_is_a_table_or_one_error(kinds: Any, names: Any, numbers: list[int], tmp_path: Path) -> None:
    columns = []
    for kind in kinds:
        bits = pa.array(numbers, pa.int64())
        try:
            columns.append(bits.view(kind))
        except pa.ArrowException:
            columns.append(pa.array([str(number) for number in numbers]))
    out = io.BytesIO()
    try:
        pq.write_table(pa.table(columns, names=list(names)), out)
    except (pa.ArrowException, ValueError):
        return
    read(put(tmp_path / "t.parquet", out.getvalue()))


@FUZZ
@given(at=st.integers(0, 2000), noise=st.binary(min_size=1, max_size=12), cut=st.integers(0, 30))
def test_a_spoilt_parquet_is_a_table_or_one_error(at: int, noise: bytes, cut: int, tmp_path: Path) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", "b", "c"], "label": [1, 2, 1], "more": [[1], [], None]}), out)
    whole = out.getvalue()
    at %= len(whole)
    read(put(tmp_path / "t.parquet", whole[:at] + noise + whole[at + len(noise) : len(whole) - cut]))


# --- cells ------------------------------------------------------------------------------------------------------------


@FUZZ
@given(rows=ROWS, names=st.lists(st.text(max_size=2000), max_size=3))
def test_any_cells_are_examples_or_one_error(rows: Any, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    table = from_rows("t", ("text", "label"), [{"text": a, "label": b} for a, b in rows])
    given_names = Table(table.name, table.columns, table.read, {"label": names}, (), "row")
    for each in (table, given_names):
        with monkeypatch.context() as patch:
            for module in ("source", "dataset"):
                patch.setattr(f"turret.data.{module}.open_source", lambda _source, _form, each=each: {"": each})
            read("t", text="text", label="label")
            read("t", document="text", summary="label")


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        pytest.param(int("7" * 400), None, id="400 digits"),
        pytest.param(int("7" * 1001), "a label of 1001 characters, the limit is 1000: is this the", id="1001 digits"),
        (math.inf, "the label inf is not a whole number: classes are whole numbers or words"),
        ([[1], [2]], r"the label is a list \(\[\[1\], \[2\]\]\): set task.multi_label = true"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_place(cell: Any, said: str | None, tmp_path: Path) -> None:
    rows = [("a", 1), ("b", 2), ("c", cell), ("d", 1), ("e", 2)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    if said is None:  # a class as good as any other
        assert "7" * 400 in load(path, "classify", test=1).labels
        return
    with pytest.raises(DataError, match=rf"^t\.jsonl line 3, column 'label': {said}") as caught:
        load(path, "classify")
    checked(caught.value)


def test_a_date_beyond_pythons_calendar_is_refused_with_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    dates = pa.array([0] * 300 + [2**62], pa.date64())
    pq.write_table(pa.table({"text": ["a"] * 301, "label": dates}), path)
    asked = open_source(str(path))[""]
    with pytest.raises(DataError, match=r"t\.parquet row 301, column 'label': this date.* cannot be read") as caught:
        list(asked.read(["text", "label"]))
    assert "expected text or a label; correct it, or leave the row out" in checked(caught.value)
    assert len(list(asked.read(["text"]))) == 301  # nobody asked for the dates


def test_a_parquet_whose_schema_is_broken_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    raw = path.read_bytes()
    found = set()
    for at in range(len(raw) - 200, len(raw)):
        put(path, raw[:at] + bytes([raw[at] ^ 0x5A]) + raw[at + 1 :])
        try:
            open_source(str(path))
        except DataError as error:
            found.add(checked(error)[:36])
    assert "t.parquet is not Parquet, or broken:" in found


def test_a_key_with_a_dot_and_a_key_within_a_key_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a.b": "x", "a": {"b": "y"}, "label": "z"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"two columns are 'a\.b', once as keys within keys: give each its own name"):
        open_source(str(tmp_path / "a.jsonl"))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "label"]), path)
    with pytest.raises(DataError, match=r"has the column 'text' more than once: give each its own name"):
        open_source(str(path))


# --- recipes ----------------------------------------------------------------------------------------------------------

GOOD = 'base = "b"\n[data]\nsource = "d.csv"\n'
TOML = ("name", "base", "seed", "data", "task", "method", "train", "data.source", "data.test", "task.class_weights")
TOML += ("train.epochs", "train.lr", "train.warmup", "method.r", "method.kind", "method.target_modules", "x" * 10_000)
VALUES = st.sampled_from(["9" * 5000, "0x" + "f" * 9000, "[" * 5000, "{}", "[[1]]", "nan", "1e999", "-0", "1979-05-27"])


@FUZZ
@given(text=st.text(max_size=200) | st.binary(max_size=100).map(lambda raw: raw.decode("latin-1")))
def test_any_text_is_a_recipe_or_one_error(text: str, tmp_path: Path) -> None:
    for each in (text, GOOD + text):
        try:
            Recipe.from_toml(each, where="x" * 10_000)
        except RecipeError as error:
            checked(error)


@FUZZ
@given(key=st.sampled_from(TOML), value=VALUES | st.text(max_size=60).map(json.dumps) | st.integers().map(str))
@example(key="seed", value="9" * 5000)
@example(key="train.epochs", value="0x" + "f" * 9000)
def test_any_value_of_any_key_is_taken_or_one_error(key: str, value: str) -> None:
    for ask in (
        lambda: Recipe.from_toml(f"{key} = {value}\n{GOOD}"),
        lambda: Recipe.from_toml(GOOD).with_overrides({key: value}),
        lambda: Recipe.from_toml(GOOD).with_overrides({"method": "peft", "method.peft_type": "IA3", "method.x": value}),
    ):
        try:
            toml = ask().to_toml()
            assert Recipe.from_toml(toml).to_toml() == toml
        except RecipeError as error:
            checked(error)


def test_a_number_of_5000_digits_is_refused_with_the_files_name(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f"seed = {'9' * 5000}\n{GOOD}")
    with pytest.raises(ValueError, match="4300 digits"):  # what Python says of it
        tomllib.loads(path.read_text())
    with pytest.raises(
        RecipeError, match=r"r\.toml cannot be read: it has a whole number of thousands of digits: a setting has"
    ) as caught:
        Recipe.load(path)
    checked(caught.value)


def test_many_mistakes_are_told_as_far_as_they_fit(tmp_path: Path) -> None:
    wrong = "\n".join(f"{word}{number} = 1" for number in range(30) for word in ("epoch", "batch", "rate"))
    with pytest.raises(RecipeError, match=r"unknown key 'train\.epoch0': .*; and \d+ more") as caught:
        Recipe.from_toml(f"{GOOD}[train]\n{wrong}")
    checked(caught.value)


@pytest.mark.slow
def test_a_table_with_hundreds_of_thousands_of_columns_is_refused_at_once(tmp_path: Path) -> None:
    names = ["text", "label", *(f"c{number}" for number in range(300_000))]
    row = ["a", "b", *["1"] * 300_000]
    (tmp_path / "wide.csv").write_text("\n".join([",".join(names), ",".join(row)]) + "\n")
    (tmp_path / "wide.jsonl").write_text(json.dumps(dict(zip(names, row, strict=True))) + "\n")
    (tmp_path / "wide.json").write_text(json.dumps([dict(zip(names, row, strict=True))]))
    for suffix in ("csv", "jsonl", "json"):
        started = time.perf_counter()
        with pytest.raises(DataError, match="has 300002 columns, expected at most 16384"):
            open_source(str(tmp_path / f"wide.{suffix}"))
        assert time.perf_counter() - started < 15  # counting each name in all of them took more than a minute
    most = ",".join(names[:16_384])
    (tmp_path / "most.csv").write_text(f"{most}\n{','.join(row[:16_384])}\n")
    assert len(open_source(str(tmp_path / "most.csv"))[""].columns) == 16_384
    (tmp_path / "twice.csv").write_text(f"{most.replace('c9,', 'c7,', 1)}\n{','.join(row[:16_384])}\n")
    assert {"c7 (1)", "c7 (2)"} <= set(open_source(str(tmp_path / "twice.csv"))[""].columns)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2", "xz"])
def test_a_decompression_bomb_is_refused_before_it_fills_anything(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.csv.{suffix}"
    piece = (b"a great film " * 700 + b",good\n") * 100
    with packed(path) as file:
        file.write(b"text,label\n")
        for _ in range((UNPACKED_BYTES + (16 << 20)) // len(piece)):
            file.write(piece)
    assert path.stat().st_size < UNPACKED_BYTES / UNPACKED_TIMES
    (table,) = open_source(str(path)).values()
    before, rows = psutil.Process().memory_info().rss, itertools.count()
    with pytest.raises(DataError, match="unpacks to more than 200 times its size"):
        deque(zip(table.read(["text", "label"]), rows, strict=False), maxlen=0)
    assert next(rows) > 20_000
    assert psutil.Process().memory_info().rss - before < UNPACKED_BYTES


def packed(path: Path) -> Any:
    """A compressed file to write to."""
    if path.suffix == ".zst":
        return pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd")
    return {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[path.suffix](path, "wb")


@pytest.mark.slow
def test_a_file_that_is_packed_well_but_small_is_read(tmp_path: Path) -> None:
    for suffix in ("gz", "zst", "bz2", "xz"):
        path = tmp_path / f"a.csv.{suffix}"
        with packed(path) as file:
            file.write(b"text,label\n" + b"a great film,good\n" * 100_000)  # a thousand times smaller
        (table,) = open_source(str(path)).values()
        assert sum(1 for _ in table.read(["text"])) == 100_000
