"""The tensors of a safetensors file from outside: of known types and plain names, not too many, all of them finite.

A file that is held in memory gives views of it. The library judges every header; one it has passed is known from then
on, to the byte, because adapters of one base and one recipe differ in their numbers alone. Refuses to know what the
tensors are for.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize, safe_open
from torch import Tensor

from turret.errors import BundleError

MAX_HEADER, MAX_TENSORS = 16 * 2**20, 20_000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KNOWN, KNOWN_SIZE = 64, 2**20  # headers that are remembered, and the longest of them
_NAME = re.compile(r"[\x21-\x7e]{1,500}")

Content = NDArray[np.uint8]  # a whole file


@dataclass(frozen=True)
class _Floats:
    """Where a file of nothing but float32 has them: one behind the other, with nothing between."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    counts: tuple[int, ...]


_known: dict[bytes, _Floats] = {}


def read_tensors(path: Path, content: Content | None) -> dict[str, Tensor]:
    """The file's tensors, from `content` where it has been read already. Raises BundleError in one line."""
    try:
        if content is None:
            read = _in_file(path)
        elif (floats := _floats(content)) is not None:
            return floats
        else:
            read = _in_memory(path, content)
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise BundleError(f"{path.name} is no readable safetensors file ({error}): fetch it again") from None
    for name, tensor in read.items():
        if not all_finite(tensor.float()):  # a float64 may be too large for a float32
            raise BundleError(f"tensor {name!r} in {path.name} holds NaN or infinity: train or export it again")
    return read


def all_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite: a sum that is finite says so in one pass, and quickly."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def _floats(content: Content) -> dict[str, Tensor] | None:
    """Views of a file whose header is known, where the sum of its numbers is finite; None says nothing of it."""
    header = _header(content)
    known = _known.get(header)
    if known is None or len(header) + 4 * sum(known.counts) != len(content):
        return None
    numbers = content[len(header) :].view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not math.isfinite(numbers.sum()):
            return None
    parts = torch.split(torch.from_numpy(numbers), list(known.counts))
    return {name: part.view(shape) for name, part, shape in zip(known.names, parts, known.shapes, strict=True)}


def _in_memory(path: Path, content: Content) -> dict[str, Tensor]:
    _refuse_header(content[:8].tobytes())
    listed: dict[str, dict[str, Any]] = dict(deserialize(content.tobytes()))  # type: ignore[no-untyped-call]
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
    """All that lies before the numbers; nothing where it is too long to be remembered."""
    begin = 8 + _promised(content[:8].tobytes())
    return content[:begin].tobytes() if begin <= KNOWN_SIZE else b""


def _remember(header: bytes) -> None:
    """Of a file that the library has read, so that no byte of it is in none or in two of the tensors: all float32."""
    if not header or len(header) % 4:
        return
    entries = {name: entry for name, entry in json.loads(header[8:]).items() if name != "__metadata__"}
    places = sorted((*entry["data_offsets"], name) for name, entry in entries.items())
    shapes = tuple(torch.Size(entries[name]["shape"]) for _, _, name in places)
    if len(_known) >= KNOWN:
        _known.clear()
    _known[header] = _Floats(tuple(name for *_, name in places), shapes, tuple(each.numel() for each in shapes))


def _in_file(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as raw:
        _refuse_header(raw.read(8))
    with safe_open(path, framework="pt", device="cpu") as file:
        names = list(file.keys())
        _refuse_listed(path, {name: str(file.get_slice(name).get_dtype()) for name in names[: MAX_TENSORS + 1]})
        return {name: file.get_tensor(name) for name in names}


def _promised(start: bytes) -> int:
    """Bytes of the header behind the first eight."""
    return int.from_bytes(start, "little")


def _refuse_header(start: bytes) -> None:
    promised = _promised(start)
    if promised > MAX_HEADER:
        raise ValueError(f"its header would take {promised} bytes, at most {MAX_HEADER} are read")


def _refuse_listed(path: Path, dtypes: dict[str, str]) -> None:
    if len(dtypes) > MAX_TENSORS:
        raise BundleError(f"{path.name} lists {len(dtypes)} tensors: at most {MAX_TENSORS} are read")
    for name, dtype in dtypes.items():
        if not _NAME.fullmatch(name):
            raise BundleError(f"{path.name} names a tensor {visible(name)}: expected plain ASCII names")
        if dtype not in DTYPES:
            raise BundleError(f"tensor {name!r} has dtype {dtype}: expected one of {', '.join(DTYPES)}")


def visible(name: str) -> str:
    """A name from outside in visible ASCII, short enough for one line."""
    return ascii(name)[1:-1][:60]
