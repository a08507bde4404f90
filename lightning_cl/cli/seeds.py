"""``--seeds 3``: one command for several seeds, and what may be said of a method over all of them.

A single run says little about a method: the spread between seeds is often as large as the difference between two
methods. Each seed is a process of its own, so that any strategy works, with ``--seed_everything`` (weights, dropout)
and ``--data.seed`` (order of the samples, validation split). The same seeds for two methods are *paired*: both saw the
same weights, order and split, so that the differences of pairs vary less than the results do (``--against``).

The numbers are made in :mod:`lightning_cl.evaluation.seeds`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_cl.cli.parser import take_flag, take_option
from lightning_cl.cli.processes import new_file, report_of, run_process, start, why_not, write_json
from lightning_cl.cli.task_order import order_for, trained_names
from lightning_cl.data.measured_on import difference
from lightning_cl.evaluation.seeds import format_seeds, paired_rows, run_result, summarize

SettingsOf = Callable[[Sequence[str]], dict[str, Any]]
"""Gives the settings of a ``fit`` command line as the run would have them."""

PERMUTE = "--permute-tasks"


def run_seeds(arguments: Sequence[str], settings_of: SettingsOf) -> int | None:
    """Runs a command once for each of its ``--seeds``, and reports over them.

    Args:
        arguments: the command line.
        settings_of: gives the settings of a command line.

    Returns:
        the exit code; None if the command line asks for a single run.

    Raises:
        ValueError: for seeds or options that do not go together.
    """
    given, rest = take_option(arguments, "--seeds 3")
    against, rest = take_option(rest, "--against runs/quickstart/seeds-0/seeds.json")
    permute, rest = take_flag(rest, PERMUTE)
    if not given:
        if permute:
            raise ValueError(f"{PERMUTE}: gives each seed an order of the tasks; give seeds, as in --seeds 3")
        if against:
            raise ValueError(f"--against={against[0]}: compares seeds in pairs; give the same seeds, as in --seeds 3")
        return None
    seeds = parse_seeds(given[-1])
    _check_options(rest)
    if {"-h", "--help"} & set(rest) or any(argument.split("=")[0] == "--print_config" for argument in rest):
        return start(rest, os.environ.copy())
    other = read_seeds(against[-1], seeds) if against else None
    orders = task_orders(settings_of(rest), seeds) if permute else None
    runs: list[dict[str, Any]] = []
    failed: dict[str, Any] | None = None
    path: Path | None = None
    for number, seed in enumerate(seeds, start=1):
        print(f"\n  seed {seed}, run {number} of {len(seeds)}", flush=True)
        code, folder = _run(rest, seed, orders[seed] if orders else None)
        if code != 0:
            failed = {"seed": seed, "exit_code": code, "folder": str(folder) if folder else None}
        else:
            runs.append(_result(seed, folder))
            path = path or new_file(Path(runs[0]["folder"]).parent, "seeds")
        if path is not None:
            table = summarize(runs, list(arguments), seeds, failed, orders)
            write_json(path, table)
        if failed is not None:
            break
        if other is not None and number == 1:
            _check_pair(table, other, against[-1])
    if path is not None:
        if other is not None and failed is None:
            table["against"] = {"path": against[-1], "rows": paired_rows(table["runs"], other["runs"])}
            write_json(path, table)
        print(format_seeds(table, path), flush=True)
    if failed is None:
        return 0
    kept = f"{path} has the {len(runs)} finished" if runs else "none is finished"
    print(f"lightning-cl: error: seed {failed['seed']} ended with code {failed['exit_code']}; {kept}", file=sys.stderr)
    code = failed["exit_code"]
    result: int | None = code if code > 0 else 128 - code  # as a shell says that a signal ended it
    return result


# ---------------------------------------------------------------------- the command line


def parse_seeds(text: str) -> list[int]:
    """Seeds from ``3`` (these are 0, 1, 2) or ``0,5,7``.

    Raises:
        ValueError: if they are no seeds, fewer than two, or one of them twice.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds={text}: expected a number of seeds, as in 3, or seeds, as in 0,5,7") from None
    seeds = list(range(numbers[0])) if len(numbers) == 1 else numbers
    if len(seeds) < 2:
        raise ValueError(f"--seeds={text}: a spread needs at least 2 seeds; for a single run: --seed_everything")
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"--seeds={text}: expected different seeds from 0 to 2**32 - 1")
    return seeds


