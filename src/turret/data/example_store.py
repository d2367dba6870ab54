"""A sequence of examples that stays in memory while it is small and lies in a temporary file when it is not.

So a data set larger than memory can be trained on: at most `MEMORY` characters are held, whatever its size.
The file has no name in the file system (where the system allows) and goes with it.
"""

from __future__ import annotations

import json
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from turret.data.examples import Example, Labelled, Pair
from turret.errors import DataError

MEMORY = 256_000_000  # characters


class ExampleStore(Sequence[Example]):
    """Filled once, by place and in any order; then read."""

    def __init__(self, size: int, memory: int = MEMORY) -> None:
        self._room = memory
        self._lock = threading.Lock()  # one place in the file for all who read
        self._held: list[Example | None] = [None] * size
        self._file: Any = None
        self._places: npt.NDArray[np.int64] = np.zeros((0, 2), dtype=np.int64)  # offset and length in the file

    def put(self, place: int, example: Example) -> None:
        if self._file is None:
            self._held[place] = example
            self._room -= len(example.input) + len(example.output)
            if self._room < 0:
                self._spill()
        else:
            self._write(place, example)

    def _spill(self) -> None:
        held, self._held = self._held, []
        self._places = np.zeros((len(held), 2), dtype=np.int64)
        with _disk_errors():
            self._file = tempfile.TemporaryFile(prefix="turret-")  # noqa: SIM115 - it lives as long as the sequence
        weakref.finalize(self, self._file.close)
        for place, example in enumerate(held):
            if example is not None:
                self._write(place, example)

    def _write(self, place: int, example: Example) -> None:
        record = json.dumps(_fields(example)).encode()
        with _disk_errors():
            self._places[place] = (self._file.tell(), len(record))
            self._file.write(record)

    def done(self) -> ExampleStore:
        if self._file is not None:
            with _disk_errors():
                self._file.flush()
        return self

    @property
    def on_disk(self) -> bool:
        return self._file is not None

    def __len__(self) -> int:
        return len(self._places) if self.on_disk else len(self._held)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        if not self.on_disk:
            return self._held[place]
        offset, length = (int(x) for x in self._places[place])
        with self._lock:
            self._file.seek(offset)
            record = self._file.read(length)
        first, second = json.loads(record)
        if isinstance(second, dict):
            return Pair(first, second["target"])
        return Labelled(first, tuple(second) if isinstance(second, list) else second)

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


def _fields(example: Example) -> tuple[str, Any]:
    return example.input, {"target": example.target} if isinstance(example, Pair) else example.label
