"""The drawings of the page, as SVG inside the HTML: text stays text, and colours follow the reader's light or dark."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any

from lightning_cl.evaluation.sentences import row_names

COLORS = ("#4f86d0", "#d9843b", "#4fa866", "#a873c2", "#cf5560", "#808080", "#35a3a3", "#b99f37")
"""Colours of the tasks, readable on white and on black."""

_INK = "#010203"  # stands for the colour of the page's text until the SVG is written
_WIDTH = 4.6  # inches: at 400 pixels of screen the letters keep their size


def figure_of(height: float, rows: int = 1) -> tuple[Any, Any]:
    """Returns a transparent figure, and its axes with the page's text colour.

    Args:
        height: in inches.
        rows: panels above each other.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), facecolor="none")
    FigureCanvasSVG(figure)
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    # Fixed margins: measuring the texts takes ten times as long as drawing them.
    figure.subplots_adjust(left=0.16, right=0.98, top=1 - 0.1 / height, bottom=0.5 / height)
    for axes in panels:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(axis="y", color=_INK, alpha=0.12)
        for side, spine in axes.spines.items():
            spine.set(color=_INK, visible=side in ("left", "bottom"))
    return figure, panels if rows > 1 else panels[0]


def as_svg(figure: Any, words: str) -> str:
    """Writes a figure as an ``<svg>`` element that needs nothing from elsewhere.

    Args:
        figure: of :func:`figure_of`.
        words: description for readers who do not see it.
    """
    import matplotlib
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
        if text.get_color() in ("black", "k"):
            text.set_color(_INK)
    stream = io.StringIO()
    # The reader's browser brings the letters, so it does not matter that a font here lacks some.
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": words}):
        warnings.simplefilter("ignore")
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_INK, "currentColor")
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"(font(?:-family)?:[^;\"]*?)'[^\"]*?sans-serif", r"\1sans-serif", drawing)
    label = _attribute(words)
    return re.sub(r' (width|height)="[^"]*pt"', "", drawing, count=2).replace(
        "<svg", f'<svg role="img" aria-label="{label}"', 1
    )


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def draw_rows(report: dict[str, Any]) -> str:
    """Draws each task's score over the rows of the matrix, a ring where it was just trained."""
    rows = row_names(report)
    figure, axes = figure_of(2.9)
    for j, name in enumerate(report["tasks"]):
        values = [row[j] if math.isfinite(row[j]) else math.nan for row in report["matrix"]]
        color, watched = COLORS[j % len(COLORS)], name in report["watched"]
        starts = sorted({0, *(c["row"] for c in report["data_changes"] if c["task"] == name)})
        for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
            axes.plot(range(start, end), values[start:end], ":" if watched else "-", color=color, marker="o", ms=3.5)
        if name in rows[1:]:
            learnt = rows.index(name, 1)
            axes.plot(learnt, values[learnt], "o", color=color, ms=10, mfc="none", mew=1.8)
    axes.set_xticks(range(len(rows)), [str(i) for i in range(len(rows))])
    axes.set_xlabel("tasks trained so far (ring: just trained)", color=_INK, fontsize=9)
    axes.set_ylabel(report["monitor"], color=_INK, fontsize=9)
    return as_svg(figure, f"{report['monitor']} of every task after every task")


def draw_steps(curves: dict[str, Any], guard: Sequence[dict[str, Any]], order: Sequence[str]) -> str:
    """Draws each task's held-out loss over the steps, with a line where a task begins and a mark at each action.

    Args:
        curves: ``tasks``, with step and loss of each look, and ``switches``.
        guard: looks of a guard; those with an action are marked by a triangle.
        order: the tasks in the order of the matrix, which gives them their colours.
    """
    figure, axes = figure_of(3.2)
    for name, points in curves["tasks"].items():
        color = COLORS[order.index(name) % len(COLORS)] if name in order else COLORS[5]
        losses = [loss if loss is not None and math.isfinite(loss) else math.nan for _, loss in points]
        axes.plot([step for step, _ in points], losses, "-", color=color, lw=1.4, marker="o", ms=2)
        for switch in curves["switches"]:
            gap = switch["gaps"].get(name)
            if gap is not None and gap["depth"] > 0:
                at = (switch["step"] + gap["peak_step"], gap["peak"])
                axes.plot(*at, "o", color=color, ms=8, mfc="none", mew=1.4)
    for switch in curves["switches"]:
        axes.axvline(switch["step"], color=_INK, alpha=0.5, ls="--", lw=1)
    for step in sorted({look["step"] for look in guard if look["action"]}):
        axes.plot(step, 0.02, "^", color=COLORS[4], ms=7, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_xlabel("steps of the run", color=_INK, fontsize=9)
    axes.set_ylabel("held-out loss", color=_INK, fontsize=9)
    return as_svg(figure, "held-out loss of every task over the steps of the run")


def draw_scatter(points: Sequence[dict[str, Any]], monitor: str) -> str:
    """Draws retention against plasticity, one point for each run; the best corner is marked.

    Args:
        points: for each run its ``number``, the mean when learnt (``learnt``), the ``forgetting``, and ``own`` if it is
            the page's run.
        monitor: the name of the score.
    """
    figure, axes = figure_of(2.9)
    for point in points:
        color = COLORS[1] if point["own"] else COLORS[0]
        axes.plot(point["learnt"], point["forgetting"], "o", color=color, ms=8 if point["own"] else 6)
        axes.annotate(
            str(point["number"]), (point["learnt"], point["forgetting"]), (5, 5), textcoords="offset points", fontsize=9
        )
    axes.margins(0.15)
    axes.set_xlabel(f"mean {monitor} when learnt", color=_INK, fontsize=9)
    axes.set_ylabel("forgetting", color=_INK, fontsize=9)
    return as_svg(figure, f"forgetting against {monitor} when learnt, {len(points)} runs")
