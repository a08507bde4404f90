"""Several ``--config`` files: what they say together, and where in them a name stands."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_cl.cli.yaml_files import read_yaml

_REPLACED = {("data", "tasks")}
"""Dictionaries that are a sequence: a later file gives another one."""
_KINDS = ("class_path", "model_type")
"""Keys that say what a dictionary describes: of another class or architecture nothing is kept."""


def config_files(arguments: Sequence[str]) -> list[tuple[int, str]]:
    """The ``--config`` files of a command line: the position of each argument that names one, and its path."""
    found = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and equals:
            found.append((position, value))
        elif name == "--config" and position + 1 < len(arguments):
            found.append((position + 1, arguments[position + 1]))
    return found


def contents(arguments: Sequence[str]) -> list[dict[str, Any]]:
    """The content of each ``--config`` file; nothing for one that cannot be read, which the parser says."""
    read = []
    for _, path in config_files(arguments):
        try:
            content = read_yaml(Path(path), "--config")
        except ValueError:
            content = None
        read.append(content if isinstance(content, dict) else {})
    return read


def merged_overlays(arguments: Sequence[str], folder: Path) -> list[str]:
    """A command line whose later files keep what earlier ones say in the same dictionary.

    The parser merges the settings of objects. It replaces dictionaries that are values, as the architecture of a model
    or the arguments of LoRA, so an overlay that changes one of their keys would lose the others. Lists are replaced,
    and ``callbacks+:`` appends, as always. ``data.tasks`` is a sequence, and a later one replaces it.

    Args:
        arguments: the command line.
        folder: for the files that are written in place of those that have to be completed.
    """
    result, so_far = list(arguments), dict[str, Any]()
    for number, ((position, path), content) in enumerate(
        zip(config_files(arguments), contents(arguments), strict=True)
    ):
        completed = _completed(content, so_far, ())
        if completed != content and number > 0:
            file = folder / f"{number}-{Path(path).name}"
            file.write_text(yaml.safe_dump(completed, sort_keys=False), encoding="utf-8")
            name = "--config=" if result[position].startswith("--config=") else ""
            result[position] = f"{name}{file}"
        so_far = _completed(content, so_far, (), everything=True)
    return result


def _completed(new: dict[str, Any], old: dict[str, Any], path: tuple[str, ...], everything: bool = False) -> Any:
    """`new` with what `old` has beyond it, in dictionaries that both have; with `everything`, also elsewhere."""
    if path in _REPLACED or any(new.get(kind, old.get(kind)) != old.get(kind) for kind in _KINDS):
        return copy.deepcopy(new)
    inside = everything or _is_value(path)
    result = copy.deepcopy(old) if inside else {}
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(old.get(key), dict)
        result[key] = _completed(value, old[key], (*path, key), everything) if both else copy.deepcopy(value)
    return result


def _is_value(path: tuple[str, ...]) -> bool:
    """Tells if a dictionary is a value, and no group of settings: it stands under an argument of an object."""
    return "init_args" in path[:-1] and path[-1] != "init_args"


def owners(configs: Sequence[dict[str, Any]], option: str) -> Iterator[str]:
    """The classes of the objects in files that are given an option."""
    for config in configs:
        for node in _nodes(config):
            given = node.get("init_args")
            if isinstance(given, dict) and option in given and isinstance(node.get("class_path"), str):
                yield node["class_path"].split(".")[-1]


def paths_to(configs: Sequence[dict[str, Any]], group: str, option: str) -> Iterator[str]:
    """Finds an option of that name below a group of settings, as the command line writes it."""
    for config in configs:
        for path in _paths(config.get(group), option):
            short = [part for part in path if part not in ("init_args", "dict_kwargs")]
            yield ".".join((group, *short))


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _nodes(item)


def _paths(value: Any, option: str) -> Iterator[tuple[str, ...]]:
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key == option:
            yield (key,)
        yield from ((str(key), *path) for path in _paths(item, option))
