"""Origin of a run's numbers: versions, seed, command and commit, so that somebody else can make them again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("lightning_cl", "torch", "lightning", "transformers", "peft", "datasets")


def provenance() -> dict[str, str | None]:
    """Returns what made the numbers of this process.

    Returns:
        ``command`` (None in a notebook), ``seed`` (of ``seed_everything``), ``commit`` of the working folder's git
        repository (with ``+`` if files differ from it), and the versions of Python and the packages; None for what is
        not known.
    """
    packages = {name: _version(name) for name in _PACKAGES}
    return {"command": _command(), "seed": os.environ.get("PL_GLOBAL_SEED"), "commit": _commit()} | {
        "python": platform.python_version(),
        **packages,
    }


@lru_cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _command() -> str | None:
    """The command line of this process, without the folder that its program lies in."""
    program = Path(sys.argv[0] or "-")
    if "ipykernel" in program.as_posix() or program.name in ("-", "-c", "-m"):
        return None
    start = ["python", program.name] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


@lru_cache(maxsize=1)
def _commit() -> str | None:
    try:
        asked = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if told.returncode == 0 else None
