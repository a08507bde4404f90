"""Held-out token sequences of tasks: the same ones for a model in memory and for its exported files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.held_out import held_out_loader
from lightning_cl.tasks import Task


class HeldOut(NamedTuple):
    """One document's tokens, and which of them bear loss."""

    ids: list[int]
    """Tokens."""
    labels: list[int]
    """The tokens again; −100 where there is no loss. The one at position ``i`` is predicted from those before ``i``."""


def held_out_sequences(data: TaskDataModule, task: Task, tokens: int) -> list[HeldOut]:
    """Returns the first sequences of a task's validation data, until they bear loss at enough tokens.

    Args:
        data: the tasks, set up.
        task: one of them.
        tokens: how many tokens bear loss in all; the last sequence is cut there.

    Returns:
        the sequences; none for data that has no token labels, such as images.
    """
    found: list[HeldOut] = []
    left = tokens
    for ids, labels in _sequences(held_out_loader(data, task)):
        places = [place for place in range(1, len(ids)) if labels[place] != -100][:left]
        if places:
            end = places[-1] + 1
            found.append(HeldOut(ids[:end], [-100, *labels[1:end]]))
            left -= len(places)
        if left == 0:
            break
    return found


def _sequences(loader: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Documents of a loader's batches: without padding, and without those that share a row with them."""
    for batch in () if loader is None else loader:
        ids, labels = (batch.get(key) if isinstance(batch, Mapping) else None for key in ("input_ids", "labels"))
        if not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape):
            return
        for row in range(len(ids)):
            for part in _parts(batch, row):
                yield ids[row, part].tolist(), labels[row, part].tolist()


def _parts(batch: Mapping[str, Any], row: int) -> Iterator[slice]:
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(mask, Tensor):
        held = mask[row].nonzero()[:, 0]
        yield slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0)
    elif isinstance(positions, Tensor):
        starts = (positions[row] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True):
            yield slice(start, end)  # the padding is one of them, and bears no loss
    else:
        yield slice(None)


def label_tensors(sequence: HeldOut) -> tuple[Tensor, Tensor]:
    """Returns a sequence's tokens and labels, each int64 ``[1, length]``."""
    return torch.tensor([sequence.ids]), torch.tensor([sequence.labels])
