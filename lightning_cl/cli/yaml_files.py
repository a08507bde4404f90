"""Configuration files that a parser can read: looked through before it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 100_000  # entries that aliases may stand for
_SUFFIXES = (".yaml", ".yml")


def read_yaml(path: Path, option: str) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.
        option: the option that names it, for messages.

    Raises:
        ValueError: if it cannot be read, is nested too deeply, or its aliases stand for far more than is written; the
            message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        sizes: dict[int, int] = {}
        size = _size(node, sizes, set()) if node is not None else 0
        if size > max(_LARGEST, 10 * len(sizes)):
            raise ValueError(
                f"its aliases, as in *name, stand for {size:.3g} entries, and {len(sizes)} are written; write out what"
                " is needed"
            )
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{option}: {path} cannot be read (it is nested too deeply)") from error
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} cannot be read ({' '.join(str(error).split())})") from error


def check_files(arguments: Sequence[str]) -> None:
    """Looks through every YAML file that a command line names.

    Raises:
        ValueError: if one cannot be read; the message names it.
    """
    option = "--config"
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument.startswith("--"):
            option = name
        value = value or argument
        if value.lower().endswith(_SUFFIXES) and len(value) < 1000 and Path(value).is_file():
            read_yaml(Path(value), option)


def _size(node: yaml.Node, sizes: dict[int, int], inside: set[int]) -> int:
    """Counts the entries when each alias is written out."""
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in inside:
        raise ValueError("an alias that contains itself")
    inside.add(id(node))
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    sizes[id(node)] = 1 + sum(_size(part, sizes, inside) for part in parts)
    inside.discard(id(node))
    return sizes[id(node)]
