"""Orthogonality of the LoRAs of several tasks.

Every task has its own LoRA ``ΔW_i = s · B_i A_i``. All of them are active, and only the newest is trained. The rows of
``A_i`` (``[r_i, in]``, the down projection) are the input directions that a task uses. Those of the newest task are
made orthogonal to the earlier ones, in one of three ways:

=========  ======================================================================================
penalty    ``Σ_{i<t} Σ_{ab} |A_i A_tᵀ|_ab`` (Wang et al. 2023, arXiv:2310.14152, eq. 7, and their code)
overlap    the mean over the rows ``a`` of ``A_t`` of ``‖a Q‖² / ‖a‖²``, in [0, 1]
hard       after each step ``A_t ← A_t − (A_t Q) Qᵀ``
=========  ======================================================================================

``Q`` (``[in, Σ r_i]``) is an orthonormal basis of all earlier rows. The penalty of the paper grows with rank, depth and
length of the rows, so one strength does not fit all models. Training can lower it by shorter rows instead of turned
ones. The overlap depends on the angle only. Penalties are for one layer: add them up (or take the mean) over layers,
and apply them once per optimizer step, not once per micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cl.functional.subspace import full_precision, orthonormal_basis, remove_span_, subspace_overlap


def earlier_basis(earlier: Sequence[Tensor], rank: int) -> Tensor:
    """An orthonormal basis ``Q`` of the rows of all earlier down projections.

    Memory: ``4 · in · Σ r_i`` bytes. Compute: one thin decomposition per task, ``O(in · (Σ r_i)²)``.

    Args:
        earlier: ``A_1 … A_{t−1}``, each ``[r_i, in]``; at least one.
        rank: of the new down projection, for which orthogonal directions must be left.

    Returns:
        ``[in, directions]``; fewer directions than rows where rows are linearly dependent.

    Raises:
        ValueError: if there is no earlier one, if the widths differ, or if all ranks together are more than the width.
    """
    if not earlier:
        raise ValueError("earlier: no down projection, expected at least one of an earlier task")
    width = earlier[0].shape[-1]
    for i, down in enumerate(earlier):
        if down.dim() != 2 or down.shape[1] != width:
            raise ValueError(f"earlier[{i}]: shape {list(down.shape)}, expected [rank, {width}]")
    ranks = [down.shape[0] for down in earlier]
    if sum(ranks) + rank > width:
        raise ValueError(
            f"rank: {rank}, with {sum(ranks)} of earlier tasks more than the layer's {width} inputs: expected at most "
            f"{max(0, width - sum(ranks))}, else no orthogonal directions are left"
        )
    return orthonormal_basis(torch.cat([down.detach().to(earlier[0].device) for down in earlier]).T)


def orthogonality_penalty(down: Tensor, earlier: Tensor) -> Tensor:
    """``Σ |earlier · downᵀ|``, the penalty of O-LoRA, differentiable in `down`.

    Memory: ``Σ r_i · r`` numbers. Compute: ``2 · Σ r_i · r · in``.

    Args:
        down: ``A_t``, ``[r, in]``.
        earlier: the rows of all earlier down projections, ``[Σ r_i, in]``.

    Returns:
        A scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError: if the shapes do not fit.

    Example::

        >>> down = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> orthogonality_penalty(down, torch.tensor([[0.0, -2.0]]))
        tensor(8.)
    """
    _check(down, earlier, 1, "earlier")
    with full_precision(down.device.type):
        return (_wide(earlier) @ _wide(down).T).abs().sum()


@torch.no_grad()
def orthogonality_gradient(down: Tensor, earlier: Tensor) -> Tensor:
    """The gradient of :func:`orthogonality_penalty`, ``sign(A_t earlierᵀ) · earlier``, without a graph.

    Args:
        down: ``A_t``, ``[r, in]``.
        earlier: ``[Σ r_i, in]``.

    Returns:
        ``[r, in]`` in fp32 (fp64 for fp64); a product of exactly 0 has no part, as in autograd.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(down, earlier, 1, "earlier")
    with full_precision(down.device.type):
        wide = _wide(earlier)
        return (_wide(down) @ wide.T).sign_() @ wide


