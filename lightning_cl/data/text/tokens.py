"""The step from documents to samples of tokens."""

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
"""Token ids, int32 ``[length]``, and for each True if it is learnt, bool ``[length]``."""

_BATCH = 256  # documents that are tokenised together
_CHARACTERS = 1_000_000  # characters after which fewer documents are tokenised together


def encode(
    documents: Iterable[Document | str],
    tokenizer: Any,
    max_length: int,
    tally: Tally | None = None,
    template: bool = False,
    last_turn: bool = False,
) -> Iterator[Sample]:
    """Encodes documents as samples of at most `max_length` tokens, in order; reads a few hundred documents ahead.

    Text is cut into blocks, and nothing is lost (:func:`tokenize`). A completion or a conversation is one sample, cut
    off on the right. If it then has no token to predict, it is dropped and counted.

    In a completion, the completion and the end token bear loss, and the prompt does not
    (:func:`~lightning_cl.data.text.completions.encode_completions`). In a conversation, the assistant's turns bear loss
    (:func:`~lightning_cl.data.text.chat.encode_chats`). Instructions become conversations if the tokenizer has a chat
    template, else completions. Prompts with completions become conversations only with `template`.

    Args:
        documents: the documents; there may be endlessly many.
        tokenizer: a ``transformers`` tokenizer.
        max_length: the most tokens in a sample.
        tally: counts what is dropped and cut off, and decides if a refusal by the chat template is an error.
        template: write prompts with completions in the tokenizer's chat template.
        last_turn: put loss on the assistant's last turn of a conversation only.

    Raises:
        ValueError: for a conversation if there is no chat template, or if the template refuses it.
    """
    tally = Tally() if tally is None else tally
    for batch in _batches(documents):
        batch = [_shaped(document, tokenizer, tally, template, last_turn) for document in batch]
        yield from _encode_batch(batch, tokenizer, max_length, tally)


def tokenize(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Cuts documents into blocks of at most `max_length` tokens; a block has tokens of one document, and none is lost.

    Each document begins with the start token if the tokenizer itself puts one there, and it ends with the end token.
    Neither is added twice: a text that was rendered by a chat template may have them already.
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
        # Nothing would predict a token that is alone, so it gets the token before it. In blocks of two tokens, that
        # token is then in both.
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
    """Turns a document into a text, a completion or a conversation, by the settings and the tokenizer."""
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
    for index, document in enumerate(batch):
        if isinstance(document, Text):
            texts[index] = document.plain
        elif isinstance(document, Completion):
            completions[index] = document
        elif isinstance(document, Chat):
            chats[index] = document
    blocks: dict[int, list[list[int]]] = {}
    whole: dict[int, Tokens | None] = {}
    if texts:
        blocks.update(zip(texts, _blocks([*texts.values()], tokenizer, max_length), strict=True))
    if completions:
        whole.update(zip(completions, encode_completions([*completions.values()], tokenizer), strict=True))
    if chats:
        whole.update(zip(chats, encode_chats([*chats.values()], tokenizer, tally), strict=True))
    for index in range(len(batch)):
        for block in blocks.get(index, ()):
            if len(block) > 1:
                yield torch.tensor(block, dtype=torch.int32), torch.ones(len(block), dtype=torch.bool)
            else:
                tally.dropped += 1
        tokens = whole.get(index)
        if tokens is None:
            continue
        ids, mask = tokens.ids[:max_length], tokens.mask[:max_length]
        if not mask[1:].any():  # nothing predicts the first token
            tally.dropped += 1
            tally.too_long += bool(tokens.mask[1:].any())
            continue
        tally.truncated += len(tokens.ids) > max_length
        yield torch.from_numpy(ids.copy()), torch.from_numpy(mask.copy())
