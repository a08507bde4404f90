"""Other people's callbacks in a sequence of tasks: each starts a task clean, or is refused with a reason.

A callback of Lightning's is put back to what its owner made: scores, averages and counts of one task are nothing to the
next. A callback of somebody else's is left alone, unless it has a ``state_dict``: that is what it says to be its
memory, and it is loaded back as it was before the first task. One that is to remember all tasks says so by an attribute
``over_tasks = True``.
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
        MisconfigurationException: with the reason, and what to do instead.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _REFUSED:
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"Trainer(callbacks=…): {type(callback).__name__}, not with a sequence of tasks: {reason}"
                )


class Pristine:
    """A callback as it was before the first task.

    Args:
        callback: a callback of Lightning's or somebody else's.
    """

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self._values = _copied(vars(callback)) if is_lightnings(callback) else None
        self._state = copy.deepcopy(callback.state_dict()) if self._values is None else None

    def restore(self) -> None:
        """Puts the callback back; what was kept stays as it is."""
        if self._values is not None:
            for name in vars(self.callback).keys() - self._values.keys() - _GIVEN:
                delattr(self.callback, name)  # what it has found out since
            vars(self.callback).update(_copied(self._values))
        elif self._state is not None:
            self.callback.load_state_dict(copy.deepcopy(self._state))


_GIVEN = {"log", "log_dict"}
"""Names of the module's methods that Lightning puts into a callback."""


def starts_clean(callback: Callback) -> bool:
    """Tells if a callback is to be put back before each task."""
    if isinstance(callback, (ContinualCallback, ProgressBar)) or getattr(callback, "over_tasks", False):
        return False
    if type(callback).__module__.startswith("lightning_cl."):
        return False
    return is_lightnings(callback) or is_overridden("state_dict", callback, Callback)


def is_lightnings(callback: Callback) -> bool:
    """Tells if a callback is Lightning's, or one of somebody that extends it."""
    homes = {kind.__module__ for kind in type(callback).__mro__ if kind is not Callback and issubclass(kind, Callback)}
    return any(home.startswith(("lightning.pytorch.", "pytorch_lightning.")) for home in homes)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    """A copy of attributes; what cannot be copied (a lock) is kept as it is."""
    copied = {}
    for name, value in values.items():
        if name in _GIVEN:
            continue
        try:
            copied[name] = copy.deepcopy(value)
        except (TypeError, AttributeError, RuntimeError):
            copied[name] = value
    return copied
