"""A causal language model taken apart: hidden states first, logits of the positions that need them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


class SplitHead:
    """Decoder and head of a ``transformers`` model, under peft or not.

    What stands between head and logits (soft-capping is known) differs between architectures, so both ways are
    compared on a few tokens first.

    Args:
        model: with ``get_decoder`` and ``get_output_embeddings``.
        quiet: say nothing where the head cannot be taken apart.

    Attributes:
        exact: whether both ways give the same logits; if not, the model's own loss has to be used.
        vocabulary: logits of a position.
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
        """``[batch, length, width]``, what the head reads."""
        return self._causal.get_decoder()(**{**inputs, "use_cache": False}).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """``[…, vocabulary]`` of ``[…, width]``."""
        return self.bend(self.head(hidden))

    @property
    def decoder(self) -> Any:
        """What gives hidden states."""
        return self._causal.get_decoder()

    @property
    def head(self) -> Any:
        """What gives logits of hidden states, up to :meth:`bend`."""
        return self._causal.get_output_embeddings()

    def bend(self, logits: Tensor) -> Tensor:
        """The soft cap, for models that have one."""
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _agrees(self) -> bool:
        if getattr(getattr(self._causal, "config", None), "output_router_logits", False):
            return False  # experts' auxiliary loss comes with the model's own
        try:
            decoder, head = self._causal.get_decoder(), self._causal.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return False
        if decoder is None or head is None or decoder is self._causal:
            return False
        with _evaluated(self._causal):
            ids = _few_tokens(self._causal)
            # An untrained model's logits are small: larger ones show what bends them.
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


def check_isolation(model: Any) -> None:
    """Whether packed documents do not see each other: two of them, packed and apart, must have the same logits.

    Raises:
        MisconfigurationException: if they see each other.
    """
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    device = next(model.parameters()).device.type
    # In fp32 rounding cannot hide a small leak; flash attention knows 16 bits alone.
    exactly = torch.autocast(device, enabled=False) if dtype == torch.float32 and not flash else nullcontext()
    with _evaluated(model), exactly:
        # Two rows, as in a batch: flash attention keeps documents apart in a single row only.
        ids = _few_tokens(model).repeat(2, 1)
        half = ids.shape[1] // 2
        places = torch.arange(half, device=ids.device).repeat(2)[None].repeat(2, 1)
        apart = model(input_ids=ids[:, half:], use_cache=False).logits
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, half:]
        leaking = model(input_ids=ids, use_cache=False).logits[:, half:]
        error, leak = (float((other - apart).abs().max()) for other in (packed, leaking))
    rounding = 4 * torch.finfo(apart.dtype).eps * float(apart.abs().max())
    if error > max(0.01 * leak, rounding) or error > 0.5 * leak > 0:
        raise MisconfigurationException(
            f"packing=True: {type(model).__name__} lets packed documents see each other (it does not read position_ids"
            " as their borders); use packing=False, or with flash attention batch_size=1 or attn_implementation='sdpa'"
        )


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _few_tokens(model: Any) -> Tensor:
    count = model.get_input_embeddings().num_embeddings
    return (torch.arange(12, device=next(model.parameters()).device)[None] * 7 + 3) % count
