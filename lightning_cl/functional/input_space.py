"""Directions of a layer's inputs along which its weight must not change.

A linear layer that saw the inputs ``x`` of earlier tasks gives the same outputs for them as long as ``ΔW x = 0``. The
directions that hold most of the energy of those inputs are collected in a basis ``M`` (``[in, k]``, orthonormal
columns), and after every step of the optimizer the weight is put back to::

    W ← W − (W M − O) Mᵀ,   O = W₀ M

``O`` are the layer's outputs for the protected directions at the task's start. They are all that is stored of the
anchor, and they are restored as they were, so that weight decay and rounding errors do not add up.

The basis grows task by task from the second moments ``C = Σ x xᵀ`` of the inputs (the representation matrix of the
paper, times its transpose). Directions are added until the basis holds a share ``threshold`` of their energy::

    tr(Mᵀ C M) + Σ_{i ≤ j} λ_i ≥ threshold · tr(C)

with ``λ_i`` the eigenvalues, falling, of ``(I − M Mᵀ) C (I − M Mᵀ)``.

A bias that trains moves the outputs for every input, so it must be frozen as well. What is outside of the basis, a
share ``1 − threshold`` of the energy, is not protected.

Source: Saha, Garg & Roy 2021 (gradient projection memory, GPM), ICLR, arXiv:2103.09762, eqs. 8 and 9. The paper
projects gradients, which is enough for plain SGD; here the weights are projected (see ``subspace.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.subspace import check_finite, full_precision

_BLOCK_BYTES = 32 * 2**20
"""Size of the fp32 copy of inputs that exists at a time."""


@torch.no_grad()
def add_second_moment_(total: Tensor, inputs: Tensor, mask: Tensor | None = None, normalize: bool = False) -> int:
    """``total += Σ x xᵀ`` over the positions that count, in place and in fp32.

    The sum does not depend on the order or the split of the batches, up to rounding. Processes that share the batches
    add up their totals.

    Memory: 32 MB next to `total`, which has ``4 · in²`` bytes. Compute: ``2 · positions · in²`` operations.

    Args:
        total: ``[in, in]`` in fp32 or fp64; zeros at the beginning.
        inputs: ``[..., in]`` of any floating type, the inputs of a linear layer.
        mask: ``[...]``, one entry per position; positions where it is zero or False (padding) are left out. None: all
            positions count.
        normalize: scale every position to length 1 first. Language models have a few positions (often the first) whose
            inputs to some layers are a hundred times longer than all others; else these make up all of the energy.

    Returns:
        The number of positions that were counted.

    Raises:
        ValueError: if the shapes do not fit, or `total` has fewer bits than fp32.

    Example::

        >>> total = torch.zeros(2, 2)
        >>> add_second_moment_(total, torch.tensor([[1.0, 2.0], [9.0, 9.0]]), mask=torch.tensor([1, 0]))
        1
        >>> total
        tensor([[1., 2.],
                [2., 4.]])
    """
    width = inputs.shape[-1]
    if total.shape != (width, width):
        raise ValueError(f"total: shape {list(total.shape)}, expected {[width, width]} for inputs of width {width}")
    if total.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"total: type {total.dtype}, expected torch.float32 or torch.float64")
    rows = inputs.detach().reshape(-1, width)
    if mask is not None:
        if mask.shape != inputs.shape[:-1]:
            raise ValueError(f"mask: shape {list(mask.shape)}, expected {list(inputs.shape[:-1])} as in `inputs`")
        rows = rows[mask.reshape(-1).to(rows.device) != 0]
    with full_precision(total.device.type):
        for part in rows.split(max(1, _BLOCK_BYTES // (4 * width))):
            wide = part.to(total.device, total.dtype)
            if normalize:
                wide = torch.nn.functional.normalize(wide, dim=-1)
            total.addmm_(wide.T, wide)
    return len(rows)


@torch.no_grad()
def spectrum_outside(second_moment: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of ``(I − M Mᵀ) C (I − M Mᵀ)`` on the complement of the basis.

    They are computed in fp64, in coordinates of the complement. So even a direction that no input has, with an
    eigenvalue of 0, is orthogonal to the basis.

    Memory: about four matrices ``[in, in]`` in fp64. Compute: one symmetric decomposition, about ``10 · in³``
    operations.

    Args:
        second_moment: ``C``, ``[in, in]``, symmetric.
        basis: ``M``, ``[in, k]`` with orthonormal columns; None: nothing is protected yet.

    Returns:
        The eigenvalues, falling, not negative, ``[in − k]`` and the eigenvectors as columns, ``[in, in − k]``; in fp64,
        on the CPU if the device has no fp64.

    Raises:
        ValueError: if the shapes do not fit, or a value is not finite.
    """
    _check_moment(second_moment, basis)
    moment = _double(second_moment)
    if basis is None or basis.shape[1] == 0:
        values, vectors = torch.linalg.eigh(moment)
    else:
        whole = torch.linalg.qr(_double(basis), mode="complete").Q
        outside = whole[:, basis.shape[1] :]
        values, vectors = torch.linalg.eigh(outside.T @ moment @ outside)
        vectors = outside @ vectors
    return values.flip(0).clamp_(min=0), vectors.flip(1)


