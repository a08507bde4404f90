"""A task's data as documents: from files, folders, lists, ``datasets``, the hub, and the sample texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.data.text.containers import (
    NO_LAYOUT,
    SUFFIXES,
    Record,
    holds_records,
    read_file,
    read_items,
    read_stream,
    read_table,
)
from lightning_cl.data.text.decoding import suffix_of
from lightning_cl.data.text.formats import Document, Text, as_document, check_answer
from lightning_cl.data.text.layout import Layout
from lightning_cl.data.text.record_counts import Tally
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.data.text.sources import (
    Location,
    documents_of,
    is_dataset_dict,
    is_table,
    locate,
    splits_of,
)


def is_text_source(source: Any) -> bool:
    """Returns True if :func:`read_documents` can read a task's data."""
    if isinstance(source, (str, Path)):
        return True
    if isinstance(source, (list, tuple)):
        # Items that are neither text nor records raise an error that names them when they are read.
        return any(isinstance(item, str) or (isinstance(item, dict) and "input_ids" not in item) for item in source)
    return is_table(source) or (is_dataset_dict(source) and all(map(is_table, source.values())))


def check_text_source(source: Any, task: str, role: str) -> None:
    """Checks a path before anything is built. Names on the hub are not looked up.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or of an unknown kind, or if files of different kinds are mixed.
    """
    if not isinstance(source, (str, Path)):
        return
    where = f"task {task!r}, {role}={str(source)!r}"
    try:
        location = locate(source)
    except ValueError as error:
        raise ValueError(f"task {task!r}, {role}={error}") from error
    if location.kind == "sample" and str(source)[len("sample:") :] not in SAMPLES:
        raise ValueError(f"{where}: no such sample; there are {[f'sample:{name}' for name in SAMPLES]}")
    if location.kind == "missing":
        raise FileNotFoundError(f"{where}: no such file (looked in {Path(source).absolute().parent})")
    _check_other_records(location, where)
    if location.kind == "nothing" and Path(source).is_dir():
        raise ValueError(
            f"{where}: nothing in this folder is data: expected train, valid and test files ending in"
            f" {', '.join(SUFFIXES)}, or files of source code or text"
        )
    if location.kind == "nothing":
        raise ValueError(f"{where}: no file matches (looked in {location.base.absolute()})")
    for split in dict(location.splits).values():
        check_text_source(split, task, role)
    if location.kind == "file" and suffix_of(location.files[0]) not in SUFFIXES:
        raise ValueError(
            f"{where}: expected a file ending in {', '.join(SUFFIXES)}, also with .gz after it; other text is read as"
            " it is from a folder or a glob, as in 'src/**/*.py'"
        )
    if location.kind in ("file", "records"):
        for file in location.files:
            if file.stat().st_size == 0:
                raise ValueError(f"task {task!r}, {role}={str(file)!r}: the file is empty")


def _check_other_records(location: Location, where: str) -> None:
    """Warns or raises if files of records in a folder would be left out, or read as plain text."""
    found = next((file for file in location.other_records if holds_records(file)), None)
    if found is None:
        return
    folder, ending = location.base, "".join(found.suffixes[-2:] if found.suffix == ".gz" else [found.suffix])
    if location.kind == "splits":
        files = ", ".join(source for _, source in location.splits)
        rank_zero_warn(
            f"{where}: of this folder only {files} are read; {found} holds records too: to train on it, make it a task"
            " of its own, or put it into the file for train"
        )
        return
    if location.kind == "documents":
        other = next(file for file in location.files if file not in location.other_records)
        raise ValueError(
            f"{where}: files of records ({found}) and files of text ({other}) are mixed, and they are read in"
            f" different ways: make two tasks of them, or name one kind by a glob, as in '{folder}/**/*{ending}' or"
            f" '{folder}/**/*{other.suffix}'"
        )
    raise ValueError(
        f"{where}: there are files of records in folders below this one ({found}), which would not be read: give a"
        f" glob that finds all of them, as in '{folder}/**/*{ending}'"
    )


