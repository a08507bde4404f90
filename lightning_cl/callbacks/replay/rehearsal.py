"""Rehearsal samples that a model wrote itself: which of them are good enough to learn from, and what is learnt of them.

Filters in the order in which they are asked; each text is rejected for the first reason that there is:

==============  =================================================================================================
short           fewer tokens than wanted
noise           the model knows hardly more of the next token than nothing: a model that has learnt nothing yet
repetitive      it goes round in circles (:func:`is_repetitive`)
outlier         far more, or far less, surprising to the model than its other texts (:func:`outliers`)
duplicate       prompt and text are those of another sample
near duplicate  most n-grams of both are those of another sample (:func:`near_duplicates`)
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
"""In any stretch of so many tokens at least this share of the 4-grams differs. Real text has more: of blocks of 256
tokens of English, Python and C++ in a small vocabulary, one in some hundred has less."""

KNOWS_NOTHING = 0.8
"""Texts whose mean surprise is above this share of ``log(vocabulary)`` are noise."""

FAR = 3.5
"""From this many (robust) standard deviations on a text is an outlier (Iglewicz & Hoaglin 1993)."""

NEAR = 0.7
"""From this Jaccard similarity of 3-grams on a text is a near duplicate."""


@dataclass(frozen=True)
class Prompt:
    """Start of a text that a model continues.

    Args:
        ids: its tokens.
        task: the name that the samples are stored under.
        learnt: whether its tokens bear loss, too.
        hidden: how many of its first tokens are no part of the sample.
    """

    ids: tuple[int, ...]
    task: str = "self"
    learnt: bool = False
    hidden: int = 0


def as_sample(prompt: Prompt, written: Written) -> dict[str, Tensor]:
    """Prompt and text as a token sample: loss on what the model wrote, its end token included.

    Returns:
        ``{"input_ids": int32 [length], "loss_mask": bool [length]}``.
    """
    given = prompt.ids[prompt.hidden :]
    mask = torch.arange(len(given) + len(written.ids)) >= (0 if prompt.learnt else len(given))
    return {"input_ids": torch.tensor([*given, *written.ids], dtype=torch.int32), "loss_mask": mask}


def choose(
    prompts: Sequence[Prompt], texts: Sequence[Written], min_tokens: int, vocabulary: int
) -> tuple[list[int], dict[str, int]]:
    """Chooses those of a model's texts that are good enough to rehearse; see the module's docstring.

    Args:
        prompts: of each text.
        texts: what the model wrote.
        min_tokens: the fewest tokens of a text, without its end token.
        vocabulary: how many tokens the model knows.

    Returns:
        the places of the chosen texts, in order, and how many were rejected for each reason.
    """
    rejected: Counter[str] = Counter()
    left: list[int] = []
    for place, text in enumerate(texts):
        reason = _own_fault(text, min_tokens, vocabulary)
        rejected.update([reason] if reason else [])
        left += [] if reason else [place]
    # Texts of one kind are compared with each other: code surprises a model less than prose.
    kinds = defaultdict(list)
    for place in left:
        kinds[prompts[place].task].append(place)
    far = {places[i] for places in kinds.values() for i in outliers([texts[p].surprise for p in places])}
    left = _without(left, far, "outlier", rejected)
    first: dict[Any, int] = {}
    for place in left:
        first.setdefault((prompts[place].ids, tuple(texts[place].ids)), place)
    left = _without(left, set(left) - set(first.values()), "duplicate", rejected)
    # With their prompts, where these differ: a task may know a few answers only. What all prompts have in front tells
    # nothing.
    common = {kind: _in_common([prompts[place].ids for place in places]) for kind, places in kinds.items()}
    whole = [(*prompts[place].ids[common[prompts[place].task] :], *texts[place].ids) for place in left]
    left = _without(left, {left[i] for i in near_duplicates(whole)}, "near duplicate", rejected)
    return left, dict(rejected)


def _without(places: list[int], out: set[int], reason: str, rejected: Counter[str]) -> list[int]:
    rejected.update({reason: len(out)} if out else {})
    return [place for place in places if place not in out]


def _in_common(rows: list[tuple[int, ...]]) -> int:
    """Counts the tokens that all rows begin with."""
    places = enumerate(zip(*rows, strict=False))
    return next((place for place, tokens in places if len(set(tokens)) > 1), min(map(len, rows)))


def _own_fault(text: Written, min_tokens: int, vocabulary: int) -> str | None:
    """Why a text is rejected that needs no other to compare it with."""
    if len(text.ids) - text.ended < min_tokens:
        return "short"
    if text.surprise > KNOWS_NOTHING * math.log(vocabulary):
        return "noise"
    return "repetitive" if is_repetitive(text.ids) else None


def ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All stretches of `n` tokens, in order."""
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def is_repetitive(ids: Sequence[int]) -> bool:
    """True if a text says the same again and again: in a stretch of it (:data:`LEAST_DISTINCT`) few 4-grams differ."""
    for window, least in LEAST_DISTINCT.items():
        # Windows that overlap by half, the last one at the end: where a text falls into a loop, it stays in it.
        last = max(len(ids) - window, 0)
        for start in sorted({*range(0, last, window // 2), last}):
            grams = ngrams(ids[start : start + window], 4)
            if len(set(grams)) < least * len(grams):
                return True
        if len(ids) <= window:
            break
    return False


def outliers(values: Sequence[float]) -> list[int]:
    """The places of values that are far from the others: by their median and its median absolute deviation.

    Of fewer than eight values nobody can say so.
    """
    if len(values) < 8:
        return []
    middle = median(values)
    deviation = median(abs(value - middle) for value in values) / 0.6745  # a normal distribution's standard deviation
    return [place for place, value in enumerate(values) if abs(value - middle) > FAR * deviation > 0]


def near_duplicates(texts: Sequence[Sequence[int]], n: int = 3, least: float = NEAR) -> list[int]:
    """The places of texts that an earlier one, itself kept, is similar to.

    Similar are two texts that share `least` of the n-grams which both together have. Only texts that share a rare
    n-gram are compared, and no pair is missed: with the n-grams in one order, two similar sets have one in common among
    the first ``|set| − ⌈least · |set|⌉ + 1`` of each (Bayardo et al. 2007).

    Args:
        texts: token ids. Those without an n-gram are similar to nothing.
        n: length of the n-grams.
        least: the Jaccard similarity from which on two texts are similar, above 0.
    """
    sets = [set(ngrams(text, n)) for text in texts]
    count = Counter(gram for grams in sets for gram in grams)
    kept_with: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found = []
    for place, grams in enumerate(sets):
        rare = sorted(grams, key=lambda gram: (count[gram], gram))[: len(grams) - math.ceil(least * len(grams)) + 1]
        candidates = {other for gram in rare for other in kept_with[gram]}
        if any(_jaccard(grams, sets[other]) >= least for other in candidates):
            found.append(place)
            continue
        for gram in rare:
            kept_with[gram].append(place)
    return found


def _jaccard(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)
