"""The loss of every task over the steps of a run, and the stability gap at each switch of tasks."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cl.evaluation.tables import format_number

Points = Sequence[Sequence[float]]
"""Looks at one task's loss: the step and the loss of each, in order."""

_RECOVERED = 0.9  # of the gap's depth
_TOLD = 0.005  # nats: a smaller gap or loss is no news
_NOISE = 3.0  # times the noise of the looks: a smaller gap is none


def geometric_looks(steps: int, looks: int) -> list[int]:
    """Returns the steps of a task at which to look: each distance between two looks is longer than the one before.

    They are ``steps^(k / looks)`` for k from 0 on, without repetition. The task's last step is not among them.

    Args:
        steps: number of steps of the task.
        looks: the most looks.

    Example:
        >>> from lightning_cl.evaluation.curves import geometric_looks
        >>> geometric_looks(100, 6)
        [1, 2, 5, 10, 22, 46]
    """
    return sorted({round(steps ** (k / looks)) for k in range(looks)} - {0, steps}) if looks > 0 else []


def stability_gap(points: Points, start: int, end: int) -> dict[str, Any] | None:
    """Measures the passing part of a rise of an earlier task's loss while a later task is trained.

    The stability gap (De Lange, van de Ven & Tuytelaars 2023, ICLR, arXiv:2205.13452) is a drop in performance right
    after a switch of tasks, of which later steps bring a part back. Here it is in the units of the loss::

        rise    = max(largest loss during the task − loss before the switch, 0)
        remains = max(loss at the task's end − loss before the switch, 0)
        depth   = rise − remains

    A loss that is not a number counts as infinite: the run has diverged.

    Args:
        points: the looks at the earlier task.
        start: the step of the switch.
        end: the step at which the later task ends; the gap of a task that still runs is measured up to its last look.

    Returns:
        ``before``, ``peak``, ``peak_step`` (steps since the switch), ``end``, ``rise``, ``remains``, ``depth``, and
        ``steps_to_recover``: steps from the switch to the first look after the peak at which 90 % of the depth has
        gone; None if the depth is 0. ``noise``: the standard deviation of a look, from the changes between
        neighbours in the second half of the task; None with fewer than four looks there. None instead of all this if
        there is no look on one side, or the run had diverged before.
    """
    looks = [(step, math.inf if math.isnan(loss) else loss) for step, loss in points]
    earlier = [loss for step, loss in looks if step <= start]
    during = [(step, loss) for step, loss in looks if start < step <= end]
    if not earlier or not during or math.isinf(earlier[-1]):
        return None
    before, last = earlier[-1], during[-1][1]
    peak_step, peak = max(during, key=lambda point: point[1])
    rise, remains = max(peak - before, 0.0), max(last - before, 0.0)
    depth = rise - remains if math.isfinite(remains) else 0.0
    recovered = None
    if depth > 0:
        level = peak - _RECOVERED * depth if math.isfinite(peak) else sys.float_info.max
        recovered = next(step for step, loss in during if step > peak_step and loss <= level) - start
    return {
        "before": before,
        "peak": peak,
        "peak_step": peak_step - start,
        "end": last,
        "rise": rise,
        "remains": remains,
        "depth": depth,
        "steps_to_recover": recovered,
        "noise": _noise([loss for step, loss in during if step - start >= (end - start) / 2]),
    }


def _noise(losses: Sequence[float]) -> float | None:
    """The standard deviation of a look around a slow change."""
    if len(losses) < 4 or not all(map(math.isfinite, losses)):
        return None
    squares = [(now - before) ** 2 for before, now in itertools.pairwise(losses)]
    return math.sqrt(sum(squares) / len(squares) / 2.0)


def describe_switches(
    curves: Mapping[str, Points], switches: Sequence[Mapping[str, Any]], last_step: int
) -> list[dict[str, Any]]:
    """Returns each switch with the gap of every task that had been looked at before it.

    Args:
        curves: the looks at each task.
        switches: each with the name of the ``task`` that begins and the ``step`` at which it does.
        last_step: the step that the run has reached.
    """
    ends = [*(switch["step"] for switch in switches[1:]), last_step]
    described = []
    for switch, end in zip(switches, ends, strict=True):
        gaps = {
            name: gap
            for name, points in curves.items()
            if name != switch["task"] and (gap := stability_gap(points, switch["step"], end)) is not None
        }
        described.append({"task": switch["task"], "step": switch["step"], "gaps": gaps})
    return described


def curve_sentences(switches: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one sentence for each gap that is worth one, and for each divergence."""
    return [
        f"{name}, when {switch['task']} began: {words}"
        for switch in switches
        for name, gap in switch["gaps"].items()
        if (words := _words(gap))
    ]


def _words(gap: Mapping[str, Any]) -> str | None:
    if math.isinf(gap["peak"]):
        after = f"finite again at step {gap['steps_to_recover']}" if gap["depth"] else "it stayed so"
        return f"its loss was not finite (at step {gap['peak_step']}), {after}"
    if gap["depth"] < max(_TOLD, _NOISE * (gap.get("noise") or 0.0)):
        return None
    return (
        f"its loss rose by {format_number(gap['rise'])} (at step {gap['peak_step']}), of which"
        f" {format_number(gap['depth'])} went away again (nine tenths of it by step {gap['steps_to_recover']}) and"
        f" {format_number(gap['remains'])} stayed"
    )
