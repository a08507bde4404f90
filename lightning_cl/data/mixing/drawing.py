"""The draw from a buffer: it decides which samples are replayed, and how often.

* ``uniform``: every sample is drawn equally often.
* ``task``: every task has the same share of the replayed tokens, whatever its number of stored samples.
* ``proportional``: a task's share is its share of all samples that were ever offered to the buffer.
* ``recency``: a task has half the share of the task after it, so the latest tasks are replayed most.
* ``interfered``: samples whose loss has risen most since they were last measured
  (:mod:`lightning_cl.callbacks.replay.interference`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.mixing.plan import balanced_order, seed_of

Draw = Literal["uniform", "task", "proportional", "recency", "interfered"]
DRAWS: tuple[str, ...] = ("uniform", "task", "proportional", "recency", "interfered")
_CHUNK = 8192  # samples that are ordered at a time, so that a pass over a million samples begins quickly


class Group(NamedTuple):
    """Samples that are drawn equally often.

    Attributes:
        members: indices of the samples.
        share: the group's share of the weight of everything that is drawn.
    """

    members: Sequence[int]
    share: float


def groups_of(
    draw: Draw,
    buffer: ReplayBuffer,
    tasks: Sequence[int],
    start: int,
    weight_of: Callable[[Sequence[int]], float],
) -> list[Group]:
    """The samples of a buffer in groups, with their shares.

    Args:
        draw: the kind of draw.
        buffer: the buffer; for ``proportional`` it tells the number of samples offered.
        tasks: for each sample in the buffer its task, as a number that rises with the tasks' order.
        start: index of the buffer's first sample.
        weight_of: a function that gives the total weight of some samples.
    """
    if draw == "uniform" or draw == "interfered" or len(set(tasks)) < 2:
        return [Group(range(start, start + len(tasks)), 1.0)]
    members: dict[int, list[int]] = {task: [] for task in sorted(set(tasks))}
    for index, task in enumerate(tasks, start):
        members[task].append(index)
    groups = list(members.values())
    if draw == "task":
        sizes = [1.0] * len(groups)
    elif draw == "recency":
        sizes = [2.0**age for age in range(len(groups))]
    else:
        names = [buffer.task_names[task] for task in members]
        sizes = [
            buffer.seen_of[name] * weight_of(group) / len(group) for name, group in zip(names, groups, strict=True)
        ]
    return [Group(group, size / sum(sizes)) for group, size in zip(groups, sizes, strict=True)]


def draws_of(
    groups: Sequence[Group], weight: Callable[[int], int], balance: Callable[[int], float], seed: int
) -> Iterator[int]:
    """An endless stream of draws that makes pass after pass over each group and takes groups by their shares.

    Args:
        groups: the groups to draw from.
        weight: the weight of a sample.
        balance: a value of a sample; any consecutive draws from a group have nearly its mean.
        seed: seed of the order.
    """
    streams = [_passes(group.members, balance, seed if i == 0 else seed_of(seed, i)) for i, group in enumerate(groups)]
    if len(streams) == 1:
        yield from streams[0]
    generator = torch.Generator().manual_seed(seed_of(seed, -1))
    # Each group begins with a random debt, so that short epochs do not always begin with the same group.
    owed = [float(torch.rand((), generator=generator)) * group.share for group in groups]
    following = [next(stream) for stream in streams]
    while True:
        chosen = max(range(len(groups)), key=lambda i: owed[i])
        drawn, following[chosen] = following[chosen], next(streams[chosen])
        cost = max(weight(drawn), 1)
        for i, group in enumerate(groups):
            owed[i] += group.share * cost
        owed[chosen] -= cost
        yield drawn


def _passes(members: Sequence[int], balance: Callable[[int], float], seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(members), generator=generator)
    chunk = [members[i] for i in order[:_CHUNK].tolist()]
    cycle = balanced_order(chunk, balance)
    # Samples that are hard to balance come late in the cycle. From a random start, all samples are equally likely.
    start = int(torch.randint(len(cycle), (), generator=generator))
    while True:
        yield from cycle[start:]
        yield from cycle[:start]
        for begin in range(_CHUNK, len(members), _CHUNK):
            yield from balanced_order([members[i] for i in order[begin : begin + _CHUNK].tolist()], balance)
