"""Names of tasks as names of adapters in peft, and back."""

from __future__ import annotations

import re
import sys

RESERVED = ("all", "mean", "sum", "base")
"""Names that no task with an adapter can have: they mean something else where a task is named."""

_PREFIX = "task-"


def adapter_name(task: str) -> str:
    """The name of a task's adapter in peft, where points and the names of submodules would do harm.

    Letters and digits stay, any other character becomes its code: ``my.task`` is ``task-my-2e-task``.
    """
    return _PREFIX + re.sub(r"[^A-Za-z0-9]", lambda found: f"-{ord(found[0]):x}-", task)


def task_name(adapter: str) -> str | None:
    """The task of an adapter's name in peft, as :func:`adapter_name` made it; None for any other adapter."""
    if not adapter.startswith(_PREFIX):
        return None
    parts = adapter.removeprefix(_PREFIX).split("-")
    codes = [int(part, 16) if re.fullmatch(r"[0-9a-f]{1,6}", part) else -1 for part in parts[1::2]]
    if len(parts) % 2 == 0 or not all(0 <= code <= sys.maxunicode for code in codes):
        return None
    task = "".join(chr(int(part, 16)) if i % 2 else part for i, part in enumerate(parts))
    return task if adapter_name(task) == adapter else None
