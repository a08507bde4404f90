"""A replayed share that is raised while a task is trained: stored samples take the places of planned new ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lightning_cl.data.mixing.plan import seed_of
from lightning_cl.data.mixing.replayed import Samples


class Raised:
    """Shares of the new samples that are replaced, and the batches from which on they are.

    The plan of an epoch stays, and so does its number of batches: the new samples that lose their place are not trained
    on in this epoch. The choice follows from the batch's number and a seed alone, so that a resumed run makes the same.

    Attributes:
        steps: ``[epoch, batch, share]``, in order: from that batch of that epoch on, that share is replaced.
    """

    def __init__(self) -> None:
        self.steps: list[list[float]] = []

    def share_at(self, epoch: int, batch: int) -> float:
        """Returns the share of a batch's new samples that is replaced.

        Args:
            epoch: number of the epoch.
            batch: number of the batch in the epoch, from 0.
        """
        return next((share for e, b, share in reversed(self.steps) if (epoch, batch) >= (e, b)), 0.0)

    def replace(self, rows: Sequence[Any], samples: Samples, epoch: int, batch: int, seed: int) -> list[Any]:
        """Returns a planned batch of all ranks, in which stored samples replace a part of the new ones.

        A replacement is drawn from all that is stored, each record alike.

        Args:
            rows: indices of the samples.
            samples: new and replayed ones by index.
            epoch: number of the epoch.
            batch: number of the batch.
            seed: seed of the choice.
        """
        share, new, end = self.share_at(epoch, batch), samples.starts[0], samples.end
        if share == 0.0 or end == new:
            return list(rows)
        draw = random.Random(seed_of(seed, epoch, batch, 1))
        return [draw.randrange(new, end) if index < new and draw.random() < share else index for index in rows]
