"""The picture of a run: the matrix as a heat map, and each task's score over the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_LONGEST = 18  # characters of a name; a longer one is shortened
_UPRIGHT = 9  # characters that stand beside each other without being turned
_COLORS = ("#3b6fb6", "#d1782f", "#4a9c5d", "#9a5fb5", "#b8474f", "#6b6b6b", "#2f9c9c", "#b59a2f")


def draw_matrix(report: dict[str, Any], path: Path) -> None:
    """Draws the report's matrix as a PNG.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        path: the file to write.
    """
    # Not pyplot: a library must not change the user's backend or open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lightning_cl.evaluation.report import row_names

    tasks, matrix = report["tasks"], report["matrix"]
    names = short_names(tasks)
    report = {**report, "tasks": names, "watched": [names[tasks.index(name)] for name in report["watched"]]}
    tasks, rows = names, row_names(report)
    turned = max(map(len, tasks)) > _UPRIGHT
    width = max(9.0, 5.4 + 1.1 * len(tasks) + 0.8 * len(rows))
    height = max(3.6, 1.5 + 0.55 * len(rows)) + (0.7 if turned else 0.0)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
    _heat_map(left, tasks, rows, matrix, report)
    _curves(right, tasks, rows, matrix, report)
    scores = " · ".join(
        f"{name.replace('_', ' ')} {report[name]:{'' if name == 'average' else '+'}.3f}".replace("-", "−")
        for name in ("average", "forgetting", "backward_transfer")
        if not math.isnan(report[name])
    )
    methods = [name for name in report["methods"] if name != "PromptSamples"]
    figure.suptitle(f"{' + '.join(methods) if methods else 'no protection'}: {scores}", fontsize=11)
    figure.savefig(path, format="png")


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit beside each other: long ones without their end, or without their middle, or else whole.

    Args:
        names: of the tasks, no two alike; so are the short ones.
    """
    half = (_LONGEST - 1) // 2
    forms: list[Callable[[str], str]] = [
        lambda name: f"{name[: _LONGEST - 1].rstrip()}…",
        lambda name: f"{name[:half].rstrip()}…{name[-half:].lstrip()}",
        lambda name: name,
    ]
    short = [[name if len(name) <= _LONGEST else form(name) for name in names] for form in forms]
    return next(shown for shown in short if len(set(shown)) == len(names))


def _turn(axes: Any, names: Sequence[str]) -> None:
    """Labels of the x axis that would run into each other stand aslant."""
    if max(map(len, names)) <= _UPRIGHT:
        return
    above = axes.xaxis.get_ticks_position() == "top"
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="left" if above else "right", rotation_mode="anchor")


def _heat_map(axes: Any, tasks: list[str], rows: list[str], matrix: list[list[float]], report: dict[str, Any]) -> None:
    import numpy as np
    from matplotlib.patches import Rectangle

    values = np.array(matrix, dtype=float)
    # Each column between its own worst and best: tasks differ in what a good score is. Blue is good, red is bad, which
    # the colour-blind can tell apart too.
    good = values if report["mode"] == "max" else -values
    known = np.isfinite(good)
    low = np.where(known, good, np.inf).min(0)
    high = np.where(known, good, -np.inf).max(0)
    shade = (good - low) / np.where(high > low, high - low, 1.0)
    axes.imshow(np.where(known, shade, np.nan), cmap="RdYlBu", vmin=-0.15, vmax=1.15, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(rows)), [f"after {row}" if i else row for i, row in enumerate(rows)])
    axes.xaxis.tick_top()
    _turn(axes, tasks)
    axes.tick_params(length=0)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            color = "white" if known[i, j] and not 0.08 < shade[i, j] < 0.92 else "black"
            text = "?" if math.isnan(value) else f"{value:.2f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=11, color=color)
    trained = [name for name in tasks if name not in report["watched"]]
    for i, name in enumerate(trained[: len(rows) - 1]):
        axes.add_patch(
            Rectangle((tasks.index(name) - 0.5, i + 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.8)
        )
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel(f"{report['monitor']} · box: just trained\nred: the task's worst, blue: its best", fontsize=9)


def _curves(axes: Any, tasks: list[str], rows: list[str], matrix: list[list[float]], report: dict[str, Any]) -> None:
    trained = [name for name in tasks if name not in report["watched"]]
    for j, name in enumerate(tasks):
        color = _COLORS[j % len(_COLORS)]
        values = [row[j] for row in matrix]
        style = ":" if name in report["watched"] else "-"
        axes.plot(range(len(rows)), values, style, color=color, linewidth=2, marker="o", markersize=4, label=name)
        if name in trained and trained.index(name) + 1 < len(rows):
            learnt = trained.index(name) + 1
            axes.plot(
                learnt, values[learnt], "o", color=color, markersize=11, markerfacecolor="none", markeredgewidth=2
            )
    turned = max(map(len, tasks)) > _UPRIGHT
    begin, after = ("before training", "after ") if turned else ("before\ntraining", "after\n")
    axes.set_xticks(range(len(rows)), [f"{after}{row}" if i else begin for i, row in enumerate(rows)])
    _turn(axes, tasks)
    axes.set_ylabel(f"{report['monitor']} ({'lower' if report['mode'] == 'min' else 'higher'} is better)")
    axes.grid(axis="y", alpha=0.3)
    # Beside the curves: inside there may be no place without one.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    axes.legend(frameon=False, fontsize=9, title="ring: just trained", title_fontsize=8, **beside)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
