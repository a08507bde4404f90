"""The draw from a buffer: which samples, and how often.

* ``uniform``: every sample as often as any other.
* ``task``: every task has the same share of the replayed tokens, however many samples of it are stored.
* ``proportional``: a task's share is that of all samples that were ever offered, not of those that are stored.
* ``recency``: a task has half the share of the task after it: what was learnt last is refreshed most.
* ``interfered``: those whose loss has risen most since they were last looked at
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
_CHUNK = 8192  # samples that are laid out at once: a pass over a million takes no longer to begin than one over these


class Group(NamedTuple):
    """Samples that are drawn equally often.

    Attributes:
        members: by index.
        share: of the weight of everything that is drawn.
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
        draw: how.
        buffer: what was offered to it is asked for ``proportional``.
        tasks: of each sample in it the task, as a number that rises with the tasks' order.
        start: index of its first sample.
        weight_of: the total weight of samples.
    """
    if draw == "uniform" or draw == "interfered" or len(set(tasks)) < 2:
        return [Group(range(start, start + len(tasks)), 1.0)]
    members: dict[int, list[int]] = {task: [] for task in sorted(set(tasks))}
    for place, task in enumerate(tasks):
        members[task].append(start + place)
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
    """An endless stream: pass after pass over each group, from a random start; groups by their shares.

    Args:
        groups: to draw from.
        weight: of a sample.
        balance: every stretch of a group's draws has nearly the mean of this.
        seed: of the order.
    """
    streams = [_passes(group.members, balance, seed if i == 0 else seed_of(seed, i)) for i, group in enumerate(groups)]
    if len(streams) == 1:
        yield from streams[0]
    generator = torch.Generator().manual_seed(seed_of(seed, -1))
    # Where each group stands at first is random, so that a short epoch does not always begin with the same one.
    owed = [float(torch.rand((), generator=generator)) * group.share for group in groups]
    following = [next(stream) for stream in streams]
    while True:
        place = max(range(len(groups)), key=lambda i: owed[i])
        drawn, following[place] = following[place], next(streams[place])
        cost = max(weight(drawn), 1)
        for i, group in enumerate(groups):
            owed[i] += group.share * cost
        owed[place] -= cost
        yield drawn


def _passes(members: Sequence[int], balance: Callable[[int], float], seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(members), generator=generator)
    chunk = [members[i] for i in order[:_CHUNK].tolist()]
    cycle = balanced_order(chunk, balance)
    # What fits badly comes late: from a random place of the cycle, every sample is as likely as any other.
    start = int(torch.randint(len(cycle), (), generator=generator))
    while True:
        yield from cycle[start:]
        yield from cycle[:start]
        for begin in range(_CHUNK, len(members), _CHUNK):
            yield from balanced_order([members[i] for i in order[begin : begin + _CHUNK].tolist()], balance)
