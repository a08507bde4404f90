"""Texts from where people have them: files, lists, ``datasets``, and the samples that every machine has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_cl.data.sample_texts import SAMPLES

SUFFIXES = (".txt", ".jsonl", ".json")


def is_text_source(source: Any) -> bool:
    """Whether :func:`read_texts` knows what to do with a task's data."""
    if isinstance(source, (str, Path)):
        return True
    if isinstance(source, (list, tuple)):
        return bool(source) and all(
            isinstance(item, str) or (isinstance(item, dict) and "input_ids" not in item) for item in source
        )
    return "text" in (getattr(source, "column_names", None) or ())


def check_text_source(source: Any, task: str, role: str) -> None:
    """Finds what is wrong with a path before anything is built.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty or of an unknown kind.
    """
    if not isinstance(source, (str, Path)):
        return
    where = f"task {task!r}, {role}={str(source)!r}"
    if str(source).startswith("sample:"):
        if str(source)[len("sample:") :] not in SAMPLES:
            raise ValueError(f"{where}: no such sample; there are {[f'sample:{name}' for name in SAMPLES]}")
        return
    path = Path(source)
    if path.is_dir():
        raise ValueError(f"{where}: is a folder; expected a file ending in {', '.join(SUFFIXES)}")
    if not path.exists():
        raise FileNotFoundError(f"{where}: no such file (looked in {path.absolute().parent})")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{where}: expected a file ending in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty")


def read_texts(source: Any, task: str, role: str) -> list[str]:
    """The documents of one task.

    A ``.txt`` file is one document. ``.jsonl`` has one ``{"text": …}`` per line, ``.json`` a list of them; a list and a
    ``datasets.Dataset`` likewise.

    Args:
        source: path, ``sample:NAME``, list of texts or records, or ``datasets.Dataset`` with a ``text`` column.
        task: the task's name, for messages.
        role: ``train``, ``val`` or ``test``, for messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the source is empty or a record is malformed; the message names file and line.
    """
    check_text_source(source, task, role)
    where = f"task {task!r}, {role}"
    if isinstance(source, (str, Path)):
        where = f"{where}={str(source)!r}"
        if str(source).startswith("sample:"):
            texts = SAMPLES[str(source)[len("sample:") :]]()
        else:
            texts = list(_read_file(Path(source), where))
    elif isinstance(source, (list, tuple)):
        texts = [_text_of(item, f"{where}, item {i}") for i, item in enumerate(source)]
    else:
        texts = [_text_of({"text": text}, f"{where}, row {i}") for i, text in enumerate(source["text"])]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{where}: there is no text in it")
    return texts


def _read_file(path: Path, where: str) -> Iterator[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text at byte {error.start}") from error
    if path.suffix == ".txt":
        yield content
    elif path.suffix == ".json":
        records = _parse(content, where)
        if not isinstance(records, list):
            raise ValueError(f'{where}: expected a list of {{"text": …}} records, got a {type(records).__name__}')
        for i, record in enumerate(records):
            yield _text_of(record, f"{where}, record {i}")
    else:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _text_of(_parse(line, f"{where}, line {number}"), f"{where}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error


def _text_of(record: Any, where: str) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict) and isinstance(record.get("text"), str):
        return record["text"]
    what = f"the keys {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
    raise ValueError(f'{where}: expected {{"text": "…"}} with a string, got {what}')
