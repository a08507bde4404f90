"""The teacher of distillation: a frozen copy of a module's earlier weights, without a second module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from lightning_cl.core.placement import clean_name, full_cpu, tensor_bytes


class Teacher:
    """A copy of a module's trainable tensors, which replaces them during a forward pass.

    Frozen tensors are not copied. Under LoRA, the teacher is a second, frozen adapter on the same base, of a few
    megabytes. The student's parameters are not changed: during the pass, the module uses the copies in their stead.
    So a graph that waits for its backward pass, the optimizer and DDP are not affected.

    Args:
        module: the module with the weights to copy; None for a later :meth:`load`.
        dtype: type of the copy; None: that of the parameters. With another type or device, all tensors are copied, the
            frozen ones too.
        device: device of the copy and of the teacher's computation; None: that of the parameters.

    Attributes:
        copies: the copies by name (without ``_orig_mod.``).
    """

    def __init__(
        self, module: nn.Module | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        self.dtype, self.device = dtype, device
        self.copies: dict[str, Tensor] = {}
        self._by_owner: dict[tuple[nn.Module, str], Tensor] = {}
        if module is not None:
            self.copies = {name: full_cpu(tensor) for name, tensor in self._to_copy(module).items()}

    @property
    def is_whole(self) -> bool:
        """True if all tensors are copied, not only those that training changes."""
        return self.dtype is not None or self.device is not None

    def _to_copy(self, module: nn.Module) -> dict[str, Tensor]:
        saved = module.state_dict(keep_vars=True)
        parameters = {n: p for n, p in module.named_parameters() if p.requires_grad or self.is_whole}
        buffers = {n: b for n, b in module.named_buffers() if self.is_whole or (n in saved and b.is_floating_point())}
        return {clean_name(name): tensor.detach() for name, tensor in {**parameters, **buffers}.items()}

    def place(self, module: nn.Module) -> None:
        """Moves the copies to the device and type that they compute with.

        Raises:
            MisconfigurationException: if the module has lost a tensor, or it has another shape.
        """
        present = {clean_name(n): t for n, t in [*module.named_parameters(), *module.named_buffers()]}
        # Tensors that are not in a checkpoint are computed, not learnt, and keep their type. Rounded rotary frequencies
        # would be wrong by radians after some hundred tokens.
        saved = {clean_name(name) for name in module.state_dict()}
        for name, copy in self.copies.items():
            now_is = present[name].shape if name in present else ()
            if len(now_is) != copy.ndim or any(old > new for old, new in zip(copy.shape, now_is, strict=True)):
                now = f"has {list(present[name].shape)} now" if name in present else "is gone"
                raise MisconfigurationException(
                    f"{name!r} had the shape {list(copy.shape)} and {now}: the teacher cannot be put together again"
                )
            device = self.device or present[name].device
            cast = self.dtype is not None and copy.is_floating_point() and name in saved
            dtype = self.dtype if cast else copy.dtype
            self.copies[name] = copy.to(device, dtype)

    @contextmanager
    def in_place_of(self, module: nn.Module) -> Iterator[None]:
        """Makes the module compute as the teacher inside the block, in evaluation mode and without gradients.

        Args:
            module: the module itself, or a part of it that is called alone.
        """
        modes = {part: part.training for part in module.modules()}
        module.eval()
        try:
            with torch.no_grad(), ExitStack() as stack:
                stack.enter_context(_reparametrize_module(module, self.tensors_of(module)))
                yield
        finally:
            for part, training in modes.items():
                part.training = training

    def bind(self, module: nn.Module) -> None:
        """Assigns each copy to the modules and names that use its tensor; call it after :meth:`place`."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        copy_of = {id(tensor): self.copies[clean_name(n)] for n, tensor in tensors if clean_name(n) in self.copies}
        # The keys are module and name, since a module may replace a buffer's tensor. Tied weights have several keys.
        self._by_owner = {
            (part, name): copy_of[id(tensor)]
            for part in module.modules()
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]
            if id(tensor) in copy_of
        }

    def complete(self, module: nn.Module) -> None:
        """Copies tensors that have become trainable since; they were frozen until now, so they are still unchanged."""
        missing = {n: p for n, p in module.named_parameters() if p.requires_grad and clean_name(n) not in self.copies}
        if missing:
            self.copies.update({clean_name(name): full_cpu(p) for name, p in missing.items()})
            self.place(module)
            self.bind(module)

    def tensors_of(self, part: nn.Module) -> dict[str, Tensor]:
        """The copies that replace a part's tensors, by the part's own names; tied tensors under each of their names."""
        return {
            f"{prefix}.{name}" if prefix else name: self._by_owner[inner, name]
            for prefix, inner in part.named_modules(remove_duplicate=False)
            for name in [*inner._parameters, *inner._buffers]
            if (inner, name) in self._by_owner
        }

    def to_its_device(self, data: Any) -> Any:
        """Moves a batch or arguments to the teacher's device, and converts them to its type."""
        if self.device is not None:
            data = move_data_to_device(data, self.device)
        if self.dtype is not None:
            data = apply_to_collection(data, Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t)
        return data

    def state(self) -> dict[str, Tensor]:
        """The copies for a checkpoint, as full tensors on the CPU."""
        return {name: full_cpu(tensor) for name, tensor in self.copies.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        self.copies = dict(state)

    def size_in_bytes(self) -> int:
        """Bytes of the copies."""
        return tensor_bytes(self.copies)
