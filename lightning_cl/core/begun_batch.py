"""The batch that is being trained on: what a checkpoint needs, when it is written inside, to begin the batch anew."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_cl.core.loops import batches_in_flight, batches_of_open_window, batches_ready
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.random_state import get_random_state

_FEW = 1_000_000


class BegunBatch:
    """State from the beginning of a batch, which a checkpoint contains if an exception interrupts the batch.

    Memory: a copy of the module's buffers (running statistics) where they have at most a million numbers, and only
    where an exception leads to a checkpoint. Compute: that copy, once per batch.

    Attributes:
        content: the batch as the module gets it; None between batches.
    """

    def __init__(self) -> None:
        self.content: Any = None
        self._number = 0  # of the batch, as Lightning counted when the loader was told of it
        self._moved = False  # True as soon as the weights have moved
        self._start: dict[str, Any] | None = None

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """A batch is about to be trained on."""
        self.content, self._moved = batch, False
        # If an exception leads to a checkpoint, its batch is trained on anew, with the random numbers and running
        # statistics from the batch's beginning.
        self._start = _state_of(pl_module) if saves_on_exception(trainer) else None

    def loader_told(self, trainer: L.Trainer) -> None:
        """The loader was told of this batch."""
        self._number = batches_ready(trainer)

    def weights_moved(self) -> None:
        """The optimizer has stepped."""
        self._moved = True

    def end(self) -> None:
        """The batch is trained on."""
        self.content = self._start = None

    def state(self, trainer: L.Trainer) -> dict[str, Any] | None:
        """Returns the ``random`` states and ``buffers`` from the start of a batch that was cut off.

        None where no batch is open, where nothing was kept of its start, or where the weights have moved since.
        """
        return self._start if batches_in_flight(trainer) and not self._moved else None

    def why_inexact(self, trainer: L.Trainer) -> str | None:
        """Returns the reason why a run that resumes from here is not the one that was stopped, bit for bit."""
        if batches_in_flight(trainer):
            if self._moved:
                return "inside a step, when the weights had moved already"
            if self._start is None or self._start["buffers"] is None:
                return "inside a step, of which the beginning was not kept"
        window = batches_of_open_window(trainer)
        return f"inside an accumulation window: the gradients of {window} batches are lost" if window else None

    def position_in(self, trainer: L.Trainer, loader: Any) -> dict[str, Any] | None:
        """Returns the loader's position after the last batch that was trained on; None where it knows none."""
        if not isinstance(loader, TaskBatches):
            return None
        # An exception in another callback's hook can come before a stream was told of a batch.
        told = not loader.is_stream or self._number == batches_ready(trainer)
        return loader.position(batches_in_flight(trainer) if told else 0)


def _state_of(pl_module: L.LightningModule) -> dict[str, Any]:
    """Returns all that a forward pass changes: random states, and running statistics where they are few."""
    buffers = dict(pl_module.named_buffers())
    are_few = sum(buffer.numel() for buffer in buffers.values()) <= _FEW
    kept = {name: buffer.detach().clone() for name, buffer in buffers.items()} if are_few else None
    return {"random": get_random_state(), "buffers": kept}


def saves_on_exception(trainer: L.Trainer) -> bool:
    """Tells if an exception leads to a checkpoint."""
    return any(
        isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
        for callback in trainer.checkpoint_callbacks
    )
