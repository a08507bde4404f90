"""The report of a run: what was kept, what was lost, and what it cost."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_cl.files import replace_file

if TYPE_CHECKING:
    from lightning_cl.callbacks.base import ContinualCallback
    from lightning_cl.callbacks.task_matrix import TaskMatrix


def build_report(
    matrix: TaskMatrix, costs: Sequence[dict[str, float]], methods: Sequence[tuple[ContinualCallback, str]]
) -> dict[str, Any]:
    """Everything that the table, the files and the picture show, as plain containers.

    Args:
        matrix: the callback with the scores.
        costs: of each trained task: steps, seconds, samples and tokens, and what of its data was left out.
        methods: the callbacks with their names.
    """
    summary = matrix.summary()
    trained = [name for name in summary["tasks"] if name not in summary["watched"]][: len(summary["matrix"]) - 1]
    return {
        "format": 1,
        **summary,
        "sentences": [
            _sentence(summary, name, trained, [type(method).__name__ for method, _ in methods])
            for name in [*trained, *summary["watched"]]
        ],
        "costs": {
            "tasks": [{"task": name, **cost} for name, cost in zip(trained, costs, strict=False)],
            "evaluation_seconds": matrix.seconds,
            "total_seconds": matrix.seconds
            + sum(c.get("begin_seconds", 0.0) + c["train_seconds"] + c["end_seconds"] for c in costs),
            "state_bytes": {name: method.state_bytes() for method, name in methods},
        },
        "methods": {name: method.report() for method, name in methods if method is not matrix},
    }


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.json``, ``matrix.csv`` and ``matrix.png``, each whole or not at all."""
    from lightning_cl.evaluation.figure import draw_matrix

    replace_file(folder / "report.json", lambda path: path.write_text(json.dumps(_plain(report), indent=2) + "\n"))

    def write_csv(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["after", *report["tasks"]])
            for name, row in zip(row_names(report), report["matrix"], strict=True):
                writer.writerow([name, *("" if math.isnan(value) else repr(value) for value in row)])

    replace_file(folder / "matrix.csv", write_csv)
    replace_file(folder / "matrix.png", lambda path: draw_matrix(report, path))


def format_report(report: dict[str, Any], folder: Path | None) -> str:
    """The report for a terminal."""
    monitor, better = report["monitor"], "lower" if report["mode"] == "min" else "higher"
    rows = [["after", *report["tasks"]]]
    rows += [
        [name, *(format_number(value) for value in row)]
        for name, row in zip(row_names(report), report["matrix"], strict=True)
    ]
    lines = ["", f"{monitor} of every task after every task ({better} is better)", "", *format_table(rows), ""]
    scores = [
        [name.replace("_", " "), format_number(report[name], signed=name != "average"), report["definitions"][name]]
        for name in ("average", "backward_transfer", "forgetting", "forward_transfer")
    ]
    lines += [*format_table(scores), ""]
    lines += [f"  {sentence}" for sentence in report["sentences"]]
    told = [sentence for method in report["methods"].values() for sentence in method.get("sentences", [])]
    lines += ["", *(f"  {sentence}" for sentence in told)] if told else []
    lines += _format_answers(report)
    lines += ["", *format_table(_cost_rows(report))]
    total = report["costs"]["total_seconds"]
    state = ", ".join(f"{name} {_bytes(size)}" for name, size in report["costs"]["state_bytes"].items() if size)
    lines.append(f"  {_seconds(total)} in all, {_seconds(report['costs']['evaluation_seconds'])} of them evaluation")
    lines.append(f"  state kept by the methods: {state or 'none'}")
    lines += [f"  left out: {words}" for cost in report["costs"]["tasks"] if (words := _left_out(cost))]
    if folder is not None:
        lines += ["", f"  {folder / 'report.json'}, matrix.csv, matrix.png"]
        lines += _kept_on_disk(report)
    return "\n".join(lines) + "\n"


def _kept_on_disk(report: dict[str, Any]) -> list[str]:
    """Where buffers lie: a checkpoint alone does not hold them."""
    methods = {name: method for name, method in report["methods"].items() if method.get("folders")}
    return [
        f"  {', '.join(method['folders'])}: the {sum(method['stored'].values()):,} samples that {name} keeps; its"
        " checkpoints need them"
        for name, method in methods.items()
    ]


