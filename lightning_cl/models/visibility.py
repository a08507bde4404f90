"""Checks that a model's logits depend on no later token, and on no token of another packed document."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.passes.heads import evaluated, few_tokens


def check_causality(model: Any) -> None:
    """Refuses models that see later tokens: their loss on the next token falls to near zero, and they learn nothing.

    Raises:
        MisconfigurationException: if the logits of a token depend on the tokens after it.
    """
    if next(model.parameters(), None) is None:
        return  # nothing that could be trained to copy
    with _exactly(model):
        ids = few_tokens(model)
        half = ids.shape[1] // 2
        sees = _depends(model, {"input_ids": ids}, slice(0, half), slice(half, None))
        if sees is None:
            changed = torch.cat([ids[:, :half], ids[:, half:].flip(1)], 1)
            with torch.no_grad():
                before, after = (_logits(model, {"input_ids": given})[:, :half] for given in (ids, changed))
            # Rounding may depend on what else is in a batch (experts, 8 bits).
            sees = float((before - after).abs().max()) > 0.05 * float(before.std())
    if sees:
        declared = [name for name in ("is_decoder", "causal") if getattr(model.config, name, None) is False]
        remedy = f", at least as long as its configuration has {declared[0]}=False" if declared else ""
        raise MisconfigurationException(
            f"model: {_name(model)} sees the tokens that it is to predict (its logits change with later tokens), so"
            f" that it would learn to copy them and not to write{remedy}. Give a causal architecture, such as 'llama'"
        )


def check_isolation(model: Any) -> None:
    """Refuses models in which packed documents see each other.

    Two documents must have the same logits when they are packed and when they are apart.

    Raises:
        MisconfigurationException: if packed documents see each other.
    """
    with _exactly(model):
        # Two rows, as in a batch: flash attention keeps documents apart in a single row only.
        ids = few_tokens(model).repeat(2, 1)
        half = ids.shape[1] // 2
        places = torch.arange(half, device=ids.device).repeat(2)[None].repeat(2, 1)
        packing = {"input_ids": ids, "position_ids": places}
        with torch.no_grad():
            apart = _logits(model, {"input_ids": ids[:, half:]})
            packed = _logits(model, packing)[:, half:]
            leaking = _logits(model, {"input_ids": ids})[:, half:]
        error, leak = (float((other - apart).abs().max()) for other in (packed, leaking))
        rounding = 4 * torch.finfo(apart.dtype).eps * float(apart.abs().max())
        differs = error > max(0.01 * leak, rounding) or error > 0.5 * leak > 0
        # Untrained weights hardly look at other tokens: a leak can be smaller than rounding, but its gradient is not 0.
        sees = differs or _depends(model, packing, slice(half, None), slice(0, half))
    if sees:
        raise MisconfigurationException(
            f"packing=True: {_name(model)} lets packed documents see each other (it does not read position_ids as their"
            " borders); use packing=False, or with flash attention batch_size=1 or attn_implementation='sdpa'"
        )


def _depends(model: Any, inputs: Mapping[str, Tensor], outputs: slice, tokens: slice) -> bool | None:
    """Tells if the logits at some positions depend on the embeddings of tokens at others.

    The gradient shows it even if the weights are small: across a mask it is exactly 0.

    Returns:
        None where no gradient can be had (sharded weights, kernels without one).
    """
    made: list[Tensor] = []

    def as_leaf(module: Any, args: Any, output: Tensor) -> Tensor:
        made.append(output.detach().clone().requires_grad_())
        return made[-1]

    if _is_sharded(model):
        return None
    handle = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            logits = _logits(model, {name: value.clone() for name, value in inputs.items()})[:, outputs]
            weights = torch.linspace(0, 30, logits[0].numel(), device=logits.device).cos().view(logits[0].shape)
            (gradient,) = torch.autograd.grad((logits.float() * weights).sum(), made[0])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, IndexError):
        return None
    finally:
        handle.remove()
    # Most embeddings come as [batch, length, width], XLNet's as [length, batch, width].
    found = gradient.movedim(list(gradient.shape).index(inputs["input_ids"].shape[1]), 0)[tokens]
    return bool(found.any()) if bool(found.isfinite().all()) else None


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _exactly(model: Any) -> ExitStack:
    """Evaluation mode; in fp32, so that rounding cannot hide what is small (flash attention knows 16 bits alone)."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    flash = "flash" in str(getattr(model.config, "_attn_implementation", ""))
    device = next(model.parameters()).device.type
    stack = ExitStack()
    stack.enter_context(evaluated(model))
    stack.enter_context(
        torch.autocast(device, enabled=False) if dtype == torch.float32 and not flash else nullcontext()
    )
    stack.enter_context(warnings.catch_warnings())
    return stack


def _is_sharded(model: Any) -> bool:
    """FSDP and its like bring weights together for whole passes alone."""
    return any("fsdp" in type(module).__name__.lower() for module in model.modules()) or any(
        type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in model.parameters()
    )


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
