"""Files that are whole or not there, and stay; what a killed writer leaves is found and removed."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows: nothing is removed there
    fcntl = None  # type: ignore[assignment]

_OLD = 3600.0  # seconds after which nobody still writes a file that is not locked


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name and renames it, so that a killed writer never leaves half of it.

    The folder is made if it is missing. The file gets the usual permissions, since others may share the folder.

    Args:
        path: the file.
        write: writes its content to the path that it is given.

    Raises:
        OSError: naming the file and the cause.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with naming_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Makes errors of the operating system say which file could not be written, and why.

    Writers of archives wrap the file's error in one of their own; the original is found in it.

    Raises:
        OSError: naming the file, the cause, and how many bytes are free on its disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None or cause.errno is None:
            raise
        left = ""
        with suppress(OSError):
            above = next(folder for folder in path.absolute().parents if folder.exists())
            left = f" ({shutil.disk_usage(above).free:,} bytes are free on its disk)"
        raise OSError(cause.errno, f"{path}: cannot be written: {cause.strerror}{left}") from error


@contextmanager
def locked_for_writing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file and locks it until the process ends, so that :func:`remove_abandoned` does not delete it."""
    while True:
        with open(path, "wb") as file:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not path.exists():
                    continue  # removed in the moment before the lock
            yield file
            return


def remove_abandoned(folder: Path, pattern: str) -> int:
    """Removes temporary files in a folder if the process that wrote them has ended.

    Args:
        folder: the folder to search, with all its subfolders.
        pattern: the pattern of the names.

    Returns:
        the bytes that were freed.
    """
    freed = 0
    for path in folder.rglob(pattern) if fcntl is not None else ():
        with suppress(OSError), open(path, "rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = os.fstat(file.fileno()).st_size
            path.unlink()
            freed += size
    return freed


def remove_old(folder: Path, pattern: str) -> None:
    """Removes temporary files in a folder that nobody has written to for an hour."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()


def sync(path: Path) -> None:
    """Has the disk keep a folder's names, or a file's content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Returns the folder for what is computed once: ``$LIGHTNING_CL_CACHE``, or ``~/.cache/lightning_cl``."""
    return Path(os.environ.get("LIGHTNING_CL_CACHE") or Path.home() / ".cache" / "lightning_cl")
