"""The scores of a matrix as torchmetrics classes: averages, transfer, forgetting, intransigence.

The mathematics and the presets are in :mod:`lightning_cl.functional.retention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_cl.arguments import check_choice
from lightning_cl.functional.retention import (
    Mode,
    Preset,
    average_over_rows,
    average_score,
    backward_transfer,
    check_preset,
    forgetting,
    forward_transfer,
    intransigence,
    largest_drop,
    mean_when_learnt,
    share_kept,
    worst_task,
)


class _MatrixMetric(Metric):
    """A score of the matrix of every task after every task, row by row.

    ``update`` takes the next row (``[tasks]``, the first one before any training) or several (``[rows, tasks]``). A
    later row may have more tasks than an earlier one; the missing entries of the earlier one are unknown. NaN is what
    was never measured; a score that was measured and came out NaN or infinite is to be given as the worst one
    (:func:`~lightning_cl.functional.with_worst`).
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor]

    def __init__(self, mode: Mode = "max", **kwargs: Any) -> None:
        # Every rank has all rows: gathering them would double the matrix.
        super().__init__(**{"sync_on_compute": False} | kwargs)
        check_choice("mode", mode, ("max", "min"), "'max' (higher is better) or 'min' (lower is better)")
        self.mode: Mode = mode
        self.add_state("rows", default=[], dist_reduce_fx=None)

    @property
    def _better(self) -> str:
        return "higher is better" if self.mode == "max" else "lower is better"

    def _minus(self, first: str, second: str) -> str:
        """A difference whose sign has one meaning in both modes."""
        return f"({first} − {second})" if self.mode == "max" else f"({second} − {first})"

    def update(self, rows: Tensor) -> None:
        """Adds one row or several."""
        if rows.ndim not in (1, 2):
            raise ValueError(f"rows: expected the shape [tasks] or [rows, tasks], got {list(rows.shape)}")
        self.rows.extend(rows.detach().to(self.dtype).reshape(-1, rows.shape[-1]))

    def matrix(self) -> Tensor:
        """``[rows, tasks]``; unknown entries are NaN."""
        width = max(len(row) for row in self.rows)
        matrix = torch.full((len(self.rows), width), torch.nan, dtype=self.rows[0].dtype, device=self.rows[0].device)
        for i, row in enumerate(self.rows):
            matrix[i, : len(row)] = row
        return matrix


class AverageAccuracy(_MatrixMetric):
    """``mean_j R[T, j]``: the mean score over all tasks at the end.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the mean is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        return f"mean_j R[T, j]: mean over the tasks at the end; {self._better}"

    def compute(self) -> Tensor:
        """The mean."""
        return average_score(self.matrix())


class MeanWhenLearnt(_MatrixMetric):
    """``mean_j R[j, j]``: the mean score of each task right after its own training.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the mean is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        return f"mean_j R[j, j]: mean over the tasks, each right after its own training; {self._better}"

    def compute(self) -> Tensor:
        """The mean."""
        return mean_when_learnt(self.matrix())


class AverageOverRows(_MatrixMetric):
    """``1/T Σ_t 1/t Σ_{j≤t} R[t, j]``: the mean over the rows of the score over the tasks so far.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the mean is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        return f"mean_t mean_{{j≤t}} R[t, j]: mean over the tasks so far, over all rows after training; {self._better}"

    def compute(self) -> Tensor:
        """The mean."""
        return average_over_rows(self.matrix())


class WorstTask(_MatrixMetric):
    """``min_j R[T, j]`` (mode ``min``: ``max_j``): the score of the worst task at the end.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        worst = "min_j" if self.mode == "max" else "max_j"
        return f"{worst} R[T, j]: the score of the worst task at the end; {self._better}"

    def compute(self) -> Tensor:
        """The score."""
        return worst_task(self.matrix(), self.mode)


