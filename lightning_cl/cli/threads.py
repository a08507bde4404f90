"""The number of threads that a small model trains with on a CPU."""

from __future__ import annotations

import os

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

SMALL = 10_000_000
"""Parameters. The matrices of a smaller model are so small that threads mostly wait for each other."""


class SensibleThreads(Callback):
    """Trains a small model with one thread on a CPU, unless ``OMP_NUM_THREADS`` says otherwise.

    On an idle machine more threads gain little with matrices this small. On a busy one they wait for each other: the
    quickstart took 7 times as long with two threads as with one. It is said in one line, and done once.
    """

    def __init__(self) -> None:
        self._decided = False

    def _decide(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._decided:
            return
        self._decided = True
        count = sum(parameter.numel() for parameter in pl_module.parameters())
        chosen = "OMP_NUM_THREADS" in os.environ or torch.get_num_threads() == 1
        if chosen or not isinstance(trainer.accelerator, CPUAccelerator) or not 0 < count < SMALL:
            return
        rank_zero_info(
            f"One thread instead of {torch.get_num_threads()}: {count / 1e6:.1f} million parameters are too few to"
            " share; OMP_NUM_THREADS decides where it is set"
        )
        torch.set_num_threads(1)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._decide(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._decide(trainer, pl_module)
