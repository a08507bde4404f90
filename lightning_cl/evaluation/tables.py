"""Tables and numbers for a terminal."""

from __future__ import annotations

import math
import unicodedata

SCORES = (
    "average",
    "average_over_rows",
    "worst_task",
    "mean_when_learnt",
    "share_kept",
    "forgetting",
    "largest_drop",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
)
"""The scores of a run, in the order in which they are shown; the last one only where a reference is given."""

UNSIGNED = ("average", "average_over_rows", "worst_task", "mean_when_learnt", "share_kept")
"""Those that are no differences."""

HEADLINE = ("average", "mean_when_learnt", "forgetting", "backward_transfer")
"""Those that stand above a picture."""


def format_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table for a terminal, its first row the header."""
    widths = [max(text_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    # The first column and texts to the left, numbers to the right.
    columns = zip(*rows[1:], strict=True)
    texts = [not any(cell[:1].isdigit() or cell[1:2].isdigit() for cell in column) for column in columns]
    return [
        "  "
        + "  ".join(
            cell + " " * (width - text_width(cell))
            if i == 0 or (i == len(row) - 1 and texts[i : i + 1] == [True])
            else " " * (width - text_width(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text_width(text: str) -> int:
    """Columns of a terminal that a text takes: Chinese, Japanese and Korean signs take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(sign) else 2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text
    )


def format_number(value: float | None, signed: bool = False) -> str:
    """Three decimals with a true minus; a dash for what was never measured, words for what is not finite."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "not finite"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def format_bytes(value: float) -> str:
    """A number of bytes with the unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def plain_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
