"""Prompts with completions as tokens: where the two meet, and which tokens are learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lightning_cl.data.text.chat import Tokens
from lightning_cl.data.text.formats import Completion
from lightning_cl.data.text.tokenizer import end_tokens, plain_ids, start_tokens

_ANCHORS = ("\n", ".", "a", " ")
"""What a completion is put after, so that a tokenizer does not take it for the beginning of a text."""


def encode_completions(documents: Sequence[Completion], tokenizer: Any) -> list[Tokens]:
    """Completions as tokens: the prompt's own, as it has them alone, then what is learnt, with the end token.

    The start token stands in front, once, if the tokenizer itself puts one there.

    Args:
        documents: the completions.
        tokenizer: a ``transformers`` tokenizer.
    """
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    prompts = plain_ids([document.asked for document in documents], tokenizer)
    joined = plain_ids([document.plain for document in documents], tokenizer)
    results = []
    for document, prompt, ids in zip(documents, prompts, joined, strict=True):
        # At inference the prompt is tokenised alone. Where a token would reach across the seam, the model has to learn
        # to resume from the prompt's own tokens.
        asked = len(prompt)
        if ids[:asked] != prompt:
            ids, asked = _across_the_seam(document.completion, prompt, ids, tokenizer)
        front = [] if start and ids[: len(start)] == start else start
        back = [] if end and len(ids) > asked and ids[-1:] == end else end
        ids = front + ids + back
        results.append(Tokens(np.asarray(ids, np.int32), np.arange(len(ids)) >= len(front) + asked))
    return results


def _across_the_seam(completion: str, prompt: list[int], joined: list[int], tokenizer: Any) -> tuple[list[int], int]:
    """Tokens that read as prompt and completion, and how many of them are the prompt's.

    They are the prompt's own, and the completion's behind them. Where no tokens of the completion continue them (as
    in vocabularies that know the insides of words only behind a beginning), they are those of the joined text, and the
    token that reaches across is learnt.
    """
    text = tokenizer.decode(joined, clean_up_tokenization_spaces=False)
    for ids in _continuations(completion, tokenizer):
        if tokenizer.decode(prompt + ids, clean_up_tokenization_spaces=False) == text:
            return prompt + ids, len(prompt)
    same = (place for place, pair in enumerate(zip(prompt, joined, strict=False)) if pair[0] != pair[1])
    return joined, next(same, min(len(prompt), len(joined)))


def _continuations(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Tokens of a text by itself, and without the space that some tokenizers put in front of every text."""
    yield plain_ids([text], tokenizer)[0]
    for anchor in _ANCHORS:
        before, whole = plain_ids([anchor, anchor + text], tokenizer)
        if whole[: len(before)] == before:
            yield whole[len(before) :]
