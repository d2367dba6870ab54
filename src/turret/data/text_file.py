"""Reads text files: decompresses them, finds their encoding, and yields their lines.

- UTF-8 with or without a byte order mark, UTF-16 and UTF-32 are recognised. Bytes that are not UTF-8 are read in the
  encoding that their letters fit best, and a note says which. `data.encoding` overrides this.
- gzip, zstd, bzip2 and xz are decompressed while they are read.
- A line has at most `LINE_LIMIT` characters, so memory is bounded for any file.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import io
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

from turret.data.table import FIELD_LIMIT, LINE_LIMIT, reason_of
from turret.errors import DataError, one_line, quote

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
UNPACKED_BYTES, UNPACKED_TIMES = 256 << 20, 200  # a compressed file unpacks to no more than the larger one
TOO_LONG = f"a field may have {FIELD_LIMIT}, so shorten it or leave the row out"
UTF8 = "utf-8-sig"
_CHUNK = 1 << 18
_SCANNED = 64 << 20  # bytes in which the first byte that is not UTF-8 is looked for
_SAMPLE = 8192  # bytes of lines with letters beyond ASCII, from which an encoding is guessed
_MARKS = (
    (codecs.BOM_UTF8, UTF8),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_FOREIGN = (  # what a file really is, by its first bytes; and what to do
    (b"PK\x03\x04", "an Excel file or a zip archive", "name it .xlsx, or unpack it"),
    (b"\xd0\xcf\x11\xe0", "an old Excel file, or one with a password", "save it as .xlsx or .csv without a password"),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it, or add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it, or add .zst to its name"),
    (b"BZh", "compressed with bzip2", "unpack it, or add .bz2 to its name"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it, or add .xz to its name"),
    (b"%PDF", "a PDF document", "export its table as .csv"),
    (b"SQLite format 3", "a SQLite database", "export one table as .csv"),
    (b"\x89PNG", "a picture", "give a table"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
)
# Letters and signs of cp1252 that Western European texts use. Other encodings give other characters for their bytes.
_WESTERN = frozenset("äöüßÄÖÜéèàâêîôûçëïœÉÀÈÇáíóúñÁÍÓÚÑ¿¡åÅæ’‘“”„–—…€£§°«»·\xa0´®©")
_SIGNS = "’‘“”„–—…€£§°«»·\xa0\u0307"  # the last one is a part of a small İ
_CENTRAL = ("cp1250", "iso8859_2", "cp852")
_ALPHABETS = (  # letters of languages beyond ASCII, and the codecs in which they are written; the first one wins
    ("ąćęłńóśźż", _CENTRAL),
    ("áčďéěíňóřšťúůýžäĺľŕôö", _CENTRAL),
    ("áéíóöőúüű", _CENTRAL),
    ("čćđšž", _CENTRAL),
    ("ăâîşţ", _CENTRAL),
    ("çğıöşüâîû", ("cp1254", "iso8859_9")),
    ("ąčęėįšųūžāēģīķļņõäöü", ("cp1257", "iso8859_13")),
)
_SURE = 0.98  # share of the letters of a sample


def name_of(path: Path) -> str:
    """The file's name for a message."""
    return one_line(path.name, 60)


def kind_of(path: Path) -> str:
    """The suffix that tells the kind of a table, in lower case, without that of a compression: `.csv` of `a.csv.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def check_is_text(path: Path) -> None:
    """Raise DataError if the first bytes are those of another kind of file, such as an Excel file named `.csv`."""
    with open_bytes(path) as file:
        head = file.read(512)
    for start, what, remedy in _FOREIGN:
        if head.startswith(start):
            raise DataError(f"{name_of(path)} is {what}, not a text file: {remedy}")
    if re.match(rb"\s*(<!doctype html|<html|<\?xml)", head, re.IGNORECASE):
        raise DataError(f"{name_of(path)} is a web page or XML, not a table: download or export the table itself")


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of a file. Raises DataError if they cannot be read, here or inside the block."""
    try:
        with _open_decompressed(path) as file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damage_error(path, error) from None
    except ValueError as error:  # pyarrow's, for zstd
        if path.suffix.lower() != ".zst" or isinstance(error, UnicodeError):
            raise
        raise _damage_error(path, error) from None
    except OSError as error:
        if path.suffix.lower() in COMPRESSED and not error.errno:  # from the decompressor, not from the system
            raise _damage_error(path, error) from None
        raise DataError(f"{name_of(path)} cannot be read: {reason_of(error)}: check the file and its folder") from None


