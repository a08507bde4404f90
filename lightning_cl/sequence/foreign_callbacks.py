"""Callbacks that are not of this package: each starts every task with its first state, or is refused with a reason.

Lightning's own callbacks get all their attributes back, since scores, averages and counts of one task mean nothing in
the next. A user's callback is not changed unless it has a ``state_dict``; that state is loaded back as it was before
the first task. A callback that needs its state of all tasks has an attribute ``over_tasks = True``.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    ModelPruning,
    ProgressBar,
    WeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cl.core.method import ContinualCallback

_TRIES = (
    "it trains trial steps inside of fit and evaluation, which the methods would take for training; run it before, as"
    " lightning.pytorch.tuner.Tuner(trainer).{}(module, datamodule=…) with a Trainer that has no other callbacks"
)
_REFUSED: tuple[tuple[type[Callback], str], ...] = (
    (BatchSizeFinder, _TRIES.format("scale_batch_size")),
    (LearningRateFinder, _TRIES.format("lr_find")),
    (
        WeightAveraging,
        "it keeps a copy of the whole model, with a frozen base, in every checkpoint, and a run that resumes between"
        " two tasks is another one; use Lightning's StochasticWeightAveraging, which starts anew in each task",
    ),
    (
        ModelPruning,
        "it renames the parameters while a task is trained, and what was learnt about them would be lost; prune the"
        " model after the sequence",
    ),
)


def check_foreign(trainer: L.Trainer) -> None:
    """Refuses callbacks that cannot start anew for each task.

    Raises:
        MisconfigurationException: if there is one; the message gives the reason, and what to do instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _REFUSED:
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"Trainer(callbacks=…): {type(callback).__name__}, not with a sequence of tasks: {reason}"
                )


class Pristine:
    """The state of a callback before the first task.

    Args:
        callback: a callback of Lightning's or of a user.
    """

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self._values = _copied(vars(callback)) if is_lightnings(callback) else None
        self._state = copy.deepcopy(callback.state_dict()) if self._values is None else None

    def restore(self) -> None:
        """Restores the state in the callback; the stored state stays unchanged."""
        if self._values is not None:
            for name in vars(self.callback).keys() - self._values.keys() - _GIVEN:
                delattr(self.callback, name)  # it was set during a task
            vars(self.callback).update(_copied(self._values))
        elif self._state is not None:
            self.callback.load_state_dict(copy.deepcopy(self._state))


_GIVEN = {"log", "log_dict"}
"""Names of the module's methods that Lightning puts into a callback."""


def starts_clean(callback: Callback) -> bool:
    """Tells if a callback's first state is to be restored before each task."""
    if isinstance(callback, (ContinualCallback, ProgressBar)) or getattr(callback, "over_tasks", False):
        return False
    if type(callback).__module__.startswith("lightning_cl."):
        return False
    return is_lightnings(callback) or is_overridden("state_dict", callback, Callback)


def is_lightnings(callback: Callback) -> bool:
    """Tells if a callback's class is one of Lightning's, or extends one."""
    homes = {kind.__module__ for kind in type(callback).__mro__ if kind is not Callback and issubclass(kind, Callback)}
    return any(home.startswith(("lightning.pytorch.", "pytorch_lightning.")) for home in homes)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of attributes; a value that cannot be copied, such as a lock, is taken as it is."""
    copied = {}
    for name, value in values.items():
        if name in _GIVEN:
            continue
        try:
            copied[name] = copy.deepcopy(value)
        except (TypeError, AttributeError, RuntimeError):
            copied[name] = value
    return copied
