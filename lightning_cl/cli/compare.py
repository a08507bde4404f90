"""``lightning-cl compare``: one configuration plain and with each of several methods, in one table and one picture.

The runs are processes, one after another, all methods of a seed before the next seed. Their results are in the
comparison's folder. The same command again resumes: finished runs are not repeated, and a run that was stopped resumes
from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_cl.cli.methods import Method, read_methods
from lightning_cl.cli.processes import new_file, report_of, run_process, told_folders, wait_for, why_not, write_json
from lightning_cl.cli.seeds import PERMUTE, SettingsOf, parse_seeds, seed_options, task_orders
from lightning_cl.cli.task_order import all_names, trained_names
from lightning_cl.cli.trust import foreign_code
from lightning_cl.cli.yaml_files import read_yaml
from lightning_cl.core.checkpoint_io import find_last_checkpoint
from lightning_cl.evaluation.comparison import compare_methods, compared_run, comparison_markdown, format_comparison
from lightning_cl.evaluation.scatter import draw_comparison
from lightning_cl.files import replace_file

_STOPPED = (130, 143, -2, -15)  # by Ctrl-C or a request to end: not the run's own failure
_EXAMPLE = """example:
  lightning-cl compare --config configs/quickstart.yaml --methods configs/methods/replay.yaml,configs/methods/ewc.yaml

