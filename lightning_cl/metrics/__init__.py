"""Scores of continual learning and of written answers as torchmetrics classes."""

from lightning_cl.metrics.retention import (
    AverageAccuracy,
    AverageOverRows,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LargestDrop,
    MeanWhenLearnt,
    ShareKept,
    WorstTask,
)
from lightning_cl.metrics.text import SARI, EditSimilarity, ExactMatch, NormalizedMatch, RougeL

__all__ = [
    "SARI",
    "AverageAccuracy",
    "AverageOverRows",
    "BackwardTransfer",
    "EditSimilarity",
    "ExactMatch",
    "Forgetting",
    "ForwardTransfer",
    "Intransigence",
    "LargestDrop",
    "MeanWhenLearnt",
    "NormalizedMatch",
    "RougeL",
    "ShareKept",
    "WorstTask",
]