class LargestDrop(_MatrixMetric):
    """``max_{j<T} (R[j, j] − R[T, j])``: what the task lost that lost most since it was learnt; positive is bad.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        lost = self._minus("R[j, j]", "R[T, j]")
        return f"max_{{j<T}} {lost}: what the task lost that lost most since it was learnt; positive is bad"

    def compute(self) -> Tensor:
        """The loss."""
        return largest_drop(self.matrix(), self.mode)


class ShareKept(_MatrixMetric):
    """``Σ_{j<T} (R[T, j] − R[j−1, j]) / Σ_{j<T} (R[j, j] − R[j−1, j])``, over the tasks that were learnt.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are; the share is the same.
        kwargs: of ``torchmetrics.Metric``.
    """

    definition = (
        "Σ_{j<T} (R[T, j] − R[j−1, j]) / Σ_{j<T} (R[j, j] − R[j−1, j]) over tasks that were learnt: what is left"
        " of what their training gave; 1 is all of it"
    )

    def compute(self) -> Tensor:
        """The share."""
        return share_kept(self.matrix(), self.mode)


class Intransigence(_MatrixMetric):
    """``mean_j (s_j − R[j, j])``: what each task is worse than its reference when it was learnt; positive is bad.

    Args:
        reference: ``s``, ``[tasks]``: scores of a model that was trained on all tasks together, or of models that were
            trained on one task alone.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, reference: Tensor, mode: Mode = "max", **kwargs: Any) -> None:
        super().__init__(mode, **kwargs)
        self.reference = reference

    @property
    def definition(self) -> str:
        """The definition in words."""
        missing = self._minus("s_j", "R[j, j]")
        return f"mean_j {missing}: what each task is worse than its reference s when it was learnt; positive is bad"

    def compute(self) -> Tensor:
        """The intransigence."""
        return intransigence(self.matrix(), self.reference, self.mode)


class BackwardTransfer(_MatrixMetric):
    """``Σ_{j<T} (R[T, j] − R[j, j])`` over ``T − 1`` (preset ``gem``) or ``T`` (``trace``, ``sapt``): positive is good.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, mode: Mode = "max", preset: Preset = "gem", **kwargs: Any) -> None:
        super().__init__(mode, **kwargs)
        check_preset(preset)
        self.preset: Preset = preset

    @property
    def definition(self) -> str:
        """The definition in words."""
        over = "T - 1" if self.preset == "gem" else "T"
        change = self._minus("R[T, j]", "R[j, j]")
        return (
            f"Σ_{{j<T}} {change} over {over}: change on earlier tasks since each was learnt ({self.preset}); positive"
            " is good"
        )

    def compute(self) -> Tensor:
        """The backward transfer."""
        return backward_transfer(self.matrix(), self.mode, self.preset)


class ForwardTransfer(_MatrixMetric):
    """``mean_{j≥2} (R[j−1, j] − R[0, j])`` (``gem``, ``trace``) or ``mean_j (R[j, j] − s_j)`` (``sapt``).

    Positive is good.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: whose definition.
        single_task: ``s``, ``[tasks]``: scores of models trained on one task alone, for ``sapt``.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(
        self, mode: Mode = "max", preset: Preset = "gem", single_task: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(mode, **kwargs)
        check_preset(preset)
        self.preset: Preset = preset
        self.single_task = single_task

    @property
    def definition(self) -> str:
        """The definition in words."""
        if self.preset == "sapt":
            gain = self._minus("R[j, j]", "s_j")
            return f"mean_j {gain}: gain over s, a model trained on the task alone (sapt); positive is good"
        gain = self._minus("R[j−1, j]", "R[0, j]")
        return (
            f"mean_{{j≥2}} {gain}: what tasks 2 to T had gained before their own training ({self.preset}); positive is"
            " good"
        )

    def compute(self) -> Tensor:
        """The forward transfer."""
        return forward_transfer(self.matrix(), self.mode, self.preset, self.single_task)


class Forgetting(_MatrixMetric):
    """``mean_{j<T} (max_{1≤i<T} R[i, j] − R[T, j])``: positive is bad.

    Args:
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        kwargs: of ``torchmetrics.Metric``.
    """

    @property
    def definition(self) -> str:
        """The definition in words."""
        lost = self._minus("best_{i<T} R[i, j]", "R[T, j]")
        return f"{lost}, mean over T - 1 (j < T): what earlier tasks lost since their best; positive is bad"

    def compute(self) -> Tensor:
        """The forgetting."""
        return forgetting(self.matrix(), self.mode)
