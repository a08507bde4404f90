"""The report page: ``report.html``, one self-contained file without scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.curves import curve_sentences
from lightning_cl.evaluation.figure import changes_of, full_color
from lightning_cl.evaluation.page.drawings import COLORS, draw_rows, draw_scatter, draw_steps
from lightning_cl.evaluation.page.sections import budget_lines, metric_matrices, more_sections
from lightning_cl.evaluation.page.verdict import change_of_average, judge
from lightning_cl.evaluation.plain import plain
from lightning_cl.evaluation.sentences import KEPT, row_names
from lightning_cl.evaluation.tables import SCORES, UNSIGNED, format_bytes, format_number
from lightning_cl.files import replace_file

_LONGEST_PROMPT = 300  # characters of it, its end
_MOST_RUNS = 30  # of the same folder, the newest ones


def write_page(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.html`` into a run's folder, whole or not at all.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        folder: of the run; its ``config.yaml`` and the reports of the runs next to it are shown too, if they exist.
    """
    config = folder / "config.yaml"
    # Where a run has no folder of its own, the file may be another program's.
    own = config.is_file() and folder.resolve() != Path.cwd()
    text = config.read_text(encoding="utf-8", errors="replace") if own else ""
    page = format_page(report, title=folder.name, config=text, others=_runs_next_to(folder, report), hidden=folder)
    replace_file(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def format_page(
    report: dict[str, Any],
    title: str = "run",
    config: str = "",
    others: Sequence[tuple[str, dict[str, Any]]] = (),
    hidden: Path | None = None,
) -> str:
    """Returns the page as HTML that asks nothing of the network and runs no script.

    Texts of users (names of tasks, samples, answers) stand in it as text, whatever markup they hold. Each number of the
    report stands in it at least once as it is in ``report.json``.

    Args:
        report: of :func:`~lightning_cl.evaluation.build_report`.
        title: name of the run.
        config: text of the run's configuration.
        others: earlier runs on the same data: name and report.
        hidden: folder of the run, which is not named in the page; neither is the user's home.
    """
    report = _numbers(report)
    verdict = judge(report)
    names, steps = row_names(report), _steps_drawing(report)
    methods = [name for name, told in report["methods"].items() if not told.get("prompts")]
    trained = ", ".join(names[1:])
    page = _template().render(
        title=f"Continual learning: {title}",
        methods_line=f"{' + '.join(methods) or 'no protection'}; tasks in order: {trained}",
        verdict=verdict,
        average_line=change_of_average(report),
        budget_lines=budget_lines(report),
        shares=[
            {
                "name": name,
                "text": "–" if math.isnan(share) else f"{share:.0%}".replace("-", "−"),
                "percent": 0 if math.isnan(share) else round(100 * min(max(share, 0.0), 1.0), 1),
                "low": share < KEPT,
            }
            for name, share in verdict.shares.items()
        ],
        sentences=report["sentences"],
        matrices=[_heat(report), *(_heat(part, title, names) for title, part in metric_matrices(report))],
        drawings=[*steps, _rows_drawing(report)],
        scatter=_scatter(report, title, others),
        answers=_answers(report),
        more=more_sections(report),
        costs=_cost_table(report),
        total_line=_total_line(report),
        left_out=[],
        methods=_methods(report, shown=[line for drawing in steps for line in drawing["lines"]]),
        definitions=[
            {
                "name": name.replace("_", " "),
                "value": format_number(report[name], signed=name not in UNSIGNED) if name in report else "",
                "words": words,
            }
            for name, words in report["definitions"].items()
        ],
        provenance=_provenance(report),
        data=_data_table(report),
        config=config,
        raw=json.dumps(plain(report), indent=1, ensure_ascii=False),
    )
    return _without_paths(page, hidden)


@lru_cache(maxsize=1)
def _template() -> Any:
    import jinja2

    folder = Path(__file__).parent
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string((folder / "page.html").read_text(encoding="utf-8"))


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """The report with NaN, and the worst, where a file has null."""
    worst = math.inf if report["mode"] == "min" else -math.inf
    broken = {(entry["row"], entry["task"]) for entry in report["not_finite"]}
    matrix = [
        [
            float(value) if value is not None else worst if (i, task) in broken else math.nan
            for task, value in zip(report["tasks"], row, strict=True)
        ]
        for i, row in enumerate(report["matrix"])
    ]
    scores = {name: math.nan for name in SCORES if report.get(name) is None}
    return report | scores | {"matrix": matrix}


def _heat(report: dict[str, Any], title: str = "", rows_of: Sequence[str] = ()) -> dict[str, Any]:
    """Cells of a matrix: red is worse than when the task was learnt, blue better."""
    matrix, shifts, names = report["matrix"], changes_of(report), list(rows_of) or row_names(report)
    full = full_color(matrix, shifts)
    changed = {change["row"] for change in report["data_changes"]}
    rows = []
    for i, (row, shift) in enumerate(zip(matrix, shifts, strict=True)):
        cells = []
        for j, (value, change) in enumerate(zip(row, shift, strict=True)):
            task = report["tasks"][j]
            kind, words = "before", f"{task} {_after(names[i])}: {report['monitor']} {value!r}"
            if math.isinf(value):
                kind = "broken"
            elif not math.isnan(change):
                kind = "better" if change > 0 else "worse"
                words += f"; {format_number(change, signed=True)} since it was learnt"
            shade = 0.0 if math.isnan(change) else min(abs(change) / full, 1.0)
            text = "not finite" if math.isinf(value) else format_number(value)
            now = i > 0 and task == names[i]
            cells.append({"kind": kind, "shade": f"{shade:.3f}", "words": words, "text": text, "now": now})
        rows.append({"name": names[i], "cells": cells, "changed": i in changed})
    better = "lower" if report["mode"] == "min" else "higher"
    watched = f" Watched, never trained on: {', '.join(report['watched'])}." if report["watched"] else ""
    line = " Above the orange line: measured on other data." if changed else ""
    caption = (
        f"{report['monitor']}, {better} is better. Boxed: just trained; grey: not learnt yet; red: worse than when"
        f" learnt (full colour: {full:.2g}); blue: better.{watched}{line}"
    )
    return {"title": title, "columns": report["tasks"], "rows": rows, "caption": caption}


def _after(row: str) -> str:
    return row if row == "before training" else f"after {row}"


def _steps_drawing(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The losses over the steps, if the run has looked at them."""
    curves = report.get("curves")
    if not curves:
        return []
    guard = report.get("guard", [])
    starts = "; ".join(f"step {switch['step']}: {switch['task']}" for switch in curves["switches"])
    words = f"Dashed: a task begins ({starts}). Ring: the peak of a stability gap."
    words += " Triangle: the guard acted." if any(look["action"] for look in guard) else ""
    drawing = {"svg": draw_steps(curves, guard, report["tasks"]), "legend": [], "words": words}
    return [drawing | {"lines": curve_sentences(curves["switches"])}]


def _rows_drawing(report: dict[str, Any]) -> dict[str, Any]:
    legend = [
        {"name": f"{name} (watched)" if name in report["watched"] else name, "color": COLORS[i % len(COLORS)]}
        for i, name in enumerate(report["tasks"])
    ]
    return {"svg": draw_rows(report), "legend": legend, "words": "", "lines": []}


def _runs_next_to(folder: Path, report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Reports of the runs in the same folder that measured the same score of the same tasks on the same data."""
    found: list[tuple[float, str, dict[str, Any]]] = []
    for path in folder.parent.glob("*/report.json"):
        if path.parent == folder:
            continue
        try:
            other = json.loads(path.read_text(encoding="utf-8"))
            same = all(other[key] == report[key] for key in ("tasks", "monitor", "mode", "watched", "measured_on"))
            if same and len(other["matrix"]) == len(report["matrix"]) and isinstance(other["methods"], dict):
                found.append((path.stat().st_mtime, path.parent.name, _numbers(other)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another program's file, or a damaged one
    return [(name, other) for _, name, other in sorted(found, key=lambda run: run[:2])[-_MOST_RUNS:]]


def _scatter(report: dict[str, Any], title: str, others: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """This run among earlier ones: what was learnt against what was forgotten."""
    scored = ("mean_when_learnt", "forgetting")
    earlier = [(name, _numbers(other)) for name, other in others]
    known = [(name, other) for name, other in earlier if all(math.isfinite(other[score]) for score in scored)]
    runs = [*known, (title, report)]
    points = [
        {"number": i, "learnt": run["mean_when_learnt"], "forgetting": run["forgetting"], "own": run is report}
        for i, (_, run) in enumerate(runs, start=1)
    ]
    if len(runs) < 2 or not all(math.isfinite(p["learnt"]) and math.isfinite(p["forgetting"]) for p in points):
        return None
    rows = [["run", "name", "methods", "mean when learnt", "forgetting", "average"]]
    for i, (name, run) in enumerate(runs, start=1):
        methods = " + ".join(run["methods"]) or "no protection"
        scores = [format_number(run[key], signed=key == "forgetting") for key in ("mean_when_learnt", "forgetting")]
        rows.append([str(i), f"{name} (this run)" if run is report else name, methods, *scores])
        rows[-1].append(format_number(run["average"]))
    return {"svg": draw_scatter(points, report["monitor"]), "rows": rows}


def _answers(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to each prompt, one row for each moment at which it was asked; those that lost most come first."""
    names, groups = row_names(report), []
    for task, exercises in report.get("metrics", {}).get("answers", {}).items():
        for exercise in exercises:
            given = sorted(exercise["answers"].items(), key=lambda item: int(item[0]))
            rows = [["after", "answer", "score"]]
            for row, answer in given:
                score = format_number(exercise["scores"].get(row))
                rows.append([names[int(row)], answer.strip() or "(blank)", score])
            rows.append(["expected", " | ".join(map(str, exercise["references"])), ""])
            groups.append({"title": f"{task}: {exercise['prompt'][-_LONGEST_PROMPT:]}", "rows": rows, "texts": (1,)})
    for method in report["methods"].values():
        for index, prompt in enumerate(method.get("prompts", [])):
            given = sorted(method["answers"].items(), key=lambda item: int(item[0]))
            rows = [
                ["after", "answer"],
                *([names[int(row)], answers[index].strip() or "(blank)"] for row, answers in given),
            ]
            groups.append({"title": prompt, "rows": rows, "texts": (1,)})
    return groups


def _cost_table(report: dict[str, Any]) -> list[list[str]]:
    rows = [["task", "steps", "training, s", "end of task, s", "new tokens", "replayed tokens"]]
    kind = "tokens" if any(cost.get("new_tokens") for cost in report["costs"]["tasks"]) else "samples"
    rows[0][4:] = [f"new {kind}", f"replayed {kind}"]
    for cost in report["costs"]["tasks"]:
        counts = [f"{cost[key]:,.0f}" if key in cost else "?" for key in (f"new_{kind}", f"replayed_{kind}")]
        times = [f"{cost['train_seconds']:.1f}", f"{cost['end_seconds']:.1f}"]
        rows.append([str(cost["task"]), f"{cost['steps']:,.0f}", *times, *counts])
    return rows


def _total_line(report: dict[str, Any]) -> str:
    costs = report["costs"]
    state = ", ".join(f"{name} {format_bytes(size)}" for name, size in costs["state_bytes"].items() if size)
    return (
        f"{costs['total_seconds']:.1f} s in all, {costs['evaluation_seconds']:.1f} s of them evaluation; state kept by"
        f" the methods: {state or 'none'}"
    )


def _methods(report: dict[str, Any], shown: Sequence[str]) -> list[dict[str, Any]]:
    """Sentences and single values of each method; longer ones stand in the raw report."""
    told = []
    for name, values in report["methods"].items():
        facts = [
            [key.replace("_", " "), _short(value)]
            for key, value in values.items()
            if isinstance(value, (str, int, float, bool)) and key != "sentences"
        ]
        lines = [line for line in values.get("sentences", []) if line not in shown]
        if lines or facts:
            told.append({"name": name, "lines": lines, "facts": [["setting", "value"], *facts] if facts else []})
    return told


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _provenance(report: dict[str, Any]) -> list[tuple[str, str]]:
    made = report.get("provenance", {})
    return [(name.replace("_", " "), str(value)) for name, value in made.items() if value is not None]


def _data_table(report: dict[str, Any]) -> list[list[str]]:
    rows = [["task", "checksum of the data", "samples", "settings"]]
    for name, on in report["measured_on"].items():
        samples = ", ".join("?" if count is None else f"{count:,}" for count in on.get("samples") or []) or "?"
        shown = {k: v for k, v in on.items() if k not in ("data", "samples", "batches") and v is not None}
        rows.append([name, str(on.get("data")), samples, ", ".join(f"{k} {v}" for k, v in shown.items())])
    return rows if len(rows) > 1 else []


def _without_paths(page: str, hidden: Path | None) -> str:
    """The page without the run's own folder and the user's home: it is made to be sent around."""
    for path, name in ((hidden, "RUN"), (Path.home(), "~")):
        if path is not None and len(str(path.resolve())) > 1:
            page = page.replace(str(path.resolve()), name)
    return page
