"""A look at the beginning of a file: whether it holds records, or is JSON or CSV of some other kind."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lightning_cl.data.formats import has_known_format

_BEGINNING = 1_000_000  # bytes of a file that are looked at


def holds_records(path: Path) -> bool:
    """Whether a file with the suffix of a file of records begins with a record of a known format.

    A source tree has configurations and tables that are nothing to learn. A ``.jsonl`` file whose first line is broken
    counts as records.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return has_known_format(_columns(path))
    with path.open("rb") as file:
        text = file.read(_BEGINNING).decode("utf-8-sig", errors="replace").lstrip()
    if suffix == ".csv":
        header = next(csv.reader(text.splitlines()[:1]), [])
        return has_known_format([name.strip() for name in header])
    if suffix == ".json":
        if not text.startswith("["):
            return False
        text = text[1:].lstrip()
    try:
        first: Any = json.JSONDecoder().raw_decode(text)[0]
    except (json.JSONDecodeError, RecursionError):
        return suffix == ".jsonl" and bool(text)
    return isinstance(first, dict) and has_known_format(first)


def _columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return []