def row_names(report: dict[str, Any]) -> list[str]:
    """The names of the matrix's rows."""
    trained = [name for name in report["tasks"] if name not in report["watched"]]
    return ["before training", *trained][: len(report["matrix"])]


def _sentence(summary: dict[str, Any], name: str, trained: list[str], methods: list[str]) -> str:
    """What became of a task, in one plain sentence."""
    column = summary["tasks"].index(name)
    values = [row[column] for row in summary["matrix"]]
    metric, last = summary["monitor"], values[-1]
    sign = 1 if summary["mode"] == "max" else -1
    note = " (measured on its training data)" if name in summary["measured_on_training_data"] else ""
    if name in summary["watched"]:
        if math.isnan(values[0]) or math.isnan(last):
            before = f"{metric} {format_number(values[0])} before training"
            return f"{name} (watched){note}: {before}, {format_number(last)} now."
        if last == values[0]:
            return f"{name} (watched){note}: {metric} is {format_number(last)}, as before training."
        change = sign * (last - values[0])
        verb = "better" if change > 0 else "worse"
        return (
            f"{name} (watched){note}: {metric} went from {format_number(values[0])} to {format_number(last)},"
            f" {format_number(abs(change))} {verb} than before training."
        )
    learnt = values[trained.index(name) + 1]
    if name == trained[-1]:
        return f"{name}{note}: learnt last, {metric} is {format_number(last)}."
    begin = f"{name}{note}: {metric} {format_number(learnt)} when learnt, {format_number(last)} now"
    lost = sign * (learnt - last)
    if math.isnan(lost):
        return f"{begin}."
    if lost <= 0:
        return f"{begin}: no worse than when it was learnt."
    # What its own training gave: transfer from earlier tasks is not what it learnt.
    before = values[trained.index(name)]
    gain = sign * (learnt - (values[0] if math.isnan(before) else before))
    if math.isnan(gain) or gain <= 0:
        return f"{begin}: {format_number(lost)} worse. {_advice(0.0, methods)}"
    kept = 1 - lost / gain
    if kept < 0:
        return f"{begin}: all that its training gave is lost, and more. {_advice(kept, methods)}"
    return f"{begin}: {kept:.0%} of what its training gave was kept. {_advice(kept, methods)}".rstrip()


def _advice(kept: float, methods: list[str]) -> str:
    """What to try, by how much was lost and by what the run did already."""
    if kept >= 0.9:
        return ""
    penalties = [name for name in methods if name in ("EWC", "SI")]
    if "Replay" in methods:
        return "To keep more: a larger Replay(ratio=…)."
    if penalties:
        return f"To keep more: Replay beside {penalties[0]}, or a higher strength as long as the average gains."
    return "To keep more: Replay(ratio=0.05), 0.25 for tasks this different; without stored data, EWC or SelfReplay."


def _cost_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = [["task", "steps", "training", "end of task", "new", "replayed"]]
    for cost in report["costs"]["tasks"]:
        kind = "tokens" if cost.get("new_tokens") else "samples"
        counts = [
            f"{cost[f'{what}_{kind}']:,.0f} {kind}" if f"new_{kind}" in cost else "?" for what in ("new", "replayed")
        ]
        times = [_seconds(cost["train_seconds"]), _seconds(cost["end_seconds"])]
        rows.append([str(cost["task"]), f"{cost['steps']:,.0f}", *times, *counts])
    return rows


def _left_out(cost: dict[str, Any]) -> str:
    """What of a task's data was not trained on, or measured on, in words."""
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


def format_table(rows: list[list[str]]) -> list[str]:
    """Lines of a table for a terminal, its first row the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    # The first column and texts to the left, numbers to the right.
    texts = [any(character.isalpha() for row in rows[1:] for character in row[i]) for i in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 or (texts[i] and i == len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def format_number(value: float | None, signed: bool = False) -> str:
    """Three decimals with a true minus; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.3f}" if signed else f"{value:.3f}"
    return text.replace("-", "−")


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _plain(value: Any) -> Any:
    """JSON knows no NaN: unknown is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
