"""The logits of a batch: reads them from any module, and finds the positions that bear loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_cl.passes.passes import forward_context, training_loss

OutputsFunction = Callable[[L.LightningModule, Any], Tensor]
"""``outputs(module, batch)`` gives the logits of a batch: ``[batch, classes]`` or ``[batch, length, classes]``."""


class LogitsReader:
    """Reads a module's logits by a user's function, or from the submodule whose output has ``.logits``.

    To see that submodule's output, the module's method ``batch_logits(batch)`` is run if it has one, else its
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
            # If the user's function calls a model, the model's class decides which labels the logits belong to.
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
        # A module whose training_step makes no logits can give them by this method.
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
        """True if position t predicts token t + 1; False for masked, token-classifying and encoder-decoder models."""
        name = type(self.source).__name__
        unshifted = name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining"))
        return not unshifted and not getattr(getattr(self.source, "config", None), "is_encoder_decoder", False)


def aligned(batch: Any, outputs: Tensor, shifted: bool = True) -> Tensor:
    """Outputs ``[batch, length, …]`` at the batch's own tokens, without those of virtual tokens before them.

    Prompt and prefix tuning put virtual tokens before a text, and these have no labels.
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
        batch: a batch with ``input_ids`` and, as in Hugging Face, ``labels`` (−100: no loss), or ``loss_mask``, or
            ``attention_mask``.
        logits: if given, positions are only returned if the length of the logits fits.
        shifted: True: position t predicts token t + 1 (causal models); False: position t predicts label t.

    Returns:
        bool ``[batch, length − 1]`` (not shifted: ``[batch, length]``); None if the batch is not of token sequences, or
        has one label for each sequence.
    """
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].ndim != 2:
        return None
    ids, labels = batch["input_ids"], batch.get("labels")
    reference = ids if shifted or not isinstance(labels, Tensor) else labels
    if logits is not None and (logits.ndim != 3 or logits.shape[1] != reference.shape[1]):
        return None
    begin = 1 if shifted else 0
    if isinstance(labels, Tensor):
        # Labels of another shape belong to a classifier, with one label for each sequence.
        return labels[:, begin:] != -100 if labels.shape == reference.shape and labels.ndim == 2 else None
    if "label" in batch:
        return None
    for key in ("loss_mask", "attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            return mask[:, begin:] != 0
    return torch.ones_like(ids[:, begin:], dtype=torch.bool)
