"""A frozen copy of what a module was: the teacher of distillation, without a second module."""

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
    """The trainable tensors of a module as they were at one moment, put in their place for a forward pass.

    What is frozen is not copied: under LoRA the teacher is a second, frozen adapter on the same base, a few megabytes.
    The parameters of the student are not written to: other tensors stand in the module's places for the moment, so that
    a graph that is waiting for its backward pass, the optimizer and DDP notice nothing.

    Args:
        module: as it is now; None for a later :meth:`load`.
        dtype: of the copy; None: that of the parameters. Another type, or another device, takes a copy of all tensors,
            the frozen ones too.
        device: where the copy is and computes; None: where the parameters are.

    Attributes:
        copies: name (without ``_orig_mod.``) to tensor.
    """

    def __init__(
        self, module: nn.Module | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> None:
        self.dtype, self.device = dtype, device
        self.copies: dict[str, Tensor] = {}
        self._by_place: dict[tuple[nn.Module, str], Tensor] = {}
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
        """Brings the copies to where they compute.

        Raises:
            MisconfigurationException: if the module has lost a tensor, or it has another shape.
        """
        present = {clean_name(n): t for n, t in [*module.named_parameters(), *module.named_buffers()]}
        # What no checkpoint holds is computed, not learnt, and stays in its own type: rounded rotary frequencies would
        # be wrong by radians some hundred tokens on.
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
        """Inside, the module is its teacher, in evaluation mode and without gradients.

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
        """Remembers which copy belongs to which place in the module; call it after :meth:`place`."""
        tensors = [*module.named_parameters(), *module.named_buffers()]
        copy_of = {id(tensor): self.copies[clean_name(n)] for n, tensor in tensors if clean_name(n) in self.copies}
        # By place and not by tensor: a module may put another buffer in the place of one. Tied weights have several.
        self._by_place = {
            (part, name): copy_of[id(tensor)]
            for part in module.modules()
            for name, tensor in [*part._parameters.items(), *part._buffers.items()]
            if id(tensor) in copy_of
        }

    def complete(self, module: nn.Module) -> None:
        """Copies what has become trainable since: until now it was frozen, and so it is as it was."""
        missing = {n: p for n, p in module.named_parameters() if p.requires_grad and clean_name(n) not in self.copies}
        if missing:
            self.copies.update({clean_name(name): full_cpu(p) for name, p in missing.items()})
            self.place(module)
            self.bind(module)

    def tensors_of(self, part: nn.Module) -> dict[str, Tensor]:
        """A part's own names to the copies that stand for its tensors, tied ones under each of their names."""
        return {
            f"{prefix}.{name}" if prefix else name: self._by_place[inner, name]
            for prefix, inner in part.named_modules(remove_duplicate=False)
            for name in [*inner._parameters, *inner._buffers]
            if (inner, name) in self._by_place
        }

    def to_its_device(self, data: Any) -> Any:
        """A batch or arguments where the teacher computes, in its type."""
        if self.device is not None:
            data = move_data_to_device(data, self.device)
        if self.dtype is not None:
            data = apply_to_collection(data, Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t)
        return data

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: full tensors on the CPU."""
        return {name: full_cpu(tensor) for name, tensor in self.copies.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores :meth:`state`."""
        self.copies = dict(state)

    def size_in_bytes(self) -> int:
        """Bytes of the copies."""
        return tensor_bytes(self.copies)
