"""Length buckets: batches of samples of like length, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

WINDOW = 64  # batches that are sorted together: with it, 95 % and more of the padding goes


def bucketed_order(
    order: Sequence[int], lengths: Sequence[int], batch_size: int, seed: int, window: int = WINDOW
) -> list[int]:
    """An order of the same samples in which those of one batch are of like length.

    The order is cut into windows of some batches; within a window samples are sorted by length and cut into batches
    again; then all batches are shuffled. What does not fill a batch stays at the end: the last samples of `order`, so
    that long ones are not put last, or dropped, more often than others.

    Args:
        order: samples by index, shuffled.
        lengths: tokens of each sample.
        batch_size: samples in a batch (over all ranks).
        seed: seed of the order of the batches.
        window: batches in a window.
    """
    full = len(order) - len(order) % batch_size
    batches: list[list[int]] = []
    for start in range(0, full, window * batch_size):
        alike = sorted(order[start : min(start + window * batch_size, full)], key=lambda index: lengths[index])
        batches += [alike[i : i + batch_size] for i in range(0, len(alike), batch_size)]
    shuffled = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return [index for place in shuffled for index in batches[place]] + list(order[full:])
