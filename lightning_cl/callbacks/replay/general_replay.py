"""Replay of general data, which keeps abilities that no task trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.buffers.buffer import Unit
from lightning_cl.callbacks.replay.base import Storage
from lightning_cl.callbacks.replay.filling import cost_of, keep
from lightning_cl.callbacks.replay.mixer import Mixer, check_together
from lightning_cl.callbacks.replay.stored import BufferCallback
from lightning_cl.core.questions import Need
from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.data.mixing.plan import MixMode
from lightning_cl.data.mixing.ratio import PER_TASK
from lightning_cl.data.text.text_tasks import TokenStream
from lightning_cl.passes.general_data import NAME, check_general_data, general_samples


class GeneralReplay(BufferCallback):
    """Adds samples of a general corpus or instruction set to the batches of all tasks, also of the first.

    Replay of the tasks' own samples keeps the tasks. It does not keep abilities that the model had before and that no
    task contains: on TRACE (Wang et al. 2023) GSM8K falls from 26 to 3 with it. A small, fixed set of general data
    keeps them. If :class:`~lightning_cl.Replay` is in the same Trainer, the two shares add up.

    Memory and compute: as for :class:`~lightning_cl.Replay`, but without its work at the ends of tasks.

    Args:
        data: data that shows the abilities to keep. It can be whatever a task's data can be (a file, a
            folder, a name on the hub, ``sample:…``, texts, records, a ``datasets.Dataset``, streaming too), or a torch
            ``Dataset`` of samples like the tasks'. Text is tokenised as the tasks are.
        ratio: share of the tokens that bear loss in each window of batches, or pairs of progress and share.
        buffer_size: the budget, in `unit`. Samples are drawn uniformly; of a stream, the first ones are kept.
        mode: ``replace``: these samples replace samples of the batch. ``add``: they are added to it.
        seed: seed for the choice of stored and of replayed samples.
        unit: unit of the budget: ``samples``, ``tokens`` or ``bytes``.
        storage: ``disk`` or ``memory`` (RAM), as in ``Replay``.
        folder: folder for the files; default: the run's folder.

    Attributes:
        buffer: the :class:`~lightning_cl.buffers.ReplayBuffer`.

    Raises:
        ValueError, TypeError, FileNotFoundError: if an argument is out of its range, or the data is not found.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import GeneralReplay
        >>> general = GeneralReplay(["Water boils at 100 °C.", "Ice melts at 0 °C."], ratio=0.02)
        >>> trainer = L.Trainer(callbacks=[general], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> general.report()["ratio"]
        0.02
    """

    replays_first = True

    def __init__(
        self,
        data: Any,
        ratio: float | list[list[float]] = 0.05,
        buffer_size: int = 10_000,
        mode: MixMode = "replace",
        seed: int = 0,
        *,
        unit: Unit = "samples",
        storage: Storage = "disk",
        folder: str | None = None,
    ) -> None:
        if isinstance(ratio, str) and ratio == PER_TASK:  # from a configuration
            raise ValueError(f"ratio={ratio!r}: general data is no task; expected a share in [0, 1)")
        super().__init__(ReplayBuffer(buffer_size, seed=check_integer("seed", seed), unit=unit), storage, folder)
        self.mixer, self.seed = Mixer(ratio, mode), seed
        self.data = data
        check_general_data(data, "data")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        check_together(self.run)
        # The data is read here and not with the first loader, so that unusable data is found before any evaluation. A
        # plain fit reads its checkpoint later, and with it perhaps this data.
        run = self.run
        if stage == "fit" and run.driven and run.checkpoint_path is None and self.buffer.seen == 0:
            self._read(trainer)

    @property
    @override
    def replays(self) -> bool:
        return self.mixer.replays

    @property
    @override
    def mixes(self) -> bool:
        return self.replays

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        self.mixer.check_loader(loader, NAME, task)

    @override
    def advice(self, need: Need) -> str | None:
        # Its samples belong to no earlier task, so more of them do not help `keep`.
        return f"a smaller {NAME}(ratio=…)" if need == "learn" else None

    @override
    def mix_into(self, trainer: L.Trainer, loader: TaskBatches) -> None:
        if self.buffer.seen == 0:
            self._read(trainer)
        seed = self.seed * 1_000_003 + self.tasks_done
        self.mixer.mix_into(trainer, self.run, loader, self.buffer, number=1, seed=seed, method=NAME)

    def earlier_tasks(self) -> int:
        """Returns 0: general data belongs to no task."""
        return 0

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write_down(trainer)

    @override
    def report(self) -> dict[str, Any]:
        return self.mixer.describe() | super().report()

    def _read(self, trainer: L.Trainer) -> None:
        if not self.replays:
            return
        name = type(self).__name__
        samples = general_samples(self.run, self.data, name, "data")
        if isinstance(samples, TokenStream):
            samples = list(self._first(samples(0)))
        if not hasattr(samples, "__getitem__") or not hasattr(samples, "__len__"):
            raise MisconfigurationException(
                f"{name}(data=…): {type(samples).__name__} has no length and no index; give a map-style data set"
            )
        if len(samples) == 0:
            raise ValueError(f"{name}(data=…): there is nothing in it")
        chosen: dict[int, int] = {}
        for index in range(len(samples)):
            slot = self.buffer.choose_slot(NAME, cost_of(self.buffer, samples, index))
            if slot is not None:
                chosen[slot] = index
        keep(trainer, self.buffer, NAME, chosen, samples.__getitem__, label=f"{name}: keeping samples")
        self.buffer.commit()
        self.buffer.write_index()
        trainer.strategy.barrier(name)

    def _first(self, stream: Iterator[Any]) -> Iterator[Any]:
        """Yields as much of a stream as fits into the budget; the stream may be endless."""
        total = 0
        for sample in stream:
            total += self.buffer.cost(sample)
            if total > self.buffer.capacity:
                return
            yield sample
