"""Files of a run: allows one run in a folder at a time, and deletes checkpoints that the user does not keep."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.arguments import is_integer

if sys.platform != "win32":
    import fcntl


_LOCK = ".run.lock"
_PICTURES = ("matrix.png", "curves.png", "importance.png")
_REPORTS = ("report.json", "report.html", "losses.json", "matrix.csv", "matrix_*.csv", *_PICTURES, "predictions.jsonl")
_OF_A_START = ("config.yaml", "hparams.yaml", "metrics.csv")  # files that exist before the first step


def boundaries_to_keep(keep_checkpoints: str | int) -> int | None:
    """The number of boundary checkpoints that stay when a run has ended; None for all.

    Args:
        keep_checkpoints: ``all``, ``last``, ``none`` or a number.

    Raises:
        ValueError: if it is something else.
    """
    known = {"all": None, "last": 1, "none": 0}
    if isinstance(keep_checkpoints, str) and keep_checkpoints.isdigit():
        keep_checkpoints = int(keep_checkpoints)
    if is_integer(keep_checkpoints, 0):
        return keep_checkpoints
    if isinstance(keep_checkpoints, str) and keep_checkpoints in known:
        return known[keep_checkpoints]
    raise ValueError(
        f"keep_checkpoints={keep_checkpoints!r}: expected 'all', 'last', 'none' or a number of tasks whose checkpoints"
        " stay, as in 3"
    )


def drop_checkpoints(keep: int | None, tasks: Sequence[str], folder: Path, inside: Sequence[Path], final: bool) -> None:
    """Deletes the checkpoints of earlier tasks; to be called when the last task's boundary checkpoint is written.

    Args:
        keep: the result of :func:`boundaries_to_keep`. The last checkpoint is deleted only if `final`, since a killed
            run needs it to resume.
        tasks: ``<index>-<name>`` of the tasks that are done.
        folder: the folder of the boundary checkpoints.
        inside: the folders in which ``ModelCheckpoint`` makes a folder for each task.
        final: True if there is no further task.
    """
    if keep is None:
        return
    for name in tasks[: len(tasks) - max(keep, 1)]:
        for base in inside:
            for path in (base / name).glob("*.ckpt"):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                (base / name).rmdir()  # unless other files are in it
    for name in tasks[: len(tasks) - (keep if final else max(keep, 1))]:
        (folder / f"{name}.ckpt").unlink(missing_ok=True)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Locks a folder for one run, until the block ends; the lock of a killed process ends too.

    Raises:
        RuntimeError: if another run has locked the folder.
    """
    if sys.platform == "win32":
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RuntimeError(
                f"default_root_dir={str(folder)!r}: another run, which has no logger either, is writing into this"
                " folder; give this one a logger, or another default_root_dir"
            ) from error
        except OSError:  # a file system without locks
            break
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:
                break
        os.close(descriptor)  # the other run has just ended, and has deleted the lock file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def set_aside(folder: Path) -> None:
    """Moves checkpoints and reports of an earlier run in this folder to ``tasks-v1`` (``-v2``, …), and warns of it."""
    tasks = folder / "tasks"
    reports = [path for name in _REPORTS for path in sorted(folder.glob(name)) if path.is_file()]
    if not reports and not (tasks.is_dir() and any(tasks.iterdir())):
        return
    aside = next(path for v in itertools.count(1) if not (path := folder / f"tasks-v{v}").exists())
    if tasks.is_dir():
        tasks.rename(aside)
    aside.mkdir(exist_ok=True)
    for path in reports:
        path.rename(aside / path.name)
    rank_zero_warn(
        f"{folder}: an earlier run has written here; its boundary checkpoints and reports are in {aside.name} now. A"
        " logger, or another default_root_dir, gives each run a folder of its own"
    )


def first_missing(folder: Path) -> Path | None:
    """The outermost missing folder, which is made when `folder` is made; None if `folder` exists."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    return missing[-1] if missing else None


def forget_start(made: Path, folder: Path) -> None:
    """Deletes the folder of a run that failed before its first step.

    Args:
        made: the outermost folder that the run has made.
        folder: the run's folder.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    if all(path.name in _OF_A_START or path.name.startswith("events.out.tfevents") for path in files):
        shutil.rmtree(folder, ignore_errors=True)
        for path in (folder, *folder.parents):
            if path != folder:
                with suppress(OSError):
                    path.rmdir()
            if path == made:
                return
