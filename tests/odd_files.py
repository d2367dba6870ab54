"""Writes tables that are damaged or odd, each with the reason: `python tests/odd_files.py FOLDER`.

A file is read as it is, or refused with one line whose remedy works: other settings, another name, or a repaired file.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from table_bytes import GERMAN, PLAIN, POLISH, RUSSIAN, csv, excel, jsonl, objects, parquet, rows, zstd

Settings = dict[str, Any]


@dataclass(frozen=True)
class Odd:
    """One odd file.

    Args:
        reason: what is odd.
        said: part of the one-line error; None: it is read as it is.
        note: part of a note, if it is read.
        settings: keys of `[data]` that are given from the start.
        remedy: keys of `[data]` that the error asks for; `multi_label` and `kind` are those of `[task]`.
        renamed: the name that the error asks for.
        repaired: the content that the error asks for.
        final: the error is the last word: the table belongs to a later version.
    """

    name: str
    reason: str
    content: bytes
    said: str | None = None
    note: str | None = None
    settings: Settings = field(default_factory=dict)
    remedy: Settings = field(default_factory=dict)
    renamed: str | None = None
    repaired: bytes | None = None
    final: bool = False


TABLE = csv(PLAIN).encode()
GERMAN_NAMES = {"text": "Kommentar", "label": "Stimmung"}
EXCEL = excel({"Tabelle1": [("text", "label"), *rows(PLAIN)]})
PAIRS = [
    {"premise": f"a dog runs {i}", "hypothesis": "an animal", "label": "yes" if i % 2 else "no"} for i in range(12)
]


def odd_files() -> list[Odd]:
    """All of them."""
    return [
        # --- encodings
        Odd(
            "semicolons-latin1.csv",
            "semicolons, Latin-1 and German headers, as Excel saves it",
            csv(GERMAN, ";", ("Kommentar", "Stimmung")).encode("latin-1"),
            note="cp1252",
            settings=GERMAN_NAMES,
        ),
        Odd("cp1250.csv", "Polish in the old Windows encoding", csv(POLISH).encode("cp1250"), note="cp1250"),
        Odd("cp1251.csv", "Russian in the old Windows encoding", csv(RUSSIAN).encode("cp1251"), note="cp1251"),
        Odd(
            "utf16.csv",
            "UTF-16 with a byte order mark, Excel's `Unicode text`",
            csv(GERMAN, "\t").encode("utf-16"),
            note="UTF-16",
        ),
        Odd("utf16-no-mark.csv", "UTF-16 without a byte order mark", csv(PLAIN).encode("utf-16-le"), note="UTF-16-LE"),
        Odd("utf32.csv", "UTF-32", csv(PLAIN).encode("utf-32"), note="UTF-32"),
        Odd("bom.csv", "UTF-8 with a byte order mark", codecs.BOM_UTF8 + TABLE),
        Odd(
            "stray-byte.csv",
            "UTF-8 with one byte of another encoding",
            csv(GERMAN).encode() + b'"caf\xe9, \xc3\xa4",positiv\n',
            said="not UTF-8 \\(line 14, byte 0xe9",
            remedy={"encoding": "cp1252"},
        ),
        Odd(
            "unknown-encoding.csv",
            "an encoding that does not exist",
            TABLE,
            said="data.encoding 'utf-9' is unknown",
            settings={"encoding": "utf-9"},
            remedy={"encoding": "utf-8"},
        ),
        # --- lines, separators, quotes
        Odd("cr.csv", "line ends of the old Mac", csv(PLAIN, end="\r").encode()),
        Odd("sep.csv", "Excel's line `sep=;` above the header", b"sep=;\n" + csv(PLAIN, ";").encode(), note="';'"),
        Odd("tabs.csv", "tabs in a .csv", csv(PLAIN, "\t").encode(), note=r"'\\t'"),
        Odd("commas.tsv", "commas in a .tsv", TABLE, note="','"),
        Odd("bars.csv", "bars between columns", csv(PLAIN, "|").encode(), note=r"'\|'"),
        Odd(
            "line-breaks.csv",
            "line breaks inside quotes",
            b"text,label\n" + b'"two\nlines %s",good\n"one, line",bad\n' * 6,
        ),
        Odd(
            "trailing-separator.csv",
            "a separator at the end of every line",
            csv(PLAIN, ",").replace("\n", ",\n").encode(),
        ),
        Odd("blank-rows.csv", "rows of separators alone", TABLE + b",\n,\n", note="2 of 14 rows without 'text'"),
        Odd(
            "ragged.csv",
            "a comma in a text without quotes",
            TABLE + b"one, two,good\n",
            said="line 14 has 3 fields",
            repaired=TABLE + b'"one, two",good\n',
        ),
        Odd(
            "ragged-often.csv",
            "many such lines",
            TABLE + b"one, two,good\n" * 3,
            said="and so have 2 more",
            repaired=TABLE,
        ),
        Odd(
            "open-quote.csv",
            "a quote that is never closed",
            TABLE + b'"open,good\n',
            said="opened and never closed",
            repaired=TABLE + b'"open",good\n',
        ),
        Odd(
            "no-header.csv",
            "no line of column names",
            TABLE.split(b"\n", 1)[1],
            said="looks like data",
            remedy={"header": False, "text": "column 1", "label": "column 2"},
        ),
        Odd(
            "twice.csv",
            "two columns of one name",
            TABLE.replace(b"text,label", b"text,text"),
            said=r"the columns are 'text \(1\)', 'text \(2\)'",
            remedy={"text": "text (1)", "label": "text (2)"},
        ),
        Odd("empty.csv", "no bytes", b"", said="is empty", repaired=TABLE),
        Odd("header-only.csv", "no rows", b"text,label\n", said="has columns and no rows", repaired=TABLE),
        # --- columns
        Odd("case.csv", "names in capitals, with blanks around", TABLE.replace(b"text,label", b" TEXT , Label ")),
        Odd("case-named.csv", "a column named in another case", TABLE, settings={"text": "TEXT", "label": "Label "}),
        Odd(
            "misspelt.csv",
            "a misspelt column",
            TABLE,
            said="did you mean 'text'",
            settings={"text": "txt"},
            remedy={"text": "text"},
        ),
        Odd(
            "misspelt-twice.csv",
            "two misspelt columns, told at once",
            TABLE,
            said="no columns 'txt', 'lable'",
            settings={"text": "txt", "label": "lable"},
            remedy={"text": "text", "label": "label"},
        ),
        Odd(
            "foreign-names.csv",
            "names in another language",
            TABLE.replace(b"text,label", b"Nachricht,Urteil"),
            said="--text, --label",
            remedy={"text": "Nachricht", "label": "Urteil"},
        ),
        Odd(
            "two-tasks.jsonl",
            "columns that fit two tasks",
            jsonl([{**each, "summary": "s"} for each in objects()]),
            said="set task.kind",
            remedy={"kind": "classify"},
        ),
        # --- labels
        Odd(
            "mixed-case.csv",
            "labels in several spellings",
            TABLE + b"x,Good\ny,BAD\n",
            said="data.normalize_labels = true",
            remedy={"normalize_labels": True},
        ),
        Odd("blanks.csv", "blanks around labels", TABLE + b"x, good \n"),
        Odd(
            "joined.csv",
            "several labels in a cell",
            TABLE + b"x,good|bad\ny,bad|good\n",
            said='data.separator = "|" and task.multi_label',
            remedy={"separator": "|", "multi_label": True},
        ),
        Odd(
            "joined-on-purpose.csv",
            "the same, meant as classes",
            TABLE + b"x,good|bad\ny,good|bad\n",
            said='data.separator = "" to take',
            remedy={"separator": ""},
        ),
        Odd(
            "lists.jsonl",
            "labels that are lists",
            jsonl(objects([("a", ["x"]), ("b", ["x", "y"])])),
            said="set task.multi_label = true \\(6 such rows\\)",
            remedy={"multi_label": True},
        ),
        Odd(
            "fractions.csv",
            "numbers with decimal commas for classes",
            b"text;label\n" + b"".join(b"t %d;%d,5\n" % (i, i % 3) for i in range(12)),
            said="is a fraction",
            repaired=b"text;label\n" + b"".join(b"t %d;%d,0\n" % (i, i % 3) for i in range(12)),
        ),
        Odd(
            "one-class.csv", "one class only", TABLE.replace(b"bad", b"good"), said="one class, 'good'", repaired=TABLE
        ),
        Odd(
            "texts-as-labels.csv",
            "a column of texts named as the labels",
            b"text,label\n" + b"".join(b"t %d,opinion %d\n" % (i, i) for i in range(300)),
            said="300 different labels",
            repaired=TABLE,
        ),
        Odd("nul.csv", "NUL characters in a text", TABLE + b"a\0b,good\n", note="NUL characters"),
        # --- JSON
        Odd("list.jsonl", "one JSON list in a .jsonl", json.dumps(objects()).encode(), note="one JSON list"),
        Odd("lines.json", "an object on every line in a .json", jsonl(objects()), note="an object on every line"),
        Odd(
            "wrapped.json",
            "the rows inside an object",
            json.dumps({"version": 1, "data": objects()}).encode(),
            note="the list 'data'",
        ),
        Odd(
            "columns.json",
            "an object of columns",
            json.dumps({key: [each[key] for each in objects()] for key in ("text", "label")}).encode(),
            note="columns",
        ),
        Odd(
            "pandas.json",
            "what pandas writes by default",
            json.dumps(
                {key: {str(i): each[key] for i, each in enumerate(objects())} for key in ("text", "label")}
            ).encode(),
            note="columns",
        ),
        Odd(
            "broken.jsonl",
            "a line that is cut off",
            jsonl(objects()) + b'{"text": "x',
            said="line 13 is not JSON",
            repaired=jsonl(objects()),
        ),
        Odd(
            "comma.json",
            "a comma too many",
            json.dumps(objects()).encode()[:-1] + b",]",
            said="is not JSON at line 1",
            repaired=json.dumps(objects()).encode(),
        ),
        # --- Excel and compression
        Odd(
            "title.xlsx",
            "lines above the table",
            excel({"Daten": [("Report 2024",), (), ("text", "label"), *rows(PLAIN)]}),
        ),
        Odd(
            "errors.xlsx",
            "#N/A and empty cells",
            excel({"Daten": [("text", "label"), *rows(PLAIN), ("x", "#N/A"), (None, "good")]}),
            note="without 'label'",
        ),
        Odd(
            "sheets.xlsx",
            "the table on the second sheet",
            excel({"Info": [("Autor", "Datum"), ("me", "today")], "Daten": [("text", "label"), *rows(PLAIN)]}),
            note="the sheet 'Daten' is read, not 'Info'",
        ),
        Odd(
            "no-sheet.xlsx",
            "a sheet that is not there",
            EXCEL,
            said="has no sheet 'Daten': it has 'Tabelle1'",
            settings={"sheet": "Daten"},
            remedy={"sheet": "Tabelle1"},
        ),
        Odd("excel.csv", "an Excel file named .csv", EXCEL, said="name it .xlsx", renamed="excel.xlsx"),
        Odd("csv.xlsx", "a CSV file named .xlsx", TABLE, said="not an .xlsx workbook", renamed="really.csv"),
        Odd(
            "old.xls",
            "an old Excel file",
            b"\xd0\xcf\x11\xe0" + b"\0" * 600,
            said="save it as .xlsx or .csv",
            renamed="new.xlsx",
            repaired=EXCEL,
        ),
        Odd("packed.csv.gz", "gzip", gzip.compress(TABLE)),
        Odd("packed.jsonl.zst", "zstd", zstd(jsonl(objects()))),
        Odd("packed.csv.bz2", "bzip2", bz2.compress(TABLE)),
        Odd("packed.tsv.xz", "xz", lzma.compress(csv(PLAIN, "\t").encode())),
        Odd(
            "cut.csv.gz",
            "gzip that was cut off",
            gzip.compress(TABLE * 50)[:60],
            said="was cut off",
            repaired=gzip.compress(TABLE),
        ),
        Odd("plain.csv.gz", "no gzip at all", TABLE, said="is not .gz data", renamed="plain.csv"),
        Odd(
            "gzip.csv",
            "gzip without its suffix",
            gzip.compress(TABLE),
            said="add .gz to its name",
            renamed="gzip.csv.gz",
        ),
        Odd("parquet.csv", "Parquet named .csv", parquet(), said="name it .parquet", renamed="parquet.parquet"),
        Odd(
            "cut.parquet",
            "Parquet that was cut off",
            parquet()[:-20],
            said="is not Parquet, or broken",
            repaired=parquet(),
        ),
        # --- no tables
        Odd("document.csv", "a PDF named .csv", b"%PDF-1.7\n", said="is a PDF document", repaired=TABLE),
        Odd(
            "page.csv",
            "the page of an error instead of the download",
            b"<!DOCTYPE html><html></html>",
            said="a web page",
            repaired=TABLE,
        ),
        Odd(
            "lfs.csv",
            "a pointer of Git LFS",
            b"version https://git-lfs.github.com/spec/v1\n",
            said="git lfs pull",
            repaired=TABLE,
        ),
        Odd("table.txt", "a table named .txt", TABLE, said="name it .csv or .tsv", renamed="table.csv"),
        # --- two texts in a row
        Odd("pairs.jsonl", "two texts and a label", jsonl(PAIRS), note="guessed: text_pairs, text is column 'premise'"),
        Odd(
            "similar.jsonl",
            "two texts and a number",
            jsonl([{"sentence1": f"a {i}", "sentence2": "b", "score": i / 4} for i in range(12)]),
            note="guessed: regression",
        ),
        Odd(
            "strange.jsonl",
            "two texts whose names are not known, and a label",
            jsonl([{"eins": f"a {i}", "zwei": "b", "label": "xy"[i % 2]} for i in range(12)]),
            settings={"kind": "text_pairs"},
            said="set data.text, data.text_pair and data.label",
            remedy={"text": "eins", "text_pair": "zwei", "label": "label"},
        ),
        # --- tables of tasks with columns of their own
        Odd(
            "tags.jsonl",
            "a tag for each word",
            jsonl([{"tokens": ["Anna", f"a{i}"], "tags": ["B-PER", "O"]} for i in range(12)]),
            note="guessed: token_classification",
        ),
        Odd(
            "preferred.jsonl",
            "answers preferred to others",
            jsonl([{"prompt": f"q {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(12)]),
            note="guessed: preference",
        ),
    ]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for each in odd_files():
        (folder / each.name).write_bytes(each.content)
        print(f"{each.name:28} {each.reason}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
