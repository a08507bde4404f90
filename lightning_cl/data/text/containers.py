"""Containers: records from a file, a list or a table, one at a time, each with its position."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_cl.data.text.decoding import GZIP, encoding_of, not_text, open_bytes, open_text, suffix_of
from lightning_cl.data.text.formats import has_known_format
from lightning_cl.data.text.layout import Layout

NO_LAYOUT = Layout()
"""A layout without renamed columns, for files whose whole content is records."""

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (".txt", *RECORD_SUFFIXES)
DELIMITERS = (",", ";", "\t", "|")
_ROWS = 256  # rows of a table that are read at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Args:
        content: a dictionary or a string.
        where: its position, for messages, as in ``task 'chat', train='data/chat.jsonl', line 3``.
        problem: the reason why it could not be read; `content` then means nothing.
        header: a line to put before the content, if a whole file is the document.
    """

    content: Any
    where: str
    problem: str | None = None
    header: str = ""


def read_file(path: Path, where: str, layout: Layout = NO_LAYOUT) -> Iterator[Record]:
    """The records of one file, by its suffix, also with ``.gz`` after it.

    Args:
        path: the file.
        where: its name, for messages.
        layout: names of its columns.

    Raises:
        ValueError: if the file as a whole cannot be read.
    """
    suffix = suffix_of(path)
    if suffix == ".txt":
        yield Record(read_text(path, where), where)
    elif suffix in (".csv", ".tsv"):
        yield from _csv(path, where, layout)
    elif suffix == ".parquet":
        yield from _parquet(path, where, layout)
    elif suffix == ".json":
        yield from _json(path, where, layout)
    else:
        yield from _jsonl(path, where)


def read_text(path: Path, where: str) -> str:
    """A file's text without a byte order mark, with line feeds as line ends.

    Raises:
        ValueError: if it is neither UTF-8 nor UTF-16.
    """
    with open_text(path, where) as file:
        return file.read()


def read_items(items: Iterable[Any], where: str, name: str) -> Iterator[Record]:
    """The records of a list, or of another iterable, as they come."""
    for i, item in enumerate(items):
        yield Record(item, f"{where}, {name} {i}")


def read_stream(rows: Iterable[Any], where: str) -> Iterator[Record]:
    """The rows of a table without length, as they come."""
    features = getattr(rows, "features", None) or {}
    for record in read_items(rows, where, "row"):
        row = record.content
        yield replace(record, content=_row_without_gaps(row, features)) if isinstance(row, dict) else record


