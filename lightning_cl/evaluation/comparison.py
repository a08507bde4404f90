"""Several methods side by side: means with intervals, paired differences to the first, the Pareto front, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cl.data.measured_on import difference
from lightning_cl.evaluation.seeds import ABOUT, FEWEST, paired_rows, run_result, score_rows
from lightning_cl.evaluation.tables import UNSIGNED, format_bytes, format_number, format_table

PLASTICITY, RETENTION = "mean_when_learnt", "backward_transfer"
"""The scores on the two axes: how well new tasks were learnt, and how earlier ones changed since."""

_SHOWN = ("average", PLASTICITY, "share_kept", "forgetting", RETENTION)
_FRONT = (
    "methods on the Pareto front: no other method is at least as good in both mean when learnt and backward transfer,"
    " and better in one of them; a method that diverged is never on it"
)
_INTERVAL = (
    "mean ± half of the 95 % interval of Student's t over n seeds, t(0.975, n − 1) · sd / √n; no interval below"
    f" {FEWEST} seeds. A difference is this method less the first one, seed by seed, over the seeds that both have"
)


def compared_run(report: dict[str, Any]) -> dict[str, Any]:
    """Parts of one run's report that a comparison keeps: the scores, and what it cost.

    Args:
        report: as it was read from ``report.json``.

    Returns:
        what :func:`~lightning_cl.evaluation.seeds.run_result` gives, and ``costs``: ``seconds``, ``state_bytes``, and
        ``tokens`` (new and replayed), or ``samples`` where the data is no text.
    """
    costs = report["costs"]
    tasks = costs["tasks"]
    found = {"seconds": costs["total_seconds"], "state_bytes": sum(costs["state_bytes"].values())}
    for kind in ("tokens", "samples"):
        if tasks and all(cost.get(f"new_{kind}") for cost in tasks):
            found[kind] = sum(cost[f"new_{kind}"] + cost.get(f"replayed_{kind}", 0.0) for cost in tasks)
            break
    return run_result(report) | {"costs": found}


def compare_methods(methods: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that the table, the picture and the files of a comparison show.

    Args:
        methods: each with ``name``, and ``family`` (the name without its strength); the first is compared with.
        runs: the finished ones, of :func:`compared_run`, with ``method`` and ``seed``.

    Returns:
        ``methods``, ``definitions``, ``pareto`` (names) and what the runs are about; ``methods`` have ``n``, ``rows``
        (as in ``seeds.json``), ``differences`` (rows, None without a pair), ``costs`` (means) and ``diverged``.
    """
    by_method = {method["name"]: [run for run in runs if run["method"] == method["name"]] for method in methods}
    first = by_method[methods[0]["name"]]
    table = []
    for number, method in enumerate(methods):
        ours = by_method[method["name"]]
        entry = {**method, "n": len(ours), "rows": score_rows(ours) if ours else [], "differences": None}
        paired, other = _pairs(ours, first)
        if number > 0 and paired:
            of_first = [run for run in first if run["seed"] in {run["seed"] for run in paired}]
            entry["differences"] = paired_rows(paired, of_first)
        entry["other_data"] = other if number > 0 else []
        entry["diverged"] = [{"seed": run["seed"], "tasks": run["diverged"]} for run in ours if run["diverged"]]
        entry["costs"] = _costs(ours)
        table.append(entry)
    about = {key: runs[0][key] for key in (*ABOUT, "preset") if key in runs[0]} if runs else {}
    if runs:
        about["definitions"] = {**about["definitions"], "pareto": _FRONT, "interval": _INTERVAL}
    return {**about, "methods": table, "pareto": pareto(table, about.get("mode", "min"))}


def mean_of(method: Mapping[str, Any], measure: str) -> float | None:
    """The mean of a score over a method's runs; None where it is not known."""
    row = row_of(method["rows"], measure)
    return row["mean"] if row is not None else None


def half_width(row: Mapping[str, Any] | None) -> float | None:
    """Half of a row's interval; None with too few seeds for one."""
    if row is None or row["low"] is None or len(row["values"]) < FEWEST:
        return None
    width: float = (row["high"] - row["low"]) / 2
    return width


def pareto(methods: Sequence[Mapping[str, Any]], mode: str) -> list[str]:
    """The names of the methods that no other one beats in plasticity and retention.

    Args:
        methods: with ``rows``; one whose means are not known (it diverged) is left out.
        mode: ``max`` if higher scores are better, ``min`` if lower ones are.
    """
    sign = 1 if mode == "max" else -1
    points = {}
    for method in methods:
        x, y = mean_of(method, PLASTICITY), mean_of(method, RETENTION)
        if x is not None and y is not None:
            points[method["name"]] = (sign * x, y)

    def beaten(point: tuple[float, float]) -> bool:
        return any(p != point and p[0] >= point[0] and p[1] >= point[1] for p in points.values())

    return [name for name, point in points.items() if not beaten(point)]


