"""Scores of written answers as torchmetrics classes, and the names that ``Task(metrics=[…])`` knows.

The mathematics and its differences to published code are in :mod:`lightning_cl.functional.text_scores`.
``torchmetrics`` has some of these scores too: its ROUGE needs ``nltk`` and leaves out all letters that are not ASCII,
and its edit distance takes seconds for long texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.functional import text_scores


class _MeanScore(Metric):
    """The mean of a score over all samples."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, scores: Sequence[float]) -> None:
        self.total += sum(scores)
        self.samples += len(scores)

    def compute(self) -> Tensor:
        """The mean over all samples; NaN without any."""
        return self.total / self.samples


class _AnswerScore(_MeanScore):
    """The mean of a score of texts with references."""

    score: ClassVar[Any]

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Adds samples.

        Args:
            predictions: the written texts.
            references: for each of them, the accepted texts.
        """
        pairs = zip(predictions, map(_listed, references), strict=True)
        self._add([type(self).score(prediction, accepted) for prediction, accepted in pairs])


class ExactMatch(_AnswerScore):
    """Share of the answers that equal a reference, apart from white space at both ends.

    Args:
        kwargs: of ``torchmetrics.Metric``.

    Example:
        >>> from lightning_cl.metrics import ExactMatch
        >>> metric = ExactMatch()
        >>> metric.update(["4", "5"], [["4"], ["6", "six"]])
        >>> float(metric.compute())
        0.5
    """

    score = staticmethod(text_scores.exact_match)


class NormalizedMatch(_AnswerScore):
    """Share of the answers that equal a reference in lower case and without punctuation (SuperNI, O-LoRA).

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    score = staticmethod(text_scores.normalized_match)


class RougeL(_AnswerScore):
    """Mean ROUGE-L: F1 of the longest common subsequence of words.

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    score = staticmethod(text_scores.rouge_l)


class EditSimilarity(_AnswerScore):
    """Mean share of characters that need not be inserted or deleted.

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    score = staticmethod(text_scores.edit_similarity)


class SARI(_MeanScore):
    """Mean SARI of simplified texts (Xu et al. 2016), between 0 and 1.

    Args:
        kwargs: of ``torchmetrics.Metric``.
    """

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str]) -> None:
        """Adds samples.

        Args:
            predictions: the written texts.
            references: for each of them, the accepted texts.
            sources: the texts that were to be simplified.
        """
        rows = zip(predictions, map(_listed, references), sources, strict=True)
        self._add([text_scores.sari(prediction, accepted, source) for prediction, accepted, source in rows])


def _listed(references: Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


BY_LIKELIHOOD = ("acc", "acc_norm")
"""The metrics for which the model writes nothing: it tells how probable each choice is."""

DEFINITIONS = {
    "exact_match": "share of the answers that equal a reference, apart from white space at both ends",
    "normalized_match": "share of the answers that equal a reference in lower case and without punctuation",
    "accuracy": "share of the answers that begin with the right label",
    "acc": "share of the samples in which the right choice has the highest log-likelihood",
    "acc_norm": "as acc, with the log-likelihood divided by the number of characters of the choice",
    "rouge_l": "mean ROUGE-L: F1 of the longest common subsequence of words, not stemmed",
    "edit_similarity": "mean share of characters that need not be inserted or deleted",
    "sari": "mean SARI, between 0 and 1; the source is the prompt",
}
"""For each metric that a task can have: its definition, for reports."""


def answer_score(
    metric: str, prediction: str, references: Sequence[str], prompt: str, choices: Sequence[str] = ()
) -> float:
    """Returns a score of one written answer.

    Args:
        metric: a name among :data:`DEFINITIONS` that is not in :data:`BY_LIKELIHOOD`.
        prediction: the answer.
        references: the accepted answers.
        prompt: the text before the answer.
        choices: the possible answers, for ``accuracy``.
    """
    if metric == "accuracy":
        return text_scores.label_match(prediction, references, choices)
    if metric == "sari":
        return text_scores.sari(prediction, references, prompt)
    return float(getattr(text_scores, metric)(prediction, references))


def choice_score(metric: str, likelihoods: Sequence[float], choices: Sequence[str], right: int) -> float:
    """1 if the right choice is the most likely one, by ``acc`` or ``acc_norm``; else 0.

    Of several equal ones the first counts, as in lm-evaluation-harness. A model without finite likelihoods knows none.

    Args:
        metric: ``acc`` or ``acc_norm``.
        likelihoods: the log-likelihood of each choice, summed over its tokens.
        choices: their texts.
        right: the index of the right one.
    """
    lengths = [max(len(choice), 1) if metric == "acc_norm" else 1 for choice in choices]
    scores = [value / length for value, length in zip(likelihoods, lengths, strict=True)]
    if any(math.isnan(score) for score in scores) or max(scores) == -math.inf:
        return 0.0
    return float(max(range(len(scores)), key=scores.__getitem__) == right)
