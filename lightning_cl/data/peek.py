"""A look at the beginning of a file: whether it holds records, or is JSON or CSV of some other kind."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning_cl.data.text.containers import NO_LAYOUT, delimiter_of
from lightning_cl.data.text.decoding import encoding_of, open_bytes, suffix_of
from lightning_cl.data.text.formats import has_known_format

_BEGINNING = 1_000_000  # bytes of a file that are looked at


def holds_records(path: Path) -> bool:
    """Returns True if a file with the suffix of a file of records begins with a record of a known format.

    A source tree has configurations and tables that are nothing to learn. A ``.jsonl`` file whose first line is broken
    counts as records.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _is_known(_columns(path))
    try:
        with open_bytes(path, str(path)) as file:
            encoding = encoding_of(file)
            text = file.read(_BEGINNING).decode(encoding, errors="replace").lstrip()
    except (OSError, ValueError):
        return False
    if suffix in (".csv", ".tsv"):
        lines = text.splitlines()[:1]
        header = next(csv.reader(lines, delimiter=delimiter_of(lines[0]) if lines else ","), [])
        return _is_known([name.strip() for name in header])
    if suffix == ".json" and not text.startswith("["):
        return False
    if suffix == ".json":
        text = text[1:].lstrip()
    try:
        first: Any = json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return suffix in (".jsonl", ".ndjson") and bool(text)
    return isinstance(first, dict) and _is_known(first)


def _is_known(names: Collection[Any]) -> bool:
    return has_known_format(NO_LAYOUT.meanings(names).values())


def _columns(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError):
        return []