def read_records(
    source: Any, task: str, role: str, path_header: bool = False, layout: Layout = NO_LAYOUT
) -> Iterator[Record]:
    """The records of one task's data, one at a time, each with its position in the source.

    Args:
        source: a path or glob, ``sample:NAME``, a name on the hub, a list of texts or records, a ``datasets.Dataset``
            or ``DatasetDict``, or any iterable of records, which is read as it comes. A ``.txt`` file is one document,
            ``.jsonl`` has a record on each line, ``.json`` a list of them, ``.csv`` a header row. In a folder of
            train/valid/test files, the file for `role` is read. Any other folder or glob gives one document per file,
            sorted by path, without hidden files, binary files and build products. If all its files are files of
            records, it gives their records; a mixture of both kinds is an error.
        task: the task's name, for messages.
        role: the split to read: ``train``, ``val`` or ``test``.
        path_header: for one document per file, add a first line ``# file: <path>``. The path is relative to the folder
            or to the fixed part of the glob (``src`` in ``src/**/*.py``).
        layout: names of the data's own columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is empty or cannot be read, or there is no such split.
    """
    check_text_source(source, task, role)
    where = f"task {task!r}, {role}"
    try:
        splits = splits_of(source)
    except FileNotFoundError as error:  # not on the hub either
        raise FileNotFoundError(f"{where}={error}") from error
    if splits is not None:
        if role not in splits:
            raise ValueError(
                f"{where}: there is no data for {role} in it; there is some for {', '.join(splits) or 'no role'}"
            )
        yield from read_records(splits[role], task, role, path_header, layout)
    elif isinstance(source, (str, Path)):
        yield from _read_path(source, locate(source), where, path_header, layout)
    elif isinstance(source, (list, tuple)):
        yield from read_items(source, where, "item")
    elif hasattr(source, "select_columns") and hasattr(source, "__len__"):
        yield from read_table(source, where, layout)
    elif is_table(source):
        yield from read_stream(source, where)
    else:
        yield from read_items(source, where, "row")


def _read_path(
    source: str | Path, location: Location, where: str, path_header: bool, layout: Layout
) -> Iterator[Record]:
    if location.kind == "sample":
        yield from read_items(SAMPLES[str(source)[len("sample:") :]](), f"{where}={str(source)!r}", "document")
    elif location.kind == "documents":
        for file, header, text in documents_of(location, path_header):
            yield Record(text, f"{where}={str(file)!r}", header=header)
    else:
        for file in location.files:
            yield from read_file(file, f"{where}={str(file)!r}", layout)


def read_documents(
    source: Any,
    task: str,
    role: str,
    tally: Tally | None = None,
    path_header: bool = False,
    layout: Layout = NO_LAYOUT,
) -> Iterator[Document]:
    """The documents of one task's data, one at a time; those without any text are dropped and counted.

    Args:
        source: see :func:`read_records`. The formats of records are those of
            :func:`~lightning_cl.data.text.formats.as_document`.
        task: the task's name.
        role: ``train``, ``val`` or ``test``.
        tally: counts what is left out, and decides if a bad record is an error; by default it is.
        path_header: True: a file's document starts with its path.
        layout: names of the data's own columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a record is malformed (the message names file and line), or there is no text at all.
    """
    tally = Tally() if tally is None else tally
    found, bad = False, tally.bad
    count_unread(source, tally)
    for record in read_records(source, task, role, path_header, layout):
        try:
            if record.problem is not None:
                raise ValueError(record.problem)
            content = layout.named(record.content) if isinstance(record.content, dict) else record.content
            document = as_document(content, record.where, tally)
            check_answer(document)
            if record.header:
                document = Text(document.plain, record.header)
        except ValueError as error:
            tally.refuse(f"{record.where}: {error}")
            continue
        except RecursionError:
            tally.refuse(f"{record.where}: lists and dictionaries are nested too deeply")
            continue
        if not document.plain.strip():
            tally.dropped += 1
            continue
        found = True
        yield document
    if not found:
        name = f"={str(source)!r}" if isinstance(source, (str, Path)) else ""
        skipped = (
            f"; {tally.bad - bad} bad records were skipped, the first: {tally.reasons[0]}" if tally.bad > bad else ""
        )
        raise ValueError(f"task {task!r}, {role}{name}: there is no text in it{skipped}")


def count_unread(source: Any, tally: Tally) -> None:
    """Counts the files of data in a folder that are not read, by their suffix."""
    if not isinstance(source, (str, Path)):
        return
    for file in locate(source).unread:
        what = f"files of the folder ending in {suffix_of(file)}"
        tally.left_out[what] = tally.left_out.get(what, 0) + 1


def read_texts(source: Any, task: str, role: str, tally: Tally | None = None, layout: Layout = NO_LAYOUT) -> list[str]:
    """The plain text of every document, whatever its format; a vocabulary is trained on it.

    Args:
        source: see :func:`read_records`.
        task: the task's name, for messages.
        role: ``train``, ``val`` or ``test``.
        tally: decides if a bad record is an error; by default it is.
        layout: names of the data's own columns.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is empty or a record is malformed; the message names file and line.
    """
    return [document.plain for document in read_documents(source, task, role, tally, layout=layout)]
