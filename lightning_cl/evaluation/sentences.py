"""One plain sentence for each task: its result, and what could be changed in this run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from lightning_cl.evaluation.tables import format_number
from lightning_cl.functional.retention import LEARNT

Need = Literal["keep", "learn", "begin"]
"""The aim that a report asks a method's advice for: keep more of earlier tasks, learn more of a new one, or begin to
keep, where no method of the run has an answer."""


KEPT = 0.9
"""The share of what a task's training gave that counts as kept: above it, no advice is given."""
_TO_BEGIN_WITH = "add a method that replays earlier samples or holds the weights"
_DIVERGED = "The run diverged: try a lower learning rate, or Trainer(gradient_clip_val=1.0)."


class Method(Protocol):
    """All that a report asks of a method."""

    def advice(self, need: Need) -> str | None:
        """Returns what could be changed of the method; None for nothing."""

    def report(self) -> dict[str, Any]:
        """Returns the numbers and texts of the method."""

    def state_bytes(self) -> int:
        """Returns the bytes of the state that the method keeps from task to task."""


def row_names(report: dict[str, Any]) -> list[str]:
    """The names of the matrix's rows."""
    trained = [name for name in report["tasks"] if name not in report["watched"]]
    return ["before training", *trained][: len(report["matrix"])]


def since(summary: dict[str, Any], name: str) -> int:
    """The first row that was measured on the data that a task's last row was measured on."""
    return max((change["row"] for change in summary["data_changes"] if change["task"] == name), default=0)


def sentence(summary: dict[str, Any], name: str, methods: Sequence[Method]) -> str:
    """Returns one sentence on what became of a task.

    Args:
        summary: of :meth:`~lightning_cl.TaskMatrix.summary`.
        name: of the task, a trained or a watched one.
        methods: the run's callbacks, which are asked for advice.
    """
    column, first, metric = summary["tasks"].index(name), since(summary, name), summary["monitor"]
    # Rows that were measured on other data are not to be compared with.
    values = [row[column] if i >= first else math.nan for i, row in enumerate(summary["matrix"])]
    note = " (measured on its training data)" if name in summary["measured_on_training_data"] else ""
    rows = row_names(summary)
    start = f"{name} (watched){note}:" if name in summary["watched"] else f"{name}{note}:"
    if math.isinf(values[-1]):
        finite = [(value, row) for value, row in zip(values, rows, strict=True) if math.isfinite(value)]
        was = f" It was {format_number(finite[-1][0])} {_after(finite[-1][1])}." if finite else ""
        return f"{start} {metric} is not finite.{was} {_DIVERGED}"
    if name in summary["watched"]:
        return f"{start} {_change(metric, values, rows, first, summary['mode'])}."
    learnt = rows.index(name, 1)
    if first > learnt:
        what = next(c["what"] for c in reversed(summary["data_changes"]) if c["task"] == name)
        change = _change(metric, values, rows, first, summary["mode"])
        return f"{start} {change}; what it was when learnt was measured on other data ({what})."
    return f"{start} {_history(summary, values, learnt, methods)}"


def cut_off_sentences(summary: dict[str, Any]) -> list[str]:
    """Returns a sentence for each task whose answers had no end after the last task: the rest is in no score."""
    said = []
    for task, told in summary.get("metrics", {}).get("tasks", {}).items():
        counts: dict[str, int] = told.get("cut_off") or {}
        last = counts[max(counts, key=int)] if counts else 0
        if last > max(0.05 * told["samples"], 1):
            said.append(
                f"{task}: {last} of {told['samples']} answers after the last task had no end after"
                f" {told['max_new_tokens']} tokens and were cut off there; Task(max_new_tokens=…) allows more."
            )
    return said


def _history(summary: dict[str, Any], values: list[float], row: int, methods: Sequence[Method]) -> str:
    """Describes how well a trained task was learnt, in `row`, and kept."""
    metric, last, learnt = summary["monitor"], values[-1], values[row]
    sign = 1 if summary["mode"] == "max" else -1
    is_last = row == len(values) - 1
    if math.isinf(learnt):
        return f"{metric} was not finite when learnt, {format_number(last)} now. {_DIVERGED}"
    # What its own training gave: transfer from earlier tasks is not what it learnt.
    before = values[0] if math.isnan(values[row - 1]) else values[row - 1]
    gain = sign * (learnt - before) if math.isfinite(before) else math.nan
    lost = sign * (learnt - last)
    least = LEARNT * abs(before)
    if gain < least or gain == 0:
        ends = f"{format_number(before)} before and {format_number(learnt)} after"
        worse = gain < 0 and gain <= -least
        said = f"made {metric} worse, {ends}" if worse else f"left {metric} about where it was, {ends}"
        now = "" if is_last else f"; {format_number(last)} now{_worse(lost)}"
        # The first task learns freely: there is nothing before it to keep.
        return f"not learnt: its training {said}{now}. {advice('learn', methods if row > 1 else ())}"
    if is_last:
        return f"learnt last, {metric} is {format_number(last)}."
    begin = f"{metric} {format_number(learnt)} when learnt, {format_number(last)} now"
    if math.isnan(lost):
        return f"{begin}."
    if lost <= 0:
        return f"{begin}: no worse than when it was learnt."
    if math.isnan(gain):
        return f"{begin}{_worse(lost)}. {advice('keep', methods)}"
    kept = 1 - lost / gain
    if kept < 0:
        return f"{begin}: all that its training gave is lost, and more. {advice('keep', methods)}"
    told = f"{begin}: {kept:.0%} of what its training gave was kept."
    return told if kept >= KEPT else f"{told} {advice('keep', methods)}"


def advice(need: Need, methods: Sequence[Method]) -> str:
    """Returns what a run could change, from the answers of its own methods.

    Args:
        need: ``keep`` more of earlier tasks, or ``learn`` more of a new one.
        methods: that are asked.
    """
    answers = [answer for method in methods if (answer := method.advice(need)) is not None]
    if need == "learn":
        return f"To learn more: {'; or '.join([*answers, 'look at its learning rate, its steps and its data'])}."
    begin = [answer for method in methods if not answers and (answer := method.advice("begin")) is not None]
    return f"To keep more: {'; or '.join([*answers, *begin]) or _TO_BEGIN_WITH}."


def _change(metric: str, values: list[float], rows: list[str], first: int, mode: str) -> str:
    """Describes the change of a score since row `first`."""
    then, last, when = values[first], values[-1], _after(rows[first])
    if math.isnan(then) or math.isnan(last) or math.isinf(then):
        return f"{metric} {format_number(then)} {when}, {format_number(last)} now"
    if last == then:
        return f"{metric} is {format_number(last)}, as {when}"
    verb = "better" if (last > then) == (mode == "max") else "worse"
    ends = f"{metric} went from {format_number(then)} to {format_number(last)}"
    return f"{ends}, {format_number(abs(last - then))} {verb} than {when}"


def _after(row: str) -> str:
    return row if row == "before training" else f"after {row}"


def _worse(lost: float) -> str:
    return f": {format_number(lost)} worse" if lost > 0 else ""
