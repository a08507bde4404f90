"""Policies: which samples of a stream stay in a buffer of fixed size.

One mechanism serves all policies. Every sample has a *group* and a *key*. While the buffer is over its budget, the
largest group loses the sample with its largest key. A group never takes in a key above one that it has lost. So a group
has all its samples below a threshold that only falls:

* With random keys each sample of a group is in the buffer with the same probability: reservoir sampling in the form of
  bottom-k sampling (Vitter 1985; Cohen & Kaplan 2007). For budgets in tokens that is so for all samples of one length;
  longer ones are a little less likely where only few fit. After samples were removed, later samples of the stream fill
  their slots, below the same threshold; of k slots, those are favoured by less than one part in k.
* With keys ``−log(u) / w`` it is weighted sampling without replacement (Efraimidis & Spirakis 2006).
* With the time of arrival, negative, it is a queue; with a rank, the best of the ranking stay.
"""

from __future__ import annotations

import math
import random
from typing import Literal, NamedTuple

from lightning_cl.arguments import is_number

_LAST = 1e300  # of keys by weight

PolicyName = Literal["reservoir", "task_balanced", "class_balanced", "fifo", "herding", "k_center", "surprise"]


class Policy(NamedTuple):
    """Rule by which a policy chooses.

    Attributes:
        group: what competes for room among itself: ``all``, the ``task`` or the ``class``.
        key: ``random``, ``weighted``, ``newest`` or a ``rank`` that is given with the sample.
        looks: what has to be known of a sample: ``nothing``, its ``loss`` or its hidden ``states``.
    """

    group: Literal["all", "task", "class"]
    key: Literal["random", "weighted", "newest", "rank"]
    looks: Literal["nothing", "loss", "states"]


POLICIES: dict[str, Policy] = {
    "reservoir": Policy("all", "random", "nothing"),
    "task_balanced": Policy("task", "random", "nothing"),
    "class_balanced": Policy("class", "random", "nothing"),
    "fifo": Policy("all", "newest", "nothing"),
    "herding": Policy("task", "rank", "states"),
    "k_center": Policy("task", "rank", "states"),
    "surprise": Policy("all", "weighted", "loss"),
}


def group_of(policy: Policy, task: str, label: int | None) -> str:
    """The group that a sample competes in.

    Args:
        policy: its policy.
        task: the name of its task.
        label: its class, or None.

    Raises:
        ValueError: if the policy needs a class and there is none.
    """
    if policy.group == "class" and label is None:
        raise ValueError(
            f"policy='class_balanced': a sample of task {task!r} has no class; expected (input, class) or a"
            " dictionary with `label` or `labels`, a whole number"
        )
    return {"all": "", "task": task, "class": str(label)}[policy.group]


def draw_key(policy: Policy, rng: random.Random, seen: int, weight: float, rank: int | None) -> float:
    """The key of the next sample.

    Args:
        policy: how it is made.
        rng: where random numbers come from.
        seen: how many samples came before.
        weight: of a weighted policy: in proportion to what the sample shall be kept.
        rank: of a ranked policy: the sample's position in its group's ranking, from 0.

    Raises:
        ValueError: if a ranked policy gets no rank, or a weight is negative or not finite.
    """
    if policy.key == "random":
        return rng.random()
    if policy.key == "newest":
        return -float(seen)
    if policy.key == "rank":
        if rank is None:
            raise ValueError("rank=None: this policy needs the sample's place in a ranking")
        return float(rank)
    if not (is_number(weight) and weight >= 0):
        raise ValueError(f"weight={weight!r}: expected a finite number of at least 0")
    # 1 − u is in (0, 1]; a weight of 0 comes last of all, and is kept as long as there is room.
    u = rng.random()
    return min(-math.log(1.0 - u) / weight, _LAST) if weight > 0 else _LAST * (1.0 + u)
