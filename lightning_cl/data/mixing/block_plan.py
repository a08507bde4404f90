"""The epochs of one task in packed blocks: each new sample comes once, and all epochs have equally many batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from lightning_cl.arguments import check_integer
from lightning_cl.data.mixing.packing import WINDOW, Block, evenly, evenly_all, pack, pack_mixed, windows_of
from lightning_cl.data.mixing.plan import cuts, plan_batches, seed_of
from lightning_cl.data.mixing.replayed import Samples

SPARE = 2  # more blocks that a later epoch may need than the first


class BlockPlan:
    """The plan of packed blocks: it assigns each block to a batch, on all ranks together.

    New samples are put in one random order per task and packed window by window. Each epoch has these blocks in another
    random order. So all epochs have the same number of batches, which learning-rate schedules rely on.

    Replayed samples differ from epoch to epoch. They are interleaved with the new ones by error diffusion and packed
    together with them. Then blocks are put in an order in which the running share stays near its goal.

    ``replace`` keeps the number of blocks in a batch. An epoch takes about ``1 / (1 − ratio)`` times the batches, if
    replayed samples have the new ones' share of loss-bearing tokens. ``add`` keeps the number of batches that the new
    samples need alone, so a batch has about ``batch_size / (1 − ratio)`` blocks.

    Replay in blocks is inexact in four ways:

    - A block is never divided between batches. So over any sequence of batches, the share of the loss-bearing tokens
      is off by up to about one block; without packing it would be one sample.
    - In ``replace`` mode, all epochs have as many batches as the first, with room for two more blocks. An epoch whose
      replayed samples need more room leaves the last of them out, and its share is a little below the goal. New
      samples are never left out. If an epoch has fewer blocks, its last batches are smaller.
    - A share that changes over the task changes in steps of some blocks (`WINDOW`). All epochs then have as many
      batches as the longest of them needs.
    - If batches have one block, and blocks one sample, an epoch's number of replayed samples is fixed. One sample too
      many or too few is not made up for in the next epoch.

    Args:
        samples: new and replayed samples.
        block_length: the most tokens in a block.
        batch_size: blocks in a batch, over all ranks.
        shuffle: True gives each epoch a random order.
        seed: seed of the order.
        drop_last: leave out a last batch that is not full.
        multiple: in ``add`` mode, the number of blocks of every batch but the last is a multiple of this, so that ranks
            have equal parts.

    Raises:
        TypeError: if the length of samples is not known.
        ValueError: if a sample is longer than a block.
    """

    def __init__(
        self,
        samples: Samples,
        block_length: int,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        multiple: int = 1,
    ) -> None:
        self.samples, self.block_length, self.batch_size = samples, block_length, batch_size
        self.shuffle, self.seed, self.drop_last, self.multiple = shuffle, seed, drop_last, multiple
        self.lengths = _checked_lengths(samples, block_length)
        order = list(range(len(samples.new)))
        if shuffle:
            order = torch.randperm(len(order), generator=self._generator(-1)).tolist()
        self.windows = windows_of(order, self.lengths, WINDOW * block_length)
        self.new_blocks = pack(self.windows, self.lengths, block_length)
        self.length = self._full(len(self.new_blocks))
        if samples.replays and samples.mode == "replace" and order:
            needed = 0
            for epoch in range(1 if samples.is_constant else max(math.ceil(samples.epochs), 1)):
                blocks = self._mixed(epoch)
                divisible = sum(map(len, blocks)) - len(blocks)
                needed = max(needed, len(blocks) + (0 if drop_last else min(SPARE, divisible)))
            self.length = max(self.length, self._full(needed))

    def __len__(self) -> int:
        return self.length

    def batches(self, epoch: int) -> list[list[Block]]:
        """The batches of one epoch, each a list of blocks."""
        samples = self.samples
        if not samples.replays or self.length == 0:
            return plan_batches(self._shuffled(self.new_blocks, epoch), self.batch_size, self.drop_last)
        room = self.length * self.batch_size
        if samples.mode == "add":
            blocks = self._mixed(epoch, least=len(self.new_blocks))
        elif self.drop_last:
            blocks = self._mixed(epoch, least=room)
        else:
            blocks = self._mixed(epoch, least=self.length, most=room)
        blocks = self._in_order(blocks, epoch)
        if samples.mode == "replace":
            return [blocks[begin:end] for begin, end in cuts(min(len(blocks), room), self.length, self.batch_size)]
        # With drop_last, only the share of the blocks that full batches make up among the new samples' blocks.
        end = len(blocks) * room // len(self.new_blocks) if self.drop_last else len(blocks)
        share = self.length * self.multiple
        ends = [-(-end * i // share) * self.multiple for i in range(self.length)] + [end]  # rounded up: none is empty
        return [blocks[begin:end] for begin, end in pairwise(ends)]

    def _in_order(self, blocks: list[Block], epoch: int) -> list[Block]:
        """Shuffles the blocks, then orders them so that the running share of each source stays near its goal."""
        if self.samples.is_constant:
            goals = [mix.curve.at(0.0) for mix in self.samples.mixes]
            return self._spread(self._shuffled(blocks, epoch), goals)
        # The share changes over the epoch. So only neighbouring blocks, whose share is similar, are shuffled with each
        # other.
        ordered: list[Block] = []
        for start in range(0, len(blocks), WINDOW):
            window = blocks[start : start + WINDOW]
            weights = [sum(parts) for parts in zip(*map(self._weights, window), strict=True)]
            goals = [weight / max(sum(weights), 1) for weight in weights[1:]]
            ordered += self._spread(self._shuffled(window, epoch), goals)
        return ordered

    def _spread(self, blocks: list[Block], goals: list[float]) -> list[Block]:
        def surplus(block: Block) -> list[float]:
            weights = self._weights(block)
            return [weight - goal * sum(weights) for weight, goal in zip(weights[1:], goals, strict=True)]

        if len(goals) == 1:
            return evenly(blocks, lambda block: surplus(block)[0])
        return evenly_all(blocks, surplus)

    def _weights(self, block: Block) -> list[int]:
        """The weight of the block's new samples, then the weight of its samples from each source."""
        weights = [0] * (len(self.samples.mixes) + 1)
        for index in block:
            weights[self.samples.source_of(index)] += self.samples.weight(index)
        return weights

    def _full(self, blocks: int) -> int:
        return blocks // self.batch_size if self.drop_last else math.ceil(blocks / self.batch_size)

    def _shuffled(self, blocks: list[Block], epoch: int) -> list[Block]:
        if not self.shuffle:
            return blocks
        return [blocks[i] for i in torch.randperm(len(blocks), generator=self._generator(epoch)).tolist()]

    def _mixed(self, epoch: int, least: int = 0, most: int | None = None) -> list[Block]:
        samples = self.samples
        # Error diffusion already balances loss-bearing tokens. Balancing the others keeps epochs of similar length.
        sources = samples.sources(epoch, balance_tokens=True)
        span = samples.span(epoch)
        return pack_mixed(self.windows, sources, samples.weight, self.lengths, self.block_length, span, least, most)

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(self.seed, epoch))


def _checked_lengths(samples: Samples, block_length: int) -> Sequence[int]:
    check_integer("block_length", block_length, 2)
    if not hasattr(samples.new, "length"):
        raise TypeError(
            f"block_length={block_length}: packing needs a data set that tells the tokens of its samples by"
            f" length(index), as TokenDataset does; a {type(samples.new).__name__} does not"
        )
    lengths = samples.lengths
    if lengths is None:
        raise TypeError(
            f"block_length={block_length}: packing needs token sequences, and a replayed sample is none; expected a"
            " dictionary with `input_ids` and `loss_mask`"
        )
    start = len(samples.new)
    for index, length in enumerate(lengths):
        if length > block_length:
            name = f"sample {index}" if index < start else f"replayed sample {index - start}"
            raise ValueError(
                f"{name} has {length} tokens, more than block_length={block_length}: expected blocks of at least the"
                " longest sample, as when block_length is the length that texts are cut to"
            )
    return lengths
