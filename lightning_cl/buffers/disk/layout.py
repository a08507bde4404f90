"""The layout of a buffer on disk: four flat files, each with a checked header, that other programs can map.

A segment is a folder. Numbers are little-endian; each file begins with a header of 64 bytes:

===============  =======================================================================================
``records.bin``  one :data:`RECORD` of 64 bytes per sample, in the order of storing
``tokens.bin``   token ids, int32; a record's begin at token ``start`` (a multiple of 8), ``length`` of them
``mask.bin``     one bit per token of ``tokens.bin``, lowest bit first: which tokens are learnt
``blobs.bin``    for samples that are no token sequences, and for what is kept next to one: ``safetensors``
                 bytes, ``blob_size`` of them from byte ``blob`` on (after the header)
``names.jsonl``  what the numbers in ``task`` and ``form`` mean, one JSON object per line, with its checksum
===============  =======================================================================================

In numpy, without this library::

    records = np.memmap("records.bin", RECORD, "r", 64)     # RECORD: the fields below, in this order
    tokens = np.memmap("tokens.bin", "<i4", "r", 64)
    ids = tokens[records["start"][7] :][: records["length"][7]]       # of record 7
    bits = np.unpackbits(np.memmap("mask.bin", "u1", "r", 64), bitorder="little")
    learnt = bits[records["start"][7] :][: len(ids)]

Records are written once and never moved. One whose ``flags`` has bit 0 set is erased: its content is zeros.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORD = np.dtype(
    [
        ("start", "<u8"),
        ("length", "<u4"),
        ("loss_tokens", "<i4"),  # −1: no token sequence
        ("blob", "<u8"),
        ("blob_size", "<u4"),
        ("task", "<u4"),
        ("form", "<u4"),
        ("position", "<i8"),  # the sample's position in its task's data; −1: unknown
        ("label", "<i8"),  # class; −1: none
        ("flags", "<u4"),
        ("data_crc", "<u4"),  # of the ids, the bits and the blob
        ("crc", "<u4"),  # of the record's number (as <u8) and of the 60 bytes before; in version 1 of these alone
    ]
)
HEADER_SIZE = 64
ALIGNMENT = 8  # tokens: a record's mask begins with a whole byte
ERASED = 1
_FIELDS = struct.Struct("<QIiQIIIqqII")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct("<8sI12s")
_MAGIC = b"LCLBUFFR"
_NUMBER = struct.Struct("<Q")
VERSION = 2
"""Of new files. Those of version 1 are read, and written to, as they are."""


class DamagedFileError(ValueError):
    """A file of a buffer is not what was written to it."""


class Record(NamedTuple):
    """One entry of ``records.bin``, without its checksum."""

    start: int
    length: int
    loss_tokens: int
    blob: int
    blob_size: int
    task: int
    form: int
    position: int
    label: int
    flags: int
    data_crc: int

    @property
    def erased(self) -> bool:
        """Returns True if the content is gone."""
        return bool(self.flags & ERASED)

    def to_bytes(self, number: int, version: int = VERSION) -> bytes:
        """64 bytes, the last four of them a checksum.

        Args:
            number: which record of its file it is.
            version: of the file.
        """
        fields = _FIELDS.pack(*self)
        return fields + _CRC.pack(_checksum(fields, number, version))


def _checksum(fields: bytes, number: int, version: int) -> int:
    # With its number, so that a record at another record's position is found.
    return zlib.crc32(fields, zlib.crc32(_NUMBER.pack(number)) if version > 1 else 0)


def read_record(content: bytes, number: int, path: Path, version: int = VERSION) -> Record:
    """A record from its 64 bytes.

    Args:
        content: the bytes.
        number: which record of its file it is.
        path: of the file.
        version: of the file.

    Raises:
        DamagedFileError: if its checksum does not fit.
    """
    fields = content[:-4]
    if _CRC.unpack(content[-4:])[0] != _checksum(fields, number, version):
        raise DamagedFileError(f"{path}: record {number} is damaged (its checksum does not fit)")
    return Record(*_FIELDS.unpack(fields))


def header(kind: str, version: int = VERSION) -> bytes:
    """The first 64 bytes of a file.

    Args:
        kind: ``records``, ``tokens``, ``mask`` or ``blobs``.
        version: of the file.
    """
    content = _HEADER.pack(_MAGIC, version, kind.encode()).ljust(HEADER_SIZE - 4, b"\0")
    return content + _CRC.pack(zlib.crc32(content))


def check_header(path: Path, kind: str) -> int:
    """Finds out that a file is a part of a buffer.

    Returns:
        its version.

    Raises:
        FileNotFoundError: if it is not there.
        DamagedFileError: if it is something else, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this file of a buffer is missing")
    with path.open("rb") as file:
        found = file.read(HEADER_SIZE)
    for version in range(1, VERSION + 1):
        if found == header(kind, version):
            return version
    known = [header(kind, version)[8:12] for version in range(1, VERSION + 1)]
    reason = "it is of another version" if found[:8] == _MAGIC and found[8:12] not in known else "damaged"
    raise DamagedFileError(f"{path}: no header of a buffer's {kind} file ({reason})")
