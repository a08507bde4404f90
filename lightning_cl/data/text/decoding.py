"""Reading files as text, compressed or not, in UTF-8 or UTF-16; errors name the likely other encoding."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

GZIP = ".gz"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)


def suffix_of(path: Path) -> str:
    """A file's suffix in lower case; for a compressed file, the suffix before ``.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == GZIP else suffix


def stem_of(path: Path) -> str:
    """A file's name without suffix, and without ``.gz``."""
    return Path(path.stem).stem if path.suffix.lower() == GZIP else path.stem


@contextmanager
def open_bytes(path: Path, where: str) -> Iterator[BinaryIO]:
    """Opens a file, and decompresses it if its suffix is ``.gz``.

    Raises:
        ValueError: during reading, if its compressed data is damaged.
    """
    try:
        if path.suffix.lower() == GZIP:
            with gzip.open(path, "rb") as packed:
                yield packed  # type: ignore[misc]
        else:
            with path.open("rb") as file:
                yield file
    except _DAMAGED as error:
        raise ValueError(f"{where}: a damaged or incomplete .gz file ({error})") from error


def encoding_of(file: BinaryIO) -> str:
    """The encoding of an open file by its first bytes: UTF-16 has a byte order mark, everything else is UTF-8."""
    beginning = file.read(4)
    file.seek(0)
    return "utf-16" if beginning.startswith(_UTF16) else "utf-8-sig"


@contextmanager
def open_text(path: Path, where: str, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a file as text.

    Args:
        path: the file.
        where: its name, for messages.
        newline: as for :func:`open`.

    Raises:
        ValueError: during reading, if the file is neither UTF-8 nor UTF-16, or is damaged.
    """
    try:
        with open_bytes(path, where) as file, io.TextIOWrapper(file, encoding_of(file), newline=newline) as text:
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {not_text(error)}") from error


def not_text(error: UnicodeDecodeError) -> str:
    """Describes a decoding error, and the likely other encoding."""
    data = bytes(error.object)
    where = f"not UTF-8 text at byte {error.start}" if error.encoding.startswith("utf-8") else "not valid UTF-16 text"
    if b"\0" in data[:1000]:
        return f"{where}: it looks like UTF-16 without a byte order mark, or like no text at all; save it as UTF-8"
    wrong = data[error.start : error.start + 1]
    try:
        letter = wrong.decode("cp1252")
    except UnicodeDecodeError:
        return f"{where}; save it as UTF-8"
    return f"{where}: it looks like Windows-1252 (there it is {letter!r}), as spreadsheets write it; save it as UTF-8"
