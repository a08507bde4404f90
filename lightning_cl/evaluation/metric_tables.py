"""The metrics of a run's answers: a table for the terminal, and a CSV file for each metric."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.sentences import row_names
from lightning_cl.evaluation.tables import HEADLINE, UNSIGNED, format_number, format_table, plain_cell
from lightning_cl.files import replace_file


def write_metrics(report: dict[str, Any], folder: Path) -> None:
    """Writes ``matrix_<metric>.csv`` for each metric, with a column of standard errors next to each task's.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        folder: the run's folder.
    """
    for name, scores in report.get("metrics", {}).get("scores", {}).items():
        replace_file(folder / f"matrix_{name}.csv", partial(_write_csv, report, scores))


def _write_csv(report: dict[str, Any], scores: dict[str, Any], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [(plain_cell(task), plain_cell(f"{task}, standard error")) for task in report["tasks"]]
        writer.writerow(["after", *(cell for pair in names for cell in pair)])
        rows = zip(row_names(report), scores["matrix"], scores["standard_errors"], strict=True)
        for name, values, errors in rows:
            pairs = zip(values, errors, strict=True)
            cells = ["" if math.isnan(value) else repr(value) for pair in pairs for value in pair]
            writer.writerow([plain_cell(name), *cells])


def format_metrics(report: dict[str, Any]) -> list[str]:
    """Lines for a terminal: the matrix of the main metrics, the scores of all, and what they cost."""
    metrics = report.get("metrics")
    if not metrics:
        return []
    tasks = [task for task in report["tasks"] if task in metrics["tasks"]]
    columns = [report["tasks"].index(task) for task in tasks]
    own = {task: metrics["tasks"][task]["metrics"][0] for task in tasks}
    common = next(iter(own.values())) if len(set(own.values())) == 1 else None
    header = tasks if common else [f"{task} ({own[task]})" for task in tasks]
    rows = [["after", *header]]
    for name, row in zip(row_names(report), metrics["scores"]["main"]["matrix"], strict=True):
        rows.append([name, *(format_number(row[column]) for column in columns)])
    samples = sorted({metrics["tasks"][task]["samples"] for task in tasks})
    counted = str(samples[0]) if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    costs = metrics["costs"]
    title = f"{common or 'Main metric'} of every task after every task (higher is better; {counted} samples a task)"
    shown = [name for name in metrics["scores"] if name != "main" or not common]
    scores = [["", *(name.replace("_", " ") for name in HEADLINE)]]
    scores += [
        [name, *(format_number(metrics["scores"][name][key], signed=key not in UNSIGNED) for key in HEADLINE)]
        for name in shown
    ]
    written = f"  {costs['generated_tokens']:,} tokens of answers and {costs['scored_tokens']:,} of choices"
    lines = [title, "", *format_table(rows), "", *format_table(scores), ""]
    return [*lines, f"{written}, {costs['seconds']:.1f} s of the evaluation", ""]
