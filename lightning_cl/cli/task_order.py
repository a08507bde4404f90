"""``--permute-tasks``: an order of the tasks for each seed, the same one for every method at that seed.

A method may look good because the tasks came in a lucky order. With few tasks the orders of successive seeds are drawn
without repetition; beyond that each seed shuffles the list.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_cl.data.text.sources import as_tasks

_LISTED = 6  # tasks whose orders, at most 720, are all written down


def order_for(names: Sequence[str], seed: int) -> list[str]:
    """The order of the tasks at a seed: it depends on the seed, the names' number and their order in the list alone.

    Args:
        names: the tasks that are trained, as the configuration has them.
        seed: of the run.
    """
    if len(names) <= _LISTED:
        orders = list(itertools.permutations(names))
        random.Random("task orders").shuffle(orders)
        return list(orders[seed % len(orders)])
    order = list(names)
    random.Random(f"task order {seed}").shuffle(order)
    return order


def trained_names(tasks: Any) -> list[str]:
    """The names of the tasks that are trained, from ``data.tasks`` as it was parsed: a dictionary or a list."""
    return [name for name, watched in _named(tasks) if not watched]


def all_names(tasks: Any) -> list[str]:
    """The names of all tasks, also of those that are only watched."""
    return [name for name, _ in _named(tasks)]


def set_order(data: Any, order: Sequence[str]) -> None:
    """Puts the trained tasks of a parsed configuration into another order; watched ones keep their positions.

    Args:
        data: the ``data`` group, with ``tasks``.
        order: the names of all trained tasks.

    Raises:
        ValueError: if they are others.
    """
    tasks = data["tasks"]
    named = _named(tasks)
    if sorted(order) != sorted(trained_names(tasks)):
        raise ValueError(f"the order {', '.join(order)} is not of the tasks {', '.join(trained_names(tasks))}")
    if _is_folder(tasks):
        if tasks.get("more"):
            raise ValueError(
                "--permute-tasks: not with `more` tasks after a benchmark's folder; list the tasks one by one"
            )
        data["tasks"] = {**tasks, "order": list(order)}
        return
    following = iter(order)
    names = [name if watched else next(following) for name, watched in named]
    content = dict(
        zip([name for name, _ in named], tasks.values() if isinstance(tasks, Mapping) else tasks, strict=True)
    )
    ordered = {name: content[name] for name in names}
    data["tasks"] = ordered if isinstance(tasks, Mapping) else list(ordered.values())


def _is_folder(tasks: Any) -> bool:
    """Tells if tasks are given as the folder of a published benchmark."""
    return isinstance(tasks, Mapping) and {"benchmark", "folder"} <= tasks.keys()


def _named(tasks: Any) -> list[tuple[str, bool]]:
    """Each task's name, and True if it is only watched."""
    if _is_folder(tasks):
        return [(task.name, task.watched) for task in as_tasks(dict(tasks))]
    if isinstance(tasks, Mapping):
        return [
            (str(name), value is None or (isinstance(value, Mapping) and value.get("train") is None))
            for name, value in tasks.items()
        ]
    found = []
    for task in tasks:
        settings = _get(task, "init_args") or task
        found.append((str(_get(settings, "name")), _get(settings, "train") is None))
    return found


def _get(task: Any, key: str) -> Any:
    return task.get(key) if hasattr(task, "get") else getattr(task, key, None)
