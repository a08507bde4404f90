"""Rehearsal samples that a model wrote itself: filters that choose the good ones, and their loss masks.

The filters are applied in this order. A text is rejected for the first reason that applies:

==============  =================================================================================================
short           the text has fewer tokens than wanted
noise           the next tokens are nearly random to the model, as before any training
repetitive      the text repeats itself (:func:`is_repetitive`)
outlier         the text surprises the model far more, or far less, than its other texts (:func:`outliers`)
duplicate       prompt and text are the same as in another sample
near duplicate  most n-grams of prompt and text are also in another sample (:func:`near_duplicates`)
==============  =================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_cl.passes.generation import Written

LEAST_DISTINCT = {64: 0.35, 256: 0.2}
"""Number of tokens to the least share of different 4-grams in any stretch of that length. Real text has more: among
blocks of 256 tokens of English, Python and C++ in a small vocabulary, about one in some hundred has less."""

KNOWS_NOTHING = 0.8
"""Texts whose mean surprise is above this share of ``log(vocabulary)`` are noise."""

FAR = 3.5
"""A text farther than this from the median, in robust standard deviations, is an outlier (Iglewicz & Hoaglin 1993)."""

NEAR = 0.7
"""A text with at least this Jaccard similarity of 3-grams is a near duplicate."""


@dataclass(frozen=True)
class Prompt:
    """Start of a text that a model continues.

    Args:
        ids: its tokens.
        task: the name that the samples are stored under.
        learnt: True if its tokens bear loss too.
        hidden: the number of its first tokens that are no part of the sample.
    """

    ids: tuple[int, ...]
    task: str = "self"
    learnt: bool = False
    hidden: int = 0


def as_sample(prompt: Prompt, written: Written) -> dict[str, Tensor]:
    """Returns prompt and text as a token sample, with loss on the model's text and its end token.

    Returns:
        ``{"input_ids": int32 [length], "loss_mask": bool [length]}``.
    """
    given = prompt.ids[prompt.hidden :]
    mask = torch.arange(len(given) + len(written.ids)) >= (0 if prompt.learnt else len(given))
    return {"input_ids": torch.tensor([*given, *written.ids], dtype=torch.int32), "loss_mask": mask}


def choose(
    prompts: Sequence[Prompt], texts: Sequence[Written], min_tokens: int, vocabulary: int
) -> tuple[list[int], dict[str, int]]:
    """Chooses the model's texts that are good enough to rehearse, by the filters in the module's docstring.

    Args:
        prompts: the prompt of each text.
        texts: the model's texts.
        min_tokens: the fewest tokens of a text, without its end token.
        vocabulary: the number of tokens that the model knows.

    Returns:
        the indices of the chosen texts, in order, and the number of rejected texts for each reason.
    """
    rejected: Counter[str] = Counter()
    left: list[int] = []
    for index, text in enumerate(texts):
        reason = _own_fault(text, min_tokens, vocabulary)
        rejected.update([reason] if reason else [])
        left += [] if reason else [index]
    # Texts of one kind are compared with each other: code surprises a model less than prose.
    kinds = defaultdict(list)
    for index in left:
        kinds[prompts[index].task].append(index)
    far = {indices[i] for indices in kinds.values() for i in outliers([texts[p].surprise for p in indices])}
    left = _without(left, far, "outlier", rejected)
    first: dict[Any, int] = {}
    for index in left:
        first.setdefault((prompts[index].ids, tuple(texts[index].ids)), index)
    left = _without(left, set(left) - set(first.values()), "duplicate", rejected)
    # Texts are compared with their prompts, since a task may have only a few different answers. The beginning that all
    # prompts share is left out.
    common = {kind: _in_common([prompts[index].ids for index in indices]) for kind, indices in kinds.items()}
    whole = [(*prompts[index].ids[common[prompts[index].task] :], *texts[index].ids) for index in left]
    left = _without(left, {left[i] for i in near_duplicates(whole)}, "near duplicate", rejected)
    return left, dict(rejected)


def _without(indices: list[int], out: set[int], reason: str, rejected: Counter[str]) -> list[int]:
    rejected.update({reason: len(out)} if out else {})
    return [index for index in indices if index not in out]


def _in_common(rows: list[tuple[int, ...]]) -> int:
    """Counts the tokens that all rows begin with."""
    indices = enumerate(zip(*rows, strict=False))
    return next((index for index, tokens in indices if len(set(tokens)) > 1), min(map(len, rows)))


def _own_fault(text: Written, min_tokens: int, vocabulary: int) -> str | None:
    """Returns the reason to reject a text that needs no comparison with others, or None."""
    if len(text.ids) - text.ended < min_tokens:
        return "short"
    if text.surprise > KNOWS_NOTHING * math.log(vocabulary):
        return "noise"
    return "repetitive" if is_repetitive(text.ids) else None


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Returns all stretches of `n` tokens, in order."""
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def is_repetitive(ids: Sequence[int]) -> bool:
    """Returns True if few 4-grams differ in some stretch of the text (:data:`LEAST_DISTINCT`)."""
    for window, least in LEAST_DISTINCT.items():
        # Windows overlap by half, and the last one is at the end: a text that has begun a loop stays in it.
        last = max(len(ids) - window, 0)
        for start in sorted({*range(0, last, window // 2), last}):
            grams = ngrams(ids[start : start + window], 4)
            if len(set(grams)) < least * len(grams):
                return True
        if len(ids) <= window:
            break
    return False


def outliers(values: Sequence[float]) -> list[int]:
    """Returns the indices of values far from the median, in units of the median absolute deviation.

    Fewer than eight values have no outliers.
    """
    if len(values) < 8:
        return []
    middle = median(values)
    deviation = median(abs(value - middle) for value in values) / 0.6745  # a normal distribution's standard deviation
    return [index for index, value in enumerate(values) if abs(value - middle) > FAR * deviation > 0]


def near_duplicates(texts: Sequence[Sequence[int]], n: int = 3, least: float = NEAR) -> list[int]:
    """Returns the indices of texts that are similar to an earlier text that is kept.

    Two texts are similar if they share `least` of the n-grams which both together have. Only texts that share a rare
    n-gram are compared, and no pair is missed: with the n-grams in one order, two similar sets have one in common among
    the first ``|set| − ⌈least · |set|⌉ + 1`` of each (Bayardo et al. 2007).

    Args:
        texts: token ids. Texts without an n-gram are similar to nothing.
        n: length of the n-grams.
        least: the smallest Jaccard similarity of two similar texts, above 0.
    """
    sets = [set(ngrams(text, n)) for text in texts]
    count = Counter(gram for grams in sets for gram in grams)
    kept_with: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found = []
    for index, grams in enumerate(sets):
        rare = sorted(grams, key=lambda gram: (count[gram], gram))[: len(grams) - math.ceil(least * len(grams)) + 1]
        candidates = {other for gram in rare for other in kept_with[gram]}
        if any(_jaccard(grams, sets[other]) >= least for other in candidates):
            found.append(index)
            continue
        for gram in rare:
            kept_with[gram].append(index)
    return found


def _jaccard(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)
