"""A command line parser whose answer to a typo is the right name, and options that are read before it."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

import lightning_cl
from lightning_cl.cli.overlays import contents, owners, paths_to


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with line breaks of the description kept."""


class EarlyOption(argparse.Action):
    """An option that :func:`take_option` takes out before the parser: it is here for the help and for typos.

    It leaves nothing in the configuration of a run.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, **settings)


def take_option(arguments: Sequence[str], example: str) -> tuple[list[str], list[str]]:
    """Takes all occurrences of an option out of a command line, ``--name value`` and ``--name=value``.

    Args:
        arguments: the command line.
        example: the option with a value, as in ``--seeds 3``.

    Returns:
        the values, in order, and the arguments that are left.

    Raises:
        ValueError: if a value is missing.
    """
    option = example.split()[0]
    values, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != option:
            rest.append(argument)
            continue
        value = value if equals else next(remaining, "")
        if not value or value.startswith("--"):
            raise ValueError(f"{option}: a value is missing, as in {example}")
        values.append(value)
    return values, rest


def take_flag(arguments: Sequence[str], flag: str) -> tuple[bool, list[str]]:
    """Takes all occurrences of an option without a value out of a command line.

    Returns:
        True if it was there, and the arguments that are left.
    """
    rest = [argument for argument in arguments if argument != flag]
    return len(rest) < len(arguments), rest


class HelpfulParser(LightningArgumentParser):
    """Lightning's parser; an error is one message with the names that would have been right."""

    arguments: Sequence[str] = ()
    """The command line that is being parsed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Else the beginning of an option is taken for it, a typo's too.
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        lines = [f"lightning-cl: error: {_essence(message)}"]
        lines += [f"  {hint}" for hint in dict.fromkeys(self._hints(message))]
        lines.append("  all arguments: lightning-cl fit --help all; all settings of a run: --print_config")
        sys.stderr.write("\n".join(lines) + "\n")
        sys.exit(2)

    def _hints(self, message: str) -> Iterator[str]:
        unknown = r"(?:unrecognized arguments|ambiguous option): --|does not accept option '"
        unexpected = re.findall(r"[Kk]ey ['\"]([\w.]+)['\"] is not expected", message)
        for option in [*re.findall(rf"(?:{unknown})([\w.]+)", message), *unexpected]:
            if not option.startswith(("trainer.callbacks", "subcommand")):
                yield _closest(option, self._option_names())
        classes = _classes()
        owner = re.search(r"given class_path '([\w.]+)'", message)
        for option in re.findall(r"Option '([\w.]+)' is not accepted", message):
            name = owner.group(1).split(".")[-1] if owner else ""
            configs = contents(self.arguments)
            groups = [part.split(".")[0].lstrip("-") for part in self.arguments if f".{option}" in part.split("=")[0]]
            deeper = [path for group in groups for path in paths_to(configs, group, option)]
            if deeper:  # an argument of an object inside of the one that was named
                yield f"did you mean --{deeper[0]}?"
                continue
            if not groups:
                named = next((cls for cls in owners(configs, option) if cls in classes), None)
                if named is not None:
                    yield f"{named} takes {', '.join(classes[named])}"
                    for match in get_close_matches(option, classes[named], n=1, cutoff=0.6):
                        yield f"did you mean {match!r}, an argument of {named}?"
                    continue
            # Whoever writes --model.… means the model.
            if not classes.get(name) and any(argument.startswith("--model.") for argument in self.arguments):
                name = "CausalLM" if get_close_matches(option, classes["CausalLM"], cutoff=0.6) else name
            if classes.get(name):
                yield f"{name} takes {', '.join(classes[name])}"
                yield _closest(option, classes[name])
                continue
            known: dict[str, list[str]] = {}
            for cls, arguments in classes.items():
                for argument in arguments:
                    known.setdefault(argument, []).append(cls)
            for match in get_close_matches(option, known, n=1, cutoff=0.6):
                yield f"did you mean {match!r}, an argument of {', '.join(known[match][:3])}?"
        for name in re.findall(r"(?:import path string: |class_path ')([\w.]+)|no attribute '(\w+)'", message):
            short = "".join(name).split(".")[-1]
            if short not in classes:
                yield _closest(short, list(classes))

    def _option_names(self) -> list[str]:
        """All options, and the groups that they are in."""
        parsers = [self]
        for action in self._actions:
            choices = getattr(action, "choices", None)
            if isinstance(choices, dict):
                parsers += [parser for parser in choices.values() if isinstance(parser, HelpfulParser)]
        names = [
            option.lstrip("-") for parser in parsers for action in parser._actions for option in action.option_strings
        ]
        names = [name for name in names if not name.endswith((".help", "+"))]
        return list(dict.fromkeys(names + [name.split(".")[0] for name in names]))


def _essence(message: str) -> str:
    """The line of jsonargparse's nested message that says what is wrong, and where."""
    where = re.match(r'Parser key "([^"]+)"', message)
    wrong = r"Option [^\n]*|Expected a dot import path[^\n]*|[^\n]*has no attribute[^\n]*"
    core = re.search(rf"(?:Problem with given class_path '[\w.]+':\s*)?(?:{wrong})", message)
    if where is None or core is None:
        return message
    text = " ".join(core.group().split()).replace("Problem with given class_path", "class").lstrip("- ")
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", text)
    text = re.sub(r".*module '(\S+)' has no attribute '(\w+)'", r"there is no class \1.\2", text)
    return f"{where.group(1)}: {text}"


def _closest(given: str, names: list[str]) -> str:
    matches = get_close_matches(given, names, n=3, cutoff=0.6)
    if not matches and "." in given:  # a misspelt group: `trainr.max_steps`
        matches = get_close_matches(given.split(".")[0], names, n=1, cutoff=0.6)
    if not matches:
        return f"{given}: nothing of a similar name is known"
    return f"did you mean {' or '.join(matches)}?"


def _classes() -> dict[str, list[str]]:
    """Classes that a configuration may name, with their arguments."""
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
