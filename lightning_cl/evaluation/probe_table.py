"""Tables and sentences of probes: what a model can do besides its tasks, before training and after every task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cl.evaluation.paired import mean_and_error, paired_p
from lightning_cl.evaluation.tables import format_number, format_table

_SURE = 0.05  # over all columns of a probe together

Rows = Mapping[int, Mapping[str, Mapping[str, Sequence[float]]]]
"""For each number of trained tasks, for each column: ``values`` of the items, and perhaps their ``margins``.

Where only their mean is known, it is the only value, and ``n`` is the number of items that it stands for."""


def probe_report(rows: Rows, columns: Sequence[str]) -> dict[str, Any]:
    """Returns the results in the rows of a probe, as plain containers.

    A change is sure if ``p < 0.05 / (columns · tests)`` (Bonferroni), which holds for all columns together. A column
    has two tests where there are margins: one of its scores, one of its margins.

    Args:
        rows: the values of the single items, the same items in all rows.
        columns: the names of the columns.

    Returns:
        ``columns``; ``after``, the number of trained tasks of each row; ``rows`` and ``standard_errors`` (``[row,
        column]``); ``margins`` and ``margin_standard_errors`` in nats, the same; ``n``, the items of each column; and
        ``changes`` from the first row to the last: for each column ``column``, ``before``, ``now``, ``p``,
        ``margin_before``, ``margin_now``, ``margin_p``, and ``sure`` (``score``, ``margin`` or None).
    """
    after = sorted(rows)
    table: dict[str, Any] = {"columns": list(columns), "after": after}
    for what, mean, error in (
        ("values", "rows", "standard_errors"),
        ("margins", "margins", "margin_standard_errors"),
    ):
        pairs = [[mean_and_error(rows[row][column].get(what, ())) for column in columns] for row in after]
        table[mean] = [[value for value, _ in row] for row in pairs]
        table[error] = [[value for _, value in row] for row in pairs]
    table["n"] = [_count(rows[after[-1]][column]) for column in columns] if after else []
    # A score that is known as a mean alone cannot be tested.
    tested = sum("n" not in rows[after[-1]][column] for column in columns) if after else 0
    table["changes"] = [_change(rows, column, tested) for column in columns] if len(after) > 1 else []
    return table


def _count(column: Mapping[str, Sequence[float]]) -> int:
    """The number of items of a column, of which there may be the mean alone."""
    return int(column["n"][0]) if "n" in column else len(column["values"])


def _change(rows: Rows, column: str, columns: int) -> dict[str, Any]:
    """The change of a column from the first row to the last."""
    first, last = rows[min(rows)][column], rows[max(rows)][column]
    told: dict[str, Any] = {"column": column}
    for what, mark in (("values", ""), ("margins", "margin_")):
        then, now = list(first.get(what, ())), list(last.get(what, ()))
        told[f"{mark}before"], told[f"{mark}now"] = mean_and_error(then)[0], mean_and_error(now)[0]
        paired = then and len(then) == len(now) and "n" not in last
        told[f"{mark}p"] = paired_p(then, now) if paired else math.nan
    tests = [(name, p) for name, p in (("score", told["p"]), ("margin", told["margin_p"])) if not math.isnan(p)]
    told["sure"] = next((name for name, p in tests if p < _SURE / (columns * len(tests))), None)
    return told


def probe_sentences(table: Mapping[str, Any]) -> list[str]:
    """A sentence for each column that has surely changed since before training, and one for all others.

    Args:
        table: of :func:`probe_report`.
    """
    if not table["changes"]:
        return []
    counts = dict(zip(table["columns"], table["n"], strict=True))
    sentences = []
    for change in table["changes"]:
        items = f"{counts[change['column']]} items"
        scores = f"from {change['before']:.2f} to {change['now']:.2f}"
        if change["sure"] == "score":
            verb = "fell" if change["now"] < change["before"] else "rose"
            sentences.append(f"{change['column']} {verb} {scores} ({items}, p = {_p(change['p'])}).")
        elif change["sure"] == "margin":
            verb = "fell" if change["margin_now"] < change["margin_before"] else "rose"
            ends = f"{format_number(change['margin_before'])} to {format_number(change['margin_now'])}"
            sentences.append(
                f"{change['column']}: the margin of the right choice {verb} from {ends} nats ({items}, p ="
                f" {_p(change['margin_p'])}); {scores} it answers right."
            )
        elif math.isnan(change["p"]):
            sentences.append(f"{change['column']} went {scores} ({items}; a mean alone is not tested).")
    unsure = [c["column"] for c in table["changes"] if c["sure"] is None and not math.isnan(c["p"])]
    if unsure:
        sentences.append(f"No sure change in {', '.join(unsure)} (p < {_SURE} over all columns together).")
    return sentences


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 0.001 else "under 0.001"


def format_probe(name: str, probe: Mapping[str, Any], rows: Sequence[str]) -> list[str]:
    """The table of a probe for a terminal: each score with its standard error.

    Args:
        name: of the callback.
        probe: of the report.
        rows: the names of the matrix's rows.
    """
    lines = [["after", *probe["columns"]]]
    for trained, scores, errors in zip(probe["after"], probe["rows"], probe["standard_errors"], strict=True):
        cells = [
            format_number(score) if error is None or math.isnan(error) else f"{score:.2f} ± {error:.2f}"
            for score, error in zip(scores, errors, strict=True)
        ]
        lines.append([rows[trained] if trained < len(rows) else str(trained), *cells])
    return ["", f"  {name}: {probe['definition']}", "", *format_table(lines)]
