"""The two thin matrices of a LoRA adapter in each layer, and the mean of several adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cl.functional.progressive import fold_gated_adapters
from lightning_cl.models.adapter_names import task_name


class Factors(NamedTuple):
    """The two factors of an adapter in one layer: ``ΔW = scale · second · first``, transposed for an embedding."""

    path: str
    """Of the layer in the ``PeftModel``."""
    first: Tensor
    """``[rank, inputs]``, random at the beginning; it shares memory with the parameter."""
    second: Tensor
    """``[outputs, rank]``, zero at the beginning."""
    scale: float
    embedding: bool
    """True for the layer of an embedding, with its outputs as inputs and the vocabulary as outputs."""


def adapter_factors(model: Any, adapter: str) -> Iterator[Factors]:
    """The factors of an adapter, layer by layer.

    Args:
        model: a ``PeftModel``.
        adapter: its name in peft.

    Raises:
        ValueError: for a layer that is no matrix, as a convolution.
    """
    for path, layer in model.named_modules():
        if adapter in getattr(layer, "lora_A", {}):
            first, second, embedding = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, False
        elif adapter in getattr(layer, "lora_embedding_A", {}):
            first, second, embedding = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter], True
        else:
            continue
        if first.ndim != 2:
            raise ValueError(f"{path}: its adapter is no product of two matrices; expected LoRA on linear layers")
        first, second = first.detach(), second.detach()
        if embedding:
            first, second = first.T, second.T
        yield Factors(path, first, second, layer.scaling[adapter], embedding)


def has_gates(layer: nn.Module, adapter: str) -> bool:
    """Tells if an adapter has gates in a layer."""
    return adapter in getattr(layer, "gated", {})


def whole_factors(model: Any, adapter: str) -> Iterator[Factors]:
    """The factors of all that an adapter adds, layer by layer: with what its gates let through, as one adapter.

    Args:
        model: a ``PeftModel``.
        adapter: its name in peft.

    Raises:
        ValueError: as :func:`~lightning_cl.models.adapter_factors.adapter_factors`.
    """
    layers: dict[str, Any] = dict(model.named_modules())
    earlier: dict[str, dict[str, Factors]] = {}
    for factors in adapter_factors(model, adapter):
        layer = layers[factors.path]
        if not has_gates(layer, adapter):
            yield factors
            continue
        for name in layer.gated[adapter]:
            if name not in earlier:
                earlier[name] = {part.path: part for part in adapter_factors(model, name)}
        parts = [earlier[name][factors.path] for name in layer.gated[adapter]]
        gates = layer.task_gates[adapter].detach().tolist()
        scales = [gate * part.scale / factors.scale for gate, part in zip(gates, parts, strict=True)]
        down, up = fold_gated_adapters(
            [*(part.first for part in parts), factors.first],
            [*(part.second for part in parts), factors.second],
            [*scales, 1.0],
        )
        yield Factors(factors.path, down, up, factors.scale, embedding=False)


def mean_factors(model: Any, adapters: Sequence[str]) -> Iterator[Factors]:
    """The mean of the products ``ΔW`` of several adapters, exactly: factors of all their ranks together, of scale 1.

    Args:
        model: a ``PeftModel``.
        adapters: names in peft.

    Raises:
        ValueError: if an adapter is more than its products (DoRA, copies of whole layers).
    """
    check_products(model, adapters)
    found: dict[str, list[Factors]] = {}
    for adapter in adapters:
        for factors in whole_factors(model, adapter):
            found.setdefault(factors.path, []).append(factors)
    for path, parts in found.items():
        first = torch.cat([part.first.float() for part in parts])
        second = torch.cat([part.second.float() * (part.scale / len(adapters)) for part in parts], 1)
        yield Factors(path, first, second, 1.0, parts[0].embedding)


def check_products(model: Any, adapters: Sequence[str]) -> None:
    """Finds adapters that are more than their products.

    Raises:
        ValueError: naming the setting that makes it so.
    """
    for adapter in adapters:
        config = model.peft_config[adapter]
        more = [
            setting
            for setting in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
            if getattr(config, setting, None)
        ]
        if more:
            raise ValueError(
                f"mean: the adapter of {task_name(adapter) or adapter!r} has {more[0]}, which no mean of ΔW contains;"
                " expected plain LoRA of linear layers"
            )
