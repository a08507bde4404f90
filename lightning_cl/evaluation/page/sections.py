"""Sections of the page that only some runs have: probes, recovery, and a guard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cl.evaluation.sentences import row_names
from lightning_cl.evaluation.tables import format_number

_MOST_LOOKS = 40  # of a guard, the ones with an action first


def more_sections(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the sections of what a run's own probes found.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.

    Returns:
        for each its ``id``, ``title``, ``lines`` and ``tables`` (``rows``, ``caption``, ``texts``: the columns that
        hold text).
    """
    sections = [_probe(name, probe, row_names(report)) for name, probe in report.get("probe", {}).items()]
    if report.get("recovery"):
        sections.append(_recovery(report["recovery"]))
    if report.get("guard"):
        sections.append(_guard(report["guard"]))
    return sections


def _probe(name: str, probe: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """General abilities, which no task trains: a row before training and after every task."""
    rows = [["after", *probe["columns"]]]
    for trained, scores, errors in zip(probe["after"], probe["rows"], probe["standard_errors"], strict=True):
        cells = [_with_error(score, error) for score, error in zip(scores, errors, strict=True)]
        rows.append([names[trained] if trained < len(names) else str(trained), *cells])
    table = {"rows": rows, "caption": probe["definition"], "texts": ()}
    return {"id": f"probe-{name}", "title": f"General abilities: {name}", "lines": [], "tables": [table]}


def _with_error(score: float | None, error: float | None) -> str:
    if error is None or math.isnan(error):
        return format_number(score)
    return f"{format_number(score)} ± {error:.2f}"


def _recovery(recovery: Mapping[str, Any]) -> dict[str, Any]:
    """The part of what seems lost that a few steps on old samples bring back."""
    rows = [["task", "measured", "when learnt", "now", "after the steps", "brought back", "control after them"]]
    for when, tasks in recovery["after"].items():
        for name, found in tasks.items():
            share, control = found["share"], found["control"]
            rows.append(
                [
                    name,
                    f"after {when}",
                    *(format_number(found[key]) for key in ("learnt", "now", "after")),
                    _brought_back(share),
                    "–" if control is None else format_number(control["after"]),
                ]
            )
    caption = (
        f"{recovery['steps']} steps on {recovery['samples']} samples of the task, on a copy that is thrown away. The"
        " control takes the same steps from the weights before the task was learnt."
    )
    table = {"rows": rows, "caption": caption, "texts": (1,)}
    return {"id": "recovery", "title": "Lost, or only hidden?", "lines": [], "tables": [table]}


def _brought_back(share: float | None) -> str:
    if share is None:
        return "–"
    return "all, and more" if share > 1 else f"{share:.0%}".replace("-", "−")


def _guard(looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The looks of a guard during training."""
    acted = [look for look in looks if look["action"]]
    shown = (acted + [look for look in looks if not look["action"]])[:_MOST_LOOKS]
    rows = [["step", "training", "task", "rise, nats", "allowed", "sequences", "decision", "action"]]
    for look in sorted(shown, key=lambda look: look["step"]):
        rise = f"{format_number(look['D'], signed=True)} ± {format_number(look['SE'])}"
        numbers = [rise, format_number(look["allowed"]), str(look["n"])]
        rows.append([str(look["step"]), look["training"], look["task"], *numbers, look["decision"], look["action"]])
    lines = [f"Looks: {len(looks)}; with an action: {len(acted)}. ± is one standard error."]
    if len(looks) > len(shown):
        lines.append(f"{len(looks) - len(shown)} more looks without an action are in the raw report.")
    table = {"rows": rows, "caption": "", "texts": (1, 2, 6, 7)}
    return {"id": "guard", "title": "The budget during training", "lines": lines, "tables": [table]}


def budget_lines(report: dict[str, Any]) -> list[str]:
    """Tells if a run's budget of forgetting was met at its end.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
    """
    last = report.get("budget")
    if not last:
        return []
    over = [name for name, decision in last.items() if decision == "breach"]
    unsure = [name for name, decision in last.items() if decision == "uncertain"]
    if over:
        return [f"Budget of forgetting: exceeded for {', '.join(over)}."]
    if unsure:
        return [f"Budget of forgetting: not enough evidence for {', '.join(unsure)}."]
    return ["Budget of forgetting: met."]


def metric_matrices(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the matrix of each metric of written answers, as a report of its own.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
    """
    metrics = report.get("metrics")
    if not metrics:
        return []
    found = []
    for name, scores in metrics["scores"].items():
        rows = [[math.nan if value is None else value for value in row] for row in scores["matrix"]]
        part = report | {"matrix": rows, "monitor": name, "mode": scores["mode"], "data_changes": []}
        found.append((f"{name}: {metrics['definitions'][name]}", part))
    return found
