"""Extra passes over a task's data, as for Fisher estimates, that do not change module or training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.utils.checkpoint as checkpointing
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_cl.core.precision import reshard
from lightning_cl.lightning_internals import before_transfer
from lightning_cl.random_state import untouched_random_state
from lightning_cl.stopping import heed


@contextmanager
def non_reentrant_checkpoints() -> Iterator[None]:
    """Makes gradient checkpointing non-reentrant inside the block; else no gradients of only some tensors exist."""

    class NonReentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            return checkpointing.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)

    own: Any = checkpointing.CheckpointFunction
    checkpointing.CheckpointFunction = NonReentrant  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        checkpointing.CheckpointFunction = own  # type: ignore[misc]


@contextmanager
def leaving_no_trace(pl_module: L.LightningModule) -> Iterator[None]:
    """Puts the module in evaluation mode inside the block, and restores its state after it.

    It restores the mode of each submodule, buffers (batch norm), torchmetrics and random states; ``.grad`` is not
    changed by the passes. Logging does nothing inside, since Lightning refuses it outside of its own steps.
    """
    modes = {module: module.training for module in pl_module.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
    # Modules may fill lists and dictionaries in training_step, for use at the end of an epoch.
    containers = {
        module: {name: copy.copy(value) for name, value in vars(module).items() if _is_users(name, value)}
        for module in pl_module.modules()
    }
    metrics = {module: copy.deepcopy(vars(module)) for module in pl_module.modules() if isinstance(module, Metric)}

    def mute(*args: Any, **kwargs: Any) -> None:
        return None

    with ExitStack() as stack:
        stack.enter_context(untouched_random_state())
        for hook in ("log", "log_dict"):
            stack.callback(_restore_attribute(pl_module, hook))
            pl_module.__dict__[hook] = mute
        pl_module.eval()
        for module in pl_module.modules():
            # Gradient checkpointing only works in training mode. A model that needs it for training needs it here too.
            if getattr(module, "gradient_checkpointing", False) and not getattr(module, "dropout", 0):
                module.training = True
        try:
            yield
        finally:
            reshard(pl_module)
            for module, training in modes.items():
                module.training = training
            current = dict(pl_module.named_buffers())
            with torch.no_grad():
                for name, buffer in buffers.items():
                    if not torch.equal(current[name], buffer):
                        current[name].copy_(buffer)
            for module, values in containers.items():
                for name, value in values.items():
                    _refill(vars(module)[name], value)
            for metric, state in metrics.items():
                metric.__dict__.clear()
                metric.__dict__.update(state)


def _is_users(name: str, value: Any) -> bool:
    """Returns True if an attribute is a list or dictionary of the user's module, not of torch or Lightning."""
    return type(value) in (list, dict) and not name.startswith("_")


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.update(content) if isinstance(container, dict) else container.extend(content)


def _restore_attribute(owner: Any, name: str) -> Callable[[], None]:
    had = name in owner.__dict__
    value = owner.__dict__.get(name)

    def restore() -> None:
        if had:
            owner.__dict__[name] = value
        else:
            owner.__dict__.pop(name, None)

    return restore


def progress(trainer: L.Trainer, items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """Shows a progress bar for work outside of Lightning's loops, if the Trainer shows bars.

    Raises:
        SIGTERMException: between two items, if the process was told to stop.
    """
    bar = trainer.progress_bar_callback
    hidden = bar is None or getattr(bar, "is_disabled", False) or trainer.global_rank > 0
    for item in tqdm(items, desc=label, total=total, disable=hidden, leave=False):
        heed(trainer)
        yield item


def to_device(trainer: L.Trainer, batch: Any) -> Any:
    """A batch as ``training_step`` gets it, through the transfer hooks of module and DataModule."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_transfer(trainer, batch)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def forward_context(trainer: L.Trainer) -> Any:
    """The precision of training; but fp32 instead of fp16, in which small single-sample gradients underflow."""
    if trainer.precision == "16-mixed":
        return nullcontext()
    return trainer.precision_plugin.forward_context()


def training_loss(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
    """The loss of ``training_step`` on the bare module, without a wrapper that would average gradients over ranks."""
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    with forward_context(trainer):
        output = pl_module.training_step(batch, 0) if takes_index else pl_module.training_step(batch)
    return output["loss"] if isinstance(output, Mapping) else output
