"""The report of a run: what was kept, what was lost, and what it cost."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.evaluation import figure
from lightning_cl.evaluation.metric_tables import format_metrics, write_metrics
from lightning_cl.evaluation.page import write_page
from lightning_cl.evaluation.plain import plain
from lightning_cl.evaluation.probe_table import format_probe
from lightning_cl.evaluation.provenance import provenance
from lightning_cl.evaluation.sentences import Method, cut_off_sentences, sentence
from lightning_cl.evaluation.sentences import row_names as row_names
from lightning_cl.evaluation.tables import SCORES, UNSIGNED, format_bytes, format_number, format_table, plain_cell
from lightning_cl.files import replace_file


class Matrix(Method, Protocol):
    """All that a report asks of the callback with the scores, which is one of the methods."""

    seconds: float
    """The time that evaluation took."""

    def summary(self) -> dict[str, Any]:
        """Returns the matrix, the scores and their definitions."""


def build_report(
    matrix: Matrix, costs: Sequence[dict[str, float]], methods: Sequence[tuple[Method, str]]
) -> dict[str, Any]:
    """Everything that the table, the files and the picture show, as plain containers.

    Args:
        matrix: the callback with the scores.
        costs: of each trained task: steps, seconds, samples and tokens, and what of its data was left out.
        methods: the callbacks with their names.
    """
    summary = matrix.summary()
    trained = [name for name in summary["tasks"] if name not in summary["watched"]][: len(summary["matrix"]) - 1]
    told = {name: method.report() for method, name in methods if method is not matrix}
    # What belongs to the whole report, as what probes have measured, is no property of a method.
    sections: dict[str, Any] = {"probe": {name: one.pop("probe") for name, one in told.items() if "probe" in one}}
    for method in told.values():
        sections |= method.pop("sections", {})
    return {
        "format": 1,
        **summary,
        **sections,
        "sentences": [
            *(sentence(summary, name, [method for method, _ in methods]) for name in [*trained, *summary["watched"]]),
            *cut_off_sentences(summary),
        ],
        "costs": {
            "tasks": [{"task": name, **cost} for name, cost in zip(trained, costs, strict=False)],
            "evaluation_seconds": matrix.seconds,
            "total_seconds": matrix.seconds
            + sum(c.get("begin_seconds", 0.0) + c["train_seconds"] + c["end_seconds"] for c in costs),
            "state_bytes": {name: method.state_bytes() for method, name in methods},
        },
        "methods": told,
        "provenance": provenance(),
    }


def write_report(report: dict[str, Any], folder: Path, page: bool = False) -> None:
    """Writes ``report.json``, ``matrix.csv`` and ``matrix.png``, each whole or not at all.

    Args:
        report: of :func:`build_report`.
        folder: of the run.
        page: True writes ``report.html`` too.
    """
    replace_file(folder / "report.json", lambda path: path.write_text(json.dumps(plain(report), indent=2) + "\n"))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["after", *map(plain_cell, report["tasks"])])
            for i, (name, row) in enumerate(zip(row_names(report), report["matrix"], strict=True)):
                if changed := _changed_at(report, i):
                    writer.writerow([f"(above: other data of {', '.join(changed)})", *("" for _ in row)])
                # Empty is what was never measured; what is not finite stands as inf or -inf.
                writer.writerow([plain_cell(name), *("" if math.isnan(value) else repr(value) for value in row)])

    replace_file(folder / "matrix.csv", write_csv)
    write_metrics(report, folder)
    replace_file(folder / "matrix.png", lambda path: figure.draw_matrix(report, path))
    if page:
        try:
            write_page(report, folder)
        except (OSError, ValueError, KeyError, TypeError) as error:  # a run must not end for the page's sake
            rank_zero_warn(f"{folder / 'report.html'} could not be written ({error!r}); report.json has all of it")


def format_report(report: dict[str, Any], folder: Path | None) -> str:
    """The report for a terminal."""
    monitor, better = report["monitor"], "lower" if report["mode"] == "min" else "higher"
    rows = [["after", *report["tasks"]]]
    for i, (name, row) in enumerate(zip(row_names(report), report["matrix"], strict=True)):
        if changed := _changed_at(report, i):
            rows.append(["(above: other data)", *("-----" if task in changed else "" for task in report["tasks"])])
        rows.append([name, *(format_number(value) for value in row)])
    lines = ["", f"{monitor} of every task after every task ({better} is better)", "", *format_table(rows), ""]
    scores = [
        [_score_name(report, name), format_number(report[name], name not in UNSIGNED), _in_words(report, name)]
        for name in SCORES
        if name in report
    ]
    lines += [*format_table(scores), ""]
    lines += format_metrics(report)
    lines += [f"  {words}" for words in _data_changes(report)]
    lines += [f"  {words}" for words in report["sentences"]]
    for name, probe in report.get("probe", {}).items():
        lines += format_probe(name, probe, row_names(report))
    told = [words for method in report["methods"].values() for words in method.get("sentences", [])]
    lines += ["", *(f"  {words}" for words in told)] if told else []
    lines += _format_answers(report)
    lines += ["", *format_table(_cost_rows(report))]
    total = report["costs"]["total_seconds"]
    state = ", ".join(f"{name} {format_bytes(size)}" for name, size in report["costs"]["state_bytes"].items() if size)
    lines.append(f"  {_seconds(total)} in all, {_seconds(report['costs']['evaluation_seconds'])} of them evaluation")
    lines.append(f"  state kept by the methods: {state or 'none'}")
    lines += [f"  left out: {words}" for cost in report["costs"]["tasks"] if (words := _left_out(cost))]
    if folder is not None:
        lines += ["", f"  {folder / 'report.html'}, report.json, matrix.csv, matrix.png"]
        lines += _kept_on_disk(report)
    return "\n".join(lines) + "\n"


def _in_words(report: dict[str, Any], name: str) -> str:
    """A score's definition without its formula, which stands in the page and in ``report.json``."""
    return str(report["definitions"][name].partition(": ")[2] or report["definitions"][name])


