"""A command line parser whose answer to a typo is the right name."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with line breaks of the description kept."""


class HelpfulParser(LightningArgumentParser):
    """Lightning's parser; an error is one message with the names that would have been right."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        hints = list(dict.fromkeys(self._hints(message)))
        problem = _essence(message)
        program = self.prog.replace(" [options]", "").split(" ")[0]
        lines = [f"{program}: error: {problem}", *(f"  {hint}" for hint in hints)]
        lines.append(f"  all arguments: {program} fit --help; all settings of a run: --print_config")
        sys.stderr.write("\n".join(lines) + "\n")
        sys.exit(2)

    def _hints(self, message: str) -> Iterator[str]:
        for option in re.findall(r"(?:unrecognized arguments|ambiguous option): --([\w.+]+)", message):
            names = [name for name in self._option_names() if not name.endswith((".help", "+"))]
            yield _closest(f"--{option}", names, "--{}", wanted=option)
        for key in re.findall(r"[Kk]ey ['\"]?([\w.]+)['\"]? is not expected", message):
            names = self._option_names()
            yield _closest(key, [name for name in names if not name.endswith((".help", "+"))], "{}", wanted=key)
        owner = re.search(r"given class_path '([\w.]+)'", message)
        for option in re.findall(r"Option '([\w.]+)' is not accepted", message):
            classes = _classes()
            name = owner.group(1).split(".")[-1] if owner else ""
            if classes.get(name):
                yield f"{name} takes {', '.join(classes[name])}"
                yield _closest(option, classes[name], "{}", wanted=option)
            else:
                known: dict[str, list[str]] = {}
                for cls, arguments in classes.items():
                    for argument in arguments:
                        known.setdefault(argument, []).append(cls)
                for match in difflib.get_close_matches(option, known, n=1, cutoff=0.6):
                    yield f"did you mean {match!r}, an argument of {', '.join(known[match][:3])}?"
        for name in re.findall(
            r"(?:import path string:|Unexpected import path format|class_path) '?([\w.]+)'?", message
        ):
            short = name.split(".")[-1]
            if short not in _classes():
                yield _closest(short, list(_classes()), "{}", wanted=short)

    def _option_names(self) -> list[str]:
        return [option.lstrip("-") for action in self._actions for option in action.option_strings if "--" in option]


def _essence(message: str) -> str:
    """The line of jsonargparse's nested message that says what is wrong, and where."""
    where = re.match(r'Parser key "([^"]+)"', message)
    core = re.findall(
        r"(?:Problem with given class_path '[\w.]+':\s*)?(?:Option|Expected a dot import path)[^\n]*", message
    )
    if where is None or not core:
        return message
    text = " ".join(core[0].split()).replace("Problem with given class_path", "class")
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", text)
    return f"{where.group(1)}: {text}"


def _closest(given: str, names: list[str], form: str, wanted: str) -> str:
    # By the last part too: `--trainer.max_stepz` is nearer to `trainer.max_steps` than to anything else.
    matches = difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)
    if not matches:
        return f"{given}: nothing of a similar name is known"
    return f"did you mean {' or '.join(form.format(match) for match in matches)}?"


def _classes() -> dict[str, list[str]]:
    """Classes that a configuration may name, with their arguments."""
    import lightning_cl

    classes = {name: getattr(lightning_cl, name) for name in lightning_cl.__all__}
    pending = [Callback]
    while pending:
        for subclass in pending.pop().__subclasses__():
            if not subclass.__name__.startswith("_"):
                classes.setdefault(subclass.__name__, subclass)
            pending.append(subclass)
    return {
        name: [argument for argument in inspect.signature(cls).parameters if argument not in ("args", "kwargs")]
        for name, cls in classes.items()
        if inspect.isclass(cls)
    }
