"""Checks of methods that give each task an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_cl.models.adapter_names import RESERVED
from lightning_cl.models.adapters import list_adapters


def check_task_name(method: str, task: str) -> None:
    """Refuses a task whose name means something else where an adapter is named.

    Raises:
        MisconfigurationException: naming the method and the task.
    """
    if task in RESERVED:
        raise MisconfigurationException(
            f"{method}: task {task!r}: this name means something else where an adapter is named"
            f" ({', '.join(RESERVED)} do); give the task another one"
        )


def foreign_adapters(method: str, module: nn.Module, tasks: Sequence[str], loading: bool) -> list[str]:
    """Returns the tasks that have an adapter in a module and are none of these.

    Args:
        method: the callback's class, for messages.
        module: contains a ``PeftModel``.
        tasks: the tasks that are to have adapters.
        loading: True if a checkpoint's weights are about to be loaded, for which later tasks' adapters go away.

    Raises:
        MisconfigurationException: if there are such tasks and nothing is about to be loaded.
    """
    others = [task for task in list_adapters(module) if task not in tasks]
    if others and not loading:
        raise MisconfigurationException(
            f"{method}: the module has adapters of {others} already, which this run has not trained; start with a new"
            " module, or resume with ckpt_path"
        )
    return others
