"""Structure that methods build into a module, before its weights are loaded, in every stage and kind of resume.

Lightning builds a module in ``configure_model``, tells it of a checkpoint in ``on_load_checkpoint``, loads the
weights, tells the callbacks, and then makes the optimizers. A checkpoint between two tasks holds the structure of the
tasks that are done. So that much is built before the weights are loaded, and the next task's part after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.checks import named, refuse_sharded
from lightning_cl.core.precision import reshard
from lightning_cl.core.questions import Questions, answers
from lightning_cl.core.run_state import RunState
from lightning_cl.random_state import untouched_random_state
from lightning_cl.tasks import TaskPosition


class Structure:
    """Builder of a module's structure, through two hooks of the module that are wrapped while the Trainer uses it.

    Memory and compute: none of its own; those of the methods that build.
    """

    def __init__(self) -> None:
        self.built = 0  # tasks whose parts are in the module
        self._wrapped: L.LightningModule | None = None
        self._own: dict[str, Any] = {}  # the hooks that the user has set on the module itself

    def attach(
        self, trainer: L.Trainer, pl_module: L.LightningModule, run: RunState, key: str, fresh: Callable[[], int | None]
    ) -> None:
        """Wraps the module's ``configure_model`` and ``on_load_checkpoint``, where a method has something to build.

        Args:
            trainer: in its setup.
            pl_module: the module.
            run: its state.
            key: of the run's entry in a checkpoint.
            fresh: returns how many tasks a fit without a checkpoint needs parts for; None in other stages, and where a
                checkpoint is to come.

        Raises:
            MisconfigurationException: if the parameters are sharded, or the module is compiled already.
        """
        self.detach()
        methods = _builders(run.methods)
        if not methods:
            return
        for method, name in named(methods):
            if answers(method, "build"):
                refuse_sharded(trainer, f"{name} adds parts to the module, which comes too late for")
        adding = [method for method in methods if answers(method, "build")]
        if adding and any(map(_is_compiled, pl_module.modules())):
            raise MisconfigurationException(
                f"{type(adding[0]).__name__} adds parts to the module, and torch.compile has seen it without them;"
                " compile in the module's configure_model, or leave torch.compile out"
            )
        configure, load = pl_module.configure_model, pl_module.on_load_checkpoint

        def configure_model() -> None:
            configure()
            count = fresh()
            if count is not None:
                self.build(trainer, pl_module, run, names_of(run.names, count))

        def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
            load(checkpoint)
            if key in checkpoint:
                self.build(trainer, pl_module, run, tasks_in(checkpoint[key]), trains=False)

        self._wrapped = pl_module
        for hook in (configure_model, on_load_checkpoint):
            if hook.__name__ in pl_module.__dict__:
                self._own[hook.__name__] = pl_module.__dict__[hook.__name__]
            pl_module.__dict__[hook.__name__] = hook

    def detach(self) -> None:
        """Gives the module its own hooks back."""
        module, self._wrapped = self._wrapped, None
        own, self._own = self._own, {}
        if module is not None:
            for name in ("configure_model", "on_load_checkpoint"):
                module.__dict__.pop(name, None)
            module.__dict__.update(own)

    def build(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        run: RunState,
        names: Sequence[str],
        trains: bool = True,
    ) -> None:
        """Lets the methods build the parts of these tasks, and choose what the last of them trains.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            run: its state.
            names: the tasks, in their order.
            trains: False while a checkpoint is about to be loaded: nothing is chosen yet.
        """
        self.built, run.loading = len(names), not trains
        reshard(pl_module)
        with untouched_random_state():
            for method in _builders(run.methods):
                method.build(trainer, pl_module, names)
            if trains and names:
                position = TaskPosition(len(names) - 1, names[-1], max(len(run.names), len(names)))
                for method in _builders(run.methods):
                    method.choose_trainable(pl_module, position)


def _is_compiled(part: torch.nn.Module) -> bool:
    in_place = getattr(part, "_compiled_call_impl", None) is not None
    return in_place or isinstance(part, torch._dynamo.OptimizedModule)


def _builders(methods: Sequence[Any]) -> list[Questions]:
    return [method for method in methods if answers(method, "build") or answers(method, "choose_trainable")]


def names_of(names: Sequence[str], count: int) -> list[str]:
    """Returns the names of the first tasks of a run; those of plain fits have numbers."""
    return [names[i] if i < len(names) else f"task-{i}" for i in range(count)]


def tasks_in(entry: dict[str, Any]) -> list[str]:
    """Returns the tasks whose parts are in a checkpoint, from the run's entry in it."""
    # One that was written while a task began has its parts, too.
    return names_of(entry["tasks"], entry.get("built") or entry["index"] + (1 if entry["started"] else 0))
