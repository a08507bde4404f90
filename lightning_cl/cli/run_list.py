"""``lightning-cl runs``: what is in the runs below a folder, which runs need files of others, and how one is forgotten.

A run that resumes from another one's checkpoint (``--add``, or a resume with a folder of its own) has its own weights
and importances. The samples of a buffer on disk stay where they were written: they are needed there.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_cl.cli.yaml_files import read_yaml
from lightning_cl.core.checkpoint_io import read_checkpoint

_OF_A_RUN = re.compile(
    r"tasks(-v\d+)?|checkpoints|buffers|model|export|guard|(config|hparams)\.yaml|metrics\.csv|(report|losses)\.json"
    r"|report\.html|matrix(_\w+)?\.csv|(matrix|curves|importance)\.png|predictions\.jsonl|samples\.(jsonl|md)"
    r"|events\.out\.tfevents\..*|\.run\.lock"
)


@dataclass
class Run:
    """A run's folder.

    Args:
        folder: absolute.
        tasks: how many tasks are trained.
        size: bytes of its files.
        needs: folders in other runs that it reads from.
        unread: its checkpoints that could not be read.
    """

    folder: Path
    tasks: int
    size: int
    needs: set[Path] = field(default_factory=set)
    unread: list[Path] = field(default_factory=list)


def run_list(arguments: Sequence[str]) -> int | None:
    """Lists runs, or forgets one.

    Args:
        arguments: the command line.

    Returns:
        the exit code; None if the command is another one.

    Raises:
        ValueError: if a run cannot be forgotten; the message says who needs it.
        FileNotFoundError: if there is no run.
    """
    if list(arguments[:1]) != ["runs"]:
        return None
    parser = argparse.ArgumentParser("lightning-cl runs", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to look; default: runs, or next to a run to forget")
    parser.add_argument("--forget", metavar="RUN", type=Path, help="delete a run's files, if no other run needs them")
    given = parser.parse_args(list(arguments[1:]))
    if given.forget is not None:
        _forget(given.forget, given.folder)
        return 0
    folder = given.folder or Path("runs")
    runs = find_runs(folder)
    if not runs:
        raise FileNotFoundError(f"{folder}: there is no run below this folder")
    print("\n".join(_table(runs)))
    return 0


def find_runs(folder: Path) -> list[Run]:
    """All runs below a folder, with what they need."""
    marks = [*folder.rglob("config.yaml"), *folder.rglob("tasks/*.ckpt")]
    found = {(mark.parent.parent if mark.suffix == ".ckpt" else mark.parent).resolve() for mark in marks}
    return [_read(path, found) for path in sorted(found)]


def _read(folder: Path, all_runs: set[Path]) -> Run:
    files = [path for path in folder.rglob("*") if path.is_file()]
    done = [
        int(match[1]) + 1 for path in (folder / "tasks").glob("*.ckpt") if (match := re.match(r"(\d+)-", path.name))
    ]
    run = Run(folder, max(done, default=0), sum(path.stat().st_size for path in files))
    read_from: list[Path] = []
    for path in files:
        if path.suffix == ".ckpt":
            try:
                read_from += map(Path, _segments(read_checkpoint(path).get("lightning_cl")))
            except (ValueError, OSError, AttributeError):
                run.unread.append(path)
        elif path.name == "live.json":
            with suppress(ValueError, AttributeError):
                read_from += map(Path, json.loads(path.read_bytes()))
    if (folder / "config.yaml").is_file():
        with suppress(ValueError):
            read_from += map(Path, _texts(read_yaml(folder / "config.yaml", "runs")))
    others = all_runs - {folder}
    for path in {path.absolute() for path in read_from if path.exists()}:
        resolved = path.resolve()
        # The innermost run: one without a logger may have others inside.
        owner = next((above for above in (resolved, *resolved.parents) if above in all_runs), None)
        if owner in others and owner not in folder.parents:
            run.needs.add(resolved)
    return run


def _segments(state: Any) -> Iterator[str]:
    """The folders of the segments that a checkpoint's buffers lie in."""
    if isinstance(state, dict):
        if state.get("kind") == "disk" and "segments" in state:
            yield from state["segments"]
        for part in state.values():
            yield from _segments(part)
    elif isinstance(state, list):
        for part in state:
            yield from _segments(part)


def _texts(value: Any, key: str = "") -> Iterator[str]:
    """The strings of a configuration that may be paths; not where the run began, which it needs no more."""
    if isinstance(value, dict):
        for name, part in value.items():
            if name not in ("ckpt_path", "default_root_dir", "save_dir", "logger"):
                yield from _texts(part, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part, key)
    elif isinstance(value, str) and "/" in value and len(value) < 1000 and "\0" not in value:
        yield value


def _owner(path: Path, runs: Sequence[Run]) -> Path:
    folders = {run.folder for run in runs}
    return next(above for above in (path, *path.parents) if above in folders)


def _table(runs: Sequence[Run]) -> list[str]:
    rows = [("run", "tasks", "MB", "needs")]
    for run in runs:
        needs = sorted({_shown(_owner(path, runs)) for path in run.needs})
        rows.append((_shown(run.folder), str(run.tasks), f"{run.size / 1e6:.1f}", ", ".join(needs) or "nothing"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        f"  {run:<{widths[0]}}  {tasks:>{widths[1]}}  {size:>{widths[2]}}  {needs}" for run, tasks, size, needs in rows
    ]
    return lines + [
        f"  {_shown(path)} cannot be read; what it needs is not known" for run in runs for path in run.unread
    ]


def _forget(folder: Path, around: Path | None) -> None:
    resolved = folder.resolve()
    # Runs of one name lie next to each other, and those of other names one folder above.
    root = around or (resolved.parent.parent if re.fullmatch(r"version_\d+", resolved.name) else resolved.parent)
    runs = find_runs(root)
    if resolved not in {run.folder for run in runs}:
        raise FileNotFoundError(f"--forget={folder}: this is no run: there is no config.yaml and no tasks/*.ckpt in it")
    for run in runs:
        if run.folder == resolved:
            continue
        needed = sorted(_shown(path) for path in run.needs if resolved in (path, *path.parents))
        if needed:
            raise ValueError(
                f"--forget={folder}: {_shown(run.folder)} needs {', '.join(needed)}; forget that run first"
            )
        if run.unread:
            raise ValueError(
                f"--forget={folder}: {_shown(run.unread[0])} cannot be read, so that what {_shown(run.folder)} needs is"
                " not known; remove that file first"
            )
    freed = next(run.size for run in runs if run.folder == resolved)
    for path in list(resolved.iterdir()):
        if _OF_A_RUN.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    left = sorted(path.name for path in resolved.iterdir())
    if left:
        freed -= sum(path.stat().st_size for path in resolved.rglob("*") if path.is_file())
        print(f"  {folder}: not of a run, and left there: {', '.join(left)}")
    else:
        resolved.rmdir()
    print(f"  {folder}: forgotten, {freed / 1e6:.1f} MB; no other run below {_shown(root.resolve())} needs it")


def _shown(path: Path) -> str:
    """Relative to the working directory, where it is below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
