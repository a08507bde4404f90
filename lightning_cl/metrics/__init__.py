"""Scores of continual learning and of written answers as torchmetrics classes."""

from lightning_cl.metrics.retention import (
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    MeanWhenLearnt,
)
from lightning_cl.metrics.text import SARI, EditSimilarity, ExactMatch, NormalizedMatch, RougeL

__all__ = [
    "SARI",
    "AverageAccuracy",
    "BackwardTransfer",
    "EditSimilarity",
    "ExactMatch",
    "Forgetting",
    "ForwardTransfer",
    "MeanWhenLearnt",
    "NormalizedMatch",
    "RougeL",
]
