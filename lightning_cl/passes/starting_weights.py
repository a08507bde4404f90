"""Weights at the start of a sequence: copies of those that change, which can be swapped into the module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.core.placement import clean_name, full_cpu, trainable_parameters


class StartingWeights:
    """Weights of a module before it was trained.

    LoRA adapters of a peft model that change nothing at the start need no copy: the starting model is the model with
    its adapters switched off. All other trainable parameters, and the running statistics of norms, are copied to the
    CPU in their own type.

    Args:
        module: the module before training; None for a later :meth:`load`.

    Attributes:
        copies: name (without ``_orig_mod.``) to tensor.
        switches_off: True if adapters are switched off.

    Example:
        >>> from torch import nn
        >>> from lightning_cl.passes.starting_weights import StartingWeights
        >>> model = nn.Linear(2, 1)
        >>> start = StartingWeights(model)
        >>> sorted(start.copies)
        ['bias', 'weight']
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self.copies: dict[str, Tensor] = {}
        self.switches_off = False
        if module is not None:
            self.switches_off = _adapters_change_nothing(module)
            self.copies = {name: full_cpu(value) for name, value in _statistics(module).items()}
            self.add_trainable(module)

    def add_trainable(self, module: nn.Module) -> None:
        """Copies parameters that are newly trainable: they were frozen or missing, and so have not changed."""
        adapters = {id(p) for layer in _lora_layers(module) for p in _matrices(layer)} if self.switches_off else ()
        for name, parameter in trainable_parameters(module).items():
            if name not in self.copies and id(parameter) not in adapters:
                self.copies[name] = full_cpu(parameter)

    def find_in(self, module: nn.Module) -> dict[str, Tensor]:
        """Returns the module's tensors that have copies.

        Raises:
            MisconfigurationException: if one is missing or has another shape.
        """
        present = {clean_name(name): p for name, p in module.named_parameters()} | _statistics(module)
        for name, value in self.copies.items():
            if name not in present or present[name].shape != value.shape:
                now = f"has {list(present[name].shape)} now" if name in present else "is gone"
                raise MisconfigurationException(
                    f"{name!r} had the shape {list(value.shape)} before the first task and {now}: the model before"
                    " training cannot be put together again; leave out the callback that compares with it"
                )
        return {name: present[name] for name in self.copies}

    def bring_to(self, module: nn.Module) -> Callable[[], AbstractContextManager[None]]:
        """Copies the starting weights to the module's device, and gives a context in which the module has them.

        Afterwards the module has its former weights, at the same memory addresses, as optimizers and DDP need.
        """
        current = self.find_in(module)
        # The copy is also made on the CPU, since a forward pass may write into a buffer.
        start = {n: self.copies[n].to(t.device, t.dtype, copy=True) for n, t in current.items()}

        @contextmanager
        def context() -> Iterator[None]:
            kept = {name: tensor.data for name, tensor in current.items()}
            trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
            try:
                with ExitStack() as stack:
                    for model in _peft_models(module) if self.switches_off else []:
                        stack.enter_context(model.disable_adapter())
                    for name, tensor in current.items():
                        tensor.data = start[name]
                    yield
            finally:
                for name, tensor in current.items():
                    tensor.data = kept[name]
                # Switching adapters on again makes frozen ones trainable.
                for parameter, requires_grad in trainable.items():
                    parameter.requires_grad_(requires_grad)

        return context

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: full tensors on the CPU."""
        return {"copies": dict(self.copies), "switches_off": self.switches_off}

    @classmethod
    def load(cls, state: dict[str, Any]) -> StartingWeights:
        """Restores starting weights from :meth:`state`."""
        start = cls()
        start.copies, start.switches_off = dict(state["copies"]), state["switches_off"]
        return start


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Returns running statistics and other numbers that training changes without a gradient."""
    saved = module.state_dict(keep_vars=True)
    return {
        clean_name(name): buffer
        for name, buffer in module.named_buffers()
        if name in saved and buffer.is_floating_point()
    }


def _peft_models(module: nn.Module) -> list[Any]:
    peft: Any = sys.modules.get("peft")  # a program with such a model has imported it
    return [] if peft is None else [part for part in module.modules() if isinstance(part, peft.PeftModel)]


def _lora_layers(module: nn.Module) -> list[Any]:
    lora: Any = sys.modules.get("peft.tuners.lora")
    models = _peft_models(module)
    return [part for model in models for part in model.modules() if isinstance(part, lora.LoraLayer)]


def _matrices(layer: Any) -> list[Tensor]:
    parts = (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B)
    return [parameter for part in parts for parameter in part.parameters()]


def _adapters_change_nothing(module: nn.Module) -> bool:
    """Returns True if there are LoRA adapters, and one factor of each active one is zero."""
    layers = _lora_layers(module)
    factors = [
        tensor
        for layer in layers
        for part in (layer.lora_B, layer.lora_embedding_A)
        for name, factor in part.items()
        if name in layer.active_adapters
        for tensor in (factor.parameters() if isinstance(factor, nn.Module) else [factor])
    ]
    return bool(factors) and not any(bool(f.any()) for f in factors) and not any(layer.merged for layer in layers)
