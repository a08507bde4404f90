"""The index of a buffer's folder: ``live.json`` has the records in the buffer, ``buffer.pt`` what a new run resumes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_cl.buffers.disk.layout import DamagedFileError
from lightning_cl.files import replace_file

_LIVE, _STATE = "live.json", "buffer.pt"


def write_live(folder: Path, records: dict[str, Any]) -> None:
    """Writes which records are in the buffer, by the folder of their segment."""
    content = json.dumps(records)
    replace_file(folder / _LIVE, lambda path: path.write_text(content, encoding="utf-8"))


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes the buffer's state."""
    replace_file(folder / _STATE, lambda path: torch.save(state, path))


def live_segments(folder: Path) -> list[Path]:
    """The segments that the records in the buffer are in; none without an index.

    Raises:
        DamagedFileError: if the file is damaged.
    """
    path = folder / _LIVE
    if not path.is_file():
        return []
    try:
        return [Path(name) for name in json.loads(path.read_text(encoding="utf-8"))]
    except ValueError as error:
        raise DamagedFileError(f"{path}: damaged ({error})") from error


def read_state(folder: Path) -> dict[str, Any] | None:
    """The buffer's state as an earlier run has left it; None if there is none.

    Raises:
        DamagedFileError: if the file is damaged.
    """
    path = folder / _STATE
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()  # by their checksums, which torch.load does not look at
        if part is not None:
            raise ValueError(f"the checksum of {part} does not fit")
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:  # of any kind, from a damaged archive
        raise DamagedFileError(f"{path}: damaged ({error})") from error
    return state
