"""The pictures of a run: its matrix as a heat map and as curves, and the importance over the model's layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.fonts import readable
from lightning_cl.evaluation.sentences import row_names
from lightning_cl.evaluation.tables import HEADLINE, UNSIGNED, format_number, text_width
from lightning_cl.files import replace_file

_LONGEST = 18  # characters of a name; a longer one is shortened
_UPRIGHT = 9  # columns that stand next to each other without being turned
_LEAST = 0.1  # of the highest score: a change of so much has the full colour, if no change is larger
_BETTER, _WORSE, _NOT_YET, _BROKEN = "#2166ac", "#b2182b", "#d9d9d9", "#3f0010"
_OTHER_DATA = "#e67e00"
_MOST_KINDS = 14  # rows of a panel of importance
COLORS = ("#3b6fb6", "#d1782f", "#4a9c5d", "#9a5fb5", "#b8474f", "#6b6b6b", "#2f9c9c", "#b59a2f")


def draw_matrix(report: dict[str, Any], path: Path) -> None:
    """Draws the report's matrix as a PNG.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        path: the file to write.
    """
    save(matrix_figure(report), path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure with an Agg canvas as a PNG.

    ``Figure.savefig`` would draw it twice, the first time for a layout that drawing makes by itself.

    Args:
        figure: a ``matplotlib.figure.Figure``.
        path: the file to write.
    """
    figure.canvas.print_png(path, pil_kwargs={"compress_level": 1})


def matrix_figure(report: dict[str, Any], title: str | None = None) -> Any:
    """Draws the report's matrix.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        title: in front of the scores; the methods of the run by default.

    Returns:
        a ``matplotlib.figure.Figure`` with an Agg canvas.
    """
    # Not pyplot: a library must not change the user's backend or open windows.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    drawn, families = readable(report["tasks"])
    tasks, matrix = short_names(drawn), report["matrix"]
    label = dict(zip(report["tasks"], tasks, strict=True))
    shifts = changes_of(report)
    report = report | {
        "tasks": tasks,
        "by_place": [name for i, name in enumerate(drawn) if name == f"task {i + 1}" != report["tasks"][i]],
        "watched": [label[name] for name in report["watched"]],
        "data_changes": [change | {"task": label[change["task"]]} for change in report["data_changes"]],
    }
    rows = row_names(report)
    turned = max(map(text_width, tasks)) > _UPRIGHT
    width = max(9.0, 5.4 + 1.1 * len(tasks) + 0.8 * len(rows))
    height = max(3.8, 1.8 + 0.55 * len(rows)) + (0.7 if turned else 0.0)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.0, 1.25))
    _heat_map(left, tasks, rows, matrix, shifts, report)
    _curves(right, tasks, rows, matrix, report)
    scores = " · ".join(
        f"{name.replace('_', ' ')} {format_number(report[name], signed=name not in UNSIGNED)}"
        for name in HEADLINE
        if not math.isnan(report[name])
    )
    methods = [name for name in report["methods"] if name != "PromptSamples"]
    title = title or (" + ".join(methods) if methods else "no protection")
    figure.suptitle(f"{title}: {scores}" if scores else title, fontsize=11)
    for text in figure.findobj(Text):
        text.set(fontfamily=families, parse_math=False)
    return figure


def changes_of(report: dict[str, Any]) -> list[list[float]]:
    """Returns the gain of each entry over when its task was learnt; NaN before that.

    A watched task is compared with the row before training. Where a column continues with other data, its first row on
    them is what the later ones are compared with.
    """
    trained = [name for name in report["tasks"] if name not in report["watched"]]
    sign = 1 if report["mode"] == "max" else -1
    shifts = [[math.nan] * len(row) for row in report["matrix"]]
    for j, name in enumerate(report["tasks"]):
        first = trained.index(name) + 1 if name in trained else 0
        starts = [first, *(change["row"] for change in report["data_changes"] if change["task"] == name)]
        for i in range(max(first, 1), len(shifts)):
            reference = max(start for start in starts if start <= i)
            if reference > 0 or name not in trained:
                change = sign * (report["matrix"][i][j] - report["matrix"][reference][j])
                shifts[i][j] = change if math.isfinite(change) else math.nan
    return shifts


