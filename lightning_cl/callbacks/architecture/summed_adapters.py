"""Methods with one LoRA adapter for each task, all of which are in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from torch import nn
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.callbacks.architecture.adapter_checks import check_task_name, foreign_adapters
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Trait
from lightning_cl.models.adapter_factors import check_products
from lightning_cl.models.adapters import (
    Train,
    adapter_bytes,
    adapter_of,
    adapter_parameters,
    allocate_adapter,
    find_peft_model,
    list_adapters,
    remove_adapter,
    train_adapter,
    use_adapters,
)
from lightning_cl.tasks import TaskPosition


class SummedAdapters(ContinualCallback):
    """A method that adds a LoRA adapter for each task, trains the newest, and computes with the sum of all.

    A new adapter's product is zero, so a teacher that is copied when its task starts is the sum of the earlier ones.

    Args:
        rank: of the adapters; None: that of the template.
        seed: of the random factors, which depend on the task's name too; None: that of the run's random state.

    Attributes:
        history: for each task a dictionary of its adapter's parameters and bytes, and what else is measured.

    Raises:
        ValueError: if an argument is out of its range.
    """

    owns = "the trainable parameters"
    trains: Train = "AB"
    weakens: Mapping[Trait, str] = MappingProxyType(
        {
            "shared parameters": "each task trains an adapter of its own, and earlier ones rest; there is nothing that"
            " a penalty on earlier parameters could hold"
        }
    )

    def __init__(self, rank: int | None = None, seed: int | None = None) -> None:
        super().__init__()
        if rank is not None:
            check_integer("rank", rank, 1, "a positive integer, or None for the template's")
        if seed is not None:
            check_integer("seed", seed)
        self.rank, self.seed = rank, seed
        self._drawn_from: int | None = seed
        self.history: dict[str, dict[str, Any]] = {}

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        check_task_name(type(self).__name__, task)

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        if self._drawn_from is None:
            self._drawn_from = torch.initial_seed()
        others = foreign_adapters(type(self).__name__, pl_module, tasks, self.run.loading)
        model = find_peft_model(pl_module)
        check_products(model, list(model.peft_config))
        for task in tasks:
            allocate_adapter(pl_module, task, "fresh", self.rank, self._drawn_from)
        for task in others if tasks else ():
            remove_adapter(pl_module, task)
        if tasks:
            use_adapters(pl_module, tasks)
            self.check_room(pl_module, max(len(self.run.names), len(tasks)))

    def check_room(self, pl_module: nn.Module, tasks: int) -> None:
        """Raises an error if so many tasks do not have room in the layers."""

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        train_adapter(pl_module, task.name, self.trains)
        use_adapters(pl_module, list_adapters(pl_module))

    @override
    def on_sequence_start(self) -> None:
        self.history, self._drawn_from = {}, self.seed

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        name = self.task.name
        self.history[name] = {
            "parameters": sum(p.numel() for p in adapter_parameters(pl_module, name).values()),
            "bytes": adapter_bytes(pl_module, name),
        }

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "drawn_from": self._drawn_from,
            "history": {name: dict(entry) for name, entry in self.history.items()},
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self._drawn_from = state["drawn_from"]
        self.history = {name: dict(entry) for name, entry in state["history"].items()}


def down_projections(pl_module: nn.Module, task: str) -> dict[str, nn.Parameter]:
    """The factors ``A``, ``[rank, in]``, of a task's adapter in linear layers, by the layer's path."""
    name = adapter_of(pl_module, task)
    return {
        path: layer.lora_A[name].weight for path, layer in adapted_layers(pl_module).items() if name in layer.lora_A
    }


def adapted_layers(pl_module: nn.Module) -> dict[str, Any]:
    """The linear layers that have adapters, by their path."""
    return {
        path: part
        for path, part in find_peft_model(pl_module).named_modules()
        if hasattr(part, "base_layer") and len(getattr(part, "lora_A", ()))
    }
