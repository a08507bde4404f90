"""Scores of continual learning as torchmetrics classes."""

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

__all__ = [
    "AverageAccuracy",
    "AverageOverRows",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "Intransigence",
    "LargestDrop",
    "MeanWhenLearnt",
    "ShareKept",
    "WorstTask",
]
