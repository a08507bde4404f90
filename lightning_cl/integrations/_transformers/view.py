"""A ``transformers.Trainer`` as methods see it: the few things that they ask a Lightning Trainer for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerState, TrainingArguments
from typing_extensions import override

from lightning_cl.integrations._transformers.replay_dataset import ReplayDataset


class ModelModule(L.LightningModule):
    """A Hugging Face model as a LightningModule; its parameters are named as those of ``CausalLM``: ``model.…``.

    Args:
        model: returns an object with ``.loss`` (a mean over tokens or samples) and ``.logits``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def training_step(self, batch: Any) -> Any:
        return self.model(**batch).loss

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        return batch


class OneProcess:
    """Answers a Lightning strategy's questions for a single process."""

    launcher = None

    def __init__(self, device: torch.device) -> None:
        self.root_device = device

    def reduce(self, tensor: Tensor, reduce_op: str = "mean") -> Tensor:
        """Returns the tensor: there is no other process."""
        return tensor

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Returns the value."""
        return value

    def barrier(self, name: str | None = None) -> None:
        """Waits for nobody."""

    def batch_to_device(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Returns the batch with its tensors on the device."""
        return move_data_to_device(batch, self.root_device)


class _Precision:
    """Precision as ``accelerate`` has it: inside the model's own ``forward``."""

    def convert_input(self, batch: Any) -> Any:
        return batch

    def forward_context(self) -> Any:
        return nullcontext()


class TrainerView:
    """The parts of a Lightning Trainer that methods read, filled from a ``transformers.Trainer``.

    Args:
        args: the arguments of training.
        state: its state.
        module: the model.
        loader: its training loader; the task's own samples are read from its data set.
        callbacks: the methods.

    Attributes:
        train_dataloader: a loader over the task's own samples, without replayed ones.
    """

    world_size, global_rank, is_global_zero, fast_dev_run = 1, 0, True, False
    progress_bar_callback = logger = None
    max_epochs, limit_train_batches, num_training_batches = -1, 1.0, float("inf")
    precision = "32-true"

    def __init__(
        self, args: TrainingArguments, state: TrainerState, module: ModelModule, loader: Any, callbacks: list[Any]
    ) -> None:
        self.lightning_module, self.callbacks = module, callbacks
        self.strategy, self.precision_plugin = OneProcess(args.device), _Precision()
        self.loggers: list[Any] = []
        self.checkpoint_callbacks: list[Any] = []
        self.max_steps, self.accumulate_grad_batches = state.max_steps, args.gradient_accumulation_steps
        self.log_every_n_steps = int(state.logging_steps or 0) if args.logging_strategy == "steps" else 0
        self.train_dataloader = own_samples(loader, args.per_device_train_batch_size)
        self._state = state

    @property
    def global_step(self) -> int:
        """Returns the number of optimizer steps before the present one."""
        return int(self._state.global_step)


def own_samples(loader: Any, batch_size: int) -> DataLoader[Any]:
    """Returns a loader over a task's own samples, in their order, with the Trainer's collation.

    Raises:
        ValueError: if the data set has no length.
    """
    dataset = loader.dataset
    if isinstance(dataset, ReplayDataset):
        dataset = dataset.new
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"train_dataset: a {type(dataset).__name__}, expected a data set with a length and samples by index; the"
            " importance of weights is measured on them, and a stream cannot be read twice"
        )
    return DataLoader(dataset, batch_size=batch_size, shuffle=False, collate_fn=loader.collate_fn)
