"""Records on disk, in segments that one process each has written; a checkpoint lists the records it needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_cl.buffers.disk.encoding import decode, decode_extra, encode
from lightning_cl.buffers.disk.index import live_segments
from lightning_cl.buffers.disk.removed import list_removed, read_removed
from lightning_cl.buffers.disk.segment import Segment
from lightning_cl.buffers.disk.segments import Segments, open_segment, segments_in
from lightning_cl.buffers.store import Info, Store, as_numbers

_GONE = ".gone.{}"  # a segment that is being deleted


class DiskStore:
    """Samples in memory-mapped files (:mod:`~lightning_cl.buffers.disk.layout`).

    Records are immutable, and files only grow, so that every checkpoint finds its own. Each process that writes begins
    its own segment, so two runs that resume from one checkpoint never write to one file. Evicted records take room
    until :meth:`rewrite`, at a task's boundary. The files that it replaces are deleted at the next boundary.

    A removed sample's content is overwritten in every segment of the folders that this store knows. A key of 16 bytes
    and its checksum are kept in ``removed.bin`` there, so that the sample is never stored again.

    Args:
        folder: where new segments go; made when the first record is written. None: not known yet (:meth:`place`).
        info: what is written into new segments and must fit old ones: ``{"tokenizer": hash}``.
        writes: False on the ranks for which another one writes.
    """

    def __init__(self, folder: Path | None, info: dict[str, Any] | None = None, writes: bool = True) -> None:
        self._folder = None if folder is None else Path(folder)
        self.info_of_new, self.writes = dict(info or {}), writes
        self._next = None if folder is None else self.first_free(Path(folder))
        self._segments = Segments()
        self._outdated: list[Path] = []
        self._removed: set[bytes] = set()
        self._read_removed()

    def __getstate__(self) -> dict[str, Any]:
        # For worker processes, which only read.
        return {"folder": self._folder, "info": self.info_of_new, "segments": [s.folder for s in self._segments]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["info"], writes=False)  # type: ignore[misc]
        self._segments = Segments(Segment(folder) for folder in state["segments"])

    @property
    def folder(self) -> Path:
        """The folder for new segments."""
        if self._folder is None:
            raise RuntimeError("the buffer's folder is not known yet")
        return self._folder

    @property
    def is_placed(self) -> bool:
        """Returns True if its folder is known."""
        return self._folder is not None

    def flush(self) -> None:
        """Lets other processes see what was appended."""
        written = self._segments.written
        if self.writes and written is not None:
            written.flush()

    @property
    def has_folder(self) -> bool:
        """Returns True if anything was written into its folder."""
        return self._folder is not None and self._folder.is_dir()

    def place(self, folder: Path, first: int, writes: bool) -> None:
        """Sets the folder for new segments.

        Args:
            folder: the buffer's folder in this run.
            first: number of the first new segment: the result of :meth:`first_free` on one rank.
            writes: True if this rank writes.
        """
        self._folder, self._next, self.writes = Path(folder), first, writes
        self._read_removed()

    @staticmethod
    def first_free(folder: Path) -> int:
        """The number of the next segment in a folder."""
        taken = [int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()]
        return max(taken, default=-1) + 1

    # ------------------------------------------------------------------ writing

    def append(
        self, sample: Any, task: str, position: int = -1, label: int = -1, extra: dict[str, Tensor] | None = None
    ) -> int:
        """Stores a sample.

        Raises:
            TypeError: if it cannot be stored without pickle.
            OSError: if the disk is full; what was stored before is whole.
        """
        segment = self._begin()
        local = segment.append(encode(sample, extra), task, position, label)
        return self._segments.first_number | local

    def begin(self) -> Path:
        """Begins this process's segment before there is anything to write, so that other ranks can be told of it."""
        return self._begin().folder

    def expect_in(self, folder: Path) -> None:
        """Says where the rank that writes has begun its segment."""
        if not self.writes:
            self._segments.expect_in(folder)
            self._next = int(folder.name) + 1

    def expect(self, count: int) -> range:
        """The numbers of records that another rank, which writes for all, is about to append."""
        return self._segments.expect(count, self._new_folder)

    def commit(self) -> None:
        """Makes what was appended outlive a crash."""
        written = self._segments.written
        if self.writes and written is not None:
            written.commit()

    def take_over(self, old: Store, numbers: Sequence[int]) -> Sequence[int]:
        """Copies another store's records into this one, with what is never to be stored again; on all ranks.

        Args:
            old: the other store.
            numbers: of its records.

        Returns:
            their new numbers.
        """
        self.refuse(old.removed)
        if not self.writes:
            return self.expect(len(numbers))
        new = []
        for number in numbers:
            info = old.info(number)
            new.append(self.append(old.get(number), info.task, info.position, info.label, old.extra(number)))
        self.commit()
        return new

    def copies(self) -> Sequence[Store]:
        """Names the rest of the folders: from killed runs, replaced segments, and those of other runs.

        Raises:
            DamagedFileError: if it cannot be looked through; the file is named.
        """
        self._segments.open_expected()
        known = {segment.folder.resolve() for segment in self._segments}
        others = DiskStore(None, writes=self.writes)
        for folder in self.folders:
            for path in segments_in(folder):
                if path.resolve() not in known:
                    others._segments.append(Segment(path))
        others._removed = self._removed
        return [others]

    def erase(self, keys: dict[int, bytes]) -> None:
        """Overwrites the content of records on the disk, and never stores the same content again.

        Args:
            keys: of the records (:func:`~lightning_cl.buffers.store.keys_of`).
        """
        self.refuse(keys.values())
        if self.writes:
            self._finish_erasing()
            for segment, local in map(self._segments.find, keys):
                segment.erase(local)

    def _finish_erasing(self) -> None:
        """Names the segments that a killed process has begun."""
        for segment in self._segments:
            segment.finish_erasing()
        for folder in self.folders:
            for path in folder.glob(_GONE.format("*")):
                shutil.rmtree(path, ignore_errors=True)

    def refuse(self, keys: Iterable[bytes]) -> None:
        """Never stores these contents from now on, also not after a resume."""
        keys = set(keys)
        if self.writes and keys:
            for folder in self.folders:
                list_removed(folder, keys)
        self._removed |= keys

    @property
    def folders(self) -> list[Path]:
        """Folders that records may be in: its own first, then those of the runs that it resumes from."""
        own = [] if self._folder is None else [self._folder]
        return list(dict.fromkeys([*own, *(segment.folder.parent for segment in self._segments)]))

    def evict(self, number: int) -> None:
        """Nothing: older checkpoints may want it."""

    def hold(self, numbers: Iterable[int]) -> None:
        """Nothing: everything is kept until :meth:`compact`."""

    @property
    def removed(self) -> set[bytes]:
        """The keys of everything that was erased."""
        return self._removed

    def delete_replaced(self) -> None:
        """Deletes the segments that the last :meth:`rewrite` replaced; the newest checkpoint needs none of them."""
        if self.writes:
            for folder in self._outdated:
                with suppress(FileNotFoundError):
                    folder.rename(folder.with_name(_GONE.format(folder.name)))  # at once, and not file by file
            self._finish_erasing()
        self._outdated = []

    def is_wasteful(self, numbers: Sequence[int], least: int) -> bool:
        """True if other records take more than half of the space, and at least `least` bytes."""
        wanted = sum(self.info(number).size for number in numbers)
        total = sum(segment.size() for segment in self._segments)
        return total - wanted >= least and total > 2 * wanted

    def rewrite(self, numbers: Sequence[int]) -> Sequence[int]:
        """Copies the records into a new segment, and gives their new numbers; on all ranks.

        Replaced segments stay until :meth:`delete_replaced`; segments in another run's folder stay for good.
        """
        old = list(self._segments)
        fresh: Segment | Path
        if self.writes:
            fresh = self._create()
            for number in numbers:
                segment, local = self._segments.find(number)
                fresh.copy(segment, local)
            fresh.commit()
        else:
            fresh = self._new_folder()
        self._outdated = [segment.folder for segment in old if segment.folder.parent.resolve() == self.folder.resolve()]
        self._segments = Segments.of_one(fresh, len(numbers))
        return range(len(numbers))

    def free_bytes(self) -> int:
        """Room that is left on the disk."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free

    def expect_tokenizer(self, fingerprint: str) -> None:
        """Says which tokenizer the samples are of.

        Raises:
            ValueError: if those that are there are of another.
        """
        self.info_of_new["tokenizer"] = fingerprint
        for segment in self._segments:
            self._check_tokenizer(segment)

    def _check_tokenizer(self, segment: Segment) -> None:
        ours, theirs = self.info_of_new.get("tokenizer"), segment.info.get("tokenizer")
        if ours is not None and theirs is not None and ours != theirs:
            raise ValueError(
                f"{segment.folder}: the buffer was written with another tokenizer; the model would read its samples as"
                " noise. Give the same tokenizer, or an empty folder"
            )

    def _begin(self) -> Segment:
        """This process's own segment."""
        written = self._segments.written
        if written is None:
            written = self._create()
            self._segments.write(written)
        return written

    def _create(self) -> Segment:
        while True:
            try:
                segment = Segment.create(self._new_folder(), self.info_of_new)
                list_removed(self.folder, self._removed)  # those of other folders too: this one may be moved alone
                return segment
            except FileExistsError:  # of a run that has begun to write since this one was started
                self._next = self.first_free(self.folder)

    def _new_folder(self) -> Path:
        assert self._next is not None
        self._next += 1
        return self.folder / f"{self._next - 1:04d}"

    # ------------------------------------------------------------------ reading

    def get(self, number: int) -> Any:
        """The sample of a record."""
        segment, local = self._segments.find(number)
        return decode(*segment.read(local))

    def extra(self, number: int) -> dict[str, Tensor]:
        """The tensors that were stored next to it."""
        segment, local = self._segments.find(number)
        return decode_extra(segment.read(local).blob)

    def info(self, number: int) -> Info:
        """Returns what is known of a record without its content."""
        segment, local = self._segments.find(number)
        record = segment.record(local)
        size = 4 * record.length + -(-record.length // 8) + record.blob_size
        return Info(segment.task_of(record), record.length, record.loss_tokens, size, record.position, record.label)

    def is_erased(self, number: int) -> bool:
        """Returns True if its content is gone."""
        segment, local = self._segments.find(number)
        return segment.record(local).erased

    # ------------------------------------------------------------------ state

    def state_dict(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The folders of the segments, and which records of them are wanted."""
        self.commit()
        return {"kind": "disk", **self._segments.state_dict(), "numbers": as_numbers(numbers)}

    def load_state_dict(self, state: dict[str, Any], folders: Sequence[Path] = ()) -> Tensor:
        """Finds the records again, and reads each once to see that it is whole.

        Args:
            state: the result of :meth:`state_dict`.
            folders: folders to search for segments that are not at their old paths.

        Raises:
            ValueError: if the checkpoint's buffer is not on disk, or is of another tokenizer.
            FileNotFoundError: if a file is missing, or a file of another run has its name.
            DamagedFileError: if a file is damaged.
        """
        if state["kind"] != "disk":
            raise ValueError(
                "storage='disk' does not fit the checkpoint, which holds the samples itself; give 'memory'"
            )
        self._segments = Segments()
        for path, identity in zip(map(Path, state["segments"]), state["ids"], strict=True):
            self._segments.append(self._open(path, folders, identity))
        self._segments.check(state["numbers"].tolist())
        self._read_removed()
        if self.writes:
            self._finish_erasing()
        result: Tensor = state["numbers"]
        return result

    def columns(self, numbers: Sequence[int]) -> dict[str, Sequence[int]]:
        """``length`` and ``loss_tokens`` of many records, as arrays."""
        return self._segments.columns(numbers)

    def attach(self) -> None:
        """Opens all segments of the folder, without a checkpoint.

        Raises:
            FileNotFoundError: if there is none.
        """
        found = segments_in(self.folder)
        if not found and not live_segments(self.folder):
            raise FileNotFoundError(f"{self.folder}: there is no buffer in this folder")
        self._segments = Segments(self._open(path) for path in found)
        # If this run resumed from another run's checkpoint, its older records are in the folder of that run.
        known = {path.resolve() for path in found}
        for path in live_segments(self.folder):
            if path.resolve() not in known and path.is_dir():
                self._segments.append(self._open(path))
        self._read_removed()

    def every(self) -> Iterator[int]:
        """The numbers of all records that are whole and not erased, also of those that were evicted."""
        return self._segments.every()

    def describe(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Returns the wanted records in plain containers: segments by folder, records by segment."""
        return self._segments.describe(numbers)

    def _open(self, path: Path, folders: Sequence[Path] = (), identity: str = "") -> Segment:
        segment = open_segment(path, [*([] if self._folder is None else [self._folder]), *folders], identity)
        self._check_tokenizer(segment)
        return segment

    def _read_removed(self) -> None:
        for folder in self.folders:
            self._removed |= read_removed(folder)
