"""Tokens: how documents become samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_cl.data.text.chat import Tokens, encode_chats, has_template
from lightning_cl.data.text.collator import TokenCollator as TokenCollator
from lightning_cl.data.text.completions import encode_completions
from lightning_cl.data.text.dataset import TokenDataset as TokenDataset
from lightning_cl.data.text.formats import Chat, Completion, Document, Instruction, Text
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.splitting import split_documents as split_documents
from lightning_cl.data.text.tokenizer import end_tokens, plain_ids, start_tokens

Sample: TypeAlias = tuple[Tensor, Tensor]
"""Token ids, int32 ``[length]``, and which of them are learnt, bool ``[length]``."""

_BATCH = 256  # documents that are tokenised together
_CHARACTERS = 1_000_000  # and about how much text at most


def encode(
    documents: Iterable[Document | str],
    tokenizer: Any,
    max_length: int,
    tally: Tally | None = None,
    template: bool = False,
    last_turn: bool = False,
) -> Iterator[Sample]:
    """Documents as samples of at most `max_length` tokens, one at a time, in order; reads a few hundred ahead.

    Text is cut into blocks, and nothing is lost (:func:`tokenize`). Completions and conversations are one sample each,
    cut off on the right; those that then have no token to predict are dropped and counted. In a completion the prompt
    bears no loss, and the end token does (:func:`~lightning_cl.data.text.completions.encode_completions`); in a
    conversation the assistant's turns do (:func:`~lightning_cl.data.text.chat.encode_chats`). Instructions are
    conversations where the tokenizer has a chat template, and completions where it has none; prompts with completions
    are conversations with `template`.

    Args:
        documents: may be endless.
        tokenizer: a ``transformers`` tokenizer.
        max_length: the most tokens in a sample.
        tally: counts what is dropped and cut off, and says what a conversation that the template refuses does.
        template: write prompts with completions in the tokenizer's chat template.
        last_turn: of a conversation only the assistant's last turn bears loss.

    Raises:
        ValueError: for a conversation without a chat template, or one that the template refuses.
    """
    tally = Tally() if tally is None else tally
    for batch in _batches(documents):
        batch = [_shaped(document, tokenizer, tally, template, last_turn) for document in batch]
        yield from _encode_batch(batch, tokenizer, max_length, tally)


def tokenize(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Documents as blocks of at most `max_length` tokens; no block crosses documents, nothing is cut off.

    Each document gets the start token once, in front, if the tokenizer itself puts one there, and the end token at its
    end; not a second time where the text brings them, as one that was rendered by a chat template does.
    """
    return [block for blocks in _blocks(texts, tokenizer, max_length) for block in blocks]


def _blocks(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[list[int]]]:
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    blocks = []
    for text, ids in zip(texts, plain_ids(texts, tokenizer), strict=True):
        front = [] if start and ids[: len(start)] == start else start
        # Many templates write a line feed after the last end token.
        ended = end and end[0] in ids and text.rstrip().endswith(tokenizer.eos_token)
        blocks.append(_cut(front + ids + ([] if ended else end), max_length))
    return blocks


def _cut(ids: list[int], max_length: int) -> list[list[int]]:
    blocks = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    if len(blocks) > 1 and len(blocks[-1]) == 1:
        # Nothing would predict a token that is alone: it gets the one before it (which is in both where blocks are of
        # two tokens).
        tail = ids[-max_length - 1 :]
        blocks[-2:] = [tail[: max(max_length - 1, 2)], tail[-2:]]
    return blocks


def _batches(documents: Iterable[Document | str]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for item in documents:
        document = Text(item) if isinstance(item, str) else item
        batch.append(document)
        characters += len(document.plain)
        if len(batch) == _BATCH or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shaped(document: Document, tokenizer: Any, tally: Tally, template: bool, last_turn: bool) -> Document:
    """A text, a completion or a conversation, as the settings and the tokenizer want it."""
    if isinstance(document, Instruction):
        document = document.as_chat() if has_template(tokenizer) else document.as_completion()
    elif isinstance(document, Completion):
        tally.untemplated += has_template(tokenizer) and not template
        document = document.as_chat() if template else document
    return document.last_alone() if last_turn and isinstance(document, Chat) else document


def _encode_batch(batch: Sequence[Document], tokenizer: Any, max_length: int, tally: Tally) -> Iterator[Sample]:
    texts: dict[int, str] = {}
    completions: dict[int, Completion] = {}
    chats: dict[int, Chat] = {}
    for place, document in enumerate(batch):
        if isinstance(document, Text):
            texts[place] = document.plain
        elif isinstance(document, Completion):
            completions[place] = document
        elif isinstance(document, Chat):
            chats[place] = document
    blocks: dict[int, list[list[int]]] = {}
    whole: dict[int, Tokens | None] = {}
    if texts:
        blocks.update(zip(texts, _blocks([*texts.values()], tokenizer, max_length), strict=True))
    if completions:
        whole.update(zip(completions, encode_completions([*completions.values()], tokenizer), strict=True))
    if chats:
        whole.update(zip(chats, encode_chats([*chats.values()], tokenizer, tally), strict=True))
    for place in range(len(batch)):
        for block in blocks.get(place, ()):
            if len(block) > 1:
                yield torch.tensor(block, dtype=torch.int32), torch.ones(len(block), dtype=torch.bool)
            else:
                tally.dropped += 1
        tokens = whole.get(place)
        if tokens is None:
            continue
        ids, mask = tokens.ids[:max_length], tokens.mask[:max_length]
        if not mask[1:].any():  # nothing predicts the first token
            tally.dropped += 1
            tally.too_long += bool(tokens.mask[1:].any())
            continue
        tally.truncated += len(tokens.ids) > max_length
        yield torch.from_numpy(ids.copy()), torch.from_numpy(mask.copy())
