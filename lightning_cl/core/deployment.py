"""The model as its user gets it: with the adapter, merge or mask that one method chooses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import lightning as L

from lightning_cl.core.checks import methods_of
from lightning_cl.core.precision import reshard
from lightning_cl.core.questions import answers
from lightning_cl.data import TaskDataModule


@contextmanager
def deployed(trainer: L.Trainer, pl_module: L.LightningModule, task: str | None = None) -> Iterator[None]:
    """A context in which a module computes what its user would get.

    All code that runs the model between tasks does so in this context. At most one method of a Trainer chooses it.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        task: the task whose data the module gets; None: unknown.
    """
    deciding = [method for method in methods_of(trainer) if answers(method, "deployed")]
    if not deciding:
        yield
        return
    reshard(pl_module)
    with deciding[0].deployed(trainer, pl_module, task):
        try:
            yield
        finally:
            reshard(pl_module)  # the weights that are put back are the shards


class View:
    """The view in which a Trainer asks a model, from the start of an evaluation or a prediction to its end."""

    def __init__(self) -> None:
        self._open: AbstractContextManager[None] | None = None

    def enter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The model is about to be asked about the task whose loaders the data module gives out."""
        self.leave()
        data = getattr(trainer, "datamodule", None)
        task = data.shown.name if isinstance(data, TaskDataModule) and data.shown is not None else None
        self._open = deployed(trainer, pl_module, task)
        self._open.__enter__()

    def leave(self) -> None:
        """The model is not asked any more, or asking it has failed."""
        view, self._open = self._open, None
        if view is not None:
            view.__exit__(None, None, None)
