"""Read a safetensors file from outside: known dtypes, plain names, a limited number of tensors, all values finite.

The tensors of a file in memory are views of it. The safetensors library checks each header. A header that it accepted
is cached, byte for byte, because adapters with one base and one recipe differ only in their values.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from torch import Tensor

from turret.errors import BundleError

MAX_HEADER, MAX_TENSORS = 16 * 2**20, 20_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CACHED_HEADERS, CACHED_SIZE = 64, 2**20  # number of headers in the cache, and bytes of the longest
_NAME = re.compile(r"[\x21-\x7e]{1,500}")

Content = NDArray[np.uint8]  # a whole file


@dataclass(frozen=True)
class _Layout:
    """The layout of a file that holds only float32 tensors, one after the other without gaps."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    counts: tuple[int, ...]


_layouts: dict[bytes, _Layout] = {}  # by header


class _Entry(TypedDict):
    """A tensor as the library reads it from memory."""

    dtype: str
    shape: list[int]
    data: bytes


def read_tensors(path: Path, content: Content | None) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Args:
        content: the whole file, if it is in memory already.

    Raises:
        BundleError: the file is broken or not accepted.
    """
    try:
        if content is None:
            tensors = _in_file(path)
        elif (views := _cached(content)) is not None:
            return views
        else:
            tensors = _in_memory(path, content)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path.name} is not a readable safetensors file ({error}): fetch it again") from None
    for name, tensor in tensors.items():
        if not all_finite(tensor.float()):  # a float64 may be too large for a float32
            raise BundleError(f"tensor {name!r} in {path.name} holds NaN or infinity: train or export it again")
    return tensors


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum proves it in one fast pass."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _cached(content: Content) -> dict[str, Tensor] | None:
    """Views of a file whose header is cached and whose values have a finite sum; None if either does not hold."""
    header = _header(content)
    layout = _layouts.get(header)
    if layout is None or len(header) + 4 * sum(layout.counts) != len(content):
        return None
    numbers = content[len(header) :].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not math.isfinite(numbers.sum()):
            return None
    parts = torch.split(torch.from_numpy(numbers), list(layout.counts))
    return {name: part.view(shape) for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)}


def _in_memory(path: Path, content: Content) -> dict[str, Tensor]:
    _refuse_header(content[:8].tobytes())
    listed: dict[str, _Entry] = dict(deserialize(content.tobytes()))  # type: ignore[no-untyped-call]  # no types
    dtypes = {name: each["dtype"] for name, each in listed.items()}
    _refuse_listed(path, dtypes)
    if set(dtypes.values()) == {"F32"}:
        _remember(_header(content))
    return {
        name: torch.frombuffer(each["data"], dtype=DTYPES[each["dtype"]]).reshape(each["shape"])
        if each["data"]
        else torch.empty(each["shape"], dtype=DTYPES[each["dtype"]])
        for name, each in listed.items()
    }


def _header(content: Content) -> bytes:
    """The bytes before the values; empty if they are too long for the cache."""
    begin = 8 + _header_size(content[:8].tobytes())
    return content[:begin].tobytes() if begin <= CACHED_SIZE else b""


def _remember(header: bytes) -> None:
    """Cache the layout of a float32 file that the library accepted, so its tensors have no gaps and no overlaps."""
    if not header or len(header) % 4:
        return
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    shapes = tuple(torch.Size(entries[name]["shape"]) for _, _, name in places)
    if len(_layouts) >= CACHED_HEADERS:
        _layouts.clear()
    _layouts[header] = _Layout(tuple(name for *_, name in places), shapes, tuple(each.numel() for each in shapes))


def _in_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as raw:
        _refuse_header(raw.read(8))
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        _refuse_listed(path, {name: str(file.get_slice(name).get_dtype()) for name in names[: MAX_TENSORS + 1]})
        return {name: file.get_tensor(name) for name in names}


def _header_size(start: bytes) -> int:
    """The length of the header after the first eight bytes, which hold it."""
    return int.from_bytes(start, "little")


def _refuse_header(start: bytes) -> None:
    size = _header_size(start)
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size} bytes, and the limit is {MAX_HEADER}")


def _refuse_listed(path: Path, dtypes: dict[str, str]) -> None:
    if len(dtypes) > MAX_TENSORS:
        raise BundleError(f"{path.name} lists {len(dtypes)} tensors: the limit is {MAX_TENSORS}")
    for name, dtype in dtypes.items():
        if not _NAME.fullmatch(name):
            raise BundleError(f"{path.name} names a tensor {visible(name)}: expected plain ASCII names")
        if dtype not in DTYPES:
            raise BundleError(f"tensor {name!r} has dtype {dtype}: expected one of {', '.join(DTYPES)}")


def visible(name: str) -> str:
    """A name from outside in visible ASCII, short enough for one line."""
    return ascii(name)[1:-1][:60]