def short_names(names: Sequence[str]) -> list[str]:
    """Names that fit next to each other: long ones without their end, or without their middle, or else whole.

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
    if max(map(text_width, names)) <= _UPRIGHT:
        return
    above = axes.xaxis.get_ticks_position() == "top"
    for label in axes.get_xticklabels():
        label.set(rotation=30, ha="left" if above else "right", rotation_mode="anchor")


def _heat_map(
    axes: Any,
    tasks: list[str],
    rows: list[str],
    matrix: list[list[float]],
    shifts: list[list[float]],
    report: dict[str, Any],
) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    colors = LinearSegmentedColormap.from_list("change", (_WORSE, "white", _BETTER)).with_extremes(bad=_NOT_YET)
    full = full_color(matrix, shifts)
    shades = [[shift / full for shift in row] for row in shifts]
    axes.imshow(shades, cmap=colors, vmin=-1, vmax=1, aspect="auto")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_yticks(range(len(rows)), [f"after {row}" if i else row for i, row in enumerate(rows)])
    axes.xaxis.tick_top()
    _turn(axes, tasks)
    axes.tick_params(length=0)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            broken = math.isinf(value)
            if broken:
                axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, facecolor=_BROKEN, edgecolor="none"))
            text = "not\nfinite" if broken else "–" if math.isnan(value) else f"{value:.2f}"
            color = "white" if broken or abs(shades[i][j]) > 0.6 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize=8 if broken else 11, color=color)
    trained = [name for name in tasks if name not in report["watched"]]
    for i, name in enumerate(trained[: len(rows) - 1]):
        axes.add_patch(
            Rectangle((tasks.index(name) - 0.5, i + 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.8)
        )
    for change in report["data_changes"]:
        column = tasks.index(change["task"])
        ends = (column - 0.5, column + 0.5)
        axes.plot(ends, [change["row"] - 0.5] * 2, color=_OTHER_DATA, linewidth=4, clip_on=False, zorder=5)
    for side in axes.spines.values():
        side.set_visible(False)
    notes = [f"{report['monitor']} · box: just trained"]
    notes += ["grey: not learnt yet", f"red: worse than when learnt (full: {full:.2g})", "blue: better"]
    notes += ["above the orange line: other data"] * bool(report["data_changes"])
    if report["by_place"]:
        more = ", …" if len(report["by_place"]) > 1 else ""
        notes.append(f"{report['by_place'][0]}{more}: no font has the letters")
    axes.set_xlabel("\n".join(notes), fontsize=9)


def full_color(matrix: list[list[float]], shifts: list[list[float]]) -> float:
    """The change that has the full colour, the same for all tasks: noise alone must not be red."""
    scores = [abs(value) for row in matrix for value in row if math.isfinite(value)]
    learnt = [
        abs(value)
        for row, changes in zip(matrix, shifts, strict=True)
        for value, change in zip(row, changes, strict=True)
        if change == 0
    ]
    least = _LEAST * max(learnt or scores, default=0.0)
    return max([least, *(abs(change) for row in shifts for change in row if not math.isnan(change))]) or 1.0


def _curves(axes: Any, tasks: list[str], rows: list[str], matrix: list[list[float]], report: dict[str, Any]) -> None:
    trained = [name for name in tasks if name not in report["watched"]]
    handles = []
    for j, name in enumerate(tasks):
        color = COLORS[j % len(COLORS)]
        values = [row[j] if math.isfinite(row[j]) else math.nan for row in matrix]
        style = ":" if name in report["watched"] else "-"
        changes = sorted({change["row"] for change in report["data_changes"] if change["task"] == name})
        for start, end in itertools.pairwise([0, *changes, len(values)]):
            # Not joined where the data is other data.
            line = axes.plot(
                range(start, end), values[start:end], style, color=color, linewidth=2, marker="o", markersize=4
            )
        handles += line
        if name in trained and trained.index(name) + 1 < len(rows):
            learnt = trained.index(name) + 1
            axes.plot(
                learnt, values[learnt], "o", color=color, markersize=11, markerfacecolor="none", markeredgewidth=2
            )
    for row in {change["row"] for change in report["data_changes"]}:
        axes.axvline(row - 0.5, color=_OTHER_DATA, linestyle="--", linewidth=1.5)
    turned = max(map(text_width, tasks)) > _UPRIGHT
    begin, after = ("before training", "after ") if turned else ("before\ntraining", "after\n")
    axes.set_xticks(range(len(rows)), [f"{after}{row}" if i else begin for i, row in enumerate(rows)])
    _turn(axes, tasks)
    axes.set_ylabel(f"{report['monitor']} ({'lower' if report['mode'] == 'min' else 'higher'} is better)")
    axes.grid(axis="y", alpha=0.3)
    # Next to the curves: inside there may be no free room. Labels are set afterwards: one that begins with an
    # underscore would be left out.
    beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    shown = [f"{index}" for index in range(len(tasks))]
    words = {"title": "ring: just trained", "title_fontsize": 8}
    legend = axes.legend(handles, shown, frameon=False, fontsize=9, **words, **beside)
    for text, name in zip(legend.get_texts(), tasks, strict=True):
        text.set_text(name)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


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

    tables = [_layer_table(diagnosis["layers"]) for _, diagnosis in panels]
    heights = [1.2 + 0.3 * len(kinds) for kinds, _, _ in tables]
    columns = max(len(layers) for _, layers, _ in tables)
    figure = Figure(figsize=(max(6.5, 4.5 + 0.42 * columns), sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, diagnosis), table in zip(rows, panels, tables, strict=True):
        _layer_panel(figure, axes, f"{name}: importance after {diagnosis['task']}", *table)
    families = readable([f"{name} {diagnosis['task']}" for name, diagnosis in panels])[1]
    for axes in rows:
        axes.title.set(fontfamily=families, parse_math=False)
    save(figure, path)


def _layer_table(by_kind: dict[str, dict[str, float]]) -> tuple[list[str], list[str], list[list[float]]]:
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


def _layer_panel(
    figure: Any, axes: Any, title: str, kinds: list[str], layers: list[str], values: list[list[float]]
) -> None:
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    short = [_short_kind(kind) for kind in kinds]
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


def _short_kind(kind: str) -> str:
    """The last parts of a name, without what every name ends with."""
    parts = [part for part in kind.split(".") if part not in ("weight", "default", "base_layer")]
    inside = parts[parts.index("*") + 1 :] if "*" in parts else parts
    return ".".join((inside or parts)[-3:]) or kind
