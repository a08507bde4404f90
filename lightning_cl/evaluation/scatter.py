"""The picture of a comparison: how well each method learns new tasks against what it keeps of earlier ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.comparison import PLASTICITY, RETENTION, half_width, mean_of, row_of
from lightning_cl.evaluation.figure import COLORS
from lightning_cl.evaluation.fonts import readable
from lightning_cl.files import replace_file

_FRONT = "#444444"
_DISTANCES = (9, 18, 30, 46, 66)  # of a name from its point, in points
_ANGLES = (45, 315, 135, 225, 0, 180, 90, 270)

_PIECES = 24  # of a line, each a box that a name keeps off

Box = tuple[float, float, float, float]


def draw_comparison(table: dict[str, Any], path: Path) -> None:
    """Draws the scatter as a PNG, whole or not at all; nothing if no method has both scores.

    Args:
        table: of :func:`~lightning_cl.evaluation.comparison.compare_methods`.
        path: the file to write.
    """
    figure = comparison_figure(table)
    if figure is not None:
        replace_file(path, lambda temporary: figure.savefig(temporary, format="png", facecolor="white"))


def comparison_figure(table: dict[str, Any]) -> Any:
    """Draws plasticity against retention, with 95 % intervals and the Pareto front; right and up are better.

    Args:
        table: of :func:`~lightning_cl.evaluation.comparison.compare_methods`.

    Returns:
        a ``matplotlib.figure.Figure`` with an Agg canvas; None if no method has both scores.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    shown = [m for m in table["methods"] if mean_of(m, PLASTICITY) is not None and mean_of(m, RETENTION) is not None]
    if not shown:
        return None
    names, fonts = readable([method["name"] for method in shown])
    figure = Figure(figsize=(8.5, 6.0), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_facecolor("white")
    points = [(float(mean_of(m, PLASTICITY) or 0.0), float(mean_of(m, RETENTION) or 0.0)) for m in shown]
    families = list(dict.fromkeys(method["family"] for method in table["methods"]))
    drawn: list[tuple[tuple[float, float], tuple[float, float]]] = []  # lines that no name may lie on
    for method, (x, y) in zip(shown, points, strict=True):
        color = COLORS[families.index(method["family"]) % len(COLORS)]
        wide, high = (half_width(row_of(method["rows"], measure)) for measure in (PLASTICITY, RETENTION))
        mark = "s" if method["name"] == table["methods"][0]["name"] else "o"
        axes.errorbar(x, y, high, wide, mark, color=color, markersize=8, capsize=3, linewidth=1, zorder=3)
        drawn += [((x - (wide or 0), y), (x + (wide or 0), y)), ((x, y - (high or 0)), (x, y + (high or 0)))]
    front = sorted(point for method, point in zip(shown, points, strict=True) if method["name"] in table["pareto"])
    drawn += itertools.pairwise(front)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), "--", color=_FRONT, linewidth=1.2, zorder=2, label="Pareto front")
        axes.legend(frameon=False, fontsize=9, loc="best")
    better = "lower" if table["mode"] == "min" else "higher"
    axes.set_xlabel(f"plasticity: mean {table['monitor']} right after a task was learnt ({better} is better) →")
    axes.set_ylabel("retention: change on earlier tasks since learnt (up keeps more) →")
    seeds = max(method["n"] for method in shown)
    spread = ", bars: 95 % intervals" if seeds >= 3 else ""
    missing = [method["name"] for method in table["methods"] if method not in shown]
    title = f"Learning and keeping: {len(shown)} methods, {seeds} {'seeds' if seeds > 1 else 'seed'}{spread}"
    axes.set_title(title + (f"\nnot finite or not run: {', '.join(missing)}" if missing else ""), fontsize=11)
    axes.margins(0.14)
    if table["mode"] == "min":
        axes.invert_xaxis()
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for text in figure.findobj(Text):
        text.set(fontfamily=fonts, parse_math=False)
    _place_names(figure, axes, names, points, drawn, fonts)
    return figure


def _place_names(
    figure: Any,
    axes: Any,
    names: Sequence[str],
    points: Sequence[tuple[float, float]],
    drawn: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    fonts: list[str],
) -> None:
    """Writes each name next to its point where no other name, point or line is; far ones have a line to it."""
    from matplotlib.patheffects import withStroke

    figure.canvas.draw()
    figure.set_layout_engine("none")
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    places = [tuple(axes.transData.transform(point)) for point in points]
    taken: list[Box] = [(x - 8 * scale, y - 8 * scale, x + 8 * scale, y + 8 * scale) for x, y in places]
    for start, end in drawn:
        (x, y), (u, v) = (axes.transData.transform(point) for point in (start, end))
        for step in range(_PIECES):
            along = (step + 0.5) / _PIECES
            a, b = x + along * (u - x), y + along * (v - y)
            half = (abs(u - x) / _PIECES / 2 + scale, abs(v - y) / _PIECES / 2 + scale)
            taken.append((a - half[0], b - half[1], a + half[0], b + half[1]))
    legend = axes.get_legend()
    inside = axes.get_window_extent(renderer)
    if legend is not None:
        taken.append(legend.get_window_extent(renderer).extents)
    for name, point, (x, y) in zip(names, points, places, strict=True):
        label = axes.annotate(name, point, fontsize=10, family=fonts, parse_math=False)
        size = label.get_window_extent(renderer)
        best = min(
            (
                (distance, angle, _box(x, y, distance * scale, angle, size.width, size.height))
                for distance in _DISTANCES
                for angle in _ANGLES
            ),
            key=lambda found: (_overlap(found[2], taken) + _outside(found[2], inside.extents), found[0]),
        )
        label.remove()
        distance, _, box = best
        taken.append(box)
        center = ((box[0] + box[2] - 2 * x) / 2 / scale, (box[1] + box[3] - 2 * y) / 2 / scale)
        line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7} if distance > _DISTANCES[1] else None
        text = axes.annotate(name, point, center, textcoords="offset points", arrowprops=line, ha="center", va="center")
        text.set(fontsize=10, fontfamily=fonts, parse_math=False, zorder=5)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def _box(x: float, y: float, distance: float, angle: int, width: float, height: float) -> Box:
    """The place of a text of a size in a direction from a point, its nearest edge at the distance."""
    dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y = x + dx * (distance + width / 2), y + dy * (distance + height / 2)
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _overlap(box: Box, taken: Sequence[Box]) -> float:
    return sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )


def _outside(box: Box, inside: Sequence[float]) -> float:
    """The area of a box that is not on the axes."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    kept = _overlap(box, [(inside[0], inside[1], inside[2], inside[3])])
    return area - kept
