"""The help of a subcommand in two screens: settings that a user makes first; ``--help all`` shows the rest."""

from __future__ import annotations

import inspect
import re
import textwrap
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Iterator

from lightning_cl import callbacks, models
from lightning_cl.cli.parser import EarlyOption

WIDTH = 100
_COLUMN = 28
_EXAMPLES = """  lightning-cl {name} --config configs/quickstart.yaml
  lightning-cl {name} --config configs/quickstart.yaml --config configs/methods/ewc_replay.yaml
  lightning-cl {name} --config my.yaml --data.batch_size 4 --trainer.precision bf16-true"""
# In the order in which somebody needs them; an option that a subcommand does not have is left out.
_GROUPS = {
    "run": [
        "config",
        "print_config",
        "run",
        "add",
        "ckpt_path",
        "seeds",
        "against",
        "permute-tasks",
        "strengths",
        "first",
        "load_best",
        "keep_checkpoints",
        "trust",
    ],
    "data": [
        *("data.tasks", "data.tokenizer", "data.max_length", "data.batch_size", "data.packing"),
        *("data.val_fraction", "data.on_bad_record", "data.template", "data.num_workers"),
    ],
    "trainer": [
        *("trainer.max_epochs", "trainer.max_steps", "trainer.accelerator", "trainer.devices", "trainer.precision"),
        *("trainer.accumulate_grad_batches", "trainer.gradient_clip_val", "trainer.fast_dev_run"),
        *("trainer.default_root_dir", "seed_everything"),
    ],
}


def wants_all(arguments: list[str]) -> bool:
    """Returns True if a command line asks for the help of all options: ``--help all``."""
    return any(arguments[i : i + 2] in (["--help", "all"], ["-h", "all"]) for i in range(len(arguments)))


def first_help(parser: ArgumentParser, name: str, description: str) -> str:
    """Formats the short help of a subcommand, at most :data:`WIDTH` columns wide.

    Args:
        parser: of the subcommand, with all options.
        name: of the subcommand.
        description: its one sentence.
    """
    options = {option.lstrip("-"): action for action in parser._actions for option in action.option_strings}
    lines = [description, "", _EXAMPLES.format(name=name), ""]
    for group, names in _GROUPS.items():
        lines.append(f"{group}:")
        for option in names:
            if option in options and options[option].help is not SUPPRESS:
                form = options[option].metavar if isinstance(options[option], EarlyOption) else None
                lines += _lines(f"--{option} {form}" if form else f"--{option}", _text(options[option]))
        lines.append("")
        if group == "data":
            lines += ["model, by --model CausalLM or a class of yours:"]
            lines += _lines("--model.ARGUMENT", f"CausalLM takes {', '.join(_arguments(models.CausalLM))}")
            lines += _lines("--model.help CausalLM", "what each of them means")
            lines += ["", "methods, by --trainer.callbacks+ NAME, or `callbacks+:` in a file:"]
            for family, members in _families():
                lines += _lines(family, ", ".join(members))
            lines += [*_lines("--trainer.callbacks.help EWC", "the arguments of a method"), ""]
    lines.append(f"everything, also all that Lightning offers: lightning-cl {name} --help all")
    return "\n".join(lines) + "\n"


def _lines(left: str, right: str) -> Iterator[str]:
    """Gives the lines of one entry: a name, and the text next to it."""
    wrapped = textwrap.wrap(right, WIDTH - _COLUMN - 2) or [""]
    if len(left) > _COLUMN - 2:
        yield f"  {left}"
    else:
        yield f"  {left:<{_COLUMN}}{wrapped.pop(0)}".rstrip()
    yield from (f"  {'':{_COLUMN}}{line}" for line in wrapped)


def _text(action: Action) -> str:
    """Returns the first sentence of an option's help, and its default where that is short."""
    text = re.sub(r"\s+", " ", str(action.help or "")).replace("%%", "%")
    text = re.sub(r":\w+:`~?[\w.]*?(\w+)`", r"\1", text).replace("``", "")  # marks of a docstring
    sentence = re.split(r"(?<=[a-z`)])[.;] ", text)[0].rstrip(".")
    default = action.default
    shown = isinstance(default, (bool, int, float, str)) and default != SUPPRESS and len(str(default)) < 12
    return f"{sentence} (default: {default})" if shown and "default" not in sentence.lower() else sentence


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]


def _families() -> list[tuple[str, list[str]]]:
    """Returns the methods by the folder that they are in."""
    families: dict[str, list[str]] = {}
    for name in callbacks.__all__:
        family = getattr(callbacks, name).__module__.split(".")[2]
        # A base is in a file that does not have its name, and is of no use to a user by itself.
        if family != "method" and not name.endswith(("Callback", "Penalty")):
            families.setdefault(family, []).append(name)
    return sorted(families.items(), reverse=True)
