"""The view of a model that its user gets: which adapter, which merge, which mask answers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import lightning as L

from lightning_cl.core.checks import methods_of
from lightning_cl.core.questions import answers


def deployed(trainer: L.Trainer, pl_module: L.LightningModule, task: str | None = None) -> AbstractContextManager[None]:
    """Returns a context in which a module computes what its user would get.

    Whatever asks the model between tasks does so inside of it. At most one method of a Trainer decides about it.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        task: the task that is asked about; None: nobody says which.
    """
    deciding = [method for method in methods_of(trainer) if answers(method, "deployed")]
    return deciding[0].deployed(trainer, pl_module, task) if deciding else nullcontext()
