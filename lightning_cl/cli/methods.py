"""The methods of a comparison: overlays and strengths from the command line, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning_cl.cli.overlays import config_files
from lightning_cl.cli.seeds import SettingsOf
from lightning_cl.cli.strengths import read_numbers, set_strength
from lightning_cl.cli.task_order import all_names

PLAIN = "plain"
"""The configuration without an overlay, which the others are compared with."""


@dataclass(frozen=True)
class Method:
    """One of the methods that are compared.

    Args:
        name: unique; with a strength, the overlay's name and the strength.
        family: the overlay's name.
        overlay: the file; None for the plain configuration.
        trial: what the run is asked beyond its command line: a strength.
        arguments: of its ``fit``, without a seed.
        settings: of that command line, as parsed.
    """

    name: str
    family: str
    overlay: str | None
    trial: dict[str, Any] | None
    arguments: tuple[str, ...]
    settings: dict[str, Any]

    def key(self, seed: int | None, order: Sequence[str] | None) -> str:
        """A hash of all that decides on a run: it names the run in the folder of the comparison."""
        content = json.dumps([self.settings, self.trial, seed, order], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_methods(
    overlays: Sequence[str], strengths: Sequence[str], arguments: Sequence[str], settings_of: SettingsOf
) -> list[Method]:
    """The plain configuration and the methods of ``--methods``, each with its strengths.

    Args:
        overlays: the values of ``--methods``.
        strengths: the values of ``--strengths``.
        arguments: the command line of the plain ``fit``.
        settings_of: gives the settings of a command line.

    Raises:
        ValueError: for files that are not there, equal names, strengths for a method that has none, and methods that
            cannot be compared; the message names them.
    """
    files = read_overlays(overlays)
    tried = read_strengths(strengths, list(files))
    plain = settings_of(list(arguments))
    _check_matrix(PLAIN, plain, plain)
    methods = [Method(PLAIN, PLAIN, None, None, tuple(arguments), plain)]
    for name, path in files.items():
        own = with_overlay(arguments, path)
        settings = settings_of(own)
        _check_matrix(name, settings, plain)
        if name not in tried:
            methods.append(Method(name, name, path, None, tuple(own), settings))
            continue
        callback, values = tried[name]
        for value in values:
            trial = {"method": callback, "strength": value}
            _check_strength(name, settings, trial)
            methods.append(Method(f"{name} {value:g}", name, path, trial, tuple(own), settings))
    names = [method.name for method in methods]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"--methods: two methods would have the name {twice!r}; give one of them another, as name=path"
        )
    return methods


def read_overlays(given: Sequence[str]) -> dict[str, str]:
    """The overlays by name: a file's name without its end, or ``name=path``.

    Raises:
        ValueError: if there is none, a file is missing, or two have one name.
    """
    files: dict[str, str] = {}
    for part in (part.strip() for value in given for part in value.split(",")):
        name, equals, path = part.partition("=")
        if not equals or Path(part).is_file():
            name, path = Path(part).stem, part
        if not Path(path).is_file():
            there = sorted(str(file) for file in (Path(path).parent or Path()).glob("*.yaml"))
            near = get_close_matches(path, there, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "give overlays, as in configs/methods/replay.yaml"
            raise ValueError(f"--methods={part}: there is no file {path!r}; {hint}")
        if not re.fullmatch(r"[^\s,=:/]([^,=:/\n]*[^\s,=:/])?", name):
            raise ValueError(f"--methods={part}: a method needs a name without , = : and /, as in mine={path}")
        if name in files or name == PLAIN:
            other = "the configuration without an overlay" if name == PLAIN else files[name]
            raise ValueError(
                f"--methods={part}: the name {name!r} is that of {other}; give it another one, as in {name}2={path}"
            )
        files[name] = path
    if not files:
        raise ValueError("--methods: nothing to compare with the plain configuration; give overlays")
    return files


def read_strengths(given: Sequence[str], names: Sequence[str]) -> dict[str, tuple[str | None, list[float]]]:
    """For each method that is tried with strengths: the callback, if one is named, and the strengths.

    Args:
        given: ``0.01,0.1`` for all methods, ``ewc=0.01,0.1`` for one, ``ewc:EWC=0.01,0.1`` for a callback of one.
        names: the methods.

    Raises:
        ValueError: if they are no strengths, or of no method.
    """
    found: dict[str, tuple[str | None, list[float]]] = {}
    for text in given:
        target, equals, numbers = text.rpartition("=")
        name, _, callback = target.partition(":")
        values = read_numbers(numbers)
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"--strengths={text}: expected different numbers of at least 0, as in 0.01,0.1, or for one method, as"
                f" in {names[0]}=0.01,0.1"
            )
        if equals and name not in names:
            raise ValueError(f"--strengths={text}: there is no method {name!r}; the methods are {', '.join(names)}")
        for method in [name] if equals else names:
            if method in found:
                raise ValueError(f"--strengths={text}: {method} has strengths already; give all of them together")
            found[method] = (callback or None, values)
    return found


def with_overlay(arguments: Sequence[str], path: str) -> list[str]:
    """A command line with one more ``--config`` after its others, so that its single options still win."""
    last = max((position for position, _ in config_files(arguments)), default=0)
    return [*arguments[: last + 1], "--config", path, *arguments[last + 1 :]]


def _check_matrix(name: str, settings: dict[str, Any], plain: dict[str, Any]) -> None:
    """Refuses a method that measures something else than the plain configuration, or nothing."""
    ours, theirs = _matrix(settings), _matrix(plain)
    if ours is None:
        raise ValueError(f"{name}: without a TaskMatrix there is nothing to compare; add one to trainer.callbacks")
    for key in ("monitor", "mode", "preset"):
        if theirs is not None and ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{name}: its TaskMatrix has {key}={ours.get(key)}, the plain configuration has {theirs.get(key)}"
            )
    tasks, others = all_names(settings["data"]["tasks"]), all_names(plain["data"]["tasks"])
    if tasks != others:
        raise ValueError(
            f"{name}: its tasks are {', '.join(tasks)}, those of the plain configuration {', '.join(others)}"
        )


def _matrix(settings: dict[str, Any]) -> dict[str, Any] | None:
    callbacks = (settings.get("trainer") or {}).get("callbacks") or []
    several = callbacks if isinstance(callbacks, list) else [callbacks]
    for callback in several:
        if callback["class_path"].rpartition(".")[2] == "TaskMatrix":
            return callback.get("init_args") or {}
    return None


def _check_strength(name: str, settings: dict[str, Any], trial: dict[str, Any]) -> None:
    callbacks = [
        SimpleNamespace(class_path=callback["class_path"], init_args=dict(callback.get("init_args") or {}))
        for callback in settings["trainer"]["callbacks"]
    ]
    try:
        set_strength(callbacks, trial)
    except ValueError as error:
        hint = (
            "give strengths to a method that has one: --strengths ewc=0.1,1, or ewc:EWC=0.1,1 for one of its callbacks"
        )
        raise ValueError(f"{name}: {error}; {hint}") from error
