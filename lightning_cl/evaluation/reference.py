"""References that a run is compared with: the score that each task can reach, as a number or from a run's report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_cl.arguments import is_number
from lightning_cl.data.measured_on import difference

Reference = dict[str, Any]
"""``score``, and where it was read from a report also ``run`` and ``measured_on``."""


def read_reference(given: Mapping[str, float | str] | str) -> dict[str, Reference]:
    """The score that each task can reach.

    Args:
        given: for each task a number, or the folder of a run (or its ``report.json``) in whose last row the task has a
            column; or one such folder for all tasks, as of a run on all data together that watches each task.

    Raises:
        ValueError: for a score that is no finite number, or a report without it.
        FileNotFoundError: if there is no report.
    """
    if isinstance(given, str):
        return _last_row(given, f"reference={given!r}")
    found: dict[str, Reference] = {}
    for name, value in given.items():
        argument = f"reference[{name!r}]={value!r}"
        if isinstance(value, str):
            row = _last_row(value, argument)
            if name not in row:
                raise ValueError(f"{argument}: its tasks are {', '.join(row)}; none has the name {name!r}")
            found[name] = row[name]
        elif is_number(value) and math.isfinite(value):
            found[name] = {"score": float(value)}
        else:
            raise ValueError(f"{argument}: expected a finite number, or the folder of a run with a report.json")
    return found


def check_reference(reference: Mapping[str, Reference], tasks: Sequence[str], needed: bool) -> None:
    """Checks that each task has a reference, before anything is trained.

    Args:
        reference: of :func:`read_reference`; empty if none was given.
        tasks: those that are trained.
        needed: True if a score cannot be made without.

    Raises:
        ValueError: naming the tasks without one.
    """
    if not reference and not needed:
        return
    missing = [name for name in tasks if name not in reference]
    if not missing:
        return
    start = "preset='sapt' compares with models of one task: " if needed else ""
    there = f" (there are {', '.join(reference)})" if reference else ""
    raise ValueError(
        f"TaskMatrix(reference=…): {start}no score for {', '.join(missing)}{there}; give one for each task that is"
        " trained, as in reference={'" + missing[0] + "': 0.8}, or the folder of a run that measured it"
    )


def on_other_data(reference: Mapping[str, Reference], measured_on: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on the references that were measured on other data than the run's own columns are."""
    told = []
    for name, entry in reference.items():
        theirs, ours = entry.get("measured_on"), measured_on.get(name)
        what = difference(theirs, ours) if theirs and ours else None
        if what is not None:
            told.append(f"the reference of {name}, of {entry['run']}, was measured on other data; it differs in {what}")
    return told


def _last_row(path: str, argument: str) -> dict[str, Reference]:
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{argument}: there is no file {file}; give the folder of a run with a report.json")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        row = dict(zip(report["tasks"], report["matrix"][-1], strict=True))
        measured = report.get("measured_on", {})
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{argument}: {file} is not a report ({type(error).__name__}: {error})") from error
    return {
        name: {"score": float(value), "run": str(file.parent), "measured_on": measured.get(name)}
        for name, value in row.items()
        if value is not None  # never measured, or not finite
    }
