"""A causal language model in two steps: first hidden states, then logits at the positions that need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


class SplitHead:
    """Decoder and head of a ``transformers`` model, with peft or without.

    Architectures differ in the operations between head and logits (soft-capping is supported). So the logits of the
    two steps are first compared with the model's own on a few tokens.

    Args:
        model: a model with ``get_decoder`` and ``get_output_embeddings``.
        quiet: print nothing if the head cannot be separated.

    Attributes:
        exact: True if the two steps give the model's logits; if not, the model's own loss has to be used.
        vocabulary: number of logits at a position.
    """

    def __init__(self, model: Any, quiet: bool = False) -> None:
        self._causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._cap = getattr(getattr(self._causal, "config", None), "final_logit_softcapping", None)
        self.vocabulary = 0
        self.exact = self._agrees()
        if not self.exact and not quiet:
            name = type(self._causal).__name__
            rank_zero_info(f"{name}: its head cannot be taken apart; the loss needs all its logits")

    def hidden_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """The input of the head, ``[batch, length, width]``."""
        result: Tensor = self._causal.get_decoder()(**{**inputs, "use_cache": False}).last_hidden_state
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits ``[…, vocabulary]`` of hidden states ``[…, width]``."""
        return self.bend(self.head(hidden))

    @property
    def decoder(self) -> Any:
        """The part of the model that gives hidden states."""
        return self._causal.get_decoder()

    @property
    def head(self) -> Any:
        """The part of the model that gives logits of hidden states, up to :meth:`bend`."""
        return self._causal.get_output_embeddings()

    def bend(self, logits: Tensor) -> Tensor:
        """Applies the soft cap to logits, for models that have one."""
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _agrees(self) -> bool:
        if getattr(getattr(self._causal, "config", None), "output_router_logits", False):
            return False  # only the model's own loss includes the auxiliary loss of its experts
        try:
            decoder, head = self._causal.get_decoder(), self._causal.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return False
        if decoder is None or head is None or decoder is self._causal:
            return False
        with evaluated(self._causal):
            ids = few_tokens(self._causal)
            # An untrained model's logits are small. Larger ones show a cap or another nonlinearity.
            for factor in (1.0, 1000.0):
                handle = decoder.register_forward_hook(_scaled(factor))
                try:
                    expected = self._causal(input_ids=ids, use_cache=False).logits
                    made = self.logits(self.hidden_states({"input_ids": ids}))
                except torch.OutOfMemoryError:
                    raise
                except (TypeError, ValueError, AttributeError, RuntimeError):
                    return False
                finally:
                    handle.remove()
                self.vocabulary = made.shape[-1]
                close = made.shape == expected.shape and torch.allclose(made, expected, rtol=1e-2, atol=1e-3 * factor)
                if not close:
                    return False
        return True


def _scaled(factor: float) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * factor
        return output

    return hook


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """Puts a model in evaluation mode without gradients inside the block, and restores all modes after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def few_tokens(model: Any) -> Tensor:
    """Some tokens of a model's vocabulary, int64 ``[1, 12]``."""
    count = len(model.get_input_embeddings().weight)
    return (torch.arange(12, device=next(model.parameters()).device)[None] * 7 + 3) % count
