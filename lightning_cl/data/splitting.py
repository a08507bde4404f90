"""Holding out whole documents for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from lightning_cl.data.formats import Document, Text

AnyDocument = TypeVar("AnyDocument", bound="Document | str")


def split_documents(
    documents: Sequence[AnyDocument], fraction: float, seed: int
) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """Holds out whole documents with about `fraction` of all characters; a single text gives its end.

    The choice depends on seed and texts alone. Copies of a document stay on one side: what is measured on a text that
    is trained on is memory.

    Args:
        documents: plain strings, or documents of any format.
        fraction: the share to hold out, between 0 and 1.
        seed: seed of the choice.

    Returns:
        the documents to train on, and those held out (none, if there is only one and it is no plain text).
    """
    groups: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(_plain(document) if isinstance(document, (str, Text)) else repr(document), []).append(i)
    if len(groups) == 1:
        return _split_one(documents, fraction)
    copies = {i: group for group in groups.values() for i in group}
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = [len(_plain(document)) for document in documents]
    wanted, taken, chosen, left = fraction * sum(lengths), 0, set[int](), len(groups)
    for index in order[:-1]:
        if index in chosen:
            continue
        length = sum(lengths[i] for i in copies[index])
        # A document that overshoots by more than it helps is left in training.
        if abs(taken + length - wanted) > abs(taken - wanted):
            continue
        chosen.update(copies[index])
        taken, left = taken + length, left - 1
        if taken >= wanted or left == 1:
            break
    if not chosen:
        shortest = min(groups.values(), key=lambda group: sum(lengths[i] for i in group))
        chosen.update(shortest)
    return (
        [document for i, document in enumerate(documents) if i not in chosen],
        [document for i, document in enumerate(documents) if i in chosen],
    )


def _split_one(documents: Sequence[AnyDocument], fraction: float) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """The front of the only text (as often as it is there), and its end."""
    document = documents[0]
    if not isinstance(document, (str, Text)):
        return list(documents), []
    text = _plain(document)
    cut = max(1, int(len(text) * (1 - fraction)))
    kind = type(document)
    return [kind(text[:cut]) for _ in documents], [kind(text[cut:])]


def _plain(document: Document | str) -> str:
    return document if isinstance(document, str) else document.plain
