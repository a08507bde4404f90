"""One run as a process: what a command of several runs starts, how the run tells its folder, and where tables go."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from lightning_cl.files import replace_file

if sys.platform != "win32":
    import fcntl

_FOLDER_FILE = "LIGHTNING_CL_RUN_FOLDER_FILE"
_ASKED_BY = "LIGHTNING_CL_ASKED_BY"
_RESUMES = "LIGHTNING_CL_RESUMES"
_TRIAL = "LIGHTNING_CL_TRIAL"
_INTERRUPTED = 130  # the exit code that a shell gives for Ctrl-C
_WAIT = 20.0  # seconds that an interrupted run has to end by itself
_held: list[IO[str]] = []  # the file with the run's folder: open and locked until the run's process ends


def run_process(
    arguments: Sequence[str],
    environment: dict[str, str],
    asked_by: str,
    trial: dict[str, Any] | None = None,
    told: Path | None = None,
    resumes: bool = False,
) -> tuple[int, Path | None]:
    """One run as a process: its exit code and its folder, if it came that far.

    Args:
        arguments: of ``lightning-cl``.
        environment: of the process.
        asked_by: the option or command that starts several runs, for the run's messages.
        trial: what is asked of the run beyond its command line, see :func:`asked_trial`.
        told: the file to which the run adds the name of its folder; a temporary one by default.
        resumes: True if the run is to resume from a checkpoint of an earlier start.
    """
    environment = {**environment, _ASKED_BY: asked_by}
    if trial:
        environment[_TRIAL] = json.dumps(trial)
    if resumes:
        environment[_RESUMES] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        file = told or Path(scratch) / "folder"
        before = len(told_folders(file))
        code = start(arguments, {**environment, _FOLDER_FILE: str(file)})
        folders = told_folders(file)[before:]
        return code, folders[-1] if folders else None


def told_folders(file: Path) -> list[Path]:
    """The folders that the starts of a run have told, the newest last."""
    return [Path(line) for line in file.read_text(encoding="utf-8").splitlines() if line] if file.exists() else []


def wait_for(told: Path, words: str) -> None:
    """Waits for a run that still writes: its starter was killed, and it was not.

    Args:
        told: the file to which the run has told its folder.
        words: the name of the run, for the message.
    """
    if sys.platform == "win32" or not told.exists():
        return
    with told.open(encoding="utf-8") as file, contextlib.suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"  {words} is still running, from an earlier start: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)


def asked_trial() -> dict[str, Any] | None:
    """Returns what the command that started this run asks of it; None if none did.

    ``strength`` of the callback ``method``, the ``first`` tasks alone, the ``order`` of the tasks: each may be missing.
    """
    text = os.environ.get(_TRIAL)
    return json.loads(text) if text else None


def start(arguments: Sequence[str], environment: dict[str, str]) -> int:
    """Starts ``lightning-cl`` as a process and waits for it.

    Returns:
        its exit code; 130 after Ctrl-C.
    """
    process = subprocess.Popen([sys.executable, "-m", "lightning_cl", *arguments], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches the run, too; it is given the time to end in good order.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(_WAIT)
        return _INTERRUPTED
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def tell_folder(folder: Path, own: bool, ckpt_path: str | None) -> None:
    """Tells the command that started this run, if one of several runs did, where its files are.

    Args:
        folder: the run's folder.
        own: True if no other run writes there.
        ckpt_path: what the run resumes from.

    Raises:
        ValueError: if the run is none that can be one of several.
    """
    file = os.environ.get(_FOLDER_FILE)
    if file is None:
        return
    option = os.environ.get(_ASKED_BY, "--seeds")
    each = "method" if option == "compare" else option.removeprefix("--").removesuffix("s")
    if not own:
        raise ValueError(
            f"{option}: each {each} needs a run folder of its own, and all of them would write to {folder}: give"
            " trainer.logger, a CSVLogger or TensorBoardLogger (the first, if there are several) without `version`, and"
            " no fast_dev_run"
        )
    if ckpt_path is not None and not os.environ.get(_RESUMES):
        raise ValueError(f"{option}: {why_not('ckpt_path', each)}; leave ckpt_path={str(ckpt_path)!r} out")
    told = Path(file).open("a", encoding="utf-8")  # noqa: SIM115
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(told, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _held.append(told)
    told.write(f"{folder.absolute()}\n")
    told.flush()


def why_not(option: str, each: str = "seed") -> str:
    """Says why an option does not go with several runs."""
    return f"each {each} is a whole run from its start, and after {option} all of them would share one beginning"


def report_of(folder: Path | None, option: str, run: str) -> dict[str, Any]:
    """Returns a finished run's report.

    Raises:
        ValueError: if it left none.
    """
    report_file = folder / "report.json" if folder is not None else None
    if report_file is None or not report_file.is_file():
        raise ValueError(
            f"{option}: {run} left no report.json in {folder}; add lightning_cl.TaskMatrix to trainer.callbacks"
        )
    result: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    return result


def new_file(beside: Path, name: str) -> Path:
    """``<name>.json`` in the first folder ``<name>-<k>`` that is not there yet."""
    number = 0
    while True:
        folder = beside / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder / f"{name}.json"
        except FileExistsError:
            number += 1


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Writes a file whole or not at all."""
    content = json.dumps(table, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