def _damage_error(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{name_of(path)} is not {path.suffix} data, or was cut off ({reason_of(error, 80)}): copy or pack it again"
    )


def _zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


_Packed: TypeAlias = gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile | BinaryIO
_DECOMPRESSORS: dict[str, Callable[[Path], _Packed]] = {
    ".gz": gzip.GzipFile,
    ".zst": _zstd,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}


def _open_decompressed(path: Path) -> BinaryIO:
    unpack = _DECOMPRESSORS.get(path.suffix.lower())
    return path.open("rb") if unpack is None else io.BufferedReader(_Unpacked(unpack(path), path), _CHUNK)


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file. Raises DataError once they are too many for its size, as of a decompression bomb.

    Args:
        packed: the decompressor, which reads the file.
    """

    def __init__(self, packed: _Packed, path: Path) -> None:
        self._packed, self._path = packed, path
        self._most = max(UNPACKED_BYTES, UNPACKED_TIMES * path.stat().st_size)
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._packed.read(len(view))
        view[: len(piece)] = piece
        self._size += len(piece)
        if self._size > self._most:
            raise DataError(
                f"{name_of(self._path)} unpacks to more than {UNPACKED_TIMES} times its size and {UNPACKED_BYTES} "
                "bytes, as texts never do: unpack it first"
            )
        return len(piece)

    def close(self) -> None:
        self._packed.close()
        super().close()


def lines_of(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The lines of a text file, without their ends."""
    return (line.rstrip("\r\n") for line in read_lines(path, find_encoding(path, encoding)[0], newline=""))


def read_lines(path: Path, encoding: str, newline: str) -> Iterator[str]:
    """Lines with their ends. No more than one line of bounded length is in memory. Raises DataError."""
    try:
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline=newline) as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise DataError(f"{name_of(path)} line {number} is longer than {LINE_LIMIT} characters: {TOO_LONG}")
                yield line
    except UnicodeError:
        raise _undecodable(path, encoding) from None


def read_text(path: Path, encoding: str, most: int) -> str:
    """The whole text. Raises DataError if it has more than `most` characters."""
    try:
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding) as file:
            text = file.read(most + 1)
    except UnicodeError:
        raise _undecodable(path, encoding) from None
    if len(text) > most:
        raise DataError(f"{name_of(path)} is over {most} bytes, too much for one value: save it as JSONL")
    return text


def _undecodable(path: Path, encoding: str) -> DataError:
    if encoding != UTF8:
        return DataError(
            f"{name_of(path)} is not {encoding} throughout: set data.encoding to its real encoding, or save it as UTF-8"
        )
    place = _bad_place(path)
    return DataError(f"{name_of(path)} is not UTF-8 ({place}): correct it, or set data.encoding, such as cp1252")


def _bad_place(path: Path) -> str:
    """The first line that is not UTF-8. Reads the file again."""
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(4 * LINE_LIMIT):
            number += 1
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"line {number}, byte 0x{line[error.start]:02x} at position {error.start + 1}"
    return "it ends in the middle of a character"


# --- the encoding ----------------------------------------------------------------------------------------------------


