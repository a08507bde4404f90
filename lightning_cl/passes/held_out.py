"""Losses of a few fixed samples of a task, which are the same ones at each look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_cl.data.foreign_loader import task_indices, why_not_plannable
from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.logits import loss_positions
from lightning_cl.passes.passes import to_device, training_loss
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.tasks import Task


def held_out_loader(data: TaskDataModule, task: Task) -> Any:
    """Returns the loader of a task's validation data, the first of several; None if there is nothing to measure."""
    loader = data.val_loader(task)
    if isinstance(loader, (dict, list, tuple)):
        loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
    return loader


class FixedSamples:
    """A few samples of a loader, chosen once, and their mean loss under the module's present weights.

    The loss is that of ``training_step`` in evaluation mode: the mean over tokens that bear loss, or over samples where
    there are no tokens. Each rank has its share of the samples, and all ranks get the same mean.

    Memory: the samples, on the device of the module. Compute: one forward pass for each call.

    Args:
        trainer: the Trainer inside ``fit``.
        loader: the loader that has the samples.
        count: number of samples on all ranks; if there are fewer, all of them.
        seed: seed of the choice.
        label: text of the progress display.

    Attributes:
        batches: each batch with the weight of its mean loss, which is the number of its tokens or samples.
    """

    def __init__(self, trainer: L.Trainer, loader: Any, count: int, seed: int, label: str) -> None:
        samples = TaskSamples(trainer, count, seed, label, loader)
        self.batches = [(_weight(batch, len(numbers)), batch) for numbers, batch in samples.batches()]

    @torch.no_grad()
    def sums(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Returns this rank's sum of weighted losses and sum of weights, ``[2]`` in float64.

        Call it inside :func:`~lightning_cl.passes.passes.leaving_no_trace`.
        """
        total = torch.zeros(2, dtype=torch.float64, device=trainer.strategy.root_device)
        for weight, batch in self.batches:
            loss = training_loss(trainer, pl_module, batch) if weight else None
            if loss is not None:
                total[0] += loss.detach().double().mean() * weight
                total[1] += weight
        return total


def mean_losses(
    trainer: L.Trainer, pl_module: L.LightningModule, samples: dict[str, FixedSamples]
) -> Iterator[tuple[str, float]]:
    """Gives the mean loss of each set of samples over all ranks, after one exchange; NaN where nothing bears loss."""
    sums = torch.stack([fixed.sums(trainer, pl_module) for fixed in samples.values()])
    for name, (total, weight) in zip(samples, trainer.strategy.reduce(sums, reduce_op="sum").tolist(), strict=True):
        yield name, total / weight if weight else float("nan")


def _weight(batch: Any, rows: int) -> int:
    positions = loss_positions(batch)
    return rows if positions is None else int(positions.sum())


def same_on_all_ranks(trainer: L.Trainer, loader: Any, count: int, seed: int, rows: int) -> list[Any]:
    """Returns batches of `rows` of the same `count` samples on every rank, on its device.

    Raises:
        TypeError: if the samples of this loader cannot be chosen by index, as those of a stream.
    """
    reason = why_not_plannable(loader)
    if reason is not None:
        raise TypeError(reason)
    indices = task_indices(loader)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    groups = [order[start : start + rows] for start in range(0, len(order), rows)]
    dataset, collate = loader.dataset, loader.collate_fn
    return [to_device(trainer, collate([dataset[indices[position]] for position in group])) for group in groups]
