"""The library's methods as callbacks of a ``transformers.Trainer``: the same classes with other hooks.

Each takes the arguments of the class of the same name in ``lightning_cl``, has its attributes, and computes what it
computes. One call of ``trainer.train()`` is one task. The same objects belong into the Trainers of all tasks, since
they hold what was learnt: an importance is measured when ``train`` ends, and held from the next ``train`` on.

A ``checkpoint-<step>`` gets a file ``continual.safetensors`` with their state. A Trainer that resumes from it reads the
file, and an error is raised where it is missing.

Parameters are named ``model.<name in the model>``, as in ``CausalLM``.
"""

from __future__ import annotations

from typing import Any

import lightning_cl.callbacks as ours
from lightning_cl.arguments import check_integer
from lightning_cl.buffers.budget import Unit
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.data.mixing.drawing import Draw
from lightning_cl.data.mixing.ratio import RatioLike
from lightning_cl.integrations._transformers.driver import TrainerHooks
from lightning_cl.integrations._transformers.replay_dataset import ReplayDataset


class EWC(TrainerHooks, ours.EWC):  # type: ignore[misc]
    """Elastic Weight Consolidation, for a ``transformers.Trainer``; see :class:`lightning_cl.EWC` for its arguments."""


class KFACEWC(TrainerHooks, ours.KFACEWC):  # type: ignore[misc]
    """Kronecker-factored EWC, for a ``transformers.Trainer``; see :class:`lightning_cl.KFACEWC` for arguments."""


class SI(TrainerHooks, ours.SI):  # type: ignore[misc]
    """Synaptic Intelligence, for a ``transformers.Trainer``; see :class:`lightning_cl.SI` for its arguments."""


class MAS(TrainerHooks, ours.MAS):  # type: ignore[misc]
    """Memory Aware Synapses, for a ``transformers.Trainer``; see :class:`lightning_cl.MAS` for its arguments."""


class RWalk(TrainerHooks, ours.RWalk):  # type: ignore[misc]
    """Riemannian Walk, for a ``transformers.Trainer``; see :class:`lightning_cl.RWalk` for its arguments."""


class L2SP(TrainerHooks, ours.L2SP):  # type: ignore[misc]
    """L2-SP, for a ``transformers.Trainer``; see :class:`lightning_cl.L2SP` for its arguments."""


class Interpolate(TrainerHooks, ours.Interpolate):  # type: ignore[misc]
    """Interpolation of weights, for a ``transformers.Trainer``; see :class:`lightning_cl.Interpolate` for arguments."""


class Replay(TrainerHooks, ours.Replay):  # type: ignore[misc]
    """Replay of stored samples of earlier tasks (see :class:`lightning_cl.Replay`), for a ``transformers.Trainer``.

    :meth:`mix` gives the training data of a task, which goes into the Trainer; when the task ends, its own samples are
    offered to the buffer. Samples are what the Trainer's data set returns. The buffer is in RAM and in checkpoints.

    Args:
        buffer_size: the budget, in `unit`.
        ratio: the share of the replayed tokens: a number in [0, 1), ``"1/t"``, or pairs of progress and share.
        policy: the choice of the samples that are kept (:class:`~lightning_cl.buffers.ReplayBuffer`).
        seed: seed for the choice of samples and for the draws.
        unit: ``samples``, ``tokens`` or ``bytes``.
        draw: how often each stored sample is replayed: ``uniform``, ``task``, ``proportional`` or ``recency``.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        buffer_size: int = 10_000,
        ratio: RatioLike = 0.05,
        policy: PolicyName = "reservoir",
        seed: int = 0,
        *,
        unit: Unit = "samples",
        draw: Draw = "uniform",
    ) -> None:
        if draw == "interfered":
            raise ValueError("draw='interfered': it chooses while a batch is built, which a Trainer does not tell")
        super().__init__(buffer_size, ratio, policy, seed=seed, unit=unit, draw=draw, storage="memory")

    def mix(
        self, new: Any, batch_size: int = 1, epochs: int = 1, shuffle: bool = True, seed: int | None = None
    ) -> ReplayDataset:
        """Returns a task's training data: its own samples, and the replayed ones between them.

        Args:
            new: the task's own samples, by index.
            batch_size: samples of an optimizer step; an epoch is as long as it makes whole batches.
            epochs: number of epochs of the task.
            shuffle: True gives the task's own samples a random order in each epoch.
            seed: seed of that order; default: another one for each task.
        """
        check_integer("batch_size", batch_size, 1)
        return ReplayDataset(
            new,
            self.buffer,
            self.mixer.ratio,
            seed=self.seed + self.tasks_done if seed is None else seed,
            draw_seed=self.seed * 1_000_003 + self.tasks_done,
            draw=self.mixer.draw,
            batch_size=batch_size,
            epochs=epochs,
            shuffle=shuffle,
            task_number=self._task_number(),
        )
