"""The losses whose squared single-sample gradients give a Fisher estimate, for any module and whole batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.functional.ewc import expected_label_losses_of_batch, label_loss, sampled_label_loss
from lightning_cl.passes.logits import LogitsReader, OutputsFunction, aligned, loss_positions
from lightning_cl.passes.passes import training_loss

Estimator = Literal["auto", "sample", "empirical", "exact", "batched"]
ESTIMATORS = ("auto", "sample", "empirical", "exact", "batched")
_EXACT_LIMIT = 4096
# `auto` makes at most this many backward passes for a Fisher without the noise of drawn labels.
_EXACT_BY_ITSELF = 32


class FisherLosses:
    """``losses_of(batch, numbers)`` for :func:`~lightning_cl.passes.sample_sums.sum_over_samples`.

    Args:
        trainer: inside ``fit``.
        pl_module: the module.
        estimator: the source of the labels (:mod:`lightning_cl.functional.ewc`).
        outputs: a user's function that gives logits, or None.
        seed: seed of the sampled labels. Every sample has its own generator, so that its labels do not depend on
            batches and ranks.
        owner: the callback's name, for messages.

    Attributes:
        used: the estimators that were really used.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        estimator: str,
        outputs: OutputsFunction | None,
        seed: int,
        owner: str,
    ) -> None:
        self.trainer, self.module, self.estimator = trainer, pl_module, estimator
        self.seed, self.owner = seed, owner
        self.read_logits = LogitsReader(trainer, pl_module, outputs)
        self.used: set[str] = set()
        self._shifted: bool | None = None

    def __call__(self, batch: Any, numbers: list[int]) -> tuple[Iterable[Tensor], int]:
        """Returns scalars, each a sum over the batch's samples, and the number of positions that bear loss."""
        if self.estimator in ("empirical", "batched"):
            return self._with_data_labels(batch, numbers)
        logits = self.read_logits(batch)
        if logits is None:
            if self.estimator != "auto":
                raise MisconfigurationException(
                    f"{self.owner}(estimator={self.estimator!r}): nothing that {type(self.module).__name__} calls"
                    f" returns an object with `.logits`; give {self.owner}(outputs=lambda module, batch: logits), or"
                    " estimator='empirical'"
                )
            return self._with_data_labels(batch, numbers)
        selected, samples, mask = select(batch, logits, self.read_logits.shifted)
        most = int(torch.bincount(samples).max()) if len(samples) else 0
        # Without tokens, all samples have equally many positions, so the decision is the same for all batches.
        is_small = mask is None and most * selected.shape[-1] <= _EXACT_BY_ITSELF
        if self.estimator == "exact" or (self.estimator == "auto" and is_small):
            self.used.add("exact")
            if most * selected.shape[-1] > _EXACT_LIMIT:
                raise MisconfigurationException(
                    f"{self.owner}(estimator='exact'): a sample has {most} positions with {selected.shape[-1]}"
                    f" classes, one backward pass each, more than {_EXACT_LIMIT}; use estimator='sample'"
                )
            return expected_label_losses_of_batch(selected, samples), len(selected)
        self.used.add("sample")
        counts = torch.bincount(samples, minlength=len(numbers)).tolist()
        uniform = [
            torch.rand(count, generator=torch.Generator().manual_seed(1 + self.seed * 1_000_003 + number))
            for count, number in zip(counts, numbers, strict=True)
        ]
        return [sampled_label_loss(selected, uniform=torch.cat(uniform))], len(selected)

    def _with_data_labels(self, batch: Any, numbers: list[int]) -> tuple[Iterable[Tensor], int]:
        self.used.add("empirical" if self.estimator == "auto" else self.estimator)
        if callable(getattr(type(self.module), "batch_logits", None)) and "labels" in batch:
            logits = self.read_logits(batch)
            assert logits is not None
            selected, _, mask = select(batch, logits, self.read_logits.shifted)
            if mask is not None:
                labels = batch["labels"][:, 1:] if self.read_logits.shifted else batch["labels"]
                return [label_loss(selected, labels[mask])], len(selected)
        if self._shifted is None:
            with torch.no_grad():
                self.read_logits(batch)
            self._shifted = self.read_logits.shifted
        loss = training_loss(self.trainer, self.module, batch)
        if loss is None:
            return [], 0
        mask = loss_positions(batch, shifted=self._shifted)
        count = int(mask.sum()) if mask is not None else len(numbers)
        # The Fisher is defined with the sum over tokens or samples, which is their mean times their number.
        return [loss * count], count


def select(batch: Any, logits: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of the positions that bear loss.

    Returns:
        the logits ``[positions, classes]``; for each position the index of its sample in the batch; and the mask
        ``[samples, length]`` that selected them. Without tokens, all positions count and the mask is None.
    """
    logits = aligned(batch, logits, shifted)
    mask = loss_positions(batch, logits, shifted)
    if mask is not None:
        return (logits[:, :-1] if shifted else logits)[mask], mask.nonzero()[:, 0], mask
    flat = logits.flatten(0, -2)
    each = len(flat) // max(len(logits), 1)
    samples = torch.arange(len(logits), device=logits.device).repeat_interleave(each)
    return flat, samples, None
