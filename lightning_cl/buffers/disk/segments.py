"""The segments of a store: they map a record's number to a segment and a record in it."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cl.buffers.disk.layout import DamagedFileError
from lightning_cl.buffers.disk.segment import RemovedError, Segment

_BITS = 32  # lower bits of a number: the record's number within its segment


class Segments:
    """Segments in order; a record's number has the index of its segment in the upper bits.

    At most one of them is being written. Another rank's is opened when it is first read.

    Args:
        segments: the first ones.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._segments = list(segments)
        self._writer: int | None = None
        self._expected = 0  # records that another rank has in the newest segment
        self._expected_folder = Path()

    @classmethod
    def of_one(cls, segment: Segment | Path, count: int) -> Segments:
        """One segment that has all records.

        Args:
            segment: the one that this process writes, or the folder of another rank's.
            count: its records.
        """
        segments = cls()
        if isinstance(segment, Path):
            segments.expect_in(segment)
        else:
            segments.write(segment)
        segments._expected = count
        return segments

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def append(self, segment: Segment) -> None:
        """Adds a segment that is only read."""
        self._segments.append(segment)

    # ------------------------------------------------------------------ writing

    @property
    def written(self) -> Segment | None:
        """The segment that this process writes; on other ranks and before the first record, None."""
        if self._writer is None or self._writer == len(self._segments):
            return None
        return self._segments[self._writer]

    @property
    def first_number(self) -> int:
        """The number of the first record in the segment that is being written."""
        assert self._writer is not None
        return self._writer << _BITS

    def write(self, segment: Segment) -> None:
        """Adds the segment that this process writes."""
        self._segments.append(segment)
        self._writer = len(self._segments) - 1

    def expect_in(self, folder: Path) -> None:
        """Says where the rank that writes has begun its segment."""
        self._writer, self._expected_folder = len(self._segments), folder

    def expect(self, count: int, new_folder: Callable[[], Path]) -> range:
        """The numbers of records that another rank is about to append.

        Args:
            count: how many.
            new_folder: gives the folder of its segment, if that is not known yet.
        """
        if self._writer is None:
            self.expect_in(new_folder())
        start = self.first_number | self._expected
        self._expected += count
        return range(start, start + count)

    # ------------------------------------------------------------------ reading

    def find(self, number: int) -> tuple[Segment, int]:
        """The segment of a record, and the record's number within it."""
        index, local = number >> _BITS, number & (1 << _BITS) - 1
        if index == len(self._segments) and index == self._writer:
            self._segments.append(Segment(self._expected_folder))
        return self._segments[index], local

    def open_expected(self) -> None:
        """Opens the segment that another rank writes, if it has records and was not read yet."""
        if self._writer is not None and self._expected and self._writer == len(self._segments):
            self.find(self.first_number)

    def every(self) -> Iterator[int]:
        """The numbers of all records that are whole and not erased."""
        self.open_expected()
        for index, segment in enumerate(self._segments):
            for local in range(segment.number_of_records()):
                try:
                    segment.read(local)
                    segment.task_of(segment.record(local))
                except (RemovedError, DamagedFileError):
                    continue  # what a killed writer left is in nobody's buffer
                yield index << _BITS | local

    def columns(self, numbers: Sequence[int]) -> dict[str, Sequence[int]]:
        """``length`` and ``loss_tokens`` of many records, as arrays."""
        wanted = np.array(numbers, dtype=np.int64)
        found = {name: np.zeros(len(wanted), dtype=np.int32) for name in ("length", "loss_tokens")}
        for index in np.unique(wanted >> _BITS).tolist():
            mine = np.flatnonzero(wanted >> _BITS == index)
            local = wanted[mine] & (1 << _BITS) - 1
            segment, _ = self.find(int(wanted[mine[0]]))
            table = segment.table(int(local.max()) + 1)
            for name, column in found.items():
                column[mine] = table[name][local]
        return {name: array("i", column.tobytes()) for name, column in found.items()}

    def describe(self, numbers: Iterable[int]) -> dict[str, Any]:
        """Returns the wanted records in plain containers: segments by folder, records by segment."""
        wanted = sorted(_by_segment(numbers).items())
        return {str(self._segments[index].folder.resolve()): records for index, records in wanted}

    def check(self, numbers: Iterable[int]) -> None:
        """Reads each record once.

        Raises:
            DamagedFileError: if a file is damaged.
        """
        for index, records in _by_segment(numbers).items():
            self._segments[index].check(iter(records))

    def state_dict(self) -> dict[str, list[str]]:
        """The folders of the segments, and what tells each from another run's."""
        folders = [str(segment.folder.resolve()) for segment in self._segments]
        ids = [segment.id for segment in self._segments]
        if self._writer is not None and self._writer == len(folders):  # another rank's; it says so in its own state
            folders.append(str(self._expected_folder.resolve()))
            ids.append("")
        return {"segments": folders, "ids": ids}


def _by_segment(numbers: Iterable[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        found[number >> _BITS].append(number & (1 << _BITS) - 1)
    return found


def segments_in(folder: Path) -> list[Path]:
    """The folders of a buffer's segments, in order."""
    return sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())


def open_segment(path: Path, folders: Iterable[Path] = (), identity: str = "") -> Segment:
    """Opens a segment at its old path, or in one of several folders.

    Args:
        path: the old path of the segment.
        folders: other folders in which it may be now.
        identity: the segment's id, which differs from those of other runs; empty: any segment is accepted.

    Raises:
        FileNotFoundError: if no folder contains it.
    """
    candidates = [path, *(folder / path.name for folder in folders)]
    found = [Segment(candidate) for candidate in dict.fromkeys(candidates) if candidate.is_dir()]
    segment = next((segment for segment in found if identity in ("", segment.id)), None)
    if segment is None:
        reason = "is missing" if not found else "is another run's"
        raise FileNotFoundError(
            f"{path}: this folder of the buffer {reason}; a checkpoint holds which samples are wanted, and the"
            " folder holds the samples: bring it back; or, if the run itself has replaced it by a compacted one"
            " since then, resume from a later checkpoint"
        )
    return segment
