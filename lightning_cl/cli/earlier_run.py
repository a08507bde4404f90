"""``--run RUN`` and ``--add name=path``: a command that resumes from an earlier run.

Before the parser sees the command line, the two options are replaced by those that they stand for. The run's saved
configuration, with the new tasks after the old ones, becomes the first ``--config``; its checkpoint becomes
``--ckpt_path``. All other options therefore override as usual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.cli.parser import take_flag, take_option
from lightning_cl.cli.trust import ask_for_trust
from lightning_cl.cli.yaml_files import read_yaml
from lightning_cl.core.checkpoint_io import find_last_checkpoint, is_whole
from lightning_cl.core.task_files import BEFORE_END

_RUN, _ADD = "--run runs/quickstart/version_0", "--add mails=data/mails.jsonl"


@dataclass(frozen=True)
class EarlierRun:
    """The run that a command resumes from.

    Args:
        folder: its folder; `fit` writes nothing there.
        checkpoint: the one that it resumes from.
        added: the names of the new tasks.
    """

    folder: Path
    checkpoint: Path
    added: tuple[str, ...]

    def check(self, folder: Path, tasks: Sequence[str]) -> None:
        """Checks that the settings after ``--run`` leave the old run, and the new tasks, as they are.

        Args:
            folder: where the new run will write.
            tasks: the names of the new run's tasks.

        Raises:
            ValueError: if the old run would be overwritten, or a new task is not among the tasks.
        """
        if folder.resolve() == self.folder.resolve():
            raise ValueError(
                f"--run={self.folder}: the new run would write into the same folder; give a logger, or another"
                " --trainer.default_root_dir"
            )
        for name in self.added:
            if name not in tasks:
                raise ValueError(
                    f"--add={name}=…: a later --config replaces data.tasks by {list(tasks)}; leave the tasks out there"
                )


def expand_run(arguments: Sequence[str], subcommands: Sequence[str]) -> tuple[list[str], EarlierRun | None]:
    """Writes ``--run`` and ``--add`` as the options that they stand for.

    Args:
        arguments: the command line.
        subcommands: the names of the subcommands.

    Returns:
        the command line for the parser, and the earlier run; None where there is no ``--run``.

    Raises:
        ValueError: for options that do not go together, or a task that cannot be added.
        FileNotFoundError: if the run has no configuration, or no checkpoint.
    """
    runs, rest = take_option(arguments, _RUN)
    additions, rest = take_option(rest, _ADD)
    trusted, rest = take_flag(rest, "--trust")
    if trusted and not runs:
        raise ValueError(f"--trust: of what an earlier run's configuration imports; give its folder too: {_RUN}")
    if not runs:
        if additions:
            raise ValueError(f"--add={additions[0]}: a task is added to an earlier run; give its folder too: {_RUN}")
        return rest, None
    position = next((position for position, argument in enumerate(rest) if argument in subcommands), None)
    if position is None:
        return rest, None  # the parser says what is missing
    if len(runs) > 1:
        raise ValueError(f"--run: given {len(runs)} times; a run goes on from one folder")
    if any(argument.split("=")[0] == "--ckpt_path" for argument in rest):
        raise ValueError(
            "--run and --ckpt_path: give one of them; --run finds the checkpoint of a run, --ckpt_path needs the"
            " configuration beside it: --config RUN/config.yaml --ckpt_path RUN/tasks/…"
        )
    subcommand, folder = rest[position], Path(runs[0])
    if additions and subcommand != "fit":
        raise ValueError(f"--add={additions[0]}: only `fit` trains a new task; for {subcommand}, give --run alone")
    config = _saved_config(folder, subcommand)
    ask_for_trust(folder, config, trusted)
    names = []
    for addition in additions:
        names.append(_add(config, addition))
    if subcommand == "fit" and not additions:
        try:
            checkpoint = find_last_checkpoint(folder)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"--run={folder}: there is no checkpoint to go on from; start anew with --config {folder}/config.yaml"
            ) from None
    else:
        checkpoint = last_boundary(folder)
    # As JSON, whose strings no reader of YAML takes for numbers.
    start = [*rest[: position + 1], "--config", json.dumps(config, default=str)]
    return [*start, *rest[position + 1 :], f"--ckpt_path={checkpoint}"], EarlierRun(folder, checkpoint, tuple(names))


def last_boundary(run: Path) -> Path:
    """The checkpoint after the last task of a run that is whole: ``tasks/<index>-<name>.ckpt``.

    Args:
        run: the run's folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    whole = [path for path in (run / "tasks").glob("*.ckpt") if not path.name.endswith(BEFORE_END)]
    found = [(path, re.match(r"(\d+)-", path.name)) for path in whole]
    ordered = sorted(((int(m[1]), path.stat().st_mtime_ns, path) for path, m in found if m), reverse=True)
    for _, _, path in ordered:
        if is_whole(path):
            return path
        rank_zero_warn(f"{path} is damaged or cut off; the task before it is gone on from")
    raise FileNotFoundError(
        f"--run={run}: there is no whole checkpoint {run}/tasks/*.ckpt, as a run leaves behind each task; to go on"
        f" inside the first task: lightning-cl fit --run {run}"
    )


def _saved_config(folder: Path, subcommand: str) -> dict[str, Any]:
    """The configuration of a run, without what belonged to that one start of it."""
    path = folder / "config.yaml"
    if not path.is_file():
        below = sorted(folder.glob("*/config.yaml"), key=lambda found: found.stat().st_mtime_ns)
        hint = f"did you mean --run {below[-1].parent}?" if below else f"give the folder of a run, as in {_RUN}"
        raise FileNotFoundError(f"--run={folder}: there is no config.yaml in it; {hint}")
    config = read_yaml(path, f"--run={folder}")
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"--run={folder}: {path} is not the configuration of a run: it has no `data`")
    of_fit = ("load_best", "keep_checkpoints") if subcommand != "fit" else ()
    for key in ("ckpt_path", "verbose", "return_predictions", *of_fit):
        config.pop(key, None)
    loggers = (config.get("trainer") or {}).get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        settings = logger.get("init_args") if isinstance(logger, dict) else None
        if settings and settings.get("version") is not None:
            settings["version"] = None  # the folder of the old run
    return config


def _add(config: dict[str, Any], addition: str) -> str:
    """Puts a new task after the old ones, and returns its name."""
    name, equals, path = addition.partition("=")
    name = name.strip()
    if not (name and equals and path):
        raise ValueError(f"--add={addition}: expected name=path, as in {_ADD} or --add cpp=sample:cpp")
    tasks = config["data"].get("tasks") or {}
    if isinstance(tasks, dict) and {"benchmark", "folder"} <= tasks.keys():
        # The tasks are those of a folder, and `more` has those after them.
        config["data"]["tasks"] = {**tasks, "more": {**(tasks.get("more") or {}), name: path}}
        return name
    names = list(tasks) if isinstance(tasks, dict) else [_name(task) for task in tasks]
    if name in map(str, names):
        raise ValueError(
            f"--add={addition}: the run has a task of that name already (its tasks: {', '.join(map(str, names))}); give"
            " the new one another name"
        )
    if isinstance(tasks, dict):
        config["data"]["tasks"] = {**tasks, name: path}
    else:
        config["data"]["tasks"] = [*tasks, {"name": name, "train": path}]
    return name


def _name(task: Any) -> Any:
    return (task.get("init_args") or task).get("name") if isinstance(task, dict) else None
