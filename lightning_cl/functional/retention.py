"""Scores of continual learning from the matrix of every task after every task.

``matrix`` has the shape ``[tasks + 1, tasks]``: row 0 is the score before any training, row ``i`` the score after
task ``i``; column ``j`` is task ``j``. Below, ``R[i, j]`` counts tasks from 1, so ``R[i, j] = matrix[i, j - 1]`` and
``R[0, j]`` is the row before training. A sequence that is under way has fewer rows: then ``T`` is the number of tasks
trained so far. ``mode`` says whether a higher score is better (``max``: accuracy) or a lower
one (``min``: loss). Entries that were never measured are NaN and are left out of a mean; a mean of nothing is NaN.

A score that was measured and is not finite (the run diverged) is the worst there is: ``inf`` in mode ``min``, ``-inf``
in mode ``max`` (:func:`with_worst` makes it so). A mean with it is the worst too, and so is a difference: no run looks
better for it. Only where the row before training is not finite is there nothing to compare with: that is not known.

Signs are the same in both modes: transfer is positive where later (or earlier) tasks *helped*, forgetting is positive
where something was *lost*.

The literature disagrees on denominators and baselines; ``preset`` chooses:

* ``gem`` (Lopez-Paz & Ranzato 2017): backward and forward transfer divide by ``T - 1``; the forward baseline is the row
  before training.
* ``trace`` (Wang et al. 2023): backward transfer divides by ``T`` (its last term is zero); forward transfer as ``gem``.
* ``sapt`` (Zhao et al. 2024): backward transfer divides by ``T``; forward transfer is ``mean_j R[j, j] - s_j`` over all
  ``T`` tasks, with ``s_j`` the score of a model trained on task ``j`` alone (``single_task``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["max", "min"]
Preset = Literal["gem", "trace", "sapt"]

LEARNT = 0.005
"""The least gain, relative to the score before, that is called learning."""


def with_worst(scores: Tensor, mode: Mode = "max") -> Tensor:
    """Measured scores, with the worst one where they are NaN or infinite.

    Args:
        scores: any shape; all of them were measured.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
    """
    return torch.where(scores.isfinite(), scores, -_sign(mode) * torch.inf)


def average_score(matrix: Tensor) -> Tensor:
    """``mean_j R[T, j]``: the score over all tasks at the end (also called AA, AP or OP).

    Args:
        matrix: ``[tasks + 1, tasks]``, see the module's docstring.
    """
    return matrix[-1, : _trained(matrix)].nanmean()


def average_over_rows(matrix: Tensor) -> Tensor:
    """``1/T Σ_t 1/t Σ_{j≤t} R[t, j]``: the mean over the rows of the score over the tasks so far.

    Also called average incremental accuracy (Rebuffi et al. 2017). Two runs with the same end differ in it if one of
    them lost more on the way.

    Args:
        matrix: ``[tasks + 1, tasks]``, see the module's docstring.
    """
    return torch.stack([matrix[row, :row].nanmean() for row in range(1, _trained(matrix) + 1)]).nanmean()


def worst_task(matrix: Tensor, mode: Mode = "max") -> Tensor:
    """``min_j R[T, j]`` (mode ``min``: ``max_j``): the score of the worst task at the end.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
    """
    sign = _sign(mode)
    return sign * _least(sign * matrix[-1, : _trained(matrix)])


def mean_when_learnt(matrix: Tensor) -> Tensor:
    """``mean_j R[j, j]``: the score of each task right after its own training, what there was to keep.

    Args:
        matrix: ``[tasks + 1, tasks]``, see the module's docstring.
    """
    return matrix.diagonal(offset=-1)[: _trained(matrix)].nanmean()


def backward_transfer(matrix: Tensor, mode: Mode = "max", preset: Preset = "gem") -> Tensor:
    """``Σ_{j<T} (R[T, j] − R[j, j])`` over ``T − 1`` (``gem``) or ``T`` (``trace``, ``sapt``): positive is good.

    ``T`` counts the tasks that were measured.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: the denominator.
    """
    check_preset(preset)
    tasks = _trained(matrix)
    terms = _gain(matrix[tasks, : tasks - 1], matrix.diagonal(offset=-1)[: tasks - 1], mode)
    # The last task's own term is 0. A mean of nothing stays NaN.
    if preset != "gem" and not (terms.isnan().all() or matrix[tasks, tasks - 1].isnan()):
        terms = torch.cat([terms, terms.new_zeros(1)])
    return terms.nanmean()


def forgetting(matrix: Tensor, mode: Mode = "max") -> Tensor:
    """``mean_{j<T} (max_{1≤i<T} R[i, j] − R[T, j])``: positive is bad (Chaudhry et al. 2018, eq. 3).

    The row before training does not count: what the model could do without training was not learnt here.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` or ``min``, as scores are better; for a loss this is the rise over the lowest loss so far.
    """
    tasks, sign = _trained(matrix), _sign(mode)
    if tasks < 2:
        return matrix.new_tensor(float("nan"))
    rows = sign * matrix[1:tasks, : tasks - 1]
    best = sign * torch.where(rows.isnan(), -torch.inf, rows).amax(0)
    best = torch.where(rows.isnan().all(0), torch.nan, best)  # never measured
    return -_gain(matrix[tasks, : tasks - 1], best, mode).nanmean()


def largest_drop(matrix: Tensor, mode: Mode = "max") -> Tensor:
    """``max_{j<T} (R[j, j] − R[T, j])``: the loss of the task that lost most since it was learnt; positive is bad.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
    """
    tasks = _trained(matrix)
    return -_least(_gain(matrix[tasks, : tasks - 1], matrix.diagonal(offset=-1)[: tasks - 1], mode))


def kept_shares(matrix: Tensor, mode: Mode = "max") -> Tensor:
    """``(R[T, j] − R[j−1, j]) / (R[j, j] − R[j−1, j])``: of what its own training gave a task, the share still there.

    1 is all of it, 0 is the score from just before the training, and above 1 later tasks helped. It is NaN for the last
    task, and for a task that was not learnt: its gain is less than :data:`LEARNT` of the score before. It is ``-inf``
    for a task that diverged. A score before that was never measured is replaced by that before all training.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.

    Returns:
        one share for each task trained so far.
    """
    gain, now = _kept(matrix, mode)
    return torch.where(now.isinf(), now, now / gain)


def share_kept(matrix: Tensor, mode: Mode = "max") -> Tensor:
    """``Σ_{j<T} (R[T, j] − R[j−1, j]) / Σ_{j<T} (R[j, j] − R[j−1, j])``, over the tasks that were learnt.

    A sum over sums, since the share of a task that learnt little says little. The shares of the tasks are in
    :func:`kept_shares`.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
    """
    gain, now = _kept(matrix, mode)
    if bool(now.isinf().any()):
        return matrix.new_tensor(-torch.inf)
    known = ~now.isnan()
    return now[known].sum() / gain[known].sum() if bool(known.any()) else matrix.new_tensor(torch.nan)


def _kept(matrix: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """The gain of each task from its own training, and the part of it at the end; NaN where there is nothing to say."""
    tasks, sign = _trained(matrix), _sign(mode)
    learnt, last = matrix.diagonal(offset=-1)[:tasks], matrix[tasks, :tasks]
    before = torch.where(matrix.diagonal()[:tasks].isnan(), matrix[0, :tasks], matrix.diagonal()[:tasks])
    gain = sign * (learnt - before)
    was_learnt = gain.isfinite() & (gain > 0) & (gain >= LEARNT * before.abs())
    now = torch.where(was_learnt, sign * (last - before), torch.nan)
    broken = (learnt.isinf() | last.isinf()) & ~(learnt.isnan() | last.isnan())
    now = torch.where(broken, -torch.inf, now)
    now[tasks - 1] = torch.nan
    return gain, now


def intransigence(matrix: Tensor, reference: Tensor, mode: Mode = "max") -> Tensor:
    """``mean_j (s_j − R[j, j])``: what each task is worse than its reference when it was learnt; positive is bad.

    Chaudhry et al. 2018, eq. 4, with a model that was trained on all tasks together as the reference. With models that
    were trained on one task alone it is the forward transfer of ``sapt`` with the other sign.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        reference: ``s``, shape ``[tasks]``: the score that each task can reach.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.

    Raises:
        ValueError: if there is not one reference for each task.
    """
    if reference.shape != matrix.shape[1:]:
        raise ValueError(f"reference: expected one score for each of the {matrix.shape[1]} tasks")
    tasks = _trained(matrix)
    return -_gain(matrix.diagonal(offset=-1)[:tasks], reference[:tasks], mode).nanmean()


def forward_transfer(
    matrix: Tensor, mode: Mode = "max", preset: Preset = "gem", single_task: Tensor | None = None
) -> Tensor:
    """Gain of a later task from earlier ones, before (``gem``, ``trace``) or by the end of (``sapt``) its training.

    ``gem`` and ``trace``: ``mean_{j=2..T} (R[j−1, j] − R[0, j])``. ``sapt``: ``mean_j (R[j, j] − s_j)``.
    Positive is good.

    Args:
        matrix: ``[tasks + 1, tasks]``.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
        preset: the definition.
        single_task: ``s``, shape ``[tasks]``, the scores of models that were trained on one task alone (``sapt``).

    Raises:
        ValueError: if ``sapt`` is asked for without one `single_task` score per task.
    """
    check_preset(preset)
    tasks = _trained(matrix)
    if preset == "sapt":
        if single_task is None or single_task.shape != matrix.shape[1:]:
            raise ValueError(
                "preset='sapt' compares with models trained on one task alone: give `single_task`, one score for each"
                f" of the {matrix.shape[1]} tasks"
            )
        return _gain(matrix.diagonal(offset=-1)[:tasks], single_task[:tasks], mode).nanmean()
    before, baseline = matrix.diagonal()[1:tasks], matrix[0, 1:tasks]  # R[j − 1, j] for j = 2 … T
    return _gain(before, torch.where(baseline.isinf(), torch.nan, baseline), mode).nanmean()


def _gain(now: Tensor, then: Tensor, mode: Mode) -> Tensor:
    """Gain since `then`, positive is good; the worst where one of the two is not finite."""
    change = _sign(mode) * (now - then)
    return torch.where((now.isinf() | then.isinf()) & ~(now.isnan() | then.isnan()), -torch.inf, change)


def _least(values: Tensor) -> Tensor:
    """The least of the values that are known; NaN if none is."""
    known = values[~values.isnan()]
    return known.min() if len(known) else values.new_tensor(torch.nan)


def _trained(matrix: Tensor) -> int:
    """The number of tasks trained so far."""
    if matrix.ndim != 2 or not 1 <= matrix.shape[0] - 1 <= matrix.shape[1]:
        raise ValueError(
            f"matrix: expected the shape [rows, tasks] with the row before training and at least one more, and no more"
            f" than tasks + 1 rows; got {list(matrix.shape)}"
        )
    return matrix.shape[0] - 1


def _sign(mode: Mode) -> int:
    if mode not in ("max", "min"):
        raise ValueError(f"mode: expected 'max' (higher is better) or 'min' (lower is better), got {mode!r}")
    return 1 if mode == "max" else -1


def check_preset(preset: Preset) -> None:
    """Raises ValueError for an unknown preset."""
    if preset not in ("gem", "trace", "sapt"):
        raise ValueError(f"preset={preset!r}: expected 'gem', 'trace' or 'sapt'")
