"""The list of what was removed from a folder: 16 bytes that stand for each sample, and their checksum."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

from lightning_cl.buffers.disk.layout import DamagedFileError
from lightning_cl.buffers.disk.segment import naming
from lightning_cl.files import sync

_NAME = "removed.bin"
_ENTRY = struct.Struct("<16sI")


def read_removed(folder: Path) -> set[bytes]:
    """The keys in a folder's list; what a killed process has left of one at its end is none.

    Raises:
        DamagedFileError: if one is damaged.
    """
    path = folder / _NAME
    content = path.read_bytes() if path.is_file() else b""
    entries = list(_ENTRY.iter_unpack(content[: _whole(len(content))]))
    for index, (key, crc) in enumerate(entries):
        if crc != zlib.crc32(key):
            raise DamagedFileError(f"{path}: entry {index} is damaged; it stands for a sample that was removed")
    return {key for key, _ in entries}


def list_removed(folder: Path, keys: set[bytes]) -> None:
    """Adds keys to a folder's list, each once, and has the disk keep them.

    Raises:
        OSError: if the disk is full; the message names the file.
    """
    path = folder / _NAME
    missing = sorted(keys - read_removed(folder))
    if not missing:
        return
    with naming(path):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(_whole(file.tell()))
            file.write(b"".join(_ENTRY.pack(key, zlib.crc32(key)) for key in missing))
            file.flush()
            os.fsync(file.fileno())
        sync(folder)


def _whole(size: int) -> int:
    """Bytes of a file up to the end of its last whole entry."""
    return size // _ENTRY.size * _ENTRY.size
