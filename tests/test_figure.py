"""The picture of a run: nothing is printed over anything else, whatever the tasks are called."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from test_report import INF, NAN, changed_report, matrix_of, report_of

from lightning_cl import PromptSamples, TaskMatrix
from lightning_cl.evaluation import figure as pictures
from lightning_cl.evaluation import fonts
from lightning_cl.evaluation.figure import draw_matrix, matrix_figure, short_names
from lightning_cl.evaluation.fonts import readable
from lightning_cl.evaluation.to_loggers import log_evidence

LONG = "język polski — strony podręcznika"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a report; gives the figure, as it was saved."""
    drawn = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda picture, path: (save(picture, path), drawn.append(picture)))

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


# ---------------------------------------------------------------------- colours


def cell_color(figure, row, column):
    """The colour of a cell's corner, as it is in the picture."""
    canvas = figure.canvas
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3] / 255
    x, y = figure.axes[0].transData.transform((column + 0.35, row + 0.3))
    return tuple(pixels[round(pixels.shape[0] - y), round(x)])


GREY, RED, BLUE = to_rgb("#d9d9d9"), to_rgb("#b2182b"), to_rgb("#2166ac")


def near(color):
    return pytest.approx(color, abs=0.02)


def test_one_scale_of_change_since_learnt_for_all_tasks():
    """The largest change, 1.2, is red; half of it is half as red; before a task's training it is grey."""
    rows = [[5.0, 5.0, 9.0], [2.0, 5.0, 9.0], [2.6, 3.0, 9.0], [3.2, 2.4, 1.0]]
    figure = matrix_figure(report_of(rows))
    assert cell_color(figure, 3, 0) == near(RED)
    assert cell_color(figure, 2, 0) == near(tuple((1 + value) / 2 for value in RED))
    assert cell_color(figure, 3, 1) == near(tuple((1 + value) / 2 for value in BLUE))
    for row, column in [(0, 0), (0, 1), (1, 1), (2, 2)]:
        assert cell_color(figure, row, column) == near(GREY)
    for row, column in [(1, 0), (2, 1), (3, 2)]:
        assert cell_color(figure, row, column) == near((1, 1, 1))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_noise_is_not_red(mode):
    figure = matrix_figure(report_of([[0.2, 0.2], [0.9, 0.2], [0.897, 0.8]], "ab", mode=mode))
    assert cell_color(figure, 2, 0) == pytest.approx((1, 1, 1), abs=0.04)


def test_watched_tasks_are_compared_with_before_training():
    figure = matrix_figure(report_of([[4.0, 3.0], [1.0, 4.0]], ("a", "w"), watched=["w"]))
    assert cell_color(figure, 0, 1) == near(GREY)
    assert cell_color(figure, 1, 1) == near(RED)


def test_what_is_not_finite_and_what_was_not_measured_are_told_apart():
    figure = matrix_figure(report_of([[4.0, NAN], [1.0, 4.0], [INF, 1.0]], "ab"))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["4.00", "–", "1.00", "4.00", "not\nfinite", "1.00"]
    assert cell_color(figure, 2, 0) == near(to_rgb("#3f0010"))


def test_a_line_separates_rows_of_other_data_and_curves_do_not_cross_it():
    figure = matrix_figure(changed_report())
    left, right = figure.axes
    assert [line.get_ydata()[0] for line in left.lines] == [1.5, 1.5]
    assert [tuple(line.get_xdata()) for line in left.lines] == [(-0.5, 0.5), (0.5, 1.5)]
    joined = [list(line.get_xdata()) for line in right.lines if line.get_marker() == "o" and line.get_markersize() == 4]
    assert joined == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1, 2, 3]]
    assert cell_color(figure, 3, 0) == pytest.approx((1, 1, 1), abs=0.02)  # 1.827 after 1.830
    assert "orange line" in left.get_xlabel()


# ---------------------------------------------------------------------- names of any script

SCRIPTS = [
    "prose",
    "数据集",
    "Русский текст",
    "مهمة",
    "한국어",
    "עברית",
    "हिन्दी",
    "code 🚀",
    "$x_1$",
    "_hidden",
    "a\nb",
]


