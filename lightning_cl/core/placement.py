"""Devices of a method's tensors: next to their parameters or on the CPU, and whole in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_cl.functional.penalty import full_value as whole


class Streamed(Mapping[str, Tensor]):
    """Tensors that are copied to a parameter's device one at a time, when they are read.

    Args:
        tensors: name to tensor, on any device.
        parameters: name to parameter; a tensor is copied to its parameter's device.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        self._tensors, self._parameters = tensors, parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self._parameters[name].device, non_blocking=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def fit_to(tensor: Tensor, parameter: Tensor, fill: Tensor | None, on_cpu: bool = False) -> Tensor:
    """Fits a stored tensor to its parameter: on the same device, with the same sharding and shape.

    Args:
        tensor: as stored, of the parameter's shape or smaller along some axes (a head that got new classes).
        parameter: the parameter.
        fill: values for new entries; None: zero.
        on_cpu: keep it on the CPU, in pinned memory if there is a GPU.

    Raises:
        MisconfigurationException: if the parameter has become smaller, or is sharded and the tensor is to stay on the
            CPU.
    """
    device = torch.device("cpu") if on_cpu else parameter.device
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and on_cpu:
        raise MisconfigurationException("state_device='cpu': not with sharded parameters; use state_device='model'")
    is_sharded_alike = mesh is None or hasattr(tensor, "device_mesh")
    if tensor.shape == parameter.shape and tensor.device == device and is_sharded_alike:
        return pinned(tensor) if on_cpu else tensor
    if tensor.shape != parameter.shape:
        if tensor.ndim != parameter.ndim or any(t > p for t, p in zip(tensor.shape, parameter.shape, strict=True)):
            raise MisconfigurationException(
                f"a parameter of shape {list(tensor.shape)} has become {list(parameter.shape)}: what was learnt about"
                " its importance does not fit any more"
            )
        new = full_cpu(fill) if fill is not None else torch.zeros(parameter.shape)
        grown = new.to(tensor.dtype)
        grown[tuple(slice(0, size) for size in tensor.shape)] = full_cpu(tensor)
        tensor = grown
    if mesh is not None and not hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
    moved = tensor.to(device)
    return pinned(moved) if on_cpu else moved


def pinned(tensor: Tensor) -> Tensor:
    """Returns a CPU tensor in pinned memory if there is a GPU, so that copies do not block."""
    return tensor.pin_memory() if torch.cuda.is_available() and not tensor.is_pinned() else tensor


def full_cpu(tensor: Tensor) -> Tensor:
    """Returns the whole tensor on the CPU; all ranks would load rank 0's part of a sharded one."""
    return whole(tensor.detach()).to("cpu", copy=True)


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor; an ordinary tensor is returned unchanged."""
    to_local = getattr(tensor, "to_local", None)
    return to_local() if to_local is not None else tensor


@torch.no_grad()
def set_weight_(parameter: Tensor, value: Tensor) -> None:
    """Sets a parameter, which may be sharded, to a value that is sharded alike or whole; of a whole one, rank 0's."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and not hasattr(value, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
    parameter.copy_(value)


def placed_along(basis: Tensor, matrix: Tensor, side: int | None) -> Tensor:
    """Brings a basis to a matrix's device, and shards its rows as that side of the matrix is.

    Args:
        basis: ``[width, directions]``, whole and the same on all ranks, or already sharded.
        matrix: of which one side has that width.
        side: 0 for its rows, 1 for its columns; None: each rank gets the whole, of whatever shape.
    """
    mesh = getattr(matrix, "device_mesh", None)
    if mesh is None:
        return basis.to(matrix.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(basis, DTensor):
        everywhere = [Replicate()] * mesh.ndim
        basis = DTensor.from_local(basis.to(matrix.device), mesh, everywhere, run_check=False)
    of_matrix: Any = matrix
    rows = [
        Shard(0) if side is not None and placement.is_shard(side) else Replicate() for placement in of_matrix.placements
    ]
    return basis.redistribute(mesh, rows)


def trainable_parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns name to trainable parameter; tied weights once, names without the prefix of ``torch.compile``."""
    return {clean_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def all_parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    """Returns name to parameter, also frozen ones; names as in :func:`trainable_parameters`."""
    return {clean_name(name): p for name, p in module.named_parameters()}


def clean_name(name: str) -> str:
    """Returns a parameter's name without ``_orig_mod.``."""
    return name.replace("_orig_mod.", "")


def tensor_bytes(*groups: dict[str, Tensor]) -> int:
    """Returns the bytes of dictionaries of tensors."""
    return sum(t.numel() * t.element_size() for group in groups for t in group.values())
