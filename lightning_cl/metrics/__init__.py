"""Scores of continual learning as torchmetrics classes."""

from lightning_cl.metrics.retention import (
    AverageAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    MeanWhenLearnt,
)

__all__ = ["AverageAccuracy", "BackwardTransfer", "Forgetting", "ForwardTransfer", "MeanWhenLearnt"]
