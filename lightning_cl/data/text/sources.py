"""Sources of a task's data: finds their kind and their splits, and computes a hash that shows changes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L

from lightning_cl.data.benchmarks import benchmark_tasks
from lightning_cl.data.text.containers import SUFFIXES
from lightning_cl.data.text.decoding import suffix_of
from lightning_cl.data.text.folders import (
    DOCUMENT_SUFFIXES,
    ROLES,
    files_below,
    glob_files,
    is_data_file,
    is_document_file,
    is_glob,
    is_record_file,
    source_text,
    split_files,
)
from lightning_cl.data.text.formats import has_known_format
from lightning_cl.data.text.layout import Layout
from lightning_cl.data.text.sample_texts import SAMPLES
from lightning_cl.tasks import Task

_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
_SIDE_FILES = ("readme", "license", "licence", "citation", "changelog", "dataset_infos")


@dataclass(frozen=True)
class Location:
    """Meaning of a path or a name.

    Args:
        kind: ``sample``, ``file``, ``splits`` (a folder with a file for each split), ``records`` (several files of
            records), ``documents`` (one document a file), ``hub``, ``nothing`` (a folder or glob without anything
            usable) or ``missing``.
        base: the folder that the names of `files` are relative to.
        files: the files to read, in order.
        splits: sources by role, for a folder of splits.
        other_records: files that may have records but are not read as records, since other files decide the kind.
        unread: files of data that are not read at all.
    """

    kind: str
    base: Path = Path()
    files: tuple[Path, ...] = ()
    splits: tuple[tuple[str, str], ...] = ()
    other_records: tuple[Path, ...] = ()
    unread: tuple[Path, ...] = ()


def locate(source: str | Path) -> Location:
    """Finds the meaning of a path or a name; looks at names of files only, and not on the hub.

    Raises:
        ValueError: if a folder has two files for one split.
    """
    name, path = str(source), Path(source)
    if name.startswith("sample:"):
        return Location("sample")
    if path.is_file():
        return Location("file", path.parent, (path,))
    if path.is_dir():
        return _folder(path)
    if is_glob(name):
        base, files = glob_files(name)
        records = tuple(file for file in files if is_record_file(file))
        if len(records) == len(files):
            return Location("records" if files else "nothing", base, records)
        return Location("documents", base, tuple(files), other_records=records)
    known = suffix_of(path) in DOCUMENT_SUFFIXES.union(SUFFIXES)
    if isinstance(source, str) and _HUB_NAME.fullmatch(source) and not known:
        return Location("hub")
    return Location("missing")


def _folder(path: Path) -> Location:
    location = _kind_of_folder(path)
    read = {*location.files, *(file for _, source in location.splits for file in _files_of(source))}
    unread = [file for file in files_below(path) if file not in read and is_data_file(file) and not _is_side_file(file)]
    return replace(location, unread=tuple(unread))


def _kind_of_folder(path: Path) -> Location:
    splits, files = split_files(path), files_below(path)
    documents, records = list(filter(is_document_file, files)), list(filter(is_record_file, files))
    of_splits = {file for source in splits.values() for file in _files_of(source)}
    own = [file for file in documents if not _is_side_file(file) and file not in of_splits]
    if "train" in splits or (splits and not own):
        others = [file for file in records if not _is_side_file(file) and file not in of_splits]
        return Location("splits", path, splits=tuple(splits.items()), other_records=tuple(others))
    direct = [file for file in records if file.parent == path]
    if own or (documents and not direct):
        return Location("documents", path, tuple(documents), other_records=tuple(records))
    below = [file for file in records if file.parent != path]
    return Location("records" if direct else "nothing", path, tuple(direct), other_records=tuple(below))


def _files_of(source: str) -> list[Path]:
    return [Path(source)] if Path(source).is_file() else glob_files(source)[1]


def _is_side_file(file: Path) -> bool:
    return file.stem.lower() in _SIDE_FILES


def load_hub(name: str) -> Any:
    """A data set of the hub, by ``owner/name`` or ``owner/name:config``, with all of its splits.

    Raises:
        FileNotFoundError: if it cannot be loaded; the message names the folder that was searched.
    """
    import datasets

    match = _HUB_NAME.fullmatch(name)
    assert match is not None
    try:
        return datasets.load_dataset(match["name"], match["config"])
    except (OSError, ValueError) as error:  # not found, no connection, no such config
        raise FileNotFoundError(
            f"{name!r}: no such file or folder (looked in {Path().absolute()}), and no data set of that name could be"
            f" loaded from the hub ({error})"
        ) from error


def splits_of(source: Any) -> dict[str, Any] | None:
    """The splits of a source as ``{role: source}``; None if it has no splits. A hub name is loaded."""
    if isinstance(source, (str, Path)):
        location = locate(source)
        if location.kind == "splits":
            return dict(location.splits)
        source = load_hub(str(source)) if location.kind == "hub" else None
    if not is_dataset_dict(source):
        return None
    return {role: source[name] for role, names in ROLES.items() for name in names if name in source}


def resolve_splits(source: Any) -> dict[str, Any]:
    """Returns the data that a task's `train` has for each role.

    A folder of train/valid/test files, a ``datasets.DatasetDict`` and a hub name (which is loaded) supply validation
    and test data too; anything else is the training data alone.

    Returns:
        ``{"train", "val", "test"}``; a value is None if there is no data for the role.

    Raises:
        FileNotFoundError: if a name is not on the hub.
        ValueError: if there are splits, but none to train on.
    """
    splits = splits_of(source)
    if splits is not None and "train" not in splits:
        name = repr(str(source)) if isinstance(source, (str, Path)) else f"the splits {list(source)}"
        raise ValueError(f"{name}: there is no split to train on, none is called {' or '.join(ROLES['train'])}")
    return {role: (source if role == "train" else None) if splits is None else splits.get(role) for role in ROLES}


def is_dataset_dict(source: Any) -> bool:
    """Returns True for a ``datasets.DatasetDict``, without importing ``datasets``."""
    # A plain dictionary of tables may be the arguments of a Task.
    return isinstance(source, dict) and hasattr(source, "column_names") and bool(source)


def is_table(source: Any) -> bool:
    """Returns True for a ``datasets.Dataset``, ``IterableDataset`` or similar table with columns of a known format."""
    if isinstance(source, dict) or not hasattr(source, "column_names") or not hasattr(source, "__iter__"):
        return False
    # A stream may learn its columns only from its first record.
    return source.column_names is None or has_known_format(Layout().meanings(source.column_names).values())


def is_stream(source: Any) -> bool:
    """Returns True for a table without a length; it may be endless, or readable only once."""
    return is_table(source) and not hasattr(source, "__len__")


def content_key(source: Any, path_header: bool = False, role: str = "train") -> str | None:
    """A hash of a source's content, as a key for results that are computed from it.

    It includes the bytes and relative names of files, the JSON text of lists, and a ``datasets.Dataset``'s fingerprint.

    Args:
        source: as for :func:`~lightning_cl.data.text.records.read_documents`.
        path_header: as there.
        role: the split to hash, if `source` has several.

    Returns:
        a sha256 in hexadecimal digits; None for streams, and for lists that JSON cannot write.
    """
    splits = splits_of(source)
    if splits is not None:
        return None if role not in splits else content_key(splits[role], path_header, role)
    digest = hashlib.sha256()
    for part in _content(source, path_header):
        if part is None:
            return None
        # The length in front makes the bytes of different lists of parts different.
        digest.update(f"{len(part)}:".encode())
        digest.update(part)
    return digest.hexdigest()


def _content(source: Any, path_header: bool) -> Iterator[bytes | None]:
    if isinstance(source, (str, Path)):
        location = locate(source)
        yield f"{location.kind} {path_header}".encode()
        if location.kind == "sample":
            yield json.dumps(SAMPLES[str(source)[len("sample:") :]]()).encode()
        for file in location.files:
            yield file.relative_to(location.base).as_posix().encode()
            yield _file_digest(file)
    elif isinstance(source, (list, tuple)):
        try:
            yield b"list" + json.dumps(source, sort_keys=True).encode()
        except (TypeError, ValueError):
            yield None
    else:
        fingerprint = getattr(source, "_fingerprint", None)
        yield None if fingerprint is None or is_stream(source) else f"table {fingerprint}".encode()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def documents_of(location: Location, path_header: bool) -> Iterator[tuple[Path, str, str]]:
    """The documents of a location of kind ``documents``: path, header and text; binary files are left out.

    Args:
        location: the folder or glob.
        path_header: True: the header is ``# file: <path>``, relative to the folder or to the fixed part of the glob.
            False: the header is empty.
    """
    for file in location.files:
        text = source_text(file)
        if text is not None:
            yield file, f"# file: {file.relative_to(location.base).as_posix()}\n" if path_header else "", text


def as_tasks(tasks: Any) -> list[Task]:
    """A list of tasks from ``{name: data}``, ``{name: {arguments of Task}}``, a list of tasks, or a benchmark's folder.

    A benchmark is given as ``{benchmark: trace, folder: …}`` (:mod:`lightning_cl.data.benchmarks`); ``more`` has tasks
    that come after its own, as ``{name: data}``.

    Raises:
        ValueError: if there is no task, no task to train on, or two tasks have the same name.
        TypeError: if `tasks` is something else, or an argument of a task has an unknown name.
    """
    if isinstance(tasks, dict) and {"benchmark", "folder"} <= tasks.keys():
        more = tasks.get("more") or {}
        listed = benchmark_tasks({key: value for key, value in tasks.items() if key != "more"})
        listed += [_as_task(name, data) for name, data in more.items()]
    elif isinstance(tasks, dict):
        listed = [_as_task(name, data) for name, data in tasks.items()]
    elif isinstance(tasks, (list, tuple)):
        listed = [task if isinstance(task, Task) else _as_task(None, task) for task in tasks]
    else:
        raise TypeError(f"tasks: expected {{name: data}} or a list of Task, got a {type(tasks).__name__}")
    if not listed:
        raise ValueError("tasks: there are none; give at least one, as in {'chat': 'data/chat.jsonl'}")
    names = [task.name for task in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: two tasks are called {twice[0]!r}; names must be unique")
    if all(task.watched for task in listed):
        raise ValueError("tasks: all of them are only watched (train=None): there is nothing to train on")
    return listed


def _as_task(name: str | None, data: Any) -> Task:
    if isinstance(data, Task):
        if name is not None and name != data.name:
            raise ValueError(f"tasks: {name!r} is the key of a Task that is called {data.name!r}")
        return data
    if isinstance(data, dict) and not is_dataset_dict(data):
        known = list(Task.__dataclass_fields__)
        unknown = [key for key in data if key not in known]
        if unknown:
            raise TypeError(f"task {name or data.get('name')!r}: unknown argument {unknown[0]!r}; there are {known}")
        arguments: dict[str, Any] = ({"name": name} if name is not None else {}) | data
        return Task(**arguments)
    if isinstance(data, tuple) and len(data) in (2, 3) and all(map(_is_source, data)):
        roles = ", ".join(f'"{role}": …' for role in ("train", "val", "test")[: len(data)])
        raise TypeError(
            f"task {name!r}: a tuple of {len(data)} sources; give {{{roles}}}, which says what each of them is for"
        )
    if name is None:
        raise TypeError(f"tasks: expected a Task in the list, got {describe_source(data)}")
    return Task(name, train=data)


def _is_source(item: Any) -> bool:
    """Tells if an item of a tuple is a data set, and not a record."""
    if isinstance(item, (str, Path)):
        return locate(item).kind != "missing" and len(str(item)) < 1000
    return not isinstance(item, (dict, int, float)) and (hasattr(item, "__len__") or hasattr(item, "__iter__"))


def is_data(source: Any) -> bool:
    """Returns True if a task's data, if it is not text, gives samples or batches."""
    if isinstance(source, (list, tuple)):
        return bool(source) and not isinstance(source[0], (int, float))
    if isinstance(source, (str, Path, dict, set)) or hasattr(
        source, "iloc"
    ):  # items of a pandas table are not its rows
        return False
    return isinstance(source, L.LightningDataModule) or hasattr(source, "__iter__") or hasattr(source, "__getitem__")


def describe_source(source: Any) -> str:
    """Describes what a user gave as data, for messages."""
    if isinstance(source, (list, tuple)) and not source:
        return "an empty list"
    if hasattr(source, "iloc"):
        return f"a pandas {type(source).__name__} (give frame.to_dict('records'))"
    columns = getattr(source, "column_names", None)
    if columns:
        return f"a {type(source).__name__} with the columns {columns}"
    return f"{source!r}" if isinstance(source, (int, float, str, Path)) else f"a {type(source).__name__}"
