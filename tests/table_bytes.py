"""Tables as bytes: texts in several languages, written as CSV, JSONL, Excel and Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq

GERMAN = [
    ("Sehr gute Qualität, wir würden wieder bestellen", "positiv"),
    ("Schlechte Verpackung, für uns nicht brauchbar", "negativ"),
]
POLISH = [
    ("Bardzo dobra jakość, polecam wszystkim znajomym, żadnych zastrzeżeń", "pozytywna"),
    ("Źle zapakowane i spóźnione, więcej tu nie zamówię, proszę o zwrot pieniędzy", "negatywna"),
]
RUSSIAN = [
    ("Очень хороший товар, спасибо продавцу за быструю доставку", "хорошо"),
    ("Плохое качество, деньги потрачены зря, никому не советую", "плохо"),
]
PLAIN = [("a great film, seen twice", "good"), ("a dull story, far too long", "bad")]


def rows(pairs: Sequence[tuple[str, str]], count: int = 12) -> list[tuple[str, str]]:
    """Different texts with the labels of `pairs` in turn."""
    return [(f"{pairs[i % len(pairs)][0]} {i}", pairs[i % len(pairs)][1]) for i in range(count)]


def csv(
    pairs: Sequence[tuple[str, str]], mark: str = ",", names: Sequence[str] = ("text", "label"), end: str = "\n"
) -> str:
    lines = [tuple(names), *(tuple(map(_quoted, row)) for row in rows(pairs))]
    return "".join(f"{mark.join(line)}{end}" for line in lines)


def _quoted(cell: str) -> str:
    return f'"{cell}"' if "," in cell else cell


def jsonl(values: Sequence[Any]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in values).encode()


def objects(pairs: Sequence[tuple[str, Any]] = PLAIN) -> list[dict[str, Any]]:
    return [{"text": f"{pairs[i % len(pairs)][0]} {i}", "label": pairs[i % len(pairs)][1]} for i in range(12)]


def excel(sheets: dict[str, Sequence[Sequence[Any]]]) -> bytes:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, lines in sheets.items():
        sheet = book.create_sheet(name)
        for line in lines:
            sheet.append(list(line))
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(objects()), out)
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)