def overlap_penalty(down: Tensor, basis: Tensor) -> Tensor:
    """The mean share of the rows of a down projection that lies in a subspace, differentiable in `down`.

    It is 0 where all rows are orthogonal to the subspace, 1 where all lie in it, and does not depend on the rows'
    lengths. Random rows have ``directions / in``. A row of zeros counts as 0.

    Memory: ``r · directions`` numbers. Compute: ``2 · r · in · directions``.

    Args:
        down: ``A_t``, ``[r, in]``.
        basis: ``Q``, ``[in, directions]`` with orthonormal columns, see :func:`earlier_basis`.

    Returns:
        A scalar in fp32 (fp64 for fp64), in [0, 1].

    Raises:
        ValueError: if the shapes do not fit.

    Example::

        >>> down = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> overlap_penalty(down, torch.tensor([[0.0], [1.0]]))  # the mean of 0 and 16/25
        tensor(0.3200)
    """
    _check(down, basis, 0, "basis")
    with full_precision(down.device.type):
        wide = _wide(down)
        inside, squares = (wide @ basis).square().sum(1), wide.square().sum(1)
        return (inside / squares.where(squares > 0, 1.0)).mean()


@torch.no_grad()
def overlap_gradient(down: Tensor, basis: Tensor) -> Tensor:
    """The gradient of :func:`overlap_penalty`: ``2 / (r ‖a‖²) · (a Q Qᵀ − c a)`` with ``c = ‖a Q‖² / ‖a‖²``.

    It is orthogonal to each row, so it turns the rows without changing their lengths.

    Args:
        down: ``A_t``, ``[r, in]``.
        basis: ``Q``, ``[in, directions]`` with orthonormal columns.

    Returns:
        ``[r, in]`` in fp32 (fp64 for fp64); 0 for a row of zeros.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(down, basis, 0, "basis")
    with full_precision(down.device.type):
        wide = _wide(down)
        products = wide @ basis
        squares = wide.square().sum(1, keepdim=True)
        squares = squares.where(squares > 0, 1.0)
        share = products.square().sum(1, keepdim=True) / squares
        return (products @ basis.T - share * wide) * (2 / (len(down) * squares))


def project_down_(down: Tensor, basis: Tensor) -> None:
    """Takes out of a down projection, in place, what lies in the earlier ones' span: ``A_t ← A_t − (A_t Q) Qᵀ``.

    Call it after the optimizer's step, and once before the first one. The overlap is then below 1e-12 in fp32. In bf16
    the rows are rounded once, which leaves about 1e-6 and at most 4e-6.

    Memory: ``r · directions`` numbers. Compute: ``8 · r · in · directions``.

    Args:
        down: ``A_t``, ``[r, in]``, of any floating type.
        basis: ``Q``, ``[in, directions]`` with orthonormal columns, see :func:`earlier_basis`.

    Raises:
        ValueError: if the shapes do not fit, or if the basis leaves less than `r` directions.
    """
    _check(down, basis, 0, "basis")
    rank, (width, taken) = len(down), basis.shape
    if taken + rank > width:
        raise ValueError(
            f"down: rank {rank}, expected at most {width - taken}: {taken} of {width} directions are taken"
        )
    remove_span_(down, basis)


def down_overlap(down: Tensor, basis: Tensor) -> Tensor:
    """The overlap of a down projection's row space with the earlier ones': the mean cos² of the angles, in [0, 1].

    Unlike :func:`overlap_penalty` it takes the rows as a space, so it does not change when ``B A`` is written with
    other rows of the same span. Independent LoRAs have about ``directions / in`` (0.08 at rank 8 and width 96).

    Compute: one thin decomposition, ``O(in · r²)``: for reports, not for every step.

    Args:
        down: ``A_t``, ``[r, in]``.
        basis: ``Q``, ``[in, directions]`` with orthonormal columns.

    Returns:
        A scalar; 0 if `down` is zero.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(down, basis, 0, "basis")
    return subspace_overlap(orthonormal_basis(down.detach().T).to(basis.device), basis)


def _check(down: Tensor, other: Tensor, side: int, name: str) -> None:
    if down.dim() != 2 or other.dim() != 2 or other.shape[side] != down.shape[1]:
        expected = f"[in, directions] with {down.shape[-1]} rows" if side == 0 else f"[rows, {down.shape[-1]}]"
        raise ValueError(f"{name}: shape {list(other.shape)}, expected {expected} for `down` of {list(down.shape)}")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
