"""The picture of every task's loss over the steps of a run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.figure import COLORS, short_names
from lightning_cl.evaluation.fonts import readable
from lightning_cl.files import replace_file

_SPACE = 0.055  # of the picture's height: two labels at the curves' ends are no nearer to each other
_WIDE_ENOUGH = 0.09  # of the picture's width: a task shorter than that has its name upright


def write_curves(curves: dict[str, Any], folder: Path) -> None:
    """Writes ``curves.png``, whole or not at all."""
    replace_file(folder / "curves.png", lambda path: curves_figure(curves).savefig(path, format="png"))


def curves_figure(curves: dict[str, Any]) -> Any:
    """Draws each task's loss over the steps, with a line where a task begins.

    A task's curve is thick while the task itself is trained. A ring marks the peak of each stability gap.

    Args:
        curves: ``tasks``, with ``[step, loss]`` for each look, and ``switches``, as
            :class:`~lightning_cl.LossCurves` reports them.

    Returns:
        a ``matplotlib.figure.Figure`` with an Agg canvas.
    """
    # Not pyplot: a library must not change the user's backend or open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    names, switches = list(curves["tasks"]), curves["switches"]
    drawn, families = readable(names)
    label = dict(zip(names, short_names(drawn), strict=True))
    last = max((point[0] for points in curves["tasks"].values() for point in points), default=1)
    figure = Figure(figsize=(max(9.0, 4.5 + 1.6 * len(switches)), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [*(switch["step"] for switch in switches[1:]), last]
    spans = {switch["task"]: (switch["step"], end) for switch, end in zip(switches, ends, strict=True)}
    final = {}
    for number, name in enumerate(names):
        color, points = COLORS[number % len(COLORS)], curves["tasks"][name]
        style = "-" if name in spans else ":"
        steps = [step for step, _ in points]
        losses = [loss if loss is not None and math.isfinite(loss) else math.nan for _, loss in points]
        axes.plot(steps, losses, style, color=color, linewidth=1.3, marker="o", markersize=2.2)
        begin, end = spans.get(name, (0, -1))
        own = [(step, loss) for step, loss in zip(steps, losses, strict=True) if begin <= step <= end]
        axes.plot([step for step, _ in own], [loss for _, loss in own], color=color, linewidth=3.2, alpha=0.45)
        finite = [loss for loss in losses if not math.isnan(loss)]
        if finite:
            final[name] = (finite[-1], color)
        for switch in switches:
            gap = switch["gaps"].get(name)
            if gap is not None and gap["depth"] > 0:
                at = (switch["step"] + gap["peak_step"], gap["peak"])
                axes.plot(*at, "o", color=color, markersize=8, markerfacecolor="none", markeredgewidth=1.4)
    _mark_switches(axes, switches, ends, label, last)
    _name_ends(axes, final, label)
    axes.set_xlim(0, last)
    axes.set_xlabel("steps of the run (ring: peak of a stability gap; thick: the task is trained)", fontsize=9)
    axes.set_ylabel("held-out loss (lower is better)", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for text in figure.findobj(Text):
        text.set(fontfamily=families, parse_math=False)
    return figure


def _mark_switches(
    axes: Any, switches: list[dict[str, Any]], ends: list[int], label: dict[str, str], last: int
) -> None:
    """Draws a line where each task begins, and its name above its span."""
    for switch, end in zip(switches, ends, strict=True):
        begin = switch["step"]
        if begin > 0:
            axes.axvline(begin, color="#555555", linestyle="--", linewidth=1)
        name = label.get(switch["task"], switch["task"])
        narrow = (end - begin) / max(last, 1) < max(_WIDE_ENOUGH, 0.012 * len(name))
        axes.text(
            (begin + end) / 2,
            1.02,
            name,
            transform=axes.get_xaxis_transform(),
            ha="left" if narrow else "center",
            va="bottom",
            rotation=30 if narrow else 0,
            rotation_mode="anchor",
            fontsize=9,
        )


def _name_ends(axes: Any, final: dict[str, tuple[float, str]], label: dict[str, str]) -> None:
    """Writes each task's name next to the end of its curve, and moves names apart that would cover each other."""
    low, high = axes.get_ylim()
    order = sorted(final, key=lambda name: final[name][0])
    heights = [(final[name][0] - low) / (high - low) for name in order]
    for below, above in itertools.pairwise(range(len(heights))):
        heights[above] = max(heights[above], heights[below] + _SPACE)
    over = max(heights[-1] - 1.0, 0.0) if heights else 0.0
    for name, height in zip(order, heights, strict=True):
        place = {"transform": axes.transAxes, "va": "center", "fontsize": 9}
        axes.text(1.01, height - over, label[name], color=final[name][1], **place)
