"""A picture of the importance over a model's layers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.fonts import readable
from lightning_cl.files import replace_file

_MOST_KINDS = 14


def write_importance(report: dict[str, Any], folder: Path) -> None:
    """Writes ``importance.png``, whole or not at all, if a method of the run measures importance."""
    label = dict(zip(report["tasks"], readable(report["tasks"])[0], strict=True))
    panels = [
        (name, method["importance"][-1] | {"task": label.get(last := method["importance"][-1]["task"], last)})
        for name, method in report["methods"].items()
        if method.get("importance") and method["importance"][-1].get("layers")
    ]
    if panels:
        replace_file(folder / "importance.png", lambda path: draw_importance(panels, path))


def draw_importance(panels: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Draws the mean importance of each kind of tensor in each layer, one panel per method.

    Args:
        panels: a method's name, and the diagnosis of its importance
            (:func:`~lightning_cl.callbacks.regularization.diagnosis.describe_importance`, with ``task``).
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = [_table(diagnosis["layers"]) for _, diagnosis in panels]
    heights = [1.2 + 0.3 * len(kinds) for kinds, _, _ in tables]
    columns = max(len(layers) for _, layers, _ in tables)
    figure = Figure(figsize=(max(6.5, 4.5 + 0.42 * columns), sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, diagnosis), table in zip(rows, panels, tables, strict=True):
        _panel(figure, axes, f"{name}: importance after {diagnosis['task']}", *table)
    families = readable([f"{name} {diagnosis['task']}" for name, diagnosis in panels])[1]
    for axes in rows:
        axes.title.set(fontfamily=families, parse_math=False)
    figure.savefig(path, format="png")


def _table(by_kind: dict[str, dict[str, float]]) -> tuple[list[str], list[str], list[list[float]]]:
    """Kinds, layers, and ``log10`` of the means; NaN where there is no such tensor, or its importance is zero."""
    numbers = sorted({int(layer) for means in by_kind.values() for layer in means if layer})
    outside = [""] if any("" in means for means in by_kind.values()) else []
    layers = [*map(str, numbers), *outside]
    kinds = sorted(by_kind, key=lambda kind: -max(by_kind[kind].values()))[:_MOST_KINDS]
    kinds = [kind for kind in by_kind if kind in kinds]  # in the order of the model
    values = [
        [math.log10(value) if (value := by_kind[kind].get(layer, 0.0)) > 0 else math.nan for layer in layers]
        for kind in kinds
    ]
    return kinds, layers, values


def _panel(figure: Any, axes: Any, title: str, kinds: list[str], layers: list[str], values: list[list[float]]) -> None:
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    short = [_short(kind) for kind in kinds]
    names = [name if short.count(name) == 1 else kind for name, kind in zip(short, kinds, strict=True)]
    axes.set_yticks(range(len(kinds)), names, fontsize=8)
    axes.set_xticks(range(len(layers)), [layer or "outside" for layer in layers], fontsize=8)
    axes.set_xlabel("layer", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.9)
    bar.set_label("mean importance, powers of ten\n(white: none, or exactly 0)", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _short(kind: str) -> str:
    """The last parts of a name, without what every name ends with."""
    parts = [part for part in kind.split(".") if part not in ("weight", "default", "base_layer")]
    inside = parts[parts.index("*") + 1 :] if "*" in parts else parts
    return ".".join((inside or parts)[-3:]) or kind
