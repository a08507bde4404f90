"""Base of methods with a buffer: its location, its state, and its part of the report."""

from __future__ import annotations

from typing import Any

import lightning as L
from typing_extensions import override

from lightning_cl.buffers import DiskStore, ReplayBuffer
from lightning_cl.callbacks.replay.location import BufferLocation, Storage
from lightning_cl.core.method import ContinualCallback

_WORTH_COMPACTING = 1 << 30  # bytes: a buffer of text stays smaller, and all its checkpoints remain valid


class BufferCallback(ContinualCallback):
    """Base of methods with a :class:`~lightning_cl.buffers.ReplayBuffer`; a subclass decides on its content.

    Args:
        buffer: an empty buffer.
        storage: ``disk`` or ``memory`` (RAM).
        folder: folder for the files; default: the run's folder.

    Attributes:
        location: the location of the buffer's records.
    """

    def __init__(self, buffer: ReplayBuffer, storage: Storage, folder: str | None = None) -> None:
        super().__init__()
        self._own = buffer
        self.location = BufferLocation(buffer, storage, folder)

    @property
    def buffer(self) -> ReplayBuffer:
        """Buffer with the stored samples."""
        return self._own

    @property
    def has_own_buffer(self) -> bool:
        """True if the buffer does not belong to another callback."""
        return True

    # ------------------------------------------------------------------ location

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        self.location.begin_run(trainer)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.run.driven:
            self.on_run_start(trainer)
        if self.has_own_buffer and stage == "fit":  # between tasks the loggers give no folder
            self.locate(trainer)

    def locate(self, trainer: L.Trainer) -> bool:
        """Finds the buffer's location, once in a run; returns True if this call found it. Call it on all ranks."""
        return self.location.find(trainer, self.run, type(self).__name__, self.run.name_of(self))

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.location.check_room(type(self).__name__)

    def write_down(self, trainer: L.Trainer) -> None:
        """Makes the buffer's new samples durable, on all ranks."""
        self._own.commit()
        self.hold()
        trainer.strategy.barrier("buffer")
        self._own.compact(_WORTH_COMPACTING, trainer.strategy.broadcast)
        self._own.write_index()
        trainer.strategy.barrier("buffer")

    def hold(self) -> None:
        """Delays the replay of samples that are added from now on, if a method needs it."""

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"buffer": self._own.state_dict()}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.location.expect(state["buffer"]["store"]["kind"])
        self._own.load_state_dict(state["buffer"], self.location.look_in(self.run, self.run.name_of(self)))

    @override
    def state_bytes(self) -> int:
        return self._own.size_in_bytes() if self.has_own_buffer else 0

    @override
    def report(self) -> dict[str, Any]:
        store = self._own.store
        return {
            "policy": self._own.policy_name,
            "buffer_size": self._own.capacity,
            "unit": self._own.unit,
            "storage": "disk" if isinstance(store, DiskStore) else "memory",
            "folders": [str(f) for f in store.folders if f.is_dir()] if isinstance(store, DiskStore) else [],
            "stored": self._own.counts(),
            "seen": self._own.seen,
        }