def _check_options(arguments: Sequence[str]) -> None:
    if "fit" not in arguments:
        raise ValueError("--seeds: only with `fit`, which trains; a checkpoint has the seed that it was trained with")
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise ValueError("--seeds starts a process for each seed itself; under torchrun give each --seed_everything")
    names = {argument.split("=")[0] for argument in arguments}
    for option in ("--run", "--ckpt_path"):
        if option in names:
            raise ValueError(f"--seeds and {option}: {why_not(option)}; give one of the two")
    for option in ("--seed_everything", "--data.seed"):
        if option in names:
            raise ValueError(f"--seeds and {option}: --seeds sets it for each run; give one of the two")


def read_seeds(path: str | Path, seeds: Sequence[int]) -> dict[str, Any]:
    """The ``seeds.json`` of another method.

    Args:
        path: the file, or its folder.
        seeds: those that it must have.

    Raises:
        FileNotFoundError, ValueError: if it is not there, not whole, or of other seeds.
    """
    file = Path(path) / "seeds.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--against={path}: no such file; give the seeds.json that --seeds wrote for a method")
    try:
        other = json.loads(file.read_text(encoding="utf-8"))
        theirs, complete, runs = other["seeds"], other["complete"], other["runs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--against={path}: it is not a seeds.json ({type(error).__name__}: {error})") from error
    if not complete:
        raise ValueError(f"--against={path}: only {len(runs)} of its {len(theirs)} seeds are finished; run it again")
    if sorted(theirs) != sorted(seeds):
        raise ValueError(
            f"--against={path}: its seeds are {','.join(map(str, theirs))}, these are {','.join(map(str, seeds))}; only"
            f" runs of the same seed make a pair: --seeds {','.join(map(str, theirs))}"
        )
    result: dict[str, Any] = other
    return result


def _check_pair(table: dict[str, Any], other: dict[str, Any], path: str) -> None:
    for key in ("tasks", "watched", "monitor", "mode", "orders"):
        if table[key] != other.get(key):
            raise ValueError(
                f"--against={path}: its {key} is {other.get(key)}, of these runs {table[key]}: there is nothing to"
                " compare in pairs; give the same data and the same TaskMatrix to both methods"
            )
    theirs = {run["seed"]: run.get("measured_on", {}) for run in other["runs"]}
    for run in table["runs"]:
        for task, now in run.get("measured_on", {}).items():
            then = theirs.get(run["seed"], {}).get(task)
            what = difference(then, now) if then is not None else None
            if what is not None:
                raise ValueError(
                    f"--against={path}: task {task!r} of seed {run['seed']} was measured on other data there; it"
                    f" differs in {what}; give the same data and settings to both methods"
                )


# ---------------------------------------------------------------------- one run


def _run(arguments: Sequence[str], seed: int, order: list[str] | None) -> tuple[int, Path | None]:
    """One seed, as a process: its exit code and its folder, if it came that far."""
    trial = {"order": order} if order else None
    return run_process([*arguments, *seed_options(seed)], os.environ.copy(), "--seeds", trial)


def seed_options(seed: int) -> list[str]:
    """The options that set a run's seed: of weights and dropout, and of the data's order and split."""
    return [f"--seed_everything={seed}", f"--data.seed={seed}"]


def task_orders(settings: dict[str, Any], seeds: Sequence[int]) -> dict[int, list[str]]:
    """For each seed the order of the tasks, which is printed.

    Raises:
        ValueError: if there is one task alone.
    """
    names = trained_names(settings["data"]["tasks"])
    if len(names) < 2:
        raise ValueError(f"{PERMUTE}: there is one task, {', '.join(names)}, and so one order")
    orders = {seed: order_for(names, seed) for seed in seeds}
    print("\n" + "\n".join(f"  seed {seed}: {', '.join(order)}" for seed, order in orders.items()), flush=True)
    return orders


def _result(seed: int, folder: Path | None) -> dict[str, Any]:
    report = report_of(folder, "--seeds", f"seed {seed}")
    return {"seed": seed, "folder": str(folder), **run_result(report)}