def read_table(dataset: Any, where: str, layout: Layout = NO_LAYOUT) -> Iterator[Record]:
    """The rows of a ``datasets.Dataset``."""
    columns, features = _wanted(dataset.column_names, layout), dataset.features
    rows = 0
    for batch in dataset.with_format(None).select_columns(columns).iter(_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield Record(_row_without_gaps(dict(zip(batch, values, strict=True)), features), f"{where}, row {rows}")
            rows += 1


def _jsonl(path: Path, where: str) -> Iterator[Record]:
    with open_bytes(path, where) as file:
        if encoding_of(file) == "utf-16":
            # Lines end at a line feed only, since U+2028 and similar characters may be inside JSON strings.
            lines = read_text(path, where).split("\n")
            yield from (
                _json_line(line, f"{where}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
            )
            return
        for number, line in enumerate(file, 1):
            position = f"{where}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Record(None, position, f"{not_text(error)} (bytes are counted from the line's start)")
                continue
            if text.strip():
                yield _json_line(text, position)


def _json_line(text: str, position: str) -> Record:
    try:
        return Record(json.loads(text), position)
    except (ValueError, RecursionError) as error:
        return Record(None, position, not_json(error))


def _json(path: Path, where: str, layout: Layout) -> Iterator[Record]:
    text = read_text(path, where)
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line, lines = "", ""
        if isinstance(error, json.JSONDecodeError):
            line = f", line {error.lineno}"
            lines = "; a file with a record on each line is called .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{where}{line}: {not_json(error)}{lines}") from error
    yield from read_items(_records_under(records, where, layout.field), where, "record")


def _records_under(content: Any, where: str, field: str | None) -> list[Any]:
    """The list of records in a JSON file: the whole content, or the value of a key."""
    for key in field.split(".") if field else ():
        if not isinstance(content, dict) or key not in content:
            keys = list(content) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise ValueError(f"{where}: field={field!r}: there is no {key!r} in it, but {keys}")
        content = content[key]
    if isinstance(content, list):
        return content
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    hint = f"; its records may be under one of its keys: give field={lists[0]!r}" if lists else ""
    raise ValueError(f'{where}: expected a list of records such as {{"text": …}}, got a {type(content).__name__}{hint}')


def _csv(path: Path, where: str, layout: Layout) -> Iterator[Record]:
    # Many documents are longer than Python's limit of 128 KiB for a field.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    with open_text(path, where, newline="") as file:
        first = file.readline()
        said = re.fullmatch(r"sep=(.)\s*", first, re.IGNORECASE)  # Excel's own first line
        header = file.readline() if said else first
        delimiter = said[1] if said else delimiter_of(header, layout)
        file.seek(0)
        lines: Iterator[str] = iter(file)
        if said:
            next(lines)
        # With strict=False, a quotation mark without a second one would silently include the rest of the file.
        yield from _csv_rows(csv.reader(lines, strict=True, delimiter=delimiter), where, layout, int(bool(said)))


def delimiter_of(header: str, layout: Layout = NO_LAYOUT) -> str:
    """Finds the delimiter of a table: the first one for which its header has a known format; else a comma."""
    for delimiter in DELIMITERS:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if has_known_format(layout.meanings(names).values()):
            return delimiter
    return ","


def _csv_rows(reader: Any, where: str, layout: Layout, before: int) -> Iterator[Record]:
    header: list[str] | None = None
    while True:
        position = f"{where}, line {reader.line_num + 1 + before}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(None, position, f"not valid CSV ({error})")
            continue
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            layout.check(header, position)
        elif len(row) > len(header):
            yield Record(None, position, f"{len(row)} fields under a header of {len(header)} columns")
        else:
            yield Record(dict(zip(header, row, strict=False)), position)


def _parquet(path: Path, where: str, layout: Layout) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        packed = path.suffix.lower() == GZIP
        with open_bytes(path, where) as opened:
            file = pq.ParquetFile(pa.BufferReader(opened.read()) if packed else path)
        names = file.schema_arrow.names
        if layout.columns:
            layout.check(names, where)
        rows = 0
        for batch in file.iter_batches(_ROWS, columns=_wanted(names, layout)):
            for row in batch.to_pylist():
                yield Record(_row_without_gaps(row, {}), f"{where}, row {rows}")
                rows += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: not a readable Parquet file ({error})") from error


def _wanted(columns: list[str], layout: Layout) -> list[str]:
    """Returns the columns that have a meaning, so that images are not decoded; all columns if none has one."""
    meanings = layout.meanings(columns)
    return [column for column in columns if column in meanings] or columns


def _row_without_gaps(row: dict[str, Any], features: Any) -> dict[str, Any]:
    return {key: _without_gaps(value, _part(features, key)) for key, value in row.items()}


def _without_gaps(value: Any, feature: Any) -> Any:
    """Removes the None values by which a table fills fields that a struct does not have.

    Otherwise they would be written into schemas of tools. A column of JSON (``datasets.Json``, or text) keeps every
    null.
    """
    if type(feature).__name__ == "Json":
        return value
    if isinstance(value, dict):
        return {key: _without_gaps(item, _part(feature, key)) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [_without_gaps(item, inner) for item in value]
    return value


def _part(features: Any, key: str) -> Any:
    return features.get(key) if isinstance(features, dict) else None


def not_json(error: Exception) -> str:
    """Describes the fault of a text that is no JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "not readable as JSON (nested too deeply)"
    return f"not readable as JSON ({str(error).partition(';')[0]})"  # a number of thousands of digits


_BEGINNING = 1_000_000  # bytes of a file that are read to find its kind


def holds_records(path: Path) -> bool:
    """Returns True if a file with the suffix of a file of records begins with a record of a known format.

    Folders of source code also have such files, as configurations and tables, that are not training data. A ``.jsonl``
    file whose first line is malformed counts as records.
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
