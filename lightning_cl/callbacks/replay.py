"""Experience replay."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.samples import own
from lightning_cl.callbacks.base import ContinualCallback, check_choice
from lightning_cl.callbacks.passes import progress
from lightning_cl.data.loader import Mix, TaskLoader
from lightning_cl.data.mixing import MixMode
from lightning_cl.data.plannable import task_indices, why_not_plannable


class Replay(ContinualCallback):
    """Experience replay: samples of earlier tasks take part in the batches of later ones.

    At the end of each task its training set is offered to a buffer of fixed size; during later tasks the buffer's
    samples have the share `ratio` of the loss-bearing tokens (of the samples, where there are no tokens), in every
    window of batches. Loss masks travel with the samples. The filling is decided by index from one seed, so that all
    ranks hold the same buffer and its budget is global.

    Memory: the samples (5 bytes per token of text). Compute: none per step in ``replace`` mode, where the batch
    keeps its number of samples and a pass over the new data takes ``1 / (1 − ratio)`` times the steps (if replayed
    samples are as long as new ones); ``ratio / (1 − ratio)`` of a step in ``add`` mode.

    Args:
        buffer_size: the largest number of samples kept, over all tasks.
        ratio: share of replayed tokens, from 0 (stores, and replays nothing) to below 1. One to five percent removes
            most forgetting of a pretrained model; a small model and very different tasks need 25 %.
        policy: ``reservoir``: uniform over all samples seen. ``task_balanced``: equal shares for the tasks.
        mode: ``replace``: replayed samples take places of the batch. ``add``: they come on top of it.
        seed: seed of what is kept and drawn.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    owns = "the replayed part of the batches"

    def __init__(
        self,
        buffer_size: int = 10_000,
        ratio: float = 0.05,
        policy: Literal["reservoir", "task_balanced"] = "reservoir",
        mode: MixMode = "replace",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (
            isinstance(ratio, bool)
            or not isinstance(ratio, (int, float))
            or not math.isfinite(ratio)
            or not 0 <= ratio < 1
        ):
            raise ValueError(f"ratio={ratio!r}: expected a share in [0, 1), as 0.05 for five percent")
        self.ratio = float(ratio)
        self.mode: MixMode = check_choice("mode", mode, ("replace", "add"))  # type: ignore[assignment]
        self.seed = seed
        self.buffer = ReplayBuffer(buffer_size, policy, seed)

    @property
    @override
    def mixes(self) -> bool:
        return self.ratio > 0 and len(self.buffer) > 0

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        check_mixable(loader, task)
        check_storable(loader, task)

    @override
    def mix_into(self, trainer: L.Trainer, loader: TaskLoader) -> None:
        loader.mix_in(Mix(self.buffer, self.ratio, self.mode, seed=self.seed * 1_000_003 + self.tasks_done))

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, TaskLoader):
            check_mixable(loader)
        chosen: dict[int, int] = {}
        for index in task_indices(loader):
            slot = self.buffer.choose_slot(self.task.name)
            if slot is not None:
                chosen[slot] = index  # a later sample may take the slot again: only the last one is loaded
        label = f"{type(self).__name__}: keeping samples of {self.task}"
        for slot in progress(trainer, sorted(chosen), label):
            self.buffer.put(slot, loader.dataset[chosen[slot]], self.task.name)

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"buffer": self.buffer.state_dict()}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])

    @override
    def state_bytes(self) -> int:
        return self.buffer.size_in_bytes()

    @override
    def report(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "mode": self.mode,
            "policy": self.buffer.policy_name,
            "buffer_size": self.buffer.capacity,
            "stored": self.buffer.counts(),
            "seen": self.buffer.seen,
        }


def check_storable(loader: Any, task: str) -> None:
    """Whether a task's samples can be kept in a checkpoint.

    Raises:
        TypeError: naming what a sample holds that cannot be stored.
    """
    try:
        own(loader.dataset[0])
    except TypeError as error:
        raise TypeError(
            f"task {task!r}: Replay cannot store its samples: they hold {error}. Samples may be made of tensors, numpy"
            " arrays, numbers, texts, dictionaries, lists and tuples"
        ) from error


def check_mixable(loader: Any, task: str | None = None) -> None:
    """Whether replay can mix into a loader's batches.

    Raises:
        MisconfigurationException: saying why not, and what can be mixed into.
    """
    reason = None if isinstance(loader, TaskLoader) else why_not_plannable(loader)
    if reason is not None:
        raise MisconfigurationException(
            f"Replay cannot mix into the training loader{f' of task {task!r}' if task else ''}: {reason}. It needs a"
            " torch DataLoader over a map-style data set (with __len__ and __getitem__) and a batch_size"
        )
