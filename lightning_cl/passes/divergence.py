"""The divergence of a module's predictions from those that it makes with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.functional import kl_divergence
from lightning_cl.passes.logits import LogitsReader, OutputsFunction, loss_positions


class Divergence:
    """``KL(reference ‖ now)`` in nats, over the positions of batches that bear loss.

    Use it inside :func:`~lightning_cl.passes.passes.leaving_no_trace` and without gradients.

    Memory: the logits of a batch, twice. Compute: two forward passes over each batch.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        outputs: a user's function that gives the logits, or None.
        owner: name of the callback, for messages.
    """

    def __init__(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: OutputsFunction | None, owner: str
    ) -> None:
        self._trainer, self._module, self._owner = trainer, pl_module, owner
        self._read = LogitsReader(trainer, pl_module, outputs)

    def logits(self, batch: Any) -> tuple[Tensor, bool]:
        """Returns logits ``[positions, classes]`` where there is loss, and True if the positions are tokens.

        Raises:
            MisconfigurationException: if the logits cannot be found.
        """
        logits = self._read(batch)
        if logits is None:
            raise MisconfigurationException(
                f"{self._owner}: nothing that {type(self._module).__name__} calls returns an object with `.logits`;"
                f" give {self._owner}(outputs=lambda module, batch: logits)"
            )
        mask = loss_positions(batch, logits, self._read.shifted)
        if mask is None:
            return logits.flatten(0, -2), False
        return (logits[:, :-1] if self._read.shifted else logits)[mask], True

    def sums(self, as_reference: Callable[[], AbstractContextManager[None]], batches: Iterable[Any]) -> Tensor:
        """Returns sums over the batches of all ranks, ``[4]`` in float64 on the device.

        They are the divergence, the positions, the batches that are token sequences, and the batches that are left out,
        since their divergence is NaN or infinite.
        """
        device = self._trainer.strategy.root_device
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        for batch in batches:
            with as_reference():
                reference, _ = self.logits(batch)
            now, are_tokens = self.logits(batch)
            divergence = kl_divergence(reference, now, reduction="sum").double()
            is_finite = bool(divergence.isfinite())
            found = [float(divergence), len(now), are_tokens, 0] if is_finite else [0, 0, are_tokens, 1]
            sums += torch.tensor(found, dtype=torch.float64, device=device)
        return self._trainer.strategy.reduce(sums, reduce_op="sum")
