"""Containers: records from a file, a list or a table, one at a time, each with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_cl.data.formats import COLUMNS, has_known_format

RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SUFFIXES = (".txt", *RECORD_SUFFIXES)
_ROWS = 256  # rows of a table that are held at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Args:
        content: a dictionary or a string.
        where: its place, for messages, as in ``task 'chat', train='data/chat.jsonl', line 3``.
        problem: why it could not be read; `content` then means nothing.
        header: of a file that is a document: a line to put in front.
    """

    content: Any
    where: str
    problem: str | None = None
    header: str = ""


def read_file(path: Path, where: str) -> Iterator[Record]:
    """The records of one file, by its suffix.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    readers = {".txt": _txt, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return readers[path.suffix.lower()](path, where)


def read_text(path: Path, where: str) -> str:
    """A file's text: a byte order mark is left out, each line end becomes a line feed.

    Raises:
        ValueError: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text at byte {error.start}") from error


def read_items(items: Iterable[Any], where: str, name: str) -> Iterator[Record]:
    """The records of a list, or of another iterable, as they come."""
    for i, item in enumerate(items):
        yield Record(item, f"{where}, {name} {i}")


def read_stream(rows: Iterable[Any], where: str) -> Iterator[Record]:
    """The rows of a table without length, as they come."""
    for record in read_items(rows, where, "row"):
        row = record.content
        yield replace(record, content=_row_without_gaps(row)) if isinstance(row, dict) else record


def read_table(dataset: Any, where: str) -> Iterator[Record]:
    """The rows of a ``datasets.Dataset``."""
    columns = _wanted(dataset.column_names)
    rows = 0
    for batch in dataset.with_format(None).select_columns(columns).iter(_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield Record(dict(zip(batch, map(_without_gaps, values), strict=True)), f"{where}, row {rows}")
            rows += 1


def _txt(path: Path, where: str) -> Iterator[Record]:
    yield Record(read_text(path, where), where)


def _jsonl(path: Path, where: str) -> Iterator[Record]:
    # Split at b"\n" alone: U+2028 and its like are legal inside JSON strings.
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{where}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Record(None, place, f"not UTF-8 text at byte {error.start} of the line")
                continue
            if not text.strip():
                continue
            try:
                yield Record(json.loads(text), place)
            except (json.JSONDecodeError, RecursionError) as error:
                yield Record(None, place, _not_json(error))


def _json(path: Path, where: str) -> Iterator[Record]:
    try:
        records = json.loads(read_text(path, where))
    except json.JSONDecodeError as error:
        lines = "; a file with a record on each line is called .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{where}, line {error.lineno}: {_not_json(error)}{lines}") from error
    if not isinstance(records, list):
        raise ValueError(f'{where}: expected a list of records such as {{"text": …}}, got a {type(records).__name__}')
    yield from read_items(records, where, "record")


def _csv(path: Path, where: str) -> Iterator[Record]:
    # Python's limit of 128 KiB a field is below the length of many documents.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: an open quotation mark would swallow the rest of the file without a word.
            yield from _csv_rows(csv.reader(file, strict=True), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason})") from error


def _csv_rows(reader: Any, where: str) -> Iterator[Record]:
    header: list[str] | None = None
    while True:
        place = f"{where}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(None, place, f"not valid CSV ({error})")
            continue
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if not has_known_format(header):
                raise ValueError(f"{place}: expected a header row with the columns' names, such as text, got {header}")
        elif len(row) > len(header):
            yield Record(None, place, f"{len(row)} fields under a header of {len(header)} columns")
        else:
            yield Record(dict(zip(header, row, strict=False)), place)


def _parquet(path: Path, where: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        rows = 0
        for batch in file.iter_batches(_ROWS, columns=_wanted(file.schema_arrow.names)):
            for row in batch.to_pylist():
                yield Record(_row_without_gaps(row), f"{where}, row {rows}")
                rows += 1
    except pa.ArrowException as error:
        raise ValueError(f"{where}: not a readable Parquet file ({error})") from error


def _wanted(columns: list[str]) -> list[str]:
    """What means something, so that images and the like are not decoded; everything, where nothing does."""
    return [column for column in columns if column in COLUMNS] or columns


def _row_without_gaps(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_gaps(value) for key, value in row.items()}


def _without_gaps(value: Any) -> Any:
    """Tables have one schema: what a struct does not have is None there, and would be written into tool schemas."""
    if isinstance(value, dict):
        return {key: _without_gaps(item) for key, item in value.items() if item is not None}
    return [_without_gaps(item) for item in value] if isinstance(value, list) else value


def _not_json(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    return "not readable as JSON (nested too deeply)"
