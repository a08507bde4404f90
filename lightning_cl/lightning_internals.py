"""Facts that Lightning keeps to itself, each read in one function; what changes its loops is in ``core/loops.py``.

No other file touches a name of Lightning's that begins with an underscore. All of them were measured on 2.6.6.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher, _XLALauncher


def trains_on(trainer: L.Trainer, data: Any) -> bool:
    """Tells if the Trainer's training loader comes from this object."""
    return trainer.fit_loop._data_source.instance is data


def shards_loaders(trainer: L.Trainer) -> bool:
    """Returns the value of ``Trainer(use_distributed_sampler=…)``."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def requeued_file(trainer: L.Trainer) -> Any:
    """Returns the checkpoint of a requeued job, from which Lightning resumes by itself; None if there is none."""
    return trainer._checkpoint_connector._hpc_resume_path


def completes_step(trainer: L.Trainer) -> bool:
    """Tells if the optimizer steps after the current batch, as the last one of its accumulation window."""
    return not trainer.fit_loop._should_accumulate()


def starts_processes_of_its_own(trainer: L.Trainer) -> bool:
    """Tells if a fit runs in processes that are spawned or forked for it, and end with it."""
    return isinstance(trainer.strategy.launcher, (_MultiProcessingLauncher, _XLALauncher))


def nothing_trained_since(saver: ModelCheckpoint, step: int) -> None:
    """Tells a ModelCheckpoint that there is nothing new to save at this step."""
    saver._last_global_step_saved = step


def before_transfer(trainer: L.Trainer, batch: Any) -> Any:
    """Returns a batch as the module's and the data's ``on_before_batch_transfer`` leave it."""
    return trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)


def has_no_version_yet(logger: CSVLogger | TensorBoardLogger) -> bool:
    """Tells if a logger has not chosen the number of its folder; asking for it would choose one."""
    return logger._version is None
