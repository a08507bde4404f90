"""The data of tasks: the DataModule of a sequence, its loaders, and the steps from text to batches."""

from lightning_cl.data.loader import TaskLoader
from lightning_cl.data.module import TaskDataModule
from lightning_cl.data.text.tokenizer import TrainedBPE

__all__ = ["TaskDataModule", "TaskLoader", "TrainedBPE"]