def find_encoding(path: Path, given: str | None = None) -> tuple[str, str | None]:
    """The codec of a text file, and a note if it was guessed.

    Args:
        given: the recipe's `data.encoding`.

    Raises:
        DataError: Python does not know the codec, or none fits.
    """
    if given is not None:
        try:
            codec = codecs.lookup(given)
            b"a".decode(codec.name)  # a codec that is no text encoding, such as base64, raises LookupError
        except (LookupError, UnicodeError, ValueError):
            if not given.lower().replace("_", "-").startswith(("utf-16", "utf-32")):  # half a character is no text
                raise DataError(
                    f"data.encoding {quote(given, 40)} is unknown: give utf-8, cp1252, utf-16 or another of Python's"
                ) from None
        with open_bytes(path) as file:
            head = file.read(4)
        for mark, name in _MARKS:  # a codec of one byte order would read the mark as a character
            if head.startswith(mark) and codec.name in (f"{name}-le", f"{name}-be"):
                return name, None
        return (UTF8 if codec.name == "utf-8" else codec.name), None
    with open_bytes(path) as file:
        head = file.read(_CHUNK)
        for mark, codec_name in _MARKS:
            if head.startswith(mark):
                return codec_name, None if codec_name == UTF8 else f"{name_of(path)}: read as {codec_name.upper()}"
        if (wide := _wide(head)) is not None:
            return wide, f"{name_of(path)}: read as {wide.upper()}, which it looks like; data.encoding overrides this"
        sample = _sample_if_foreign(file, head)
    if sample is None:
        return UTF8, None
    guess = _guess(sample)
    if guess is None or _is_damaged_utf8(sample):
        return UTF8, None  # reading it raises the error with the place
    word = next((word for word in re.findall(r"\w+", sample.decode(guess, "replace")) if not word.isascii()), "")
    return guess, f"{name_of(path)}: read as {guess}, as in {word!r}; if letters are wrong, set data.encoding"


def _wide(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: every second byte of mostly Latin text is 0."""
    even, odd = head[:2000:2], head[1:2000:2]
    if len(odd) < 4:
        return None
    for zeros, letters, name in ((odd, even, "utf-16-le"), (even, odd, "utf-16-be")):
        if zeros.count(0) > 0.8 * len(zeros) and letters.count(0) < 0.1 * len(letters):
            return name
    return None


def _sample_if_foreign(file: BinaryIO, head: bytes) -> bytes | None:
    """Lines with bytes beyond ASCII, if the first `_SCANNED` bytes are not UTF-8; None if they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    sample, scanned, foreign, chunk = b"", 0, False, head
    while chunk and scanned < _SCANNED:
        scanned += len(chunk)
        if not foreign:
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError:
                foreign = True
        if not chunk.isascii() and len(sample) < _SAMPLE:
            lines = [line for line in chunk.splitlines() if not line.isascii()]
            sample = (sample + b"\n".join(line[:2000] for line in lines[:200]))[: 2 * _SAMPLE]
        if foreign and len(sample) >= _SAMPLE:
            break
        chunk = file.read(_CHUNK)
    return sample if foreign else None


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether most characters beyond ASCII are UTF-8, so that only some bytes are wrong."""
    text = sample.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    return sum(not c.isascii() for c in text) - wrong > 2 * wrong


@functools.lru_cache(maxsize=64)
def _guess(sample: bytes) -> str | None:
    """The codec that the sample fits best: cp1252 if it looks Western European, else what charset-normalizer finds.

    That one takes codecs of Central Europe and Turkey for others, so their alphabets are tried before.
    """
    western = _decode_sample(sample, "cp1252")
    if western is not None and _looks_western(western):
        return "cp1252"
    share, codec = max(
        ((_share_of_letters(sample, codec, letters), codec) for letters, codecs_ in _ALPHABETS for codec in codecs_),
        key=lambda each: each[0],
    )
    if share >= _SURE:
        return codec
    from charset_normalizer import from_bytes

    best = from_bytes(sample).best()
    if best is None:
        return None if western is None else "cp1252"
    return "cp1252" if western is not None and western == str(best) else best.encoding


def _share_of_letters(sample: bytes, codec: str, letters: str) -> float:
    """The share of the letters beyond ASCII that an alphabet has; 0 if the codec does not fit."""
    text = _decode_sample(sample, codec)
    if text is None or any(unicodedata.category(c) == "Cc" and c not in "\t\r\n" for c in text):
        return 0.0
    found = [c for c in text.lower() if not c.isascii() and c not in _SIGNS]
    return sum(c in letters for c in found) / len(found) if found else 0.0


def _decode_sample(sample: bytes, codec: str) -> str | None:
    try:
        return sample.decode(codec)
    except UnicodeDecodeError:
        return None


def _looks_western(text: str) -> bool:
    """Whether nearly all characters beyond ASCII are usual Western ones, and letters among them stand alone."""
    others = [c for c in text if not c.isascii()]
    runs = sum(len(run) for run in re.findall(r"[^\W\x00-\x7f]{3,}", text))
    return sum(c in _WESTERN for c in others) >= 0.98 * len(others) and runs <= 0.05 * len(others)