@torch.no_grad()
def grow_basis(second_moment: Tensor, threshold: float, basis: Tensor | None = None, most: int | None = None) -> Tensor:
    """Extends a basis by the fewest directions with which it contains a given share of the inputs' energy (GPM, eq. 9).

    The old columns keep every bit, and come first. Nothing is added if the old basis contains enough already, or if
    all inputs were zero. Directions whose energy is only rounding of `second_moment` are never added.

    Memory and compute: see :func:`spectrum_outside`.

    Args:
        second_moment: ``C = Σ x xᵀ``, ``[in, in]``, of the inputs that are to be protected from now on.
        threshold: the share of ``tr(C)`` that the basis must hold, above 0 and at most 1. 0.9 left room for new tasks
            in small models; 0.98 left little.
        basis: ``M``, ``[in, k]`` with orthonormal columns; None: start a new one.
        most: the largest number of columns that the result may have; None: as many as the layer has inputs.

    Returns:
        ``[in, k + new]`` in fp32 (fp64 for a second moment in fp64), with orthonormal columns.

    Raises:
        ValueError: if `threshold` is outside (0, 1], if `most` is less than the columns of `basis`, if the shapes do
            not fit, or if a value is not finite.

    Example::

        >>> energy = torch.diag(torch.tensor([1.0, 6.0, 3.0]))
        >>> grow_basis(energy, threshold=0.9).abs()
        tensor([[0., 0.],
                [1., 0.],
                [0., 1.]])
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold}, expected a number above 0 and at most 1")
    width = second_moment.shape[0]
    old = 0 if basis is None else basis.shape[1]
    if most is not None and most < old:
        raise ValueError(f"most: {most}, expected at least {old}, the columns that `basis` has")
    values, vectors = spectrum_outside(second_moment, basis)
    moment = _double(second_moment)
    total = float(moment.trace())
    held = 0.0 if basis is None else float((_double(basis) * (moment @ _double(basis))).sum())
    kept = torch.promote_types(second_moment.dtype, torch.float32)
    rounding = 10 * torch.finfo(kept).eps * float(moment.norm())
    count = 0
    if held < threshold * total:
        enough = int(torch.searchsorted(held + values.cumsum(0), threshold * total)) + 1
        count = min(enough, int((values > rounding).sum()), (width if most is None else most) - old)
    new = vectors[:, :count].to(second_moment.device, kept)
    return new.contiguous() if basis is None else torch.cat([basis, new.to(basis)], dim=1)


@torch.no_grad()
def protected_outputs(weight: Tensor, basis: Tensor) -> Tensor:
    """The outputs of a layer for the protected directions, ``O = W M``, in fp32: what :func:`project_inputs_` restores.

    Memory: the result has ``4 · out · k`` bytes. Compute: ``2 · out · in · k``.

    Args:
        weight: ``[out, in]``, at the task's start.
        basis: ``M``, ``[in, k]`` with orthonormal columns.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_basis(basis, weight)
    with full_precision(weight.device.type):
        return weight.detach().to(_wide_type(weight)) @ basis


@torch.no_grad()
def project_inputs_(weight: Tensor, basis: Tensor, outputs: Tensor) -> None:
    """Puts a weight's outputs for protected inputs back to what they were: ``W ← W − (W M − O) Mᵀ``, in place.

    Call it after the optimizer's step. The change of the weight along inputs outside the basis stays. ``W M`` equals
    `outputs` up to rounding after any number of steps, weight decay included. A 16-bit weight is rounded once per call.

    Memory: ``out · k`` numbers; for 16-bit weights also one fp32 copy of the weight. Compute: ``4 · out · in · k``.

    Args:
        weight: ``[out, in]``. For a layer that stores ``[in, out]``, hand in ``weight.T``. May be a DTensor: `outputs`
            is then placed as the weight's rows, `basis` replicated.
        basis: ``M``, ``[in, k]`` with orthonormal columns.
        outputs: ``O``, ``[out, k]``, from :func:`protected_outputs`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_basis(basis, weight)
    if outputs.shape != (weight.shape[0], basis.shape[1]):
        expected = [weight.shape[0], basis.shape[1]]
        raise ValueError(f"outputs: shape {list(outputs.shape)}, expected {expected} for this weight and basis")
    with full_precision(weight.device.type):
        wide = weight.to(_wide_type(weight))
        wide.addmm_((wide @ basis).sub_(outputs), basis.T, alpha=-1)
    if wide is not weight:
        weight.copy_(wide)


def _check_moment(second_moment: Tensor, basis: Tensor | None) -> None:
    if second_moment.dim() != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(f"second_moment: shape {list(second_moment.shape)}, expected a square matrix [in, in]")
    check_finite("second_moment", second_moment)
    if basis is not None:
        _check_basis(basis, second_moment)


def _check_basis(basis: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or basis.dim() != 2 or basis.shape[0] != weight.shape[1]:
        raise ValueError(
            f"basis: shape {list(basis.shape)}, expected [width, directions] for a matrix of shape {list(weight.shape)}"
        )


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _double(tensor: Tensor) -> Tensor:
    """In fp64, on the CPU where the device has no such type."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()
