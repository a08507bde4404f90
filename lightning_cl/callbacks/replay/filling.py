"""Filling of a buffer with a task's samples, the same on all ranks and without removed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.store import was_removed
from lightning_cl.buffers.tokens import label_of
from lightning_cl.callbacks.replay.ranking import losses_of, ranking_of
from lightning_cl.data.foreign_loader import task_indices
from lightning_cl.data.mixing.contents import Trained
from lightning_cl.passes.passes import progress
from lightning_cl.tasks import TaskPosition

Extras = Callable[[Sequence[Any]], list[dict[str, Tensor]]]
"""Tensors to be stored next to samples."""


def cost_of(buffer: ReplayBuffer, dataset: Any, index: int) -> int:
    """Returns a sample's share of the buffer's budget; it is not loaded if its length is known."""
    length_of = getattr(dataset, "length", None)
    if buffer.unit == "samples":
        return 1
    return buffer.cost(dataset[index]) if length_of is None else buffer.cost_of_tokens(length_of(index))


def offer_batch(trainer: L.Trainer, buffer: ReplayBuffer, task: str, trained: Trained, extras: Extras | None) -> None:
    """Offers the new samples of a batch.

    Args:
        trainer: inside ``fit``.
        buffer: the buffer, which takes some of them.
        task: the name of their task.
        trained: the samples.
        extras: gives tensors to store next to them.
    """
    chosen: dict[int, int] = {}
    for position in range(len(trained)):
        sample = trained.sample(position)
        label = label_of(sample) if buffer.policy.group == "class" else None
        slot = buffer.choose_slot(task, buffer.cost(sample), label)
        if slot is not None:
            chosen[slot] = position
    keep(trainer, buffer, task, chosen, trained.sample, position_of=trained.index, extras=extras)


def offer_task(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    loader: Any,
    buffer: ReplayBuffer,
    task: TaskPosition,
    seed: int,
    owner: str,
    extras: Extras | None,
) -> None:
    """Offers a task's training set, in its own order.

    Args:
        trainer: inside ``fit``.
        pl_module: gives the samples' losses or hidden states, if the policy needs them.
        loader: the task's loader.
        buffer: the buffer, which takes some of them.
        task: the task.
        seed: seed for the candidates of a ranking.
        owner: the callback's name, for the progress display.
        extras: gives tensors to store next to samples.
    """
    indices, dataset, policy = task_indices(loader), loader.dataset, buffer.policy
    weights: dict[int, float] = {}
    ranks: dict[int, int] = {}
    if policy.looks == "loss":
        weights = losses_of(trainer, pl_module, loader, indices, f"{owner}: surprise of {task}")
    elif policy.looks == "states":
        most = _room_of_one_more_task(buffer) if buffer.unit == "samples" else len(indices)
        label = f"{owner}: hidden states of {task}"
        ranks = ranking_of(trainer, pl_module, loader, indices, buffer.policy_name, most, seed, label)
        buffer.seen_of[task.name] += len(indices) - len(ranks)  # the others count as seen, and are left out
        indices = [index for index in indices if index in ranks]
    chosen: dict[int, int] = {}
    for index in indices:
        group = label_of(dataset[index]) if policy.group == "class" else None
        cost = cost_of(buffer, dataset, index)
        slot = buffer.choose_slot(task.name, cost, group, weights.get(index, 1.0), ranks.get(index))
        if slot is not None:
            chosen[slot] = index  # a later sample may take the same slot: only the last one is loaded
    label = f"{owner}: keeping samples of {task}"
    keep(trainer, buffer, task.name, chosen, dataset.__getitem__, extras=extras, label=label)


def _room_of_one_more_task(buffer: ReplayBuffer) -> int:
    """Returns the most samples that a task can have if tasks share equally; a ranking need not be longer."""
    left, counts = buffer.capacity, sorted(buffer.counts().values())
    for number, count in enumerate(counts):
        share = -(-left // (len(counts) - number + 1))
        if count >= share:
            return share
        left -= count
    return left


def keep(
    trainer: L.Trainer,
    buffer: ReplayBuffer,
    task: str,
    chosen: dict[int, int],
    load: Callable[[int], Any],
    *,
    position_of: Callable[[int], int] = int,
    extras: Extras | None = None,
    label: str | None = None,
) -> None:
    """Stores the chosen samples, in the order of their positions.

    Args:
        trainer: for the progress display.
        buffer: the buffer that has chosen.
        task: the name of the samples' task.
        chosen: the buffer's slots, each with the position of its sample. A sample that has lost its slot since is left
            out.
        load: gives the sample at a position.
        position_of: gives the index in the task's data for such a position; by default, the same number.
        extras: gives tensors to store next to samples.
        label: text of the progress display; None: no display.
    """
    slots = sorted((slot for slot in chosen if buffer.is_waiting(slot)), key=chosen.__getitem__)
    if buffer.store.removed:
        for slot in [slot for slot in slots if was_removed(buffer.store, load(chosen[slot]))]:
            buffer.give_back(slot)
            slots.remove(slot)
    if not buffer.store.writes:
        buffer.put_expected(slots)
        return
    size = 1 if extras is None else 64
    groups = [slots[start : start + size] for start in range(0, len(slots), size)]
    for group in groups if label is None else progress(trainer, groups, label):
        samples = [load(chosen[slot]) for slot in group]
        extra_tensors = [None] * len(group) if extras is None else extras(samples)
        for slot, sample, extra in zip(group, samples, extra_tensors, strict=True):
            buffer.put(slot, sample, task, position=position_of(chosen[slot]), extra=extra)
