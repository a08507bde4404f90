"""Experience replay."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_cl.buffers.buffer import Unit
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.callbacks.replay.base import Fill, MemoryCallback, Storage
from lightning_cl.callbacks.replay.interference import Interference
from lightning_cl.callbacks.replay.mixer import Mixer, check_together
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.questions import Need
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.data.mixing.drawing import Draw
from lightning_cl.data.mixing.plan import MixMode


class Replay(MemoryCallback):
    """Experience replay: mixes samples of earlier tasks into the batches of later ones.

    At the end of each task its training set is offered to a buffer with a budget. During later tasks the buffer's
    samples have the share `ratio` of the tokens that bear loss (of the samples, if there are no tokens), in every
    window of batches, also with packing, accumulation, several ranks and streams. Loss masks are stored with
    the samples.

    Memory: only the index, 36 bytes per sample. On disk: 4 bytes and a bit per token, and 64 bytes per sample. Compute
    in ``replace`` mode: none per step, since the batch keeps its number of samples. But a pass over the new data takes
    ``1 / (1 − ratio)`` times the steps, if replayed samples are as long as new ones. Compute in ``add`` mode:
    ``ratio / (1 − ratio)`` of a step.

    Args:
        buffer_size: the budget, over all tasks, in `unit`.
        ratio: share of replayed tokens, from 0 (stores samples, and replays none) to below 1. One to five percent
            removes most forgetting of a pretrained model; a small model and very different tasks need 25 %. A list of
            pairs of progress and share, as ``[[0, 0.25], [1, 0.05]]``, changes it over each task. With ``1/t`` the t-th
            task and each task before it have the share 1/t.
        policy: the choice of the samples that are kept: ``reservoir`` (uniform over all samples seen),
            ``task_balanced``, ``class_balanced``, ``fifo``, ``herding``, ``k_center`` or ``surprise``
            (:class:`~lightning_cl.buffers.ReplayBuffer`).
        mode: ``replace``: replayed samples replace samples of the batch. ``add``: they are added to it. On several
            ranks ``add`` gives each rank the same number, because the mean over ranks is the mean over all samples only
            then. So samples are added in multiples of the number of ranks: the same samples in the same order as on one
            process, but not always in the same step. Where one process adds 3, 2, 3, two add 2, 4, 2, and the weights
            differ accordingly. ``replace`` has the same batches on any number of ranks.
        seed: seed for the choice of stored and of replayed samples.
        unit: unit of the budget: ``samples``, ``tokens`` or ``bytes``.
        draw: how often each sample is replayed: ``uniform``, ``task`` (equal shares of tasks), ``proportional`` (to all
            samples seen of a task), ``recency`` (half the share per task back), ``interfered`` (MIR: the samples that
            training hurts most).
        fill: ``task_end`` or ``training``: the moment when samples are offered. A stream needs ``training``.
        storage: ``disk`` (in the run's folder; checkpoints list the stored samples) or ``memory`` (RAM).
        folder: folder for the files; default: the run's folder. Samples that an earlier run left there are replayed
            from the first task on.
        buffer: the name of another callback, as ``DERpp``, whose buffer is replayed instead of an own one.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import Replay
        >>> replay = Replay(buffer_size=500, ratio=0.1)
        >>> trainer = L.Trainer(callbacks=[replay], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> replay.report()["ratio"]
        0.1
    """

    def __init__(
        self,
        buffer_size: int = 10_000,
        ratio: float | str | list[list[float]] = 0.05,
        policy: PolicyName = "reservoir",
        mode: MixMode = "replace",
        seed: int = 0,
        *,
        unit: Unit = "samples",
        draw: Draw = "uniform",
        fill: Fill = "task_end",
        storage: Storage = "disk",
        folder: str | None = None,
        buffer: str | None = None,
    ) -> None:
        super().__init__(
            buffer_size, policy, unit=unit, fill=fill, storage=storage, folder=folder, buffer=buffer, seed=seed
        )
        self.mixer = Mixer(ratio, mode, draw)
        self._interference: Interference | None = None
        self._interference_state: dict[str, Any] | None = None

    @property
    @override
    def replays(self) -> bool:
        return self.mixer.replays

    @property
    @override
    def mixes(self) -> bool:
        return super().mixes or (len(self.buffer) > 0 and self.replays)

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        super().check_loader(loader, task)
        self.mixer.check_loader(loader, type(self).__name__, task)

    @override
    def mix_into(self, trainer: L.Trainer, loader: TaskBatches) -> None:
        seed = self.seed * 1_000_003 + self.tasks_done
        self._interference = None
        if self.mixer.draw == "interfered":
            self._interference = Interference(self.buffer, seed)
            if self._interference_state is not None:  # state of this task, before it was interrupted
                self._interference.load_state_dict(self._interference_state)
        self.mixer.mix_into(
            trainer,
            self.run,
            loader,
            self.buffer,
            number=self._task_number(),
            seed=seed,
            method=type(self).__name__,
            chooser=self._interference,
        )

    def earlier_tasks(self) -> int:
        """Counts the tasks of other runs in the buffer; in a plain fit, all but the last."""
        stored = set(self.buffer.task_names)
        return len(stored - set(self.run.names)) if self.run.names else max(len(stored) - 1, 0)

    def _task_number(self) -> int:
        """Returns t, the number of tasks up to this one, including those of an earlier run in the buffer."""
        current = self.run.position.name
        return 1 + max(self.tasks_done, sum(name != current for name in self.buffer.task_names))

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(self.run)
        if self.mixer.draw == "interfered":
            refuse_sharded(trainer, f"{type(self).__name__}(draw='interfered') looks at single samples with")

    @override
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if self._interference is not None:
            self._interference.before_step(trainer, pl_module)

    @override
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        rise = self._interference.after_step(trainer, pl_module) if self._interference is not None else None
        if rise is not None:
            self.log_scalar("interference", rise)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interference = self._interference_state = None
        super().on_task_end(trainer, pl_module)

    @override
    def continual_state(self) -> dict[str, Any]:
        interference = self._interference.state_dict() if self._interference is not None else None
        return {**super().continual_state(), "interference": interference}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self._interference_state = state["interference"]

    @override
    def report(self) -> dict[str, Any]:
        return self.mixer.describe() | super().report()

    @override
    def advice(self, need: Need) -> str | None:
        return f"a {'larger' if need == 'keep' else 'smaller'} {type(self).__name__}(ratio=…)"
