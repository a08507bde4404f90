"""Settings for mixing a buffer's samples into a task's batches, and checks of them."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_cl.arguments import check_choice
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.core.run_state import RunState
from lightning_cl.data.batch_source import TaskBatches, TaskLength, is_stream
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.data.mixing.drawing import DRAWS, Draw
from lightning_cl.data.mixing.plan import MixMode
from lightning_cl.data.mixing.ratio import check_ratio, check_sum, curve_of, replays_anything
from lightning_cl.data.mixing.replayed import Chooser, Mix


class Mixer:
    """Mixes a buffer's samples into a task's batches; each method that replays has one mixer.

    Args:
        ratio: share of replayed tokens, pairs of progress and share, or ``1/t``.
        mode: ``replace``: replayed samples replace samples of the batch. ``add``: they are added to it.
        draw: how often each sample is replayed.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, ratio: float | str | list[list[float]], mode: MixMode, draw: Draw = "uniform") -> None:
        self.ratio = check_ratio(ratio)
        self.mode: MixMode = check_choice("mode", mode, ("replace", "add"))  # type: ignore[assignment]
        self.draw: Draw = check_choice("draw", draw, DRAWS)  # type: ignore[assignment]

    @property
    def replays(self) -> bool:
        """True if the share is ever above 0."""
        return replays_anything(self.ratio)

    def check_loader(self, loader: Any, method: str, task: str) -> None:
        """Checks that samples can be mixed into a task's loader with these settings.

        Raises:
            MisconfigurationException: with the reason and what to use instead.
        """
        check_plannable(loader, method, task)
        workers = getattr(loader, "num_workers", 0)
        if self.draw == "interfered" and workers:
            raise MisconfigurationException(
                f"{method}(draw='interfered'): worker processes fetch the batches of task {task!r} before anybody knows"
                f" what will be hurt; give num_workers=0 instead of {workers}"
            )
        for argument, value, instead in (("mode", "add", "replace"), ("draw", "interfered", "uniform")):
            if is_stream(loader) and getattr(self, argument) == value:
                raise MisconfigurationException(
                    f"{method}({argument}={value!r}): not for a stream, as the training data of task {task!r} is; give"
                    f" {argument}={instead!r}"
                )

    def mix_into(
        self,
        trainer: L.Trainer,
        run: RunState,
        loader: TaskBatches,
        buffer: ReplayBuffer,
        *,
        number: int,
        seed: int,
        method: str,
        chooser: Chooser | None = None,
    ) -> None:
        """Mixes a buffer into a task's loader.

        Args:
            trainer: inside ``fit``.
            run: the run's state.
            loader: the task's loader.
            buffer: the samples.
            number: t, the task's number from 1, for a share of ``1/t``.
            seed: seed for the draws.
            method: the callback's class, for messages.
            chooser: may replace planned samples by others when a batch is built.

        Raises:
            MisconfigurationException: if the share changes over a task of unknown length, or if the loader cannot
                mix in this way.
        """
        mix = Mix(buffer, curve_of(self.ratio, number), self.mode, seed=seed, draw=self.draw, chooser=chooser)
        try:
            loader.mix_in(mix, _length_of_task(trainer, run))
        except ValueError as error:
            raise MisconfigurationException(f"{method}({error})") from error

    def describe(self) -> dict[str, Any]:
        """Returns the settings for a report."""
        return {"ratio": self.ratio, "mode": self.mode, "draw": self.draw}


@runtime_checkable
class Mixing(Protocol):
    """A method that has a mixer."""

    mixer: Mixer

    def earlier_tasks(self) -> int:
        """Returns the number of other runs' tasks in the buffer; ``1/t`` counts them too."""


def check_plannable(loader: Any, name: str, task: str | None = None) -> None:
    """Checks that a loader's samples can be reached by index, and mixed into its batches.

    Raises:
        MisconfigurationException: with the reason and what to use instead.
    """
    reason = None if isinstance(loader, TaskBatches) else why_not_plannable(loader)
    if reason is not None:
        raise MisconfigurationException(
            f"{name} cannot mix into the training loader{f' of task {task!r}' if task else ''}: {reason}. It needs a"
            " torch DataLoader over a map-style data set (with __len__ and __getitem__) and a batch_size"
        )


def check_together(run: RunState) -> None:
    """Checks that all methods with a mixer leave room for new samples, in every task, and mix in one mode.

    Raises:
        MisconfigurationException: if they do not. It is raised before training.
    """
    methods = [method for method in run.methods if isinstance(method, Mixing) and method.mixer.replays]
    names = " and ".join(type(method).__name__ for method in methods)
    try:
        for number in range(1, len(run.names) + 1) if run.names else (2,):
            check_sum([curve_of(method.mixer.ratio, number + method.earlier_tasks()) for method in methods])
    except ValueError as error:
        raise MisconfigurationException(f"{names}: {error}") from error
    if len({method.mixer.mode for method in methods}) > 1:
        modes = ", ".join(f"{type(method).__name__}(mode={method.mixer.mode!r})" for method in methods)
        raise MisconfigurationException(f"mode: {modes}: expected the same for all callbacks that replay")


def _length_of_task(trainer: L.Trainer, run: RunState) -> TaskLength:
    limits = run.limits
    epochs = limits.max_epochs if limits is not None else trainer.max_epochs
    steps = limits.max_steps if limits is not None else trainer.max_steps
    return TaskLength(
        math.inf if epochs is None or epochs == -1 else max(float(epochs), 1.0),
        None if steps is None or steps == -1 else float(steps * trainer.accumulate_grad_batches),
        trainer.limit_train_batches,
    )
