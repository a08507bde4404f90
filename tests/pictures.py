"""Pictures where no test looks at them: each kind of picture is composed once in a process, and none is rendered.

A run of a tiny model draws four pictures at each of its boundaries. They took a third of its time.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_cl.evaluation import curves_figure, figure
from lightning_cl.evaluation.page import page

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
)
# Of a report: seconds, memory and versions, which no picture shows.
NEVER_DRAWN = ("costs", "provenance", "sentences")


def save_one_pixel(figure: object, path: Path) -> None:
    """In place of the rendering of a picture, which takes more time than the training of a tiny model."""
    path.write_bytes(ONE_PIXEL)


class OnePixel:
    """In place of a figure that is to be saved and looked at by nobody."""

    def savefig(self, path: Path, **_) -> None:
        save_one_pixel(self, path)


def kind(value: object) -> object:
    """All of a value that can make its picture fail: its structure and its texts, and of a number if it is finite."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return tuple((name, kind(inner)) for name, inner in value.items() if name not in NEVER_DRAWN)
    if isinstance(value, Sequence):
        return ("list", *map(kind, value))
    if isinstance(value, float):
        return "0" if value == 0 else "number" if math.isfinite(value) else repr(value)
    return repr(value)


def once_for_each_kind(draw, otherwise):
    """The function `draw` for the first picture of a kind; ``otherwise(first, *arguments)`` for those that follow."""
    first = {}

    def composed_once(*arguments):
        drawn = kind([argument for argument in arguments if not isinstance(argument, Path)])
        if drawn in first:
            return otherwise(first[drawn], *arguments)
        first[drawn] = draw(*arguments)
        return first[drawn]

    return composed_once


def _a_file(first: None, drawn: object, path: Path) -> None:
    save_one_pixel(drawn, path)


def _the_same(first: object, *arguments: object) -> object:
    return first


def _curves(curves: dict) -> OnePixel:
    real_curves(curves)
    return OnePixel()


real_curves = curves_figure.curves_figure
# Module, name, and what stands there in tests that look at no picture. A page's SVG is that of the first of its kind.
IN_PLACE = [
    (figure, "save", save_one_pixel),
    (figure, "draw_matrix", once_for_each_kind(figure.draw_matrix, _a_file)),
    (figure, "draw_importance", once_for_each_kind(figure.draw_importance, _a_file)),
    (curves_figure, "curves_figure", once_for_each_kind(_curves, _the_same)),
    (page, "draw_rows", once_for_each_kind(page.draw_rows, _the_same)),
    (page, "draw_steps", once_for_each_kind(page.draw_steps, _the_same)),
    (page, "draw_scatter", once_for_each_kind(page.draw_scatter, _the_same)),
]


def nobody_looks(patch) -> None:
    """Puts them in place by ``patch(module, name, value)``."""
    for module, name, value in IN_PLACE:
        patch(module, name, value)
