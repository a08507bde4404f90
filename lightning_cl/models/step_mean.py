"""The mean over all tokens of an optimizer step, where its batches are accumulated or spread over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_cl.lightning_internals import completes_step

MeanOver = Literal["step", "batch"]


class StepMean:
    """Weights that make the mean of batch means into the mean over all tokens of an optimizer step.

    Batch b of process r has ``n_rb`` tokens that bear loss, with the sum of losses ``s_rb``. Lightning accumulates k
    batches and takes the mean over W processes: ``1/(k W) Σ_rb s_rb / n_rb``, in which a batch with few tokens weighs
    as much as any other. A last window with m < k batches is divided by k too, and so its gradient is too small. The
    gradient here is that of ``Σ_rb s_rb / N`` with ``N = Σ_rb n_rb``, in two parts:

    * before the backward pass, a batch's loss is multiplied by ``n_rb / ñ``, where ``ñ`` is the mean over the processes
      for the first batch of the window;
    * after the window's last backward pass, the gradients are multiplied by ``k W ñ / N``.

    Terms that methods add to a batch's loss are weighted alike. Penalties come later and are not: their proportion to
    the loss is the same in every window, also in a last one that is cut off. Without accumulation the second factor is
    1, and so is the first in one process. Batches with equal numbers of tokens give both factors 1 in a whole window:
    nothing is multiplied then.

    Memory: none. Compute: one number is summed over the processes per batch, and one pass over the gradients per window
    whose batches differ.
    """

    def __init__(self) -> None:
        self._tokens: list[float] = []  # of all processes, of each batch of the window
        self._is_complete = False
        self._weight = 1.0

    def begin(self) -> None:
        """Forgets a window that was not ended, at the start of a training."""
        self._tokens, self._weight = [], 1.0

    def begin_batch(self, trainer: L.Trainer, batch: Any) -> None:
        """Counts the tokens of a batch that bear loss; call it on all processes, before the batch's forward pass.

        Args:
            trainer: in training.
            batch: with ``labels`` ``[batch, length]``, −100 where there is no loss; with no such entry, each batch
                weighs as much as any other.
        """
        self._weight = 1.0
        if self._is_complete:  # not sooner: some optimizers compute a window's last batch several times
            self._tokens, self._is_complete = [], False
        if trainer.world_size == 1 and trainer.accumulate_grad_batches == 1:
            return
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            self._tokens.clear()
            return
        mine = (labels[:, 1:] != -100).sum().double()
        everyone = mine if trainer.world_size == 1 else trainer.strategy.reduce(mine.clone(), reduce_op="sum")
        self._tokens.append(float(everyone))
        first = self._tokens[0] / trainer.world_size
        self._weight = float(mine) / first if first else float(mine)

    def weighted(self, loss: Tensor) -> Tensor:
        """Returns the loss of the current batch, multiplied by the batch's weight."""
        return loss if self._weight == 1.0 else loss * self._weight

    def end_batch(self, trainer: L.Trainer, parameters: Any) -> None:
        """Scales the gradients after the last backward pass of a window; call it after each of them.

        Args:
            trainer: in training.
            parameters: those with gradients.
        """
        if not self._tokens or not completes_step(trainer):
            return
        self._is_complete = True
        total, window = sum(self._tokens), trainer.accumulate_grad_batches
        factor = window * (self._tokens[0] or float(trainer.world_size)) / total if total else 1.0
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
