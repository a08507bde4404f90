"""Extra passes over a task's data that leave no trace: what Fisher estimates and their like run in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
import torch.utils.checkpoint as checkpointing
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm.auto import tqdm

from lightning_cl.lightning_internals import before_transfer
from lightning_cl.random_state import untouched_random_state
from lightning_cl.stopping import heed

OutputsFunction = Callable[[L.LightningModule, Any], Tensor]
"""``outputs(module, batch)`` gives the logits of a batch: ``[batch, classes]`` or ``[batch, length, classes]``."""


@contextmanager
def non_reentrant_checkpoints() -> Iterator[None]:
    """Gradient checkpointing of the old, reentrant kind does not know gradients of some tensors alone; the new does."""

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
    """Evaluation mode inside; afterwards the module is as it was.

    Kept are the mode of each submodule, buffers (batch norm), torchmetrics, ``.grad`` (not touched by the passes),
    random states; logging is muted, as Lightning refuses it outside of its own steps.
    """
    modes = {module: module.training for module in pl_module.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}
    # Lists and dictionaries that modules fill in training_step, for use at the end of an epoch.
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
            # Gradient checkpointing works in training mode alone; whoever needs it for training needs it here.
            if getattr(module, "gradient_checkpointing", False) and not getattr(module, "dropout", 0):
                module.training = True
        try:
            yield
        finally:
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
    """Returns True if an attribute is a plain container of the module's author, not of torch or Lightning."""
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
    """Shows a bar for work outside of Lightning's loops, where the Trainer shows bars at all.

    Raises:
        SIGTERMException: between two items, where the process was told to stop.
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
    """The precision that training runs in; fp32 instead of fp16, whose small gradients of single samples underflow."""
    if trainer.precision == "16-mixed":
        return nullcontext()
    return trainer.precision_plugin.forward_context()


def training_loss(trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
    """The loss of ``training_step`` on the bare module: no wrapper that would average gradients over ranks."""
    takes_index = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    with forward_context(trainer):
        output = pl_module.training_step(batch, 0) if takes_index else pl_module.training_step(batch)
    return output["loss"] if isinstance(output, Mapping) else output


class LogitsReader:
    """Reaches a module's logits: by a user's function, or from the submodule whose output has ``.logits``.

    What is run to see that submodule's output is the module's method ``batch_logits(batch)``, else its
    ``training_step``.

    Args:
        trainer: the Trainer.
        pl_module: the module.
        outputs: a user's function, or None.

    Attributes:
        source: the submodule that the logits came from; None before the first batch, and for a user's function that
            calls none.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: OutputsFunction | None) -> None:
        self._trainer, self._module, self._outputs = trainer, pl_module, outputs
        self.source: nn.Module | None = None
        self._unreachable = self._asked = False

    def __call__(self, batch: Any) -> Tensor | None:
        """Logits of a batch with their graph; None if nothing that the module calls returns any."""
        caught: list[tuple[nn.Module, Tensor]] = []

        def catch(module: nn.Module, args: Any, output: Any) -> None:
            logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            if isinstance(logits, Tensor):
                caught.append((module, logits))

        if self._outputs is not None:
            # Whose logits a user's function gives, if any model's: it says which labels they are to be held against.
            first, self._asked = not self._asked, True
            handles = [module.register_forward_hook(catch) for module in self._module.modules() if first]
            try:
                with forward_context(self._trainer):
                    given = self._outputs(self._module, batch)
            finally:
                for handle in handles:
                    handle.remove()
            self.source = caught[-1][0] if caught else self.source
            return given
        if self._unreachable:
            return None
        watched = list(self._module.modules()) if self.source is None else [self.source]
        handles = [module.register_forward_hook(catch) for module in watched]
        # A module whose training_step makes no logits offers them by a method of that name.
        own = getattr(type(self._module), "batch_logits", None)
        returned = None
        try:
            if callable(own):
                with forward_context(self._trainer):
                    returned = own(self._module, batch)
            else:
                training_loss(self._trainer, self._module, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not caught:
            self._unreachable = not isinstance(returned, Tensor)
            return None if self._unreachable else returned
        # The outermost module returns last.
        self.source, logits = caught[-1]
        return logits

    @property
    def shifted(self) -> bool:
        """Returns True if position t predicts token t + 1: not in masked, token-classifying, encoder-decoder models."""
        name = type(self.source).__name__
        unshifted = name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining"))
        return not unshifted and not getattr(getattr(self.source, "config", None), "is_encoder_decoder", False)


def aligned(batch: Any, outputs: Tensor, shifted: bool = True) -> Tensor:
    """Outputs ``[batch, length, …]`` at the batch's own tokens: without those of virtual tokens in front of them.

    Prompt and prefix tuning put some in front; the labels know nothing of them.
    """
    if not isinstance(batch, Mapping) or outputs.ndim != 3:
        return outputs
    tokens = batch.get("input_ids") if shifted else batch.get("labels")
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or outputs.shape[1] <= tokens.shape[1]:
        return outputs
    return outputs[:, outputs.shape[1] - tokens.shape[1] :]


def loss_positions(batch: Any, logits: Tensor | None = None, shifted: bool = True) -> Tensor | None:
    """Marks the positions of a batch of token sequences that predict a token that bears loss.

    Args:
        batch: with ``input_ids`` and, as Hugging Face has it, ``labels`` (−100: no loss), or ``loss_mask``, or
            ``attention_mask``.
        logits: if given, positions are only returned when their length fits.
        shifted: True: position t predicts token t + 1 (causal models); False: position t predicts label t.

    Returns:
        bool ``[batch, length − 1]`` (not shifted: ``[batch, length]``); None for a batch that is no token sequence, as
        that of a classifier.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
        return None
    ids, labels = batch["input_ids"], batch.get("labels")
    reference = ids if shifted or not isinstance(labels, Tensor) else labels
    if logits is not None and (logits.ndim != 3 or logits.shape[1] != reference.shape[1]):
        return None
    begin = 1 if shifted else 0
    if isinstance(labels, Tensor):
        # Labels of another shape: a classifier of sequences, one label each.
        return labels[:, begin:] != -100 if labels.shape == reference.shape and labels.ndim == 2 else None
    if "label" in batch:
        return None
    for key in ("loss_mask", "attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            return mask[:, begin:] != 0
    return torch.ones_like(ids[:, begin:], dtype=torch.bool)
