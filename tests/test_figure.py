"""The picture of a run: nothing is printed over anything else, whatever the tasks are called."""

from __future__ import annotations

import itertools
import math

import pytest
from matplotlib.figure import Figure
from test_report import report_of

from lightning_cl.evaluation.figure import draw_matrix, short_names

LONG = "język polski — strony podręcznika"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a report; gives the figure, as it was saved."""
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (save(figure, *a, **k), drawn.append(figure)))

    def of(names, watched=()):
        trained = len(names) - len(watched)
        rows = [[5.0 - 3.0 * (i > j) + 0.1 * i * j for j in range(len(names))] for i in range(trained + 1)]
        draw_matrix(report_of(rows, names, watched=watched), tmp_path / "matrix.png")
        assert (tmp_path / "matrix.png").read_bytes()[:4] == b"\x89PNG"
        return drawn[-1]

    return of


NAMES = [
    (["prose", "python", "cpp"], []),
    (["Deutsch", "español", LONG, "watched"], ["watched"]),
    ([f"{LONG} {i}" for i in range(5)], []),
    ([f"a task with a name {i}" for i in range(12)], []),
    (["a"], []),
]


@pytest.mark.parametrize(("names", "watched"), NAMES)
def test_labels_do_not_touch_each_other(draw, names, watched):
    for axes in draw(names, watched).axes:
        labels = axes.get_xticklabels()
        for label, other in itertools.pairwise(labels):
            one, two = label.get_window_extent(), other.get_window_extent()
            angle = math.radians(label.get_rotation())
            if angle == 0:
                assert one.x1 < two.x0
            else:  # parallel lines: as far apart as a line is high
                distance = axes.transData.transform([(1, 0)])[0][0] - axes.transData.transform([(0, 0)])[0][0]
                assert distance * math.sin(angle) > label.get_fontsize() * axes.figure.dpi / 72


@pytest.mark.parametrize(("names", "watched"), NAMES)
def test_legend_is_beside_the_curves(draw, names, watched):
    figure = draw(names, watched)
    curves = figure.axes[1]
    legend = curves.get_legend().get_window_extent()
    assert legend.x0 >= curves.get_window_extent().x1
    assert legend.x1 <= figure.bbox.x1
    assert len(curves.get_legend().get_texts()) == len(names)


@pytest.mark.parametrize(("names", "watched"), NAMES)
def test_titles_and_labels_are_inside_the_picture(draw, names, watched):
    figure = draw(names, watched)
    left, right = (axes.get_tightbbox() for axes in figure.axes)
    assert left.x0 >= 0
    assert left.x1 <= right.x0
    assert min(left.y0, right.y0) >= 0
    assert max(left.y1, right.y1) <= figure._suptitle.get_window_extent().y0


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["prose", "exactly 18 letters"], ["prose", "exactly 18 letters"]),
        ([LONG, "b"], ["język polski — st…", "b"]),
        ([f"{LONG} {i}" for i in "AB"], ["język po…cznika A", "język po…cznika B"]),
        ([f"{'x' * 20}{i}{'y' * 20}" for i in "AB"], [f"{'x' * 20}{i}{'y' * 20}" for i in "AB"]),
    ],
)
def test_short_names_stay_unlike_each_other(names, short):
    assert short_names(names) == short
