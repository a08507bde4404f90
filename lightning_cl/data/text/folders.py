"""Folders and globs: finds the files in them that are data, and the kind of data."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path, PurePath

from lightning_cl.data.text.containers import RECORD_SUFFIXES, SUFFIXES
from lightning_cl.data.text.decoding import stem_of, suffix_of

ROLES = {
    "train": ("train", "training"),
    "val": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
"""The file names of splits, by a task's roles."""

_SUFFIXES = """
adoc asm awk bash bat bib c cc cfg clj cljs cmake coffee conf cpp cs css cu cuh cxx d dart edn el elm erl ex
exs f f90 fs fsx go gradle graphql groovy h hcl hh hpp hrl hs htm html hxx ini inl java jl js jsx kt kts less
lisp lua m md mjs mk ml mli mm nim nix org pas php pl pm proto ps1 py pyi pyx r rb rkt rs rst s sass scala scm
scss sh sol sql sv svelte swift tcl tex tf toml ts tsx txt v vhd vhdl vim vue xml yaml yml zig zsh
"""
DOCUMENT_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""Suffixes of source code and text, in lower case. JSON and CSV are not here, since they are mostly data."""

_OTHER_DATA = """
arrow feather avro orc xls xlsx ods pdf doc docx odt rtf ppt pptx epub mobi zip tar tgz bz2 xz zst 7z rar pkl pickle npy
npz h5 hdf5 db sqlite sqlite3 mdb bin pt safetensors
"""
DATA_SUFFIXES = frozenset({*SUFFIXES, *(f".{suffix}" for suffix in _OTHER_DATA.split())})
"""Suffixes of files that have data, readable here or not."""

_JUNK = {"__pycache__", "node_modules", "bower_components", "site-packages", "venv", "env", "virtualenv"}
_JUNK |= {"build", "dist", "target", "_build", "htmlcov", "CMakeFiles"}
_SHARD = re.compile(r"-\d+-of-\d+$")


def is_glob(source: str) -> bool:
    """Returns True if a path has wildcards."""
    return glob.has_magic(source)


def split_files(folder: Path) -> dict[str, str]:
    """The files of a folder that are named after splits, by role, as paths or globs.

    It knows the names of mlx-lm (``train.jsonl, valid.jsonl, test.jsonl``), of TRACE (``train.json, eval.json,
    test.json``) and of the hub (``train-00000-of-00002.parquet``, also in a folder ``data``).

    Raises:
        ValueError: if there are two files for one role.
    """
    for parent in (folder, folder / "data"):
        found: dict[str, str] = {}
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            own = stem_of(path)
            stem = _SHARD.sub("", own)
            role = next((role for role, names in ROLES.items() if stem.lower() in names), None)
            if role is None or suffix_of(path) not in SUFFIXES or not path.is_file():
                continue
            fixed = glob.escape(str(parent / stem))
            source = str(path) if stem == own else f"{fixed}-*{path.name[len(own) :]}"
            if found.setdefault(role, source) != source:
                raise ValueError(f"{str(folder)!r}: there are two files for {role}: {found[role]} and {source}")
        if found:
            return found
    return {}


def is_record_file(path: Path) -> bool:
    """Returns True if a file's suffix, in upper or lower case, is that of a file of records."""
    return suffix_of(path) in RECORD_SUFFIXES


def is_document_file(path: Path) -> bool:
    """Returns True if it is a file of source code or text, by its suffix."""
    # Minified scripts are build products next to the sources.
    return path.suffix.lower() in DOCUMENT_SUFFIXES and ".min." not in path.name


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and its subfolders, sorted by path, without hidden files and build products."""
    return sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())


def glob_files(pattern: str) -> tuple[Path, list[Path]]:
    """The fixed part of a glob, and the files that it finds, sorted by path."""
    fixed = Path(*takewhile(lambda part: not glob.has_magic(part), PurePath(pattern).parts))
    # glob.iglob leaves hidden files and folders out; pathlib's glob does not.
    found = (Path(path) for path in glob.iglob(pattern, recursive=True))
    kept = {path for path in found if path.is_file() and not _in_junk(path.relative_to(fixed).parts[:-1])}
    return fixed, sorted(kept, key=lambda path: path.as_posix())


def is_data_file(path: Path) -> bool:
    """Returns True if a file's suffix is one of data files, readable here or not."""
    return suffix_of(path) in DATA_SUFFIXES


def source_text(path: Path) -> str | None:
    """A file's text with line feeds as line ends; None if it is binary (not UTF-8, or with a zero byte)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and not _in_junk([name])]
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _in_junk(names: Iterable[str]) -> bool:
    return any(name in _JUNK or name.endswith(".egg-info") for name in names)
