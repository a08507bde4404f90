"""The model as its user gets it: with the adapter, merge or mask that one method chooses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import lightning as L

from lightning_cl.core.checks import methods_of
from lightning_cl.core.questions import answers


def deployed(trainer: L.Trainer, pl_module: L.LightningModule, task: str | None = None) -> AbstractContextManager[None]:
    """Returns a context in which a module computes what its user would get.

    All code that runs the model between tasks does so in this context. At most one method of a Trainer chooses it.

    Args:
        trainer: the Trainer.
        pl_module: its module.
        task: the task whose data the module gets; None: unknown.
    """
    deciding = [method for method in methods_of(trainer) if answers(method, "deployed")]
    return deciding[0].deployed(trainer, pl_module, task) if deciding else nullcontext()
