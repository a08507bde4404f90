"""Folders that are whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from lightning_cl.files import naming_file


def replace_folder(folder: Path, write: Callable[[Path], object], mark: str | None) -> Path:
    """Writes a folder under a temporary name and renames it, so that a killed writer never leaves half of it.

    Args:
        folder: the folder. One that is there is replaced, if it is empty or has the file `mark`.
        write: fills the empty folder that it is given, and checks what it has written.
        mark: a file that every folder of this kind has, and no other; None: only an empty folder is replaced.

    Returns:
        the folder.

    Raises:
        ValueError: if another folder of that name is there.
        OSError: naming the folder and the cause.
    """
    ours = mark is not None and (folder / mark).is_file()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not ours):
        raise ValueError(f"{str(folder)!r}: there are other files already; give a new folder")
    _remove_abandoned(folder)
    temporary, old = (folder.with_name(f".{os.getpid()}.{folder.name}{end}") for end in ("", ".old"))
    with naming_file(folder):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            if folder.is_dir():
                folder.rename(old)
            temporary.rename(folder)
        finally:
            if old.is_dir() and not folder.is_dir():
                old.rename(folder)
            for each in (temporary, old):
                shutil.rmtree(each, ignore_errors=True)
    return folder


def _remove_abandoned(folder: Path) -> None:
    """Removes what a killed process has left of this folder; a folder that it had moved away gets its name back."""
    for path in folder.parent.glob(f".*.{folder.name}*"):
        found = re.fullmatch(rf"\.(\d+)\.{re.escape(folder.name)}(\.old)?", path.name)
        if found is None or _runs(int(found[1])):
            continue
        if found[2] and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