def _score_name(report: dict[str, Any], name: str) -> str:
    task = report["worst"].get(name)
    return name.replace("_", " ") + (f" ({task})" if task else "")


def _kept_on_disk(report: dict[str, Any]) -> list[str]:
    """Names the folders of buffers: a checkpoint alone does not have them."""
    methods = {name: method for name, method in report["methods"].items() if method.get("folders")}
    return [
        f"  {', '.join(method['folders'])}: the {sum(method['stored'].values()):,} samples that {name} keeps; its"
        " checkpoints need them"
        for name, method in methods.items()
    ]


def _changed_at(report: dict[str, Any], row: int) -> list[str]:
    """The tasks that are measured on other data from this row on."""
    return [change["task"] for change in report["data_changes"] if change["row"] == row]


def _data_changes(report: dict[str, Any]) -> list[str]:
    rows = row_names(report)
    whats = {(change["row"], change["what"]): [] for change in report["data_changes"]}  # type: ignore[var-annotated]
    for change in report["data_changes"]:
        before = f" (there {', '.join(map(format_number, change['before']))})" if change["before"] else ""
        whats[change["row"], change["what"]].append(f"{change['task']}{before}")
    return [
        f"From the row {rows[row]!r} on measured on other data than above: {', '.join(tasks)}. It differs in {what}. No"
        " score is made across that line."
        for (row, what), tasks in whats.items()
    ]


def _cost_rows(report: dict[str, Any]) -> list[list[str]]:
    costs = report["costs"]["tasks"]
    kinds = ["tokens" if cost.get("new_tokens") else "samples" for cost in costs]
    common = f" {kinds[0]}" if len(set(kinds)) == 1 else ""  # one unit for a column, in its header
    times = [max((cost[key] for cost in costs), default=0.0) for key in ("train_seconds", "end_seconds")]
    units = [("s", 1) if longest < 120 else ("min", 60) for longest in times]
    headers = [f"{what}, {unit}" for what, (unit, _) in zip(("training", "end of task"), units, strict=True)]
    rows = [["task", "steps", *headers, f"new{common}", f"replayed{common}"]]
    for cost, kind in zip(costs, kinds, strict=True):
        counts = [
            f"{cost[f'{what}_{kind}']:,.0f}{'' if common else f' {kind}'}" if f"new_{kind}" in cost else "?"
            for what in ("new", "replayed")
        ]
        spent = [cost["train_seconds"] / units[0][1], cost["end_seconds"] / units[1][1]]
        rows.append([str(cost["task"]), f"{cost['steps']:,.0f}", *(f"{value:.1f}" for value in spent), *counts])
    return rows


def _left_out(cost: dict[str, Any]) -> str:
    """Describes the part of a task's data that was not trained on, or measured on."""
    whats = {"dropped": "samples dropped", "cut_off": "samples cut off", "malformed": "malformed records"}
    counts = [
        f"{cost[f'{role}_{what}']:,.0f} {words} ({name})"
        for role, name in (("train", "training"), ("val", "validation"), ("test", "test"))
        for what, words in whats.items()
        if cost.get(f"{role}_{what}")
    ]
    for role, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        unused = f"{role}_without "
        counts += [
            f"{count:,.0f} records without {key.removeprefix(unused)} ({name})"
            for key, count in cost.items()
            if key.startswith(unused)
        ]
    return f"{cost['task']}: {', '.join(counts)}" if counts else ""


def _format_answers(report: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    names = row_names(report)
    width = max(16, *map(len, names))
    for method in report["methods"].values():
        for index, prompt in enumerate(method.get("prompts", [])):
            lines += ["", f"  {prompt!r} …"]
            for trained, answers in sorted(method["answers"].items(), key=lambda item: int(item[0])):
                answer = " ".join(answers[index].split()) or "(blank)"
                lines.append(f"    {names[int(trained)]:>{width}} | {answer[:100]}")
    return lines


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
