"""One folder of records: one process writes it, from its first record to its last; anybody may read it."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_cl.buffers.disk.encoding import Encoded
from lightning_cl.buffers.disk.layout import (
    ALIGNMENT,
    ERASED,
    HEADER_SIZE,
    RECORD,
    DamagedFileError,
    Record,
    check_header,
    header,
    read_record,
)
from lightning_cl.buffers.disk.names import Names
from lightning_cl.files import sync

KINDS = ("records", "tokens", "mask", "blobs")
_WRITE_BEHIND = 1 << 20  # bytes that wait to be written together
_RESIDENT = 16 << 20  # bytes of the maps that may stay in memory
_AROUND = 64 << 10  # bytes that Linux brings in where one is read
_PATIENCE = 60.0  # seconds that a reader waits for what another rank is about to write


class RemovedError(LookupError):
    """A record that was erased."""


class Content(NamedTuple):
    """Content of a record, as bytes."""

    form: str
    ids: bytes
    mask: bytes
    blob: bytes


class Segment:
    """A folder of the files in :mod:`~lightning_cl.buffers.disk.layout`.

    Writing: data first, then the record that points to it; :meth:`commit` brings both to the disk in that order. So a
    record that was committed is whole, and nobody looks at what a killed writer left after it. Reading maps the files
    and copies a record out. It gives the pages back now and then, so that memory does not grow with the file.

    Args:
        folder: of an existing segment.
        writable: True if this process is its writer.

    Raises:
        FileNotFoundError: if a file is missing.
        DamagedFileError: if a file is no part of a buffer.
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        self.folder, self.writable = Path(folder), writable
        versions = {kind: check_header(self.path(kind), kind) for kind in KINDS}
        self._version = versions["records"]
        self._maps: dict[str, mmap.mmap] = {}
        self._touched = 0
        self._names = Names(self.path("names"))
        self._waiting: dict[str, bytearray] = {kind: bytearray() for kind in KINDS}
        self._ends = {kind: os.path.getsize(self.path(kind)) - HEADER_SIZE for kind in KINDS}
        self._ends["records"] -= self._ends["records"] % RECORD.itemsize
        self.count = self._written = self._records_in_file()
        self._process = os.getpid()

    @classmethod
    def create(cls, folder: Path, info: dict[str, Any]) -> Segment:
        """A new one, with what readers should know about it (the tokenizer's hash).

        Raises:
            FileExistsError: if the folder is there already.
            OSError: if the folder cannot be written; the message names it.
        """
        # Under another name first: whenever the writer is killed, nobody finds half a segment.
        temporary = folder.with_name(f".{os.getpid()}.{folder.name}")
        try:
            with naming(folder):
                temporary.mkdir(parents=True)
                for kind in KINDS:
                    (temporary / f"{kind}.bin").write_bytes(header(kind))
                (temporary / "names.jsonl").write_bytes(Names.first_line(info))
                temporary.rename(folder)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, f"{folder}: another process has begun it") from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return cls(folder, writable=True)

    @property
    def info(self) -> dict[str, Any]:
        """Description of the segment by its writer."""
        return self._names.info

    @property
    def id(self) -> str:
        """Identity of the segment: no other one has it."""
        return self._names.id

    def path(self, kind: str) -> Path:
        """The file of a kind."""
        return self.folder / ("names.jsonl" if kind == "names" else f"{kind}.bin")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    # ------------------------------------------------------------------ writing

    def append(self, sample: Encoded, task: str, position: int = -1, label: int = -1) -> int:
        """Stores a sample; it is on the disk after :meth:`commit`.

        Returns:
            its number in this segment.
        """
        assert self.writable
        start = self._ends["tokens"] // 4
        crc = zlib.crc32(sample.blob, zlib.crc32(sample.mask, zlib.crc32(sample.ids)))
        record = Record(
            start,
            sample.length,
            sample.loss_tokens,
            self._ends["blobs"],
            len(sample.blob),
            self._names.number_of("task", task),
            self._names.number_of("form", sample.form),
            position,
            label,
            0,
            crc,
        )
        padding = -sample.length % ALIGNMENT
        self._add("tokens", sample.ids + bytes(4 * padding) if padding else sample.ids)
        self._add("mask", sample.mask)
        self._add("blobs", sample.blob)
        self._add("records", record.to_bytes(self.count, self._version))
        self.count += 1
        if len(self._waiting["tokens"]) + len(self._waiting["blobs"]) > _WRITE_BEHIND:
            self.flush()
        return self.count - 1

    def copy(self, other: Segment, number: int) -> int:
        """Stores a record of another segment; an erased one as it is, so that numbers keep their order."""
        record = other.record(number)
        try:
            content = other.read(number)
        except RemovedError:
            empty = Encoded(b"", b"", b"", "{}", 0, record.loss_tokens)
            copied = self.append(empty, other.task_of(record), record.position, record.label)
            self.erase(copied)
            return copied
        sample = Encoded(content.ids, content.mask, content.blob, content.form, record.length, record.loss_tokens)
        return self.append(sample, other.task_of(record), record.position, record.label)

    def flush(self) -> None:
        """Writes what waits, so that other processes see it.

        Raises:
            OSError: if the disk is full; the records before stay as they are.
        """
        with naming(self._names.path):
            self._names.flush()
        for kind in ("tokens", "mask", "blobs", "records"):  # the records last: they point to the others
            data = self._waiting[kind]
            if not data:
                continue
            with naming(self.path(kind)), self.path(kind).open("r+b") as file:
                # Where the last whole write ended, and not the end of the file: a failed write may have left a part.
                file.seek(HEADER_SIZE + self._ends[kind] - len(data))
                file.write(data)
                file.flush()
            self._waiting[kind] = bytearray()
        self._written = self.count

    def commit(self) -> None:
        """Writes what waits and has the disk keep it."""
        if not self.writable:
            return
        self.flush()
        for kind in ("names", "tokens", "mask", "blobs", "records"):
            with naming(self.path(kind)):
                sync(self.path(kind))
        sync(self.folder)
        sync(self.folder.parent)

    def erase(self, number: int) -> None:
        """Overwrites a record's content with zeros, on the disk, and marks it."""
        self.flush()
        record = self.record(number)
        if not record.erased:
            # First the mark: should the writer be killed in between, the record is known to be gone.
            gone = record._replace(flags=record.flags | ERASED, data_crc=0)
            self._overwrite("records", number * RECORD.itemsize, gone.to_bytes(number, self._version))
        for kind, (start, size) in _spans(record).items():
            if any(self._bytes(kind, start, size)):
                self._overwrite(kind, start, bytes(size))

    def finish_erasing(self) -> None:
        """Overwrites what a killed :meth:`erase` has only marked."""
        self.flush()
        count = self.number_of_records()
        if count:
            table = np.memmap(self.path("records"), RECORD, "r", HEADER_SIZE, (count,))
            for number in np.flatnonzero(table["flags"] & ERASED).tolist():
                with suppress(DamagedFileError):  # after the last commit
                    self.erase(number)

    def _overwrite(self, kind: str, start: int, data: bytes) -> None:
        with naming(self.path(kind)), self.path(kind).open("r+b") as file:
            file.seek(HEADER_SIZE + start)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _add(self, kind: str, data: bytes) -> None:
        self._waiting[kind] += data
        self._ends[kind] += len(data)

    # ------------------------------------------------------------------ reading

    def record(self, number: int) -> Record:
        """The fields of a record.

        Raises:
            DamagedFileError: if it is damaged or missing.
        """
        if number >= self._written:
            self._find(number)
        return read_record(
            self._bytes("records", number * RECORD.itemsize, RECORD.itemsize),
            number,
            self.path("records"),
            self._version,
        )

    def read(self, number: int) -> Content:
        """The content of a record.

        Raises:
            RemovedError: if it was erased.
            DamagedFileError: if it is damaged.
        """
        record = self.record(number)
        if record.erased:
            raise RemovedError(f"{self.folder}: record {number} was removed")
        ids, mask, blob = (self._bytes(kind, start, size) for kind, (start, size) in _spans(record).items())
        if zlib.crc32(blob, zlib.crc32(mask, zlib.crc32(ids))) != record.data_crc:
            if self.record(number).erased:  # just now, by another process
                raise RemovedError(f"{self.folder}: record {number} was removed")
            raise DamagedFileError(
                f"{self.folder}: the content of record {number} is damaged, in {self._files_of(record)}"
            )
        return Content(self._names.name_of("form", record.form), ids, mask, blob)

    def task_of(self, record: Record) -> str:
        """The name of a record's task."""
        return self._names.name_of("task", record.task)

    def number_of_records(self) -> int:
        """Returns the number of records, with those that another process has written since."""
        if not self.writable:
            self.count = self._written = self._records_in_file()
        return self.count

    def table(self, count: int) -> np.ndarray[Any, np.dtype[np.void]]:
        """The first records, mapped; see :data:`~lightning_cl.buffers.disk.layout.RECORD`."""
        self.record(count - 1)  # written, if it was waiting
        return np.memmap(self.path("records"), RECORD, "r", HEADER_SIZE, (count,))

    def size(self) -> int:
        """Bytes of all records' content."""
        return sum(self._ends[kind] for kind in ("tokens", "mask", "blobs"))

    def check(self, numbers: Iterator[int]) -> None:
        """Reads records, and finds what is damaged.

        Raises:
            DamagedFileError: naming the file.
        """
        for number in numbers:
            with suppress(RemovedError):
                self.read(number)

    def _files_of(self, record: Record) -> str:
        sizes = {"tokens": record.length, "mask": record.length, "blobs": record.blob_size}
        return " or ".join(self.path(kind).name for kind, size in sizes.items() if size)

    def _find(self, number: int) -> None:
        """A record that is not known to be in the file yet: our own that waits, or another process's."""
        if self.writable:
            if number >= self.count:
                raise IndexError(f"{self.folder}: record {number} of {self.count}")
            if os.getpid() != self._process:  # a forked worker: the writer may have written it, and erased it, since
                self._written = min(self._records_in_file(), self.count)
            if number >= self._written:
                self.flush()
            return
        end = time.monotonic() + _PATIENCE
        while True:
            if number < self.number_of_records():
                return
            if time.monotonic() > end:
                raise DamagedFileError(f"{self.path('records')}: it has {self._written} records, and no {number}")
            time.sleep(0.01)

    def _records_in_file(self) -> int:
        return (os.path.getsize(self.path("records")) - HEADER_SIZE) // RECORD.itemsize

    def _map(self, kind: str, end: int) -> mmap.mmap:
        mapped = self._maps.get(kind)
        if mapped is None or len(mapped) < end:
            if mapped is not None:
                mapped.close()
            with self.path(kind).open("rb") as file:
                mapped = self._maps[kind] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(mapped) < end:
                raise DamagedFileError(f"{self.path(kind)}: it ends at byte {len(mapped)}, before a record's content")
        return mapped

    def _bytes(self, kind: str, start: int, size: int) -> bytes:
        if size == 0:
            return b""
        mapped = self._map(kind, HEADER_SIZE + start + size)
        data = mapped[HEADER_SIZE + start : HEADER_SIZE + start + size]
        self._touched += size + _AROUND
        if self._touched > _RESIDENT:
            self._touched = 0
            if sum(map(len, self._maps.values())) > _RESIDENT:
                for each in self._maps.values():
                    if hasattr(each, "madvise"):  # not on Windows
                        each.madvise(mmap.MADV_DONTNEED)
        return data


def _spans(record: Record) -> dict[str, tuple[int, int]]:
    """Returns where a record's content begins in each file, after the header, and its bytes."""
    return {
        "tokens": (4 * record.start, 4 * record.length),
        "mask": (record.start // 8, -(-record.length // 8)),
        "blobs": (record.blob, record.blob_size),
    }


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system say which file, and what can be done about a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        left = "none"
        with suppress(OSError):
            left = str(shutil.disk_usage(path.parent if path.parent.exists() else ".").free)
        raise OSError(
            error.errno,
            f"{path}: the disk is full ({left} bytes are left). What was stored before is whole: make room and resume"
            " from the last checkpoint, or give a smaller buffer_size or another folder",
        ) from error
