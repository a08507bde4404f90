"""Checks that methods, Trainer, module and checkpoint fit each other, before anything is trained."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.core.questions import Questions, answers
from lightning_cl.core.run_state import named as named
from lightning_cl.data import TaskDataModule
from lightning_cl.data.batch_source import is_indexed
from lightning_cl.lightning_internals import starts_processes_of_its_own
from lightning_cl.random_state import untouched_random_state

FORMAT = 3
"""Format version of the ``lightning_cl`` entry in a checkpoint."""


def methods_of(trainer: L.Trainer) -> list[Questions]:
    """Returns the continual-learning callbacks of a Trainer, in its order."""
    return [callback for callback in getattr(trainer, "callbacks", ()) if isinstance(callback, Questions)]


def check_loaders(data: TaskDataModule, methods: list[Questions]) -> None:
    """Checks the training loader of every task of a sequence, by itself and with each method.

    Raises:
        MisconfigurationException: if a loader gives no batch, or a method cannot work with it.
    """
    with untouched_random_state():
        for task in data.trained_tasks:
            loader = data.train_loader(task)
            if is_indexed(loader) and len(loader) == 0:
                raise MisconfigurationException(
                    f"task {task.name!r}: its training loader gives no batch (is the data empty, or smaller than a"
                    " batch with drop_last=True?)"
                )
            for method in methods:
                method.check_loader(loader, task.name)


def check_trainer(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Checks that the methods can work with this Trainer and module.

    Raises:
        MisconfigurationException: with what to do instead.
    """
    if starts_processes_of_its_own(trainer):
        raise MisconfigurationException(
            "Trainer(strategy=…): spawned and forked processes lose what callbacks learnt when a fit ends; use"
            " strategy='ddp' and start the training as a script"
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimises by hand (automatic_optimization=False): penalties and projections"
            " need to stand between the backward pass and the step, which only automatic optimisation shows; return"
            " the loss from training_step instead"
        )
    owners: dict[str, str] = {}
    for method, name in named(methods_of(trainer)):
        if method.owns is not None and method.owns in owners:
            raise MisconfigurationException(
                f"Trainer(callbacks=…): {owners[method.owns]} and {name} both want {method.owns}; keep one of them"
            )
        if method.owns is not None:
            owners[method.owns] = name
    deployers = [name for method, name in named(methods_of(trainer)) if answers(method, "deployed")]
    if len(deployers) > 1:
        raise MisconfigurationException(
            f"Trainer(callbacks=…): {' and '.join(deployers)} each decide with which weights the model answers; keep"
            " one of them"
        )
    _check_pairs(methods_of(trainer))


def _check_pairs(methods: list[Questions]) -> None:
    """Refuses pairs of which one takes away what the other relies on, and warns where it leaves only a part."""
    for method, name in named(methods):
        for other, others_name in named(methods):
            if other is method:
                continue
            for trait in sorted(other.relies_on):
                if trait in method.takes_away:
                    raise MisconfigurationException(
                        f"Trainer(callbacks=…): {others_name} with {name}: {method.takes_away[trait]}"
                    )
                if trait in method.weakens:
                    rank_zero_warn(f"{others_name} with {name}: {method.weakens[trait]}")


def refuse_sharded(trainer: L.Trainer, reason: str, rows_are_fine: bool = False) -> None:
    """Refuses strategies that give each process only a part of the parameters.

    Args:
        trainer: in its setup.
        reason: the beginning of the message.
        rows_are_fine: whether each process may have some rows of each parameter, as FSDP2 shares them out.

    Raises:
        MisconfigurationException: with `reason`, the strategy's name, and what to use instead.
    """
    strategy = type(trainer.strategy).__name__
    if strategy not in ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"):
        return
    use = "strategy='ddp' or one device"
    if rows_are_fine:
        if strategy == "ModelParallelStrategy" and _only_rows(trainer.strategy):
            return
        use = "FSDP2 (ModelParallelStrategy with tensor_parallel_size=1), strategy='ddp' or one device"
    raise MisconfigurationException(f"{reason} parameters sharded by {strategy}; use {use}")


def _only_rows(strategy: Any) -> bool:
    mesh = strategy.device_mesh
    return "tensor_parallel" not in mesh.mesh_dim_names or mesh["tensor_parallel"].size() == 1


def refuse_several_loaders(loader: Any, task: str, method: str) -> None:
    """Refuses a collection of loaders, if a method takes single samples from one loader.

    Raises:
        MisconfigurationException: with the names of method and task.
    """
    if isinstance(loader, (dict, list, tuple)):
        raise MisconfigurationException(
            f"{method}: the training data of task {task!r} is a {type(loader).__name__} of loaders; it needs one loader"
            " to take single samples from"
        )


def check_state(trainer: L.Trainer, state: dict[str, Any], path: Any = "the checkpoint") -> None:
    """Checks that the run has the same callbacks as the checkpoint.

    Raises:
        MisconfigurationException: with the names of missing or additional callbacks.
    """
    if state["format"] != FORMAT:
        raise MisconfigurationException(
            f"ckpt_path: {path} was written in format {state['format']} of lightning_cl, this version reads format"
            f" {FORMAT}"
        )
    ours = {name for _, name in named(methods_of(trainer))}
    theirs = set(state["methods"])
    if theirs - ours:
        raise MisconfigurationException(
            f"ckpt_path: {path} holds what {sorted(theirs - ours)} learnt, but Trainer(callbacks=…) has only"
            f" {sorted(ours)}: that would be lost; add the missing callbacks"
        )
    if ours - theirs and (state["index"] > 0 or state["started"]):
        raise MisconfigurationException(
            f"ckpt_path: Trainer(callbacks=…) has {sorted(ours - theirs)}, about which the checkpoint knows nothing"
            f" (it has {sorted(theirs)}): the tasks before could not be protected; resume with the callbacks of that"
            " run"
        )
