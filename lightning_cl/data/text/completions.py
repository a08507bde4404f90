"""Prompts with completions as tokens: the boundary between the two, and the mask of learnt tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lightning_cl.data.text.chat import Tokens
from lightning_cl.data.text.formats import Completion
from lightning_cl.data.text.tokenizer import end_tokens, plain_ids, start_tokens

_ANCHORS = ("\n", ".", "a", " ")
"""Texts to put before a completion, so that a tokenizer does not treat it as the beginning of a text."""


def encode_completions(documents: Sequence[Completion], tokenizer: Any) -> list[Tokens]:
    """Encodes completions: first the tokens that the prompt has alone, then the learnt ones with the end token.

    The start token comes first, once, if the tokenizer itself puts one there.

    Args:
        documents: the completions.
        tokenizer: a ``transformers`` tokenizer.
    """
    start, end = start_tokens(tokenizer), end_tokens(tokenizer)
    prompts = plain_ids([document.asked for document in documents], tokenizer)
    joined = plain_ids([document.plain for document in documents], tokenizer)
    results = []
    for document, prompt, ids in zip(documents, prompts, joined, strict=True):
        # At inference the prompt is tokenised alone. If a token of the joined text would contain parts of both, the
        # model has to learn to continue from the prompt's own tokens.
        asked = len(prompt)
        if ids[:asked] != prompt:
            ids, asked = _across_the_boundary(document.completion, prompt, ids, tokenizer)
        front = [] if start and ids[: len(start)] == start else start
        back = [] if end and len(ids) > asked and ids[-1:] == end else end
        ids = front + ids + back
        results.append(Tokens(np.asarray(ids, np.int32), np.arange(len(ids)) >= len(front) + asked))
    return results


def _across_the_boundary(
    completion: str, prompt: list[int], joined: list[int], tokenizer: Any
) -> tuple[list[int], int]:
    """Returns tokens whose text is prompt and completion, and the number of the prompt's tokens.

    They are the prompt's own tokens, then the completion's. Some vocabularies have parts of words only for the middle
    of a word, so that no tokens of the completion fit after the prompt's. Then the tokens of the joined text are
    returned, and the token that contains parts of both is learnt.
    """
    text = tokenizer.decode(joined, clean_up_tokenization_spaces=False)
    for ids in _continuations(completion, tokenizer):
        if tokenizer.decode(prompt + ids, clean_up_tokenization_spaces=False) == text:
            return prompt + ids, len(prompt)
    different = (i for i, pair in enumerate(zip(prompt, joined, strict=False)) if pair[0] != pair[1])
    return joined, next(different, min(len(prompt), len(joined)))


def _continuations(text: str, tokenizer: Any) -> Iterator[list[int]]:
    """Gives the tokens of a text alone, then those without the space that some tokenizers put before every text."""
    yield plain_ids([text], tokenizer)[0]
    for anchor in _ANCHORS:
        before, whole = plain_ids([anchor, anchor + text], tokenizer)
        if whole[: len(before)] == before:
            yield whole[len(before) :]