def test_every_sign_of_a_name_is_in_a_font_and_names_stay_unlike():
    shown, families = readable(SCRIPTS)
    have = [get_font(findfont(family)) for family in families]
    assert len(set(shown)) == len(SCRIPTS)
    assert all(any(font.get_char_index(ord(sign)) for font in have) for name in shown for sign in name)
    assert not any("Last Resort" in family for family in families)  # which has boxes for all
    assert (shown[0], shown[2], shown[8], shown[9], shown[10]) == ("prose", "Русский текст", "$x_1$", "_hidden", "a b")


def test_names_are_drawn_without_boxes_or_formulas(draw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Glyph … missing from font(s)"
        figure = draw(SCRIPTS)
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert len(legend) == len(SCRIPTS)
    assert {"$x_1$", "_hidden"} <= set(legend)
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_an_installed_font_that_has_the_signs_is_taken():
    """STIX comes with matplotlib, and has circled letters, which DejaVu has not."""
    shown, families = readable(["Ⓐ Ⓑ", "b"])
    assert shown == ["Ⓐ Ⓑ", "b"]
    assert families[0] == "DejaVu Sans"
    assert any(get_font(findfont(family)).get_char_index(ord("Ⓐ")) for family in families[1:])


def test_names_that_no_font_has_are_written_by_sign_or_by_place(monkeypatch):
    monkeypatch.setattr(fonts, "_has", lambda entry, wanted: frozenset(c for c in wanted if c.isascii()))
    fonts._families.cache_clear()
    try:
        names = ["task 2", "数据", "go 🚀", "数", "Ж"]
        assert readable(names)[0] == ["task 2", "task 2 (2)", "go [rocket]", "task 4", "task 5"]
        assert (
            "task 4, …: no font has the letters"
            in matrix_figure(report_of([[1.0] * 5] * 2, names)).axes[0].get_xlabel()
        )
    finally:
        fonts._families.cache_clear()


def test_arabic_is_numbered_where_matplotlib_cannot_join_its_letters(monkeypatch):
    monkeypatch.setattr(fonts, "_shapes", lambda: False)
    assert readable(["prose", "مهمة", "Ж"])[0] == ["prose", "task 2", "Ж"]


# ---------------------------------------------------------------------- for notebooks and TensorBoard


def test_plot_gives_the_figure():
    matrix = matrix_of([[4.0, 4.0], [2.0, 4.0], [3.0, 1.0]], "ab")
    figure = matrix.plot()
    assert isinstance(figure, Figure)
    assert "average 2.000 · mean when learnt 1.500 · forgetting +1.000" in figure._suptitle.get_text()
    assert matrix_of([[4.0, 4.0]], "ab").plot() is not None  # before any training
    with pytest.raises(RuntimeError, match="nothing has been measured yet"):
        TaskMatrix().plot()


class Board(TensorBoardLogger):
    """Without the package `tensorboard`: what would be written."""

    def __init__(self):
        self.images, self.texts = [], []

    @property
    def experiment(self):
        return self

    def add_image(self, tag, image, step, dataformats):
        self.images.append((tag, image.shape, image.dtype, step, dataformats))

    def add_text(self, tag, text, step):
        self.texts.append((tag, text, step))


def test_tensorboard_gets_picture_and_answers():
    prompts = PromptSamples(["Once | upon"])
    prompts.answers = {0: ["x"], 1: ["a\ntime"], 2: [""]}
    board = Board()
    report = report_of([[4.0, 4.0], [2.0, 4.0], [3.0, 1.0]], "ab", methods=[prompts])
    log_evidence([object(), board], report, 7)
    (image,) = board.images
    assert image[0] == "continual/matrix"
    assert image[1][2] == 3
    assert image[2:] == (np.dtype("uint8"), 7, "HWC")
    texts = {tag: text for tag, text, step in board.texts if step == 7}
    assert texts["continual/report"] == "\n\n".join(report["sentences"])
    assert texts["continual/answers"].splitlines() == [
        "| after | Once \\| upon |",
        "|---|---|",
        "| before training | x |",
        "| a | a time |",
        "| b | (blank) |",
    ]
