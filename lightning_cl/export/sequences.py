"""Held-out token sequences of tasks: the same ones for a model in memory and for its exported files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lightning_cl.data.module import TaskDataModule
from lightning_cl.passes.held_out import held_out_loader
from lightning_cl.tasks import Task

_DOCUMENTS = 8  # that the tokens are of, if they are long enough


class HeldOut(NamedTuple):
    """One document's tokens, and which of them bear loss."""

    ids: list[int]
    """Tokens."""
    labels: list[int]
    """The tokens again; −100 where there is no loss. The one at position ``i`` is predicted from those before ``i``."""

    @property
    def places(self) -> list[int]:
        """Returns the positions that bear loss."""
        return [place for place, label in enumerate(self.labels) if label != -100]


def held_out_sequences(data: TaskDataModule, task: Task, tokens: int, longest: int | None = None) -> list[HeldOut]:
    """Returns sequences of a task's validation data that bear loss at a number of tokens in all.

    They are the beginnings of the first documents: an eighth of the tokens of each, or more where there are fewer
    documents. Without validation data they are those of the training data, as in the matrix.

    Args:
        data: the tasks, set up.
        task: one of them.
        tokens: how many tokens bear loss in all, unless the data has fewer.
        longest: the most tokens of a sequence; None: any number.

    Returns:
        the sequences; none for data that has no token labels, such as images.
    """
    share, found, left = max(1, -(-tokens // _DOCUMENTS)), [], tokens
    for ids, labels in _sequences(held_out_loader(data, task)):
        places = [place for place in range(1, len(ids[:longest])) if labels[place] != -100]
        if places:
            found.append((ids, labels, places))
            left -= min(share, len(places))
        if left <= 0:
            break
    while sum(min(share, len(places)) for *_, places in found) < min(tokens, sum(len(places) for *_, places in found)):
        share *= 2
    left, cut = tokens, []
    for ids, labels, places in found:
        taken = places[: min(share, left)]
        if taken:
            end = taken[-1] + 1
            cut.append(HeldOut(ids[:end], [-100, *labels[1:end]]))
            left -= len(taken)
    return cut


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