--config is needed. All other options are those of `lightning-cl fit`, and go to every run, except --run, --ckpt_path,
--add, --against, --first and --print_config. The same command again resumes a comparison that was stopped."""


def run_compare(arguments: Sequence[str], settings_of: SettingsOf) -> int | None:
    """Compares methods.

    Args:
        arguments: the command line.
        settings_of: gives the settings of a ``fit`` command line.

    Returns:
        the exit code; None if the command is another one.

    Raises:
        ValueError: for methods, strengths or options that cannot be, before any run.
    """
    if list(arguments[:1]) != ["compare"]:
        return None
    asked, rest = _parser().parse_known_args(list(arguments[1:]))
    _check_options(rest, asked)
    seeds: list[int | None] = [*parse_seeds(asked.seeds)] if asked.seeds else [None]
    methods = read_methods(asked.methods, asked.strengths or [], ["fit", *rest], settings_of)
    orders = task_orders(methods[0].settings, [s for s in seeds if s is not None]) if asked.permute_tasks else None
    plan = [
        (method, seed, orders[seed] if orders and seed is not None else None) for seed in seeds for method in methods
    ]
    keys = [method.key(seed, order) for method, seed, order in plan]
    folder = asked.into or _folder(methods[0].settings, keys)
    state: dict[str, Any] = {
        "format": 1,
        "complete": False,
        "command": shlex.join(["lightning-cl", *arguments]),
        "seeds": seeds,
        "orders": {str(seed): order for seed, order in orders.items()} if orders else None,
        "plan": keys,
        "failed": [],
    }
    names = ", ".join(method.name for method in methods)
    print(f"\n  {len(plan)} runs of {len(methods)} methods ({names}); results in {folder}", flush=True)
    runs: list[dict[str, Any]] = []
    for number, ((method, seed, order), key) in enumerate(zip(plan, keys, strict=True), start=1):
        words = method.name if seed is None else f"{method.name}, seed {seed}"
        print(f"\n  {words}: run {number} of {len(plan)}", flush=True)
        code, found = _run(method, seed, order, folder / "runs" / f"{key}.txt", words)
        if found is not None:
            runs.append({"method": method.name, "seed": seed, "key": key, "folder": str(found[0]), **found[1]})
        else:
            state["failed"].append({"method": method.name, "seed": seed, "exit_code": code})
        if code in _STOPPED:
            break
        if code != 0 and not runs:
            break  # the first run of all: the others would fail as well
        _write(folder, state, methods, runs)
    else:
        state["complete"] = not state["failed"]
        table = _write(folder, state, methods, runs)
        print(f"{format_comparison(table)}\n\n  {folder}: compare.json, compare.md, compare.png", flush=True)
    if state["complete"]:
        return 0
    last = state["failed"][-1]
    words = "stopped" if last["exit_code"] in _STOPPED else "not all runs are finished"
    print(
        f"lightning-cl: error: {words} ({last['method']} ended with code {last['exit_code']}); the same command again"
        f" resumes it, with the {len(runs)} finished runs of {folder}",
        file=sys.stderr,
    )
    result: int = last["exit_code"]
    return result if result > 0 else 128 - result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-cl compare",
        description="Runs a configuration plain and with each of several methods, and compares them.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods",
        metavar="YAML,…",
        action="append",
        required=True,
        help="overlays, each a method; its name is that of the file, or name=path. May be repeated.",
    )
    parser.add_argument(
        "--strengths",
        metavar="S,S,…",
        action="append",
        help="each method once with each strength; METHOD=S,S,… for one method, METHOD:CALLBACK=S,S,… for one of its"
        " callbacks. May be repeated.",
    )
    parser.add_argument(
        "--seeds",
        metavar="N|S,S,…",
        help="each method once with each seed; the same seeds make pairs. Intervals from 3 on.",
    )
    parser.add_argument(PERMUTE, action="store_true", help="each seed has an order of the tasks, for all methods alike")
    parser.add_argument(
        "--into",
        metavar="FOLDER",
        type=Path,
        help="folder of the results; its finished runs are used. Default: compare-<number> next to the runs.",
    )
    return parser


def _check_options(rest: Sequence[str], asked: argparse.Namespace) -> None:
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise ValueError("compare starts a process for each run itself; not under torchrun")
    names = {argument.split("=")[0] for argument in rest}
    if "--config" not in names:
        raise ValueError("compare: a configuration is missing, as in --config configs/quickstart.yaml")
    for option in ("--run", "--ckpt_path", "--add"):
        if option in names:
            raise ValueError(f"compare and {option}: {why_not(option, 'method')}; leave {option} out")
    for option in ("--against", "--first", "--print_config"):
        if option in names:
            raise ValueError(f"compare: {option} is for `fit` alone; leave it out")
    for option in ("--seed_everything", "--data.seed"):
        if option in names and asked.seeds:
            raise ValueError(f"--seeds and {option}: --seeds sets it for each run; give one of the two")
    if asked.permute_tasks and not asked.seeds:
        raise ValueError(f"{PERMUTE}: gives each seed an order of the tasks; give seeds, as in --seeds 3")


def _folder(settings: dict[str, Any], keys: Sequence[str]) -> Path:
    """The latest ``compare-<k>`` next to the runs if it is of the same runs; else a new one."""
    logger = settings["trainer"].get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    given = (logger.get("init_args") or {}) if isinstance(logger, dict) else {}
    root = Path(given.get("save_dir") or settings["trainer"].get("default_root_dir") or ".") / (given.get("name") or "")
    numbers = sorted(int(path.name[8:]) for path in root.glob("compare-*") if path.name[8:].isdigit())
    if numbers:
        latest = root / f"compare-{numbers[-1]}"
        with suppress(OSError, ValueError, KeyError):
            if json.loads((latest / "plan.json").read_text(encoding="utf-8"))["plan"] == list(keys):
                return latest
    folder = new_file(root, "compare").parent
    write_json(folder / "plan.json", {"plan": list(keys)})
    return folder


def _run(
    method: Method, seed: int | None, order: list[str] | None, told: Path, words: str
) -> tuple[int, tuple[Path, dict[str, Any]] | None]:
    """One run to its end, from where it was left: its exit code, its folder and its result."""
    tasks = all_names(method.settings["data"]["tasks"])
    trained = len(trained_names(method.settings["data"]["tasks"]))
    told.parent.mkdir(parents=True, exist_ok=True)
    wait_for(told, words)
    earlier = list(reversed(told_folders(told)))
    for folder in earlier:
        found = _finished(folder, tasks, trained)
        if found is not None:
            print(f"  finished before: {folder}", flush=True)
            return 0, (folder, found)
    start = next((folder for folder in earlier if _has_checkpoint(folder)), None)
    if start is not None:
        print(f"  resumes {start}", flush=True)
        # Its saved configuration has the strength, the seed and the order. The user's own command has agreed to the
        # code that it names, and to no other.
        saved = read_yaml(start / "config.yaml", "compare")
        agreed = set(foreign_code(saved)) <= set(foreign_code(method.settings))
        arguments = ["fit", "--run", str(start), *(["--trust"] if agreed else [])]
        code, now = run_process(arguments, os.environ.copy(), "compare", told=told, resumes=True)
    else:
        arguments = [*method.arguments, *(seed_options(seed) if seed is not None else [])]
        trial = {**(method.trial or {}), **({"order": order} if order else {})}
        code, now = run_process(arguments, os.environ.copy(), "compare", trial, told)
    if code != 0:
        return code, None
    report = report_of(now, "compare", words)
    assert now is not None
    return 0, (now, compared_run(report))


def _finished(folder: Path, tasks: Sequence[str], trained: int) -> dict[str, Any] | None:
    """The result of a run that has measured all tasks after the last one; None for another."""
    with suppress(OSError, ValueError, KeyError):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        if len(report["matrix"]) == trained + 1 and sorted(report["tasks"]) == sorted(tasks):
            return compared_run(report)
    return None


def _has_checkpoint(folder: Path) -> bool:
    try:
        find_last_checkpoint(folder)
    except (FileNotFoundError, ValueError):
        return False
    return (folder / "config.yaml").is_file()


def _write(
    folder: Path, state: dict[str, Any], methods: Sequence[Method], runs: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Writes the table, the Markdown and the picture of what is finished, each whole or not at all."""
    about = [
        {
            "name": method.name,
            "family": method.family,
            "overlay": method.overlay,
            "strength": method.trial["strength"] if method.trial else None,
        }
        for method in methods
    ]
    compared = compare_methods(about, runs)
    common = compared.keys() - {"tasks"}
    own = [{key: value for key, value in run.items() if key not in common} for run in runs]
    table = {**state, **compared, "runs": own}
    write_json(folder / "compare.json", table)
    if runs:
        text = comparison_markdown(table)
        replace_file(folder / "compare.md", lambda path: path.write_text(text, encoding="utf-8"))
        draw_comparison(table, folder / "compare.png")
    return table
