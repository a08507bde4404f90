"""Scalar gates through which the adapter of a task adds what earlier adapters give (progressive adapters).

In each adapted layer of task t, with its own ``B_t A_t`` and one gate for each earlier task, 0 at the start::

    y = W x + s_t B_t A_t x + Σ_{i<t} g_{t,i} s_i B_i A_i x

The gates belong to the adapter: wherever it is in use, so are they.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.models.adapter_factors import has_gates
from lightning_cl.models.adapter_names import task_name

_GATES = "task_gates"


def add_gates(model: Any, adapter: str) -> None:
    """Gives an adapter a gate for each adapter before it, in each layer; the first one gets none.

    The gates are frozen parameters, and 0. An adapter that has them keeps them as they are.

    Args:
        model: a ``PeftModel`` that has adapters of tasks alone.
        adapter: its name in peft.

    Raises:
        ValueError: if the adapters are more than products of two matrices in linear layers.
    """
    names = list(model.peft_config)
    earlier = names[: names.index(adapter)]
    if not earlier:
        return
    _check(model, adapter)
    for layer in _layers(model, adapter):
        if not hasattr(layer, _GATES):
            setattr(layer, _GATES, nn.ParameterDict())
            layer.gated = {}
            layer.register_forward_hook(_add_earlier)
        if adapter not in layer.task_gates:
            weight = layer.lora_A[adapter].weight
            gates = torch.zeros(len(earlier), dtype=weight.dtype, device=weight.device)
            layer.task_gates[adapter] = nn.Parameter(gates, requires_grad=False)
            layer.gated[adapter] = earlier


def remove_gates(model: Any, adapter: str) -> None:
    """Removes the gates of an adapter, if it has any."""
    for layer in model.modules():
        if has_gates(layer, adapter):
            del layer.task_gates[adapter], layer.gated[adapter]


def is_gated(model: nn.Module, adapter: str) -> bool:
    """Tells if an adapter has gates anywhere in a model."""
    return any(has_gates(layer, adapter) for layer in model.modules())


def gates_of(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The gates of an adapter by the path of their layer, one entry for each earlier adapter."""
    return {
        path: layer.task_gates[adapter].detach() for path, layer in model.named_modules() if has_gates(layer, adapter)
    }


def _layers(model: Any, adapter: str) -> Iterator[Any]:
    for layer in model.modules():
        if adapter in getattr(layer, "lora_A", {}):
            yield layer


def _check(model: Any, adapter: str) -> None:
    config = model.peft_config[adapter]
    for setting in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, setting, None):
            raise ValueError(
                f"{setting}={getattr(config, setting)!r}: the adapter of {task_name(adapter) or adapter!r} is more than"
                " a product of two matrices, which no gate can add to another adapter; expected plain LoRA"
            )
    for path, layer in model.named_modules():
        if adapter in getattr(layer, "lora_embedding_A", {}) or isinstance(
            getattr(layer, "base_layer", None), nn.modules.conv._ConvNd
        ):
            raise ValueError(f"target_modules: {path} is no linear layer; gated adapters work on linear layers alone")


def _add_earlier(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Adds to a layer's output what the gates of the adapter in use let through."""
    if layer.disable_adapters or layer.merged:
        return None
    for adapter in layer.active_adapters:
        if not has_gates(layer, adapter):
            continue
        for gate, earlier in zip(layer.task_gates[adapter], layer.gated[adapter], strict=True):
            down, up = layer.lora_A[earlier], layer.lora_B[earlier]
            added = up(down(args[0].to(down.weight.dtype))) * (gate * layer.scaling[earlier])
            output = (output + added).to(output.dtype)
    return output
