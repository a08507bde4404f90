"""``names.jsonl``: what the numbers of tasks and forms in a segment's records mean, and what the segment is."""

from __future__ import annotations

import json
import secrets
import zlib
from pathlib import Path
from typing import Any

from lightning_cl.buffers.disk.layout import DamagedFileError


class Names:
    """The names in a segment's file; each line has its checksum.

    Args:
        path: of the file.

    Attributes:
        info: what the segment's writer said of it.
        id: a number that no other segment has.

    Raises:
        DamagedFileError: if its first line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: dict[str, Any] = {}
        self.id = ""
        self._known: dict[str, list[str]] = {"task": [], "form": []}
        self._read_to = 0
        self._waiting = bytearray()
        self._read()
        if not self.id:
            raise DamagedFileError(f"{path}: its first line is missing or damaged")

    @staticmethod
    def first_line(info: dict[str, Any]) -> bytes:
        """Returns the first bytes of a new segment's file."""
        return _line_of({"info": info, "id": secrets.token_hex(8)})

    def number_of(self, kind: str, name: str) -> int:
        """The number of a ``task`` or ``form``; a new one is written by :meth:`flush`."""
        known = self._known[kind]
        if known and known[-1] == name:
            return len(known) - 1
        if name not in known:
            known.append(name)
            self._waiting += _line_of({kind: len(known) - 1, "name": name})
        return known.index(name)

    def name_of(self, kind: str, number: int) -> str:
        """The name of a number; another process may just have written it.

        Raises:
            DamagedFileError: if there is none.
        """
        if number >= len(self._known[kind]):
            self._read()
        if number >= len(self._known[kind]):
            raise DamagedFileError(f"{self.path}: it does not name {kind} {number}")
        return self._known[kind][number]

    def flush(self) -> None:
        """Writes what is new."""
        if not self._waiting:
            return
        with self.path.open("r+b") as file:
            file.seek(self._read_to)  # and not the end of the file: a failed write may have left a part
            file.write(self._waiting)
            file.flush()
        self._read_to += len(self._waiting)
        self._waiting = bytearray()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                entry = _entry_of(line)
                if entry is None:
                    break  # being written, or damaged: an error for a record that needs it or what follows
                if "info" in entry:
                    self.info, self.id = entry["info"], entry["id"]
                else:
                    kind = "task" if "task" in entry else "form"
                    if entry[kind] != len(self._known[kind]):
                        break  # a line at another line's position
                    self._known[kind].append(entry["name"])
                self._read_to += len(line)


def _line_of(entry: dict[str, Any]) -> bytes:
    crc = zlib.crc32(json.dumps(entry).encode())
    return json.dumps({**entry, "crc": crc}).encode() + b"\n"


def _entry_of(line: bytes) -> dict[str, Any] | None:
    """Reads a line; None if it is not as it was written."""
    try:
        entry = json.loads(line)
        del entry["crc"]
    except (ValueError, TypeError, KeyError):
        return None
    return entry if line == _line_of(entry) else None
