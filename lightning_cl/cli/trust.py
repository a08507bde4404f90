"""``--trust``: a run's folder that another person has made names code to run; nothing is imported without a word."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_cl.cli.yaml_files import read_yaml

_KNOWN = ("lightning_cl", "torch", "lightning", "transformers")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_TRUSTED = "LIGHTNING_CL_TRUSTED_RUN"  # for the processes of further ranks, which Lightning starts


def ask_for_trust(folder: Path, config: Any, trusted: bool) -> None:
    """Has the user agree to what a run's configuration would import from elsewhere, on a terminal or by ``--trust``.

    Args:
        folder: of the run.
        config: its configuration.
        trusted: True if ``--trust`` was given.

    Raises:
        ValueError: if nobody agreed; the message lists what would be imported.
    """
    found = list(dict.fromkeys(foreign_code(config)))
    if not found:
        return
    if trusted or ("LOCAL_RANK" in os.environ and os.environ.get(_TRUSTED) == str(folder.resolve())):
        os.environ[_TRUSTED] = str(folder.resolve())
        return
    listed = "; ".join(found)
    if sys.stdin.isatty() and sys.stderr.isatty() and "LOCAL_RANK" not in os.environ:
        print(f"{folder}/config.yaml would run code that is not of {', '.join(_KNOWN)}: {listed}", file=sys.stderr)
        print("Do you trust it? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            os.environ[_TRUSTED] = str(folder.resolve())
            return
    raise ValueError(
        f"--run={folder}: its config.yaml would run code that is not of {', '.join(_KNOWN)}: {listed}. If you know"
        " where it comes from, give --trust"
    )


def foreign_code(value: Any, key: str = "") -> Iterator[str]:
    """Lists what a configuration would run or import from outside of this package, torch, lightning and transformers.

    A parser imports what a string names where a class or function is expected. Which strings these are, it knows only
    after it has imported their owners. So every string that names something importable counts.

    Args:
        value: the configuration, or a part of it.
        key: the name that it stands under.

    Yields:
        each in words.
    """
    if isinstance(value, dict):
        for name, part in value.items():
            if name == "trust_remote_code" and str(part).lower() not in ("false", "none", "null", "no", "off", "0", ""):
                yield "trust_remote_code (Python files in the folder or repository of a model or tokenizer)"
            yield from foreign_code(part, str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from foreign_code(part, key)
    elif isinstance(value, str):
        yield from _named_by(value.strip(), key)


def _named_by(text: str, key: str) -> Iterator[str]:
    if text.lower().endswith((".yaml", ".yml")) and len(text) < 1000 and Path(text).is_file():
        yield from foreign_code(read_yaml(Path(text), key), key)
    elif "${" in text:
        yield f"{key}: {text!r}, which is put together when it is read"
    elif _PATH.fullmatch(text):
        root = text.split(".")[0]
        if root not in _KNOWN and (key == "class_path" or _is_importable(root, text)):
            yield text
    elif text[:1] in ("[", "{", "-") or "class_path" in text or "trust_remote_code" in text:
        try:
            inner = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            inner = None
        if isinstance(inner, (dict, list)):
            yield from foreign_code(inner, key)


def _is_importable(root: str, text: str) -> bool:
    if root in sys.stdlib_module_names and Path(text).exists():
        return False  # a data file called code.txt
    if Path(f"{root}.py").is_file() or (Path(root).is_dir() and any(Path(root).glob("*.py"))):
        return True  # in the working directory
    try:
        return importlib.util.find_spec(root) is not None
    except (ImportError, ValueError):
        return True
