"""``--strengths 0.001,0.01,0.1``: finds a penalty's strength on the first tasks alone, then trains all of them with it.

A strength that was chosen by the result of the whole sequence has seen the future: the later tasks were not there when
the choice had to be made (De Lange et al. 2022, section 4; Chaudhry et al. 2019, section 5). Here each strength is
tried on the first tasks, by the average over *their* validation data, and the best one then trains the whole sequence
from its start. Each run is a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cl.cli.parser import take_option
from lightning_cl.cli.processes import new_file, report_of, run_process, write_json
from lightning_cl.evaluation.seeds import diverged
from lightning_cl.evaluation.tables import SCORES, format_number, format_table


def run_search(arguments: Sequence[str]) -> int | None:
    """Tries the strengths of ``--strengths`` on the first tasks, and trains all tasks with the best.

    Args:
        arguments: the command line.

    Returns:
        the exit code; None if the command line asks for no search.

    Raises:
        ValueError: for strengths or options that do not go together.
    """
    given, rest = take_option(arguments, "--strengths 0.001,0.01,0.1")
    first_tasks, rest = take_option(rest, "--first 2")
    if not given:
        if first_tasks:
            raise ValueError(f"--first={first_tasks[0]}: on how many tasks strengths are tried; give --strengths too")
        return None
    method, strengths = parse_strengths(given[-1])
    first = parse_first(first_tasks[-1] if first_tasks else "2")
    _check_options(rest)
    trials: list[dict[str, Any]] = []
    path: Path | None = None
    for number, strength in enumerate(strengths, start=1):
        print(f"\n  strength {strength:g} on the first {first} tasks, run {number} of {len(strengths)}", flush=True)
        code, folder = _run(rest, {"method": method, "strength": strength, "first": first})
        if code != 0:
            print(f"lightning-cl: error: strength {strength:g} ended with code {code}", file=sys.stderr)
            return code
        report = report_of(folder, "--strengths", f"strength {strength:g}")
        trials.append(_trial(strength, folder, report))
        path = path or new_file(Path(trials[0]["folder"]).parent, "search")
        about = {"monitor": report["monitor"], "definitions": report["definitions"]}
        write_json(path, {"format": 1, "first": first, **about, "trials": trials})
    best = _best(trials, report["mode"])
    assert path is not None
    print(_table(trials, first, best, report["monitor"], report["mode"], path), flush=True)
    print(f"\n  all tasks with strength {best:g}", flush=True)
    code, folder = _run(rest, {"method": method, "strength": best, "first": None})
    if code == 0:
        content = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, content | {"best": best, "run": str(folder)})
    return code


def parse_strengths(text: str) -> tuple[str | None, list[float]]:
    """The callback, if one is named, and the strengths: ``0.001,0.01`` or ``EWC=0.001,0.01``.

    Raises:
        ValueError: if they are no strengths, or fewer than two.
    """
    method, equals, numbers = text.rpartition("=")
    strengths = read_numbers(numbers)
    if len(set(strengths)) < 2:
        raise ValueError(
            f"--strengths={text}: expected at least two different numbers of at least 0, as in 0.001,0.01,0.1, or with"
            " a callback's name, as in EWC=0.001,0.01"
        )
    return (method if equals else None), strengths


def read_numbers(text: str) -> list[float]:
    """Strengths from ``0.001,0.01``; an empty list if one of them is none."""
    try:
        strengths = [float(part) for part in text.split(",")]
    except ValueError:
        return []
    return strengths if all(0 <= strength < float("inf") for strength in strengths) else []


def parse_first(text: str) -> int:
    """The number of tasks to try on.

    Raises:
        ValueError: if it is no number of at least 2.
    """
    if not text.isdigit() or int(text) < 2:
        raise ValueError(f"--first={text}: expected at least 2 tasks: one has nothing before it to protect")
    return int(text)


def _check_options(arguments: Sequence[str]) -> None:
    if "fit" not in arguments:
        raise ValueError("--strengths: only with `fit`, which trains")
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise ValueError("--strengths starts a process for each run itself; not under torchrun")
    for option in ("--run", "--ckpt_path", "--seeds"):
        if option in {argument.split("=")[0] for argument in arguments}:
            raise ValueError(
                f"--strengths and {option}: a search is of whole runs from their start; give one of the two"
            )


def _run(arguments: Sequence[str], trial: dict[str, Any]) -> tuple[int, Path | None]:
    return run_process(arguments, os.environ.copy(), "--strengths", trial)


def _trial(strength: float, folder: Path | None, report: dict[str, Any]) -> dict[str, Any]:
    final = dict(zip(report["tasks"], report["matrix"][-1], strict=True))
    unknown = [name for name in report["tasks"] if final[name] is None and name not in report["watched"]]
    scores = {name: report.get(name) for name in SCORES}
    about = {"final": final, "diverged": diverged(report), "unknown": unknown}
    return {"strength": strength, "folder": str(folder), **about, **scores}


def _best(trials: Sequence[dict[str, Any]], mode: str) -> float:
    sign = 1 if mode == "max" else -1
    # A mean over some of the tasks is no average: a strength at which a task diverged, or was not measured, is not
    # better for what it leaves out.
    known = [t for t in trials if t["average"] is not None and not t["diverged"] and not t["unknown"]]
    if not known:
        lost = ", ".join(f"{trial['strength']:g}" for trial in trials if trial["diverged"]) or "none"
        raise ValueError(
            "--strengths: no strength has a finite average over all of the first tasks (see the matrices in their"
            f" reports; diverged: {lost}); does"
            " every task have validation data, and is what TaskMatrix monitors a finite number?"
        )
    result: float = max(known, key=lambda trial: sign * trial["average"])["strength"]
    return result


def _table(trials: Sequence[dict[str, Any]], first: int, best: float, monitor: str, mode: str, path: Path) -> str:
    names = list(trials[0]["final"])
    rows = [["strength", *names, "average", "mean when learnt", "forgetting", ""]]
    for trial in trials:
        scores = (trial[name] for name in ("average", "mean_when_learnt", "forgetting"))
        numbers = [*(trial["final"][name] for name in names), *scores]
        mark = "best" if trial["strength"] == best else "diverged" if trial["diverged"] else ""
        rows.append([f"{trial['strength']:g}", *(format_number(number) for number in numbers), mark])
    better = "lower" if mode == "min" else "higher"
    lines = ["", f"{monitor} after the first {first} tasks ({better} is better)", "", *format_table(rows)]
    lines += [
        f"  strength {trial['strength']:g} is not chosen: {monitor} of {', '.join(trial['diverged'])} is not finite"
        for trial in trials
        if trial["diverged"]
    ]
    tried = [trial["strength"] for trial in trials]
    if best in (min(tried), max(tried)) and len(trials) > 2:
        lines.append("  the best is at the end of the list: a strength beyond it may be better")
    return "\n".join([*lines, "", f"  {path}"])


# ---------------------------------------------------------------------- inside a run


def set_strength(callbacks: Any, trial: dict[str, Any]) -> None:
    """Puts a trial's strength into the configuration of the callback that it is for.

    Args:
        callbacks: ``trainer.callbacks`` as parsed: a list with ``class_path`` and ``init_args``.
        trial: of :func:`~lightning_cl.cli.processes.asked_trial`.

    Raises:
        ValueError: if there is no such callback, or several.
    """
    several = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks is not None else []
    having = [c for c in several if "strength" in (getattr(c, "init_args", None) or {})]
    names = [c.class_path.rpartition(".")[2] for c in having]
    wanted = [c for c, name in zip(having, names, strict=True) if trial["method"] in (None, name)]
    if len(wanted) != 1:
        asked = f"called {trial['method']} " if trial["method"] else ""
        raise ValueError(
            f"--strengths: {len(wanted)} callbacks {asked}have a strength (there are {names}); "
            + ("name the one that is meant, as in EWC=0.001,0.01" if wanted else "add one to trainer.callbacks")
        )
    wanted[0].init_args["strength"] = trial["strength"]


def keep_first(data: Any, first: int | None) -> None:
    """Leaves a run the first tasks alone, and what is only watched.

    Raises:
        ValueError: if there are not so many.
    """
    if first is None:
        return
    kept = data.trained_tasks[:first]
    if len(kept) < first:
        raise ValueError(f"--first={first}: there are only {len(kept)} tasks to train on")
    data.tasks = [task for task in data.tasks if task.watched or task in kept]
