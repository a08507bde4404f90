"""The order of an epoch: it assigns each sample, new or replayed, to a batch of all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_cl.data.mixing.block_plan import BlockPlan
from lightning_cl.data.mixing.packing import bucketed_order
from lightning_cl.data.mixing.plan import cuts, interleave, mixed_length, plan_batches, plan_mixed_batches, seed_of
from lightning_cl.data.mixing.replayed import Samples


class EpochPlan:
    """Plan of a task's epochs as lists of indices, from seeds alone or from the user's own sampler.

    Args:
        samples: new and replayed samples by index.
        size: samples in a batch of all ranks; with packing, blocks.
        shuffle: True gives each epoch a random order (from `seed`).
        seed: seed of the order.
        sampler: a user's sampler that gives the order instead.
        drop_last: leave out a last batch that is not full.
        block_length: pack samples into blocks of at most this many tokens.
        buckets: True: samples of a batch have similar length.
        world_size: number of processes; in ``add`` mode, the replayed samples of a batch are a multiple of it.
        broadcast: sends rank 0's order to all ranks.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        *,
        shuffle: bool,
        seed: int,
        sampler: Any,
        drop_last: bool,
        block_length: int | None,
        buckets: bool,
        world_size: int,
        broadcast: Callable[[Any], Any] | None,
    ) -> None:
        self.samples, self.size, self.world_size = samples, size, world_size
        self.shuffle, self.seed, self.drop_last, self.buckets = shuffle, seed, drop_last, buckets
        self._sampler, self._broadcast = sampler, broadcast
        self._blocks: BlockPlan | None = None
        if block_length is not None:
            self._blocks = BlockPlan(
                samples, block_length, size, shuffle=shuffle, seed=seed, drop_last=drop_last, multiple=world_size
            )

    def length(self, indices: Callable[[], Sequence[int]]) -> int:
        """Returns the number of batches in an epoch.

        Args:
            indices: a function that gives the indices of the samples that the loader can give; they tell the weight.
        """
        if self._blocks is not None:
            return len(self._blocks)
        samples = len(self._sampler) if self._sampler is not None else len(self.samples.new)
        if self.samples.replays and self.samples.mode == "replace":
            # A sampler may leave samples out or repeat them, so their mean weight is used.
            weight = samples * self.samples.mean_weight(indices())
            return mixed_length(samples, weight, self.samples.sources(0), self.size, self.drop_last)
        return samples // self.size if self.drop_last else math.ceil(samples / self.size)

    def batches(self, epoch: int, indices: Callable[[], Sequence[int]]) -> list[list[Any]]:
        """Returns the epoch's batches of all ranks: lists of indices, or of blocks (tuples of indices).

        Args:
            epoch: number of the epoch.
            indices: as for :meth:`length`.
        """
        samples = self.samples
        if self._blocks is not None:
            return self._blocks.batches(epoch)
        if not samples.replays:
            return plan_batches(self._order(epoch), self.size, self.drop_last)
        if samples.mode == "replace" and not samples.is_constant and samples.epochs > 1:
            return self._part_of_task(epoch, self.length(indices))
        return plan_mixed_batches(
            self._order(epoch),
            samples.sources(epoch),
            samples.weight,
            self.size,
            samples.mode,
            samples.span(epoch),
            self.drop_last,
            length=self.length(indices) if samples.mode == "replace" else None,
            multiple=self.world_size,
        )

    def _part_of_task(self, epoch: int, length: int) -> list[list[int]]:
        """Plans an epoch of a task in which the replayed share changes.

        Epochs have equally many batches, but passes over the new samples do not. So all passes are planned one after
        the other, and each epoch is a part of that sequence.
        """
        samples, size = self.samples, self.size
        epochs = max(math.ceil(samples.epochs), epoch + 1)
        slots: list[int] = []
        for number in range(epochs):
            order = self._order(number)
            room = (epochs * length * size - len(slots) - len(order)) if number == epochs - 1 else None
            groups = interleave(order, samples.sources(number), samples.weight, samples.span(number), room)
            slots += [index for group in groups for index in group]
        if samples.epochs == int(samples.epochs):
            ends = list(cuts(len(slots), epochs * length, size))[epoch * length : (epoch + 1) * length]
            return [slots[begin:end] for begin, end in ends]
        return plan_batches(slots, size)[epoch * length : (epoch + 1) * length]  # the task ends within its last epoch

    def _order(self, epoch: int) -> list[int]:
        """Returns the order of the new samples in an epoch."""
        if self._sampler is not None:
            if hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(epoch)
            order = list(self._sampler)
            return self._broadcast(order) if self._broadcast is not None and self.world_size > 1 else order
        if not self.shuffle:
            return list(range(len(self.samples.new)))
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        order = torch.randperm(len(self.samples.new), generator=generator).tolist()
        if not self.buckets:
            return order
        return bucketed_order(order, self.samples.lengths_of_new, self.size, seed_of(self.seed, epoch, 1))
