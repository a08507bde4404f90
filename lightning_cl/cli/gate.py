"""``lightning-cl gate``: a verdict on a run's budget of forgetting, with an exit code for scripts and CI."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cl.evaluation.gate import gate_markdown, gate_text, judge
from lightning_cl.functional.guard import check_budget, check_confidence

_DESCRIPTION = """Tells if a run has kept a budget of forgetting, from the losses of single sequences that
ForgettingBudget wrote into its folder (losses.json) and from its report.json. Exit code: 0 the budget is kept, 2 it is
exceeded, 3 there is not enough evidence, 1 for a wrong call."""


def run_gate(arguments: Sequence[str]) -> int | None:
    """Judges a run.

    Args:
        arguments: the command line.

    Returns:
        the exit code; None if the command is another one.

    Raises:
        ValueError: if an argument or a file is wrong.
        FileNotFoundError: if there is no such run.
    """
    if list(arguments[:1]) != ["gate"]:
        return None
    parser = argparse.ArgumentParser("lightning-cl gate", description=_DESCRIPTION)
    parser.error = _refuse  # type: ignore[method-assign]  # argparse's own exit code is the one of an exceeded budget
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument(
        "--budget",
        type=float,
        help="the share to keep (default: 0.9); with --unit nats the rise to allow, which must be given. The budget of"
        " the run's own guard is not read",
    )
    parser.add_argument(
        "--unit",
        choices=("retained", "nats"),
        default="retained",
        help="retained: a share of what training gave (a watched task: its loss may rise by 1 - budget of itself);"
        " nats: a rise of the loss; default: retained",
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="the confidence of the verdict; default: 0.95")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown, for a pull request")
    given = parser.parse_args(list(arguments[1:]))
    budget = check_budget("--budget", given.budget, given.unit)
    check_confidence("--confidence", given.confidence)
    report = _read(given.run / "report.json")
    if report is None:
        raise FileNotFoundError(f"--run={given.run}: there is no report.json; TaskMatrix writes it after every task")
    found = judge(report, _read(given.run / "losses.json"), budget, given.unit, given.confidence)
    if given.json:
        print(json.dumps({"run": str(given.run), **found}, indent=2))
    else:
        print(gate_markdown(found) if given.markdown else gate_text(found), end="")
    code: int = found["code"]
    return code


def _refuse(message: str) -> Any:
    raise ValueError(f"gate: {message}")


def _read(path: Path) -> Any:
    """Returns a file's content; None if there is no such file.

    Raises:
        ValueError: if it is no JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: it is damaged ({error})") from error