def _pairs(ours: Sequence[dict[str, Any]], first: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Our runs that have a partner in the first method, and sentences on those that were measured on other data."""
    partner, paired, told = {run["seed"]: run for run in first}, [], []
    for run in ours:
        if run["seed"] not in partner:
            continue
        theirs = partner[run["seed"]].get("measured_on", {})
        whats = {
            task: what
            for task, now in run.get("measured_on", {}).items()
            if task in theirs and (what := difference(theirs[task], now)) is not None
        }
        if whats:
            tasks = ", ".join(f"{task} ({what})" for task, what in whats.items())
            told.append(
                f"{_seed(run)} was measured on other data than that of the first method: {tasks}: no difference"
            )
        else:
            paired.append(run)
    return paired, told


def _costs(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for run in runs for name in run["costs"])
    return {name: sum(run["costs"].get(name, 0.0) for run in runs) / len(runs) for name in names}


def row_of(rows: Sequence[dict[str, Any]] | None, measure: str, task: str | None = None) -> dict[str, Any] | None:
    """The row of a measure, and of a task where it is the task's score at the end; None if there is none."""
    return next((row for row in rows or () if row["measure"] == measure and row["task"] == task), None)


def _seed(run: Mapping[str, Any]) -> str:
    return "its run" if run["seed"] is None else f"seed {run['seed']}"


# ---------------------------------------------------------------------- for people


def format_comparison(table: dict[str, Any]) -> str:
    """The table for a terminal."""
    lines = [
        "",
        *_title(table),
        "",
        *format_table(_cells(table, tuple(name for name in _SHOWN if name != "forgetting"))),
    ]
    lines += ["", *(f"  {words}" for words in _notes(table))]
    return "\n".join(lines)


def comparison_markdown(table: dict[str, Any]) -> str:
    """The table, each task's score, the definitions and the command, as Markdown."""
    tasks = [["method", *table["tasks"]]]
    for method in table["methods"]:
        cells = [_cell(row_of(method["rows"], "final", task), signed=False) for task in table["tasks"]]
        tasks.append([method["name"], *cells])
    definitions = [f"- {name.replace('_', ' ')}: {words}" for name, words in table["definitions"].items()]
    parts = [
        f"# {_title(table)[0].strip()}",
        "\n".join(_markdown(_cells(table))),
        "![plasticity and retention](compare.png)",
        f"{table['monitor']} of each task at the end:",
        "\n".join(_markdown(tasks)),
        "\n".join(f"- {_escape(words)}" for words in _notes(table)),
        "\n".join(definitions),
        "```bash\n" + table["command"] + "\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(table: dict[str, Any]) -> list[str]:
    better = "lower" if table["mode"] == "min" else "higher"
    seeds = [seed for seed in table["seeds"] if seed is not None]
    over = f" over the seeds {', '.join(map(str, seeds))}" if seeds else ""
    return [f"{table['monitor']} of {len(table['methods'])} methods{over} ({better} is better)"]


def _cells(table: dict[str, Any], shown: Sequence[str] = _SHOWN) -> list[list[str]]:
    first = table["methods"][0]["name"]
    names = {"average": "average", PLASTICITY: "when learnt", "share_kept": "kept", RETENTION: "transfer back"}
    header = ["method", "n", "average", f"less {first}", *(names.get(name, name) for name in shown[1:])]
    kind = next((kind for kind in ("tokens", "samples") if kind in table["methods"][0]["costs"]), "tokens")
    cells = [[*header, "seconds", "state", kind]]
    for method in table["methods"]:
        scores = [_cell(row_of(method["rows"], name), signed=name not in UNSIGNED) for name in shown]
        if method["diverged"]:
            scores = ["not finite" if cell == "–" else cell for cell in scores]
        less = _cell(row_of(method["differences"], "average"), signed=True)
        costs = method["costs"]
        seconds = f"{costs['seconds']:,.0f}" if costs else "–"
        state = format_bytes(costs["state_bytes"]) if costs else "–"
        count = f"{costs[kind]:,.0f}" if kind in costs else "–"
        name = method["name"] + (" *" if method["name"] in table["pareto"] else "")
        cells.append([name, str(method["n"]), scores[0], less, *scores[1:], seconds, state, count])
    return cells


def _cell(row: Mapping[str, Any] | None, signed: bool) -> str:
    if row is None or row["mean"] is None:
        return "–"
    half = half_width(row)
    mean = format_number(row["mean"], signed)
    return mean if half is None else f"{mean} ± {format_number(half)}"


def _notes(table: dict[str, Any]) -> list[str]:
    """Sentences on what the table does not show."""
    most = max((method["n"] for method in table["methods"]), default=0)
    notes = [f"* on the Pareto front of learning and keeping: {', '.join(table['pareto'])}"] if table["pareto"] else []
    if most >= FEWEST:
        notes.append(f"± is half of the 95 % interval over n seeds (Student's t); n of at least {FEWEST}")
    else:
        notes.append(f"n is below {FEWEST}: no intervals, and small differences may be chance; give --seeds {FEWEST}")
    for method in table["methods"]:
        for entry in method["diverged"]:
            at = "" if entry["seed"] is None else f" at seed {entry['seed']}"
            what = f"{table['monitor']} of {', '.join(entry['tasks'])}{at}"
            notes.append(f"{method['name']}: {what} is not finite: the worst there is, no mean with it")
        notes += [f"{method['name']}: {words}" for words in method["other_data"]]
    for run in table["failed"]:
        at = "" if run["seed"] is None else f" at seed {run['seed']}"
        notes.append(f"{run['method']}{at} ended with code {run['exit_code']}: it is missing above")
    if len({method["family"] for method in table["methods"]}) < len(table["methods"]):
        notes.append("a strength that is chosen from this table has seen the later tasks; `fit --strengths` has not")
    notes += [f"seed {seed}: {', '.join(order)}" for seed, order in (table["orders"] or {}).items()]
    return notes


def _markdown(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_escape, row))} |" for row in rows]
    return [lines[0], f"|{'|'.join(['---'] + ['---:'] * (len(rows[0]) - 1))}|", *lines[1:]]


def _escape(text: str) -> str:
    for sign, written in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(sign, written)
    return " ".join(text.split()).replace("*", "\\*")
