"""A sequence of examples that is kept in memory up to `MEMORY` characters, and beyond that in a temporary file.

So a data set larger than memory can be trained on. The file has no name, on systems that allow it, and is deleted with
the sequence. `write_dataset` and `load_dataset` pass a data set to another process, as lines of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, overload

import numpy as np
import numpy.typing as npt

from turret.data.examples import EXAMPLES, Dataset, Example
from turret.errors import DataError

MEMORY = 256_000_000  # characters
SPLITS = ("train", "validation", "test")


class ExampleStore(Sequence[Example]):
    """A sequence that is filled once, in any order, and then read.

    Args:
        size: number of examples.
        memory: characters to keep in memory.
    """

    def __init__(self, size: int, memory: int = MEMORY) -> None:
        self._room = memory
        self._lock = threading.Lock()  # all readers share the position in the file
        self._examples: list[Example | None] = [None] * size
        self._file: IO[bytes] | None = None
        self._places: npt.NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)  # offset and length in the file

    def put(self, place: int, example: Example) -> None:
        """Set the example at an index. Raises DataError if the disk is full."""
        if self._file is None:
            self._examples[place] = example
            self._room -= len(example.input) + len(example.output)
            if self._room < 0:
                self._spill()
        else:
            self._write(self._file, place, example)

    def _spill(self) -> None:
        """Move all examples to a file."""
        examples, self._examples = self._examples, []
        self._places = np.zeros((len(examples), 2), dtype=np.int64)
        with _disk_errors():
            self._file = tempfile.TemporaryFile(prefix="turret-")  # noqa: SIM115 - it lives as long as the sequence
        weakref.finalize(self, self._file.close)
        for place, example in enumerate(examples):
            if example is not None:
                self._write(self._file, place, example)

    def _write(self, file: IO[bytes], place: int, example: Example) -> None:
        record = _record(example).encode()
        with _disk_errors():
            self._places[place] = (file.tell(), len(record))
            file.write(record)

    def done(self) -> ExampleStore:
        """The sequence, ready to be read. Raises DataError if the disk is full."""
        if self._file is not None:
            with _disk_errors():
                self._file.flush()
        return self

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def __len__(self) -> int:
        return len(self._places) if self.on_disk else len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if self._file is None:
            example = self._examples[place]
            assert example is not None, "read before it was filled"
            return example
        offset, length = (int(x) for x in self._places[place])
        with self._lock:
            self._file.seek(offset)
            record = self._file.read(length)
        return _example(record)

    def __iter__(self) -> Iterator[Example]:
        for place in range(len(self)):
            yield self[place]


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the data is larger than memory and {tempfile.gettempdir()} cannot hold it ({error.strerror}): "
            "free some space there, set TMPDIR to another folder, or lower data.train"
        ) from None


def _record(example: Example) -> str:
    """A line of JSON: the name of the example's class and its fields."""
    return json.dumps([type(example).__name__, *dataclasses.astuple(example)])


def _example(record: str | bytes) -> Example:
    """The example of such a line."""
    kind, *fields = json.loads(record)
    return EXAMPLES[kind].from_json(fields)


def write_dataset(dataset: Dataset, path: Path) -> None:
    """Write a data set to a file: a line about it, and a line an example."""
    about = {field.name: getattr(dataset, field.name) for field in dataclasses.fields(dataset)}
    about |= {split: len(about[split]) for split in SPLITS}
    with path.open("w", encoding="ascii") as file:
        file.write(json.dumps(about) + "\n")
        for split in SPLITS:
            for example in getattr(dataset, split):
                file.write(_record(example) + "\n")


def load_dataset(path: Path, memory: int = MEMORY) -> Dataset:
    """The data set in a file of `write_dataset`. memory: characters of examples that are kept in memory."""
    with path.open(encoding="ascii") as file:
        about = json.loads(file.readline())
        for split in SPLITS:
            examples = ExampleStore(about[split], memory)
            for place in range(about[split]):
                examples.put(place, _example(file.readline()))
            about[split] = examples.done()
    return Dataset(**about | {"labels": tuple(about["labels"]), "notes": tuple(about["notes"])})
