"""Statistics of a method over several seeds: spread, intervals, and differences of pairs.

The interval is Student's t: ``mean ± t(0.975, n − 1) * sd / √n`` with the sample's standard deviation (n − 1). It is
about seeds only: about other data it says nothing. Two methods with the same seeds are compared by the differences of
their pairs: what a seed does to both is then not in the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.tables import SCORES as SCORES
from lightning_cl.evaluation.tables import format_number, format_table

ABOUT = ("tasks", "watched", "monitor", "mode", "definitions")
"""Parts of a report that all runs of a table have in common."""

FEWEST = 3  # the interval of two seeds is twelve times their spread


def run_result(report: dict[str, Any]) -> dict[str, Any]:
    """Parts of one run's report that a table of several runs keeps.

    Args:
        report: as it was read from ``report.json``.

    Returns:
        ``final`` (each task's score at the end), ``diverged``, the scores, the matrix and what they are about.
    """
    kept = ("matrix", "tasks", "watched", "monitor", "mode", "preset", "definitions", "measured_on", "fingerprints")
    return {
        "final": dict(zip(report["tasks"], report["matrix"][-1], strict=True)),
        "diverged": diverged(report),
        **{name: report.get(name) for name in SCORES},
        **{key: report[key] for key in kept if key in report},
    }


def diverged(report: dict[str, Any]) -> list[str]:
    """The tasks whose score was measured and not finite, from their own training on (watched ones: at the end)."""
    trained = [name for name in report["tasks"] if name not in report["watched"]]
    last = len(report["matrix"]) - 1
    found = {
        entry["task"]
        for entry in report.get("not_finite", ())  # earlier reports do not have it
        if entry["row"] >= (trained.index(entry["task"]) + 1 if entry["task"] in trained else last)
    }
    return [name for name in report["tasks"] if name in found]


def summarize(
    runs: Sequence[dict[str, Any]],
    arguments: list[str],
    seeds: Sequence[int],
    failed: dict[str, Any] | None = None,
    orders: dict[int, list[str]] | None = None,
) -> dict[str, Any]:
    """Everything that is in ``seeds.json``.

    Args:
        runs: of each finished seed: ``seed``, ``folder``, ``final``, the scores, and what they are about.
        arguments: the command line.
        seeds: all seeds that were asked for.
        failed: which one failed, and how.
        orders: for each seed the order of its tasks, if they are not those of the configuration.
    """
    about = {key: runs[0][key] for key in ABOUT}
    # In another order, the columns of a run's matrix are its own.
    own = ("tasks",) if orders else ()
    results = [{key: value for key, value in run.items() if key in own or key not in about} for run in runs]
    return {
        "format": 1,
        "complete": len(runs) == len(seeds),
        "arguments": arguments,
        "seeds": list(seeds),
        "failed": failed,
        **about,
        "orders": {str(seed): order for seed, order in orders.items()} if orders else None,
        "rows": score_rows(results),
        "runs": results,
        "against": None,
    }


def paired_rows(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row the differences, ours less theirs, seed by seed, with their mean and interval."""
    partner = {run["seed"]: run for run in others}
    ours, theirs = _rows(runs), _rows([partner[run["seed"]] for run in runs])
    paired = []
    for row, other in zip(ours, theirs, strict=True):
        pairs = zip(row["values"], other["values"], strict=True)
        values = [None if a is None or b is None else a - b for a, b in pairs]
        paired.append({**row, "values": values} | interval(values))
    return paired


def score_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task's score at the end, and each score, the values of the runs with their mean and interval."""
    return [row | interval(row["values"]) for row in _rows(runs)]


def _rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"measure": "final", "task": task, "values": [run["final"][task] for run in runs]} for task in runs[0]["final"]
    ]
    scores = [{"measure": name, "task": None, "values": [run.get(name) for run in runs]} for name in SCORES]
    # Without a reference there is no intransigence.
    return rows + [row for row in scores if row["measure"] != "intransigence" or row["values"] != [None] * len(runs)]


def interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean, standard deviation (n − 1), and the ends of the 95 % interval of Student's t.

    Args:
        values: one for each seed; None where it is not known, then nothing is said.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "sd": None, "low": None, "high": None}
    mean = statistics.fmean(known)
    if len(known) < 2:
        return {"mean": mean, "sd": None, "low": None, "high": None}
    sd = statistics.stdev(known)
    half = t_quantile(len(known) - 1) * sd / math.sqrt(len(known))
    return {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half}


def t_quantile(freedom: int) -> float:
    """The t with ``P(|T| ≤ t) = 0.95`` under Student's distribution, by bisection of its closed form.

    Args:
        freedom: degrees of freedom, at least 1.

    Source: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _probability(theta: float, freedom: int) -> float:
    """``P(|T| ≤ √ν tan θ)``: a finite sum, in odd powers of cos θ for odd ν and in even ones for even ν."""
    odd, cosine = freedom % 2, math.cos(theta)
    power, term, total = odd, cosine if odd else 1.0, 0.0
    while power <= freedom - 2:
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
        power += 2
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


# ---------------------------------------------------------------------- the terminal


def format_seeds(table: dict[str, Any], path: Path) -> str:
    """The table for a terminal."""
    seeds = [run["seed"] for run in table["runs"]]
    better = "lower" if table["mode"] == "min" else "higher"
    lines = ["", f"{table['monitor']} over the seeds {', '.join(map(str, seeds))} ({better} is better)", ""]
    lines += _lines(table["rows"], "at the end")
    lines += [f"  seed {seed}: {', '.join(order)}" for seed, order in (table["orders"] or {}).items()]
    lines += ["", *(f"  {name.replace('_', ' ')}: {words}" for name, words in table["definitions"].items())]
    if table["against"] is not None:
        lines += ["", f"the same, less that of {table['against']['path']}, seed by seed", ""]
        lines += _lines(table["against"]["rows"], "difference")
    lines += [
        f"  seed {run['seed']}: {table['monitor']} of {', '.join(run['diverged'])} is not finite: no mean with it"
        for run in table["runs"]
        if run.get("diverged")
    ]
    if not table["complete"]:
        lines += ["", f"  only {len(seeds)} of {len(table['seeds'])} seeds are finished"]
    return "\n".join([*lines, "", f"  {path}"]) + "\n"


def _lines(rows: Sequence[dict[str, Any]], title: str) -> list[str]:
    cells = [[title, "mean", "sd", "95 % interval"]]
    for row in rows:
        low, high, mean, sd = (format_number(row[key]) for key in ("low", "high", "mean", "sd"))
        few = len(row["values"]) < FEWEST
        ends = "too few seeds" if few else f"{low} to {high}" if row["low"] is not None else "–"
        cells.append([row["task"] or row["measure"].replace("_", " "), mean, sd, ends])
    return format_table(cells)
