"""Checksums of checkpoints: in the comment of the zip archive that ``torch.save`` writes, where every reader skips it.

``torch.load`` looks at none of the checksums in an archive: a flipped bit in a weight would be trained on. So a
checkpoint of ours ends with a CRC-32 over all of its bytes, computed while they are written. In a checkpoint without
one (Lightning's own, or an older one) the CRC-32 of each part is compared, which ``torch.save`` itself writes.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import torch

_END = struct.Struct("<4s4H2LH")  # the last record of an archive; its last field is the length of the comment
_MAGIC = b"PK\x05\x06"
_COMMENT = re.compile(rb"lightning_cl crc32 ([0-9a-f]{8})")
_LONGEST = 64  # bytes of a comment
_CHUNK = 1 << 22  # bytes that are read at once


class _Counted:
    """A file for ``torch.save``, with the checksum of what was written and the last bytes of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc, self.tail = file, 0, b""

    def write(self, data: Any) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.tail = (self.tail + bytes(data[-_END.size :]))[-_END.size :]
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save_checked(content: Any, file: IO[bytes]) -> None:
    """Writes what ``torch.save`` writes, followed by a checksum over all of it, without a copy in RAM.

    Args:
        content: what to save.
        file: open for writing, at its beginning.
    """
    counted = _Counted(file)
    torch.save(content, counted)  # type: ignore[arg-type]
    if counted.tail.startswith(_MAGIC) and counted.tail.endswith(b"\0\0"):
        comment = b"lightning_cl crc32 %08x" % counted.crc
        file.seek(-2, 2)
        file.write(struct.pack("<H", len(comment)) + comment)


def find_damage(path: Path) -> str | None:
    """Reads a checkpoint to its end and compares its checksums.

    Args:
        path: a file of ``torch.save``.

    Returns:
        the damage, in words; None if the file is as it was written.
    """
    try:
        return _find_damage(path)
    except Exception as error:  # of any kind, from a damaged archive
        return f"damaged or cut off ({error})"


def _find_damage(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LONGEST))
        tail = file.read()
        place = tail.rfind(_MAGIC)
        if place < 0 or len(tail) - place < _END.size:
            return "damaged or cut off (it has no end)"
        comment = tail[place + _END.size :]
        if _END.unpack_from(tail, place)[-1] != len(comment):
            return "damaged (its end is not the end of the file)"
        if not comment:
            return _damaged_part(path)
        found = _COMMENT.fullmatch(comment)
        if found is None:
            return "damaged (its checksum cannot be read)"
        file.seek(0)
        crc = zlib.crc32(b"\0\0", _crc(file, size - len(comment) - 2))
    return None if crc == int(found[1], 16) else "damaged (its checksum does not fit)"


def _crc(file: IO[bytes], size: int) -> int:
    crc = 0
    while size > 0:
        data = file.read(min(size, _CHUNK))
        if not data:
            raise EOFError("it ends too early")
        crc, size = zlib.crc32(data, crc), size - len(data)
    return crc


def _damaged_part(path: Path) -> str | None:
    """The damage in an archive without a checksum of ours."""
    with zipfile.ZipFile(path) as archive:
        if not archive.namelist():
            return "no checkpoint (there is nothing in it)"
        if not any(part.CRC for part in archive.infolist()):
            return None  # torch.serialization.set_crc32_options(False): there is nothing to compare
        part = archive.testzip()
    return None if part is None else f"damaged (the checksum of {part} in it does not fit)"


def checksum_of(parts: Iterable[tuple[str, torch.Tensor]], *texts: str) -> str:
    """A CRC-32 over names, types, shapes and bytes of tensors on the CPU, and over texts.

    Args:
        parts: names and tensors; in any order.
        texts: what else it is to cover.
    """
    crc = zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(parts, key=lambda part: part[0]):
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
