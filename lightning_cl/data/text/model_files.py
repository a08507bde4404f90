"""Files of pretrained models: finds damaged files, and writes checksums for folders that this package makes."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

_CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22  # bytes that are read at once


def find_damaged_file(source: str, error: Exception) -> str | None:
    """Finds the damaged file that made the reading of a model or tokenizer fail.

    Args:
        source: a folder or a ``.gguf`` file; a name on the hub has no files to check.
        error: the error that was raised when it was read.

    Returns:
        the file and its fault, in words; None if no file is damaged.
    """
    path = Path(source)
    if source.endswith(".gguf"):
        reason = f"{path} cannot be read: it is damaged, cut off or of an unknown kind ({_in_a_line(error)})"
        return reason if path.is_file() else None
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        try:
            if file.suffix == ".json" and not isinstance(json.loads(file.read_bytes()), (dict, list)):
                raise ValueError("it is no object")
            if file.name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                json.loads(file.read_bytes()).items()
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            if file.name.startswith("pytorch_model") and file.suffix == ".bin" and not zipfile.is_zipfile(file):
                raise ValueError("it has no end")
        except (SafetensorError, OSError, ValueError, AttributeError, RecursionError) as reason:
            return f"{file} is damaged or cut off ({_in_a_line(reason)})"
    return None


def _in_a_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_checksums(folder: Path) -> None:
    """Writes a file with the size and CRC-32 of every file of a folder into that folder."""
    sums = {file.name: [file.stat().st_size, _crc(file)] for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def damaged_in(folder: Path) -> str | None:
    """Compares the files of a folder with what :func:`write_checksums` wrote.

    Returns:
        the first file that is missing or changed, in words; None if all are unchanged.
    """
    path = folder / _CHECKSUMS
    if not path.is_file():
        return f"{path} is missing"
    try:
        for name, (size, crc) in json.loads(path.read_bytes()).items():
            file = folder / name
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size != size or _crc(file) != crc:
                return f"{file} is damaged"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return f"{path} is damaged"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            crc = zlib.crc32(data, crc)
    return crc
