"""A verdict on a finished run: its budget of forgetting is kept, is exceeded, or cannot be judged."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cl.evaluation.tables import format_number, format_table
from lightning_cl.functional.guard import allowed_rise, kept_share, look_error, paired_rise

KEPT, EXCEEDED, UNKNOWN = 0, 2, 3
"""Exit codes of ``lightning-cl gate``."""

_VERDICTS = {KEPT: "the budget is kept", EXCEEDED: "the budget is exceeded", UNKNOWN: "not enough evidence"}
_NO_FILE = "no losses of single sequences: train with ForgettingBudget among the callbacks"
_NOT_GUARDED = "ForgettingBudget did not guard it: too few validation samples, a stream, or not among its tasks"
_DECISIONS = {"safe": "within", "breach": "over", "uncertain": "not sure"}


def judge(
    report: Mapping[str, Any], losses: Mapping[str, Any] | None, budget: float, unit: str, confidence: float
) -> dict[str, Any]:
    """Compares each task's losses now with those when it was learnt, sequence by sequence.

    The task that was trained last can have forgotten nothing, and is left out. The error probability is divided among
    the others (Bonferroni), so that the whole verdict holds with `confidence`.

    Args:
        report: content of ``report.json``.
        losses: content of ``losses.json``; None: the run has none.
        budget: as of :class:`~lightning_cl.ForgettingBudget`.
        unit: ``retained`` or ``nats``.
        confidence: of the verdict.

    Returns:
        ``code`` (0, 2 or 3), ``verdict``, ``budget``, ``unit``, ``confidence``, ``unseen`` (the share of all sequences
        of the task with the fewest that may be unlike all that were looked at), and ``tasks``: for each its ``task``,
        ``watched``, ``D`` (mean rise in nats), ``SE``, ``n``, ``allowed``, ``margin``, ``kept`` (the share of what
        training gave), ``decision``, and a ``reason`` where it could not be judged.

    Raises:
        ValueError: if the files are not of one moment of the run.
    """
    rows = len(report["matrix"]) - 1
    if losses is not None and losses["trained"] != rows:
        raise ValueError(
            f"losses.json: it was written after {losses['trained']} tasks and report.json after {rows}; run the"
            " sequence to its next boundary, which writes both"
        )
    trained = [name for name in report["tasks"] if name not in report["watched"]][:rows]
    names = [name for name in report["tasks"] if name in report["watched"] or name in trained[:-1]]
    alpha = look_error(2.0 * (1.0 - confidence), 1, len(names))  # one look: all of it
    known = losses["tasks"] if losses is not None else {}
    lacking = _NO_FILE if losses is None else _NOT_GUARDED
    tasks = [_task(report, name, known.get(name), budget, unit, alpha, lacking) for name in names]
    decisions = {task["decision"] for task in tasks}
    code = EXCEEDED if "breach" in decisions else KEPT if decisions == {"safe"} else UNKNOWN
    sizes = [task["n"] for task in tasks if task["n"]]
    unseen = 1.0 - (1.0 - confidence) ** (1.0 / min(sizes)) if sizes else None
    told = {"budget": budget, "unit": unit, "confidence": confidence, "unseen": unseen}
    return {"code": code, "verdict": _VERDICTS[code], **told, "tasks": tasks}


def _task(
    report: Mapping[str, Any],
    name: str,
    losses: Mapping[str, Any] | None,
    budget: float,
    unit: str,
    alpha: float,
    lacking: str,
) -> dict[str, Any]:
    told: dict[str, Any] = {"task": name, "watched": name in report["watched"]}
    empty = dict.fromkeys(("D", "SE", "n", "allowed", "margin", "kept"))
    last = len(report["matrix"]) - 1
    if any(entry["task"] == name and entry["row"] == last for entry in report["not_finite"]):
        return told | empty | {"decision": "breach", "reason": f"{report['monitor']} is not finite"}
    if losses is None or losses["learnt"] is None or losses["now"] is None:
        return told | empty | {"decision": "uncertain", "reason": lacking}
    now, learnt = _tensor(losses["now"]), _tensor(losses["learnt"])
    before = _tensor(losses["before"]) if losses["before"] is not None and not told["watched"] else None
    rise = paired_rise(now, learnt, allowed_rise(unit, budget, learnt, before), alpha)
    numbers = (rise.mean, rise.error, rise.size, rise.allowed, rise.rise_margin)
    kept = kept_share(now, learnt, before) if before is not None else math.nan
    told |= dict(zip(empty, [value if math.isfinite(value) else None for value in (*numbers, kept)], strict=True))
    spoilt = None if math.isfinite(rise.mean) else "a loss is not finite"
    return told | {"decision": rise.decision, "reason": spoilt}


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def gate_rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Returns the verdict's table, its header first."""
    rows = [["task", "rise, nats", "allowed", "kept", "sequences", "budget"]]
    for task in found["tasks"]:
        rise = "?" if task["D"] is None else f"{task['D']:+.3g} ± {task['margin']:.2g}"
        kept = "" if task["kept"] is None else f"{task['kept']:.0%}"
        allowed = "" if task["allowed"] is None else format_number(task["allowed"])
        decision = _DECISIONS[task["decision"]] + (f": {task['reason']}" if task["reason"] else "")
        name = f"{task['task']} (watched)" if task["watched"] else task["task"]
        rows.append([name, rise, allowed, kept, str(task["n"] or ""), decision])
    return rows


def gate_title(found: Mapping[str, Any]) -> str:
    """Returns the verdict in one line."""
    asked = f"{found['budget']:.0%} kept" if found["unit"] == "retained" else f"+{found['budget']:g} nats"
    none = "" if found["tasks"] else ": no earlier or watched task yet"
    return f"{found['verdict']}{none} (budget: {asked}, confidence {found['confidence']:.0%})"


def gate_text(found: Mapping[str, Any]) -> str:
    """Returns the verdict for a terminal."""
    table = format_table(gate_rows(found)) if found["tasks"] else []
    note = ["", *textwrap.wrap(gate_note(found), 110)] if found["unseen"] else []
    return "\n".join([gate_title(found), "", *table, *note]) + "\n"


def gate_markdown(found: Mapping[str, Any]) -> str:
    """Returns the verdict for a pull request; task names are text, whatever they contain."""
    header, *rows = [[_escaped(cell) for cell in row] for row in gate_rows(found)]
    mark = {KEPT: "✅", EXCEEDED: "❌", UNKNOWN: "❔"}[found["code"]]
    lines = [f"### {mark} Forgetting: {_escaped(gate_title(found))}", ""]
    if rows:
        lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    if found["unseen"]:
        lines += ["", gate_note(found)]
    return "\n".join(lines) + "\n"


def gate_note(found: Mapping[str, Any]) -> str:
    """Returns the limits of the verdict in two sentences."""
    fewest = min(task["n"] for task in found["tasks"] if task["n"])
    return (
        "The bound is right for differences that are roughly normal, and a few sequences that lose very much are not."
        f" With {fewest} sequences, up to {found['unseen']:.1%} of all may be unlike each of them; more validation data"
        " make that less."
    )


def _escaped(text: str) -> str:
    """A text in which Markdown and HTML find nothing of theirs."""
    if text == "---":
        return text
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ").replace("@", "&#64;")
    for mark in "\\`*_[]|~#!":
        text = text.replace(mark, f"\\{mark}")
    return text
