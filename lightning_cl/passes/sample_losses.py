"""The loss of each of some samples, in evaluation mode and without a trace in module or training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_cl.passes.fisher_losses import select
from lightning_cl.passes.logits import LogitsReader
from lightning_cl.passes.passes import leaving_no_trace, training_loss
from lightning_cl.passes.task_samples import TaskSamples

_TOKENS = 2048  # of a batch: all their logits exist at once


@torch.no_grad()
def sample_losses(
    trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, *, first: int, end: int, seed: int
) -> Tensor:
    """Returns the losses ``[end − first]`` of samples number `first` to `end` of a random order, on all ranks.

    The loss of a sequence is the mean of its tokens' losses. A module with ``batch_logits``, whose batches have one
    label a position, is asked for whole batches; any other for the ``training_step`` of one sample after the other. The
    ranks share the samples.

    Memory: the logits of about 2,048 tokens. Compute: a forward pass over each sample.

    Args:
        trainer: inside a fit.
        pl_module: the module.
        loader: has the samples, by index.
        first: number of the first sample.
        end: number after the last sample; at most the size of the data set.
        seed: seed of the order.

    Raises:
        MisconfigurationException: if ``training_step`` returns no loss.
    """
    found = torch.zeros(end - first, dtype=torch.float64, device=trainer.strategy.root_device)
    samples = TaskSamples(trainer, end, seed, "", loader, _rows(loader), first=first, quiet=True)
    with leaving_no_trace(pl_module):
        if callable(getattr(type(pl_module), "batch_logits", None)) and _has_labels(samples.one()):
            read_logits = LogitsReader(trainer, pl_module, None)
            for numbers, batch in samples.batches():
                found[[number - first for number in numbers]] = _batch_losses(read_logits, batch, len(numbers)).to(
                    found
                )
        else:
            for number, batch in samples.singles():
                loss = training_loss(trainer, pl_module, batch)
                if loss is None:
                    raise MisconfigurationException(
                        f"{type(pl_module).__name__}.training_step returns no loss for a sample that a task's losses"
                        " are to be measured on"
                    )
                found[number - first] = loss.detach().to(found)
    summed: Tensor = trainer.strategy.reduce(found, reduce_op="sum")
    return summed.cpu()


def _rows(loader: Any) -> int | None:
    """Returns the samples of a batch whose logits are no burden; None where lengths are not known."""
    length_of = getattr(loader.dataset, "length", None)
    longest = max((length_of(index) for index in range(len(loader.dataset))), default=1) if length_of else None
    longest = getattr(loader, "block_length", None) or longest
    return None if longest is None else max(1, _TOKENS // longest)


def _has_labels(batch: Any) -> bool:
    labels, ids = (batch.get(key) if isinstance(batch, Mapping) else None for key in ("labels", "input_ids"))
    return isinstance(labels, Tensor) and isinstance(ids, Tensor) and labels.shape == ids.shape


def _batch_losses(read_logits: LogitsReader, batch: Any, count: int) -> Tensor:
    """Returns the mean loss of each sample's labels, ``[count]``; 0 for a sample without any."""
    logits = read_logits(batch)
    assert logits is not None
    selected, owners, mask = select(batch, logits, read_logits.shifted)
    labels = batch["labels"][:, 1:] if read_logits.shifted else batch["labels"]
    losses = F.cross_entropy(selected.float(), labels[mask], reduction="none").double()
    sums = torch.zeros(count, dtype=torch.float64, device=losses.device).index_add_(0, owners, losses)
    return sums / torch.bincount(owners, minlength=count).clamp(min=1)
