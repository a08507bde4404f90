"""Location of a buffer's records: in RAM, in the run's folder, or in a folder of the user's choice."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.arguments import check_choice
from lightning_cl.buffers import DiskStore, ReplayBuffer
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.run_state import RunState

Storage = Literal["disk", "memory"]


class BufferLocation:
    """Location of a buffer, which is found once in a run, as soon as the run's folder is known.

    Args:
        buffer: its records move to the location when it is found.
        storage: ``disk``: files, if the Trainer keeps checkpoints. ``memory``: RAM; checkpoints contain the samples.
        folder: folder for the files; default: ``buffers/<callback>`` in the run's folder.

    Attributes:
        found: True as soon as the location of this run is known.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, buffer: ReplayBuffer, storage: Storage, folder: str | None) -> None:
        self.storage = check_choice("storage", storage, ("disk", "memory"))
        if folder is not None and storage == "memory":
            raise ValueError(f"folder={folder!r}: storage='memory' keeps no files; give storage='disk'")
        self.buffer, self.folder, self.found = buffer, folder, False
        self._trainer: weakref.ref[L.Trainer] | None = None
        self._needed: dict[str, int] = {}  # the most bytes of each task's samples

    def begin_run(self, trainer: L.Trainer) -> None:
        """Forgets the location if another run begins, which gets its own folder."""
        if self._trainer is None or self._trainer() is not trainer:
            self._trainer, self.found = weakref.ref(trainer), False

    def find(self, trainer: L.Trainer, run: RunState, method: str, name: str) -> bool:
        """Finds the buffer's location, once in a run, and moves its records there; call it on all ranks.

        Args:
            trainer: the Trainer, in its setup.
            run: the run's state.
            method: the callback's class, for messages.
            name: the callback's name in its Trainer.

        Returns:
            True if the location was found by this call.

        Raises:
            MisconfigurationException: if another callback has its buffer there.
        """
        store = self.buffer.store
        keeps_files = bool(trainer.checkpoint_callbacks) and not trainer.fast_dev_run  # type: ignore[attr-defined]
        wanted = keeps_files or (self.folder is not None and not trainer.fast_dev_run)  # type: ignore[attr-defined]
        if self.found or self.storage == "memory" or not (isinstance(store, DiskStore) or wanted):
            return False
        self.found = True
        folder = Path(self.folder) if self.folder is not None else run_folder(trainer) / "buffers" / name
        self._check_apart(run, folder, method)
        first = trainer.strategy.broadcast(DiskStore.first_free(folder))
        fingerprint = run.data.fingerprint() if run.data is not None else None
        # A store that a checkpoint has opened has no folder yet; a store of an earlier run keeps its folder.
        target = store if isinstance(store, DiskStore) and not store.is_placed else DiskStore(None)
        target.place(folder, first, trainer.is_global_zero)
        if fingerprint is not None:
            target.expect_tokenizer(fingerprint)
        if trainer.world_size > 1:
            # Another run may have taken the number, so rank 0 tells the others the real folder.
            target.expect_in(trainer.strategy.broadcast(target.begin() if trainer.is_global_zero else folder))
        if target is not store:
            self.buffer.move_to(target)
        return True

    def _check_apart(self, run: RunState, folder: Path, method: str) -> None:
        for other in run.methods:
            location = getattr(other, "location", None)
            if not isinstance(location, BufferLocation) or location is self or not location.found:
                continue
            store = location.buffer.store
            if isinstance(store, DiskStore) and store.folder.resolve() == folder.resolve():
                name = run.name_of(other)
                raise MisconfigurationException(
                    f"{method}(folder={str(folder)!r}): {name} has its buffer there; two callbacks cannot own one"
                    " buffer. Give another folder; methods with an argument `buffer` can share it on purpose, by"
                    f" buffer={name!r}"
                )

    def use_earlier(self, trainer: L.Trainer, run: RunState, method: str) -> None:
        """Uses the samples that an earlier run left in the folder; they must fit this run.

        Raises:
            ValueError: if a sample is longer than the run's samples may be.
        """
        self.buffer.adopt()
        longest = max(self.buffer.columns(self.buffer.numbers)["length"], default=0)
        data = run.data
        if data is not None and data.fingerprint() is not None and longest > data.max_length:
            raise ValueError(
                f"{method}(folder={self.folder!r}): a sample there has {longest} tokens, more than"
                f" TaskDataModule(max_length={data.max_length}); give at least {longest}, or another folder"
            )
        trainer.strategy.barrier("adopt")  # no rank writes before all ranks have read

    # ------------------------------------------------------------------ disk space

    def needs(self, task: str, size: int) -> None:
        """Notes that a task's samples take at most `size` bytes."""
        self._needed[task] = size

    def check_room(self, method: str) -> None:
        """Checks before training that the disk has room for the largest task.

        Raises:
            OSError: naming the task, the bytes needed and the bytes left.
        """
        store = self.buffer.store
        if not isinstance(store, DiskStore) or not store.writes or not self._needed:
            return
        task = max(self._needed, key=lambda name: self._needed[name])
        needed, free = self._needed[task], store.free_bytes()
        self._needed.clear()
        if needed > free:
            raise OSError(
                f"{method}: the buffer of task {task!r} takes about {needed:,} bytes, and {store.folder} has"
                f" {free:,} left; give a smaller buffer_size, another folder, or make room"
            )

    # ------------------------------------------------------------------ resume

    def expect(self, kind: str) -> None:
        """Prepares for a checkpoint whose records are in this kind of storage."""
        if self.storage == "disk" and kind == "disk" and not self.found:
            self.buffer.store = DiskStore(None)

    def look_in(self, run: RunState, name: str) -> list[Path]:
        """Returns other folders that may have the buffer's files, since a run's folder can be moved."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            return []
        path = run.checkpoint_path or trainer.ckpt_path
        above = [] if path is None else list(Path(path).absolute().parents)[:4]
        given = [] if self.folder is None else [Path(self.folder)]
        return [*given, *(folder / "buffers" / name for folder in above)]
