"""The tasks of a sequence, from what people write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_cl.data.text.sources import is_dataset_dict, locate
from lightning_cl.tasks import Task


def as_tasks(tasks: Any) -> list[Task]:
    """A list of tasks from ``{name: data}``, ``{name: {arguments of Task}}``, or a list of tasks.

    Raises:
        ValueError: if there are none, two of one name, or none to train on.
        TypeError: if it is something else, or an argument of a task has an unknown name.
    """
    if isinstance(tasks, dict):
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
    """Tells if something is a data set of its own, and no record of one."""
    if isinstance(item, (str, Path)):
        return locate(item).kind != "missing" and len(str(item)) < 1000
    return not isinstance(item, (dict, int, float)) and (hasattr(item, "__len__") or hasattr(item, "__iter__"))


def is_data(source: Any) -> bool:
    """Returns True if a task's data, where it is no text, gives samples or batches."""
    if isinstance(source, (list, tuple)):
        return bool(source) and not isinstance(source[0], (int, float))
    if isinstance(source, (str, Path, dict, set)) or hasattr(source, "iloc"):  # pandas: rows are not its items
        return False
    return isinstance(source, L.LightningDataModule) or hasattr(source, "__iter__") or hasattr(source, "__getitem__")


def describe_source(source: Any) -> str:
    """Describes what somebody gave as data, for messages."""
    if isinstance(source, (list, tuple)) and not source:
        return "an empty list"
    if hasattr(source, "iloc"):
        return f"a pandas {type(source).__name__} (give frame.to_dict('records'))"
    columns = getattr(source, "column_names", None)
    if columns:
        return f"a {type(source).__name__} with the columns {columns}"
    return f"{source!r}" if isinstance(source, (int, float, str, Path)) else f"a {type(source).__name__}"
