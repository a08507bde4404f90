"""Holding out whole documents for validation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch

from lightning_cl.data.text.formats import Completion, Document, Instruction, Text
from lightning_cl.data.text.tool_calls import calls_of, with_objects

_LONGEST = 100
AnyDocument = TypeVar("AnyDocument", bound="Document | str")


def split_documents(
    documents: Sequence[AnyDocument], fraction: float, seed: int
) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """Holds out whole documents with about `fraction` of all characters; of a single text, its end is held out.

    To compute `fraction` of all characters, a document counts as at most a hundred times the median length. Otherwise
    one book among short notes would have all of the notes held out.

    The choice depends on seed and texts alone. Copies of a document, as :func:`said` finds them, are all trained on or
    all held out. A loss on a text that was also trained on would not measure generalisation.

    Args:
        documents: plain strings, or documents of any format.
        fraction: the share to hold out, between 0 and 1.
        seed: seed of the choice.

    Returns:
        the documents to train on, and those held out (none if there is only one and it is not plain text).
    """
    groups: dict[str, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(said(document), []).append(i)
    if len(groups) == 1:
        return _split_one(documents, fraction)
    copies = {i: group for group in groups.values() for i in group}
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
    lengths = [len(_plain(document)) for document in documents]
    most = _LONGEST * sorted(lengths)[len(lengths) // 2]
    wanted = fraction * sum(min(length, most) for length in lengths)
    taken, chosen, left = 0, set[int](), len(groups)
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


def said(document: Document | str) -> str:
    """Returns the words of a document, which are the same for all its copies in any form.

    They are without the path in front and without white space at the ends. For instructions, completions and
    conversations, they are the roles and contents of the turns. Other keys of a message, schemas of tools, and the
    number of turns that are only a prompt are left out.
    """
    if isinstance(document, (str, Text)):
        return (document if isinstance(document, str) else document.text).strip()
    messages = (document.as_chat() if isinstance(document, (Completion, Instruction)) else document).messages
    return json.dumps([_turn(message) for message in messages], sort_keys=True, default=str)


def _turn(message: dict[str, Any]) -> list[Any]:
    turn = [message["role"], message.get("content", "").strip()]
    # The id of a call is left out, since it differs from copy to copy.
    with suppress(ValueError):  # invalid JSON in arguments raises an error when they are tokenised
        message = with_objects([message])[0]
    calls = calls_of(message)
    return [*turn, calls] if calls else turn


def _split_one(documents: Sequence[AnyDocument], fraction: float) -> tuple[list[AnyDocument], list[AnyDocument]]:
    """Returns the beginning of the only text, once for each copy, and its end."""
    document = documents[0]
    if not isinstance(document, (str, Text)):
        return list(documents), []
    text = document if isinstance(document, str) else document.text
    cut = max(1, int(len(text) * (1 - fraction)))
    return [_with_text(copy, text[:cut]) for copy in documents], [_with_text(document, text[cut:])]


def _with_text(document: Any, text: str) -> Any:
    return replace(document, text=text) if isinstance(document, Text) else text


def _plain(document: Document | str) -> str:
    return document if isinstance(document, str) else document.plain
