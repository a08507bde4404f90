"""Subspaces of a weight that training must not touch.

A weight ``W = U S Vᵀ`` keeps most of what it knows in its leading singular directions ``U_h``, ``V_h``. After every
step of the optimizer the weight is put back to::

    W ← W_h + P_U W P_V,   W_h = U_h S_h V_hᵀ,   P_U = I − U_h U_hᵀ,   P_V = I − V_h V_hᵀ

Projecting the gradient instead does not protect: Adam divides it entry by entry, which turns it back into the
protected directions, and weight decay shrinks them. The anchor's protected part is ``W_h`` itself (``P_U W_h = 0``), so
the factors are all that is stored. It is added back as it was at the start, so its rounding errors do not add up.

A basis is a matrix with orthonormal columns, ``[width, directions]``, in fp32 (fp64 for fp64 weights).

Source: Nayak et al. 2025, arXiv:2504.07097 (ICLR 2026; orthogonal subspace fine-tuning, OSF or OSFT). For a LoRA of a
frozen weight the same subspaces are taken out of its factors by :func:`remove_span_` (OPLoRA, arXiv:2510.13003).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 1e-9
"""Added to a number of directions before it is cut to a whole number: 0.29 · 100 is 28.999…"""


class PrincipalSubspace(NamedTuple):
    """The leading singular directions of a weight: ``W_h = left · diag(values) · rightᵀ``."""

    left: Tensor
    """``U_h``, ``[out, k]``, orthonormal columns."""
    values: Tensor
    """``S_h``, ``[k]``, falling."""
    right: Tensor
    """``V_h``, ``[in, k]``, orthonormal columns."""


def directions_of_share(share: float, shape: Sequence[int]) -> int:
    """The number of singular directions that a share of a weight's directions comes to, cut to a whole number.

    Args:
        share: above 0, at most 1.
        shape: of the weight, ``[out, in]``.

    Raises:
        ValueError: if `share` is outside (0, 1], or comes to less than one direction, or the shape is no matrix's.

    Example::

        >>> directions_of_share(0.5, (96, 256))
        48
    """
    if len(shape) != 2:
        raise ValueError(f"weight: shape {list(shape)}, expected a matrix [out, in]")
    if not 0 < share <= 1:
        raise ValueError(f"share: {share}, expected a number above 0 and at most 1")
    count = int(share * min(shape) + _SMALL)
    if count < 1:
        least = 1 / max(1, min(shape))
        raise ValueError(f"share: {share} of {min(shape)} directions is less than one, expected at least {least:.4g}")
    return count


@torch.no_grad()
def principal_subspace(weight: Tensor, share: float, dtype: torch.dtype = torch.float64) -> PrincipalSubspace:
    """The leading singular directions of a weight.

    Memory: the result has ``k · (out + in + 1)`` numbers of 4 bytes; on the way there are about four matrices of the
    weight's size in `dtype`. Compute: one full decomposition, about ``20 · out · in · min(out, in)`` operations. Its
    bits differ between machines, so a run that is to be resumed must store the result.

    Args:
        weight: ``[out, in]``, a whole tensor (not a shard), of any floating type.
        share: the part of the ``min(out, in)`` directions to protect, see :func:`directions_of_share`.
        dtype: the type to decompose in. In fp32 the columns are orthonormal up to 2e-6 instead of rounding; it is worth
            its speed only on GPUs with slow fp64.

    Raises:
        ValueError: if `share` is out of range, or if the weight is no matrix or has values that are not finite.

    Example::

        >>> weight = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        >>> principal_subspace(weight, share=0.7).values
        tensor([3., 2.])
    """
    count = directions_of_share(share, weight.shape)
    check_finite("weight", weight)
    left, values, right = torch.linalg.svd(_able(weight, dtype), full_matrices=False)
    kept = torch.promote_types(weight.dtype, torch.float32)
    parts = (left[:, :count], values[:count], right[:count].T)
    return PrincipalSubspace(*(part.to(weight.device, kept).contiguous() for part in parts))


@torch.no_grad()
def project_weights_(weight: Tensor, subspace: PrincipalSubspace) -> None:
    """Puts the protected part of a weight back to what it was, in place: ``W ← W_h + P_U W P_V``.

    Call it after the optimizer's step. What the step did outside the subspace stays; ``U_hᵀ W`` and ``W V_h`` are those
    of the weight that the subspace was taken from, up to rounding, after any number of steps, weight decay included. A
    second call changes nothing but rounding.

    The algebra is in fp32 whatever the type of the weight, free of TF32 and autocast. A 16-bit weight is rounded once
    per call: its protected part is then off by half a unit of its last place, which does not grow with the steps.

    Memory: ``k · in + out · k`` numbers; for 16-bit weights also one fp32 copy of the weight. Compute: ``8 · out · in ·
    k`` operations, as many as training on ``4 k / 3`` more tokens per optimizer step.

    Args:
        weight: ``[out, in]``. For a layer that stores ``[in, out]``, hand in ``weight.T``. May be a DTensor: `left` is
            then placed as the weight's rows, `right` replicated.
        subspace: of the weight at the task's start.

    Raises:
        ValueError: if the shapes do not fit.
    """
    left, values, right = subspace
    _check_side("left", left, weight, 0)
    _check_side("right", right, weight, 1)
    with full_precision(weight.device.type):
        wide = _wide(weight)
        wide.addmm_(left, left.T @ wide, alpha=-1)
        # (P_U W) V − U S, so that one product with Vᵀ takes out the part on the right and adds W_h.
        wide.addmm_((wide @ right).sub_(left * values), right.T, alpha=-1)
    if wide is not weight:
        weight.copy_(wide)


@torch.no_grad()
def protected_square(step: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """The squared norm of the part of a step that lies in protected space: ``‖D − P_U D P_V‖²``.

    It is the sum ``‖Uᵀ D‖² + ‖P_U D V‖²``, so that a small part is not lost in a difference of large ones. Sums over
    layers may be added up; :func:`protected_share` is the quotient for one.

    Memory: ``k · (out + in)`` numbers and an fp32 copy of a 16-bit step. Compute: at most ``4 · out · in · k``.

    Args:
        step: ``D``, ``[out, in]``: the difference of the weight after and before.
        left: basis on the side of the outputs, ``[out, k]``; None: that side is free.
        right: basis on the side of the inputs, ``[in, k]``; None: that side is free.

    Returns:
        A scalar in fp32 or wider.

    Raises:
        ValueError: if both bases are missing, or a shape does not fit.
    """
    if left is None and right is None:
        raise ValueError("left, right: None and None, expected at least one basis")
    parts = []
    with full_precision(step.device.type):
        wide = step.to(_wide_type(step))
        if left is not None:
            _check_side("left", left, step, 0)
            parts.append((left.T @ wide).square().sum())
        if right is not None:
            _check_side("right", right, step, 1)
            columns = wide @ right
            if left is not None:
                columns = columns - left @ (left.T @ columns)
            parts.append(columns.square().sum())
    return torch.stack([_whole(part) for part in parts]).sum()


@torch.no_grad()
def protected_share(step: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """The share of a step's squared norm that lies in protected space, in [0, 1]; 0 for a step of zeros.

    A full step of Adam whose gradient was projected has about 0.05 (share 0.5). After :func:`project_weights_` an fp32
    weight has less than 1e-6. A 16-bit weight cannot: the rounding of the weight is as large as a step.

    Args:
        step: see :func:`protected_square`.
        left: basis on the side of the outputs.
        right: basis on the side of the inputs.

    Raises:
        ValueError: see :func:`protected_square`.

    Example::

        >>> step = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        >>> protected_share(step, right=torch.tensor([[1.0], [0.0]]))
        tensor(0.3600)
    """
    protected = protected_square(step, left, right)
    total = _whole(step.to(_wide_type(step)).square().sum())
    return torch.where(total > 0, protected / total, 0.0)


@torch.no_grad()
def orthonormal_basis(vectors: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """An orthonormal basis of what the columns of a matrix span.

    Columns that the others give up to rounding add no direction, so the result may be narrower than `vectors`; of zeros
    alone it has no columns.

    Args:
        vectors: ``[width, count]``; for the rows of a matrix hand in its transpose.
        dtype: the type to decompose in.

    Returns:
        ``[width, directions]`` with ``directions <= min(width, count)``.

    Raises:
        ValueError: if `vectors` is no matrix or has values that are not finite.
    """
    if vectors.dim() != 2:
        raise ValueError(f"vectors: shape {list(vectors.shape)}, expected a matrix [width, count]")
    check_finite("vectors", vectors)
    left, values, _ = torch.linalg.svd(_able(vectors, dtype), full_matrices=False)
    kept = torch.promote_types(vectors.dtype, torch.float32)
    smallest = max(vectors.shape) * torch.finfo(kept).eps * values.max() if len(values) else 0.0
    basis: Tensor = left[:, values > smallest].to(vectors.device, kept).contiguous()
    return basis


@torch.no_grad()
def subspace_overlap(first: Tensor, second: Tensor) -> Tensor:
    """The mean cos² of the principal angles between two subspaces: ``‖Aᵀ B‖² / min(k, l)``, in [0, 1].

    1 means that the smaller one lies in the larger one, 0 that they are orthogonal. Two random subspaces have
    ``max(k, l) / width`` on average: a small number alone says nothing.

    Args:
        first: basis ``[width, k]`` with orthonormal columns.
        second: basis ``[width, l]`` with orthonormal columns.

    Returns:
        A scalar; 0 if one of them has no direction.

    Raises:
        ValueError: if the widths differ.

    Example::

        >>> axes = torch.eye(4)
        >>> subspace_overlap(axes[:, :2], axes[:, 1:4])
        tensor(0.5000)
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(f"second: shape {list(second.shape)}, expected [width, directions] as {list(first.shape)}")
    with full_precision(first.device.type):
        cosines = _wide(first).T @ _wide(second)
    return cosines.square().sum().div(max(1, min(cosines.shape)))


@torch.no_grad()
def remove_span_(rows: Tensor, basis: Tensor) -> None:
    """Takes out of every row what lies in a subspace, in place: ``rows ← rows − (rows Q) Qᵀ``.

    It is done twice: where most of a row was in the subspace, the first pass leaves its rounding error there. For
    columns hand in the transpose, as the up projection of OPLoRA: ``remove_span_(up.T, left)``.

    Memory: ``rows · k`` numbers. Compute: ``8 · rows · width · k``.

    Args:
        rows: ``[count, width]``, of any floating type; rounded once if in 16 bits.
        basis: ``Q``, ``[width, k]`` with orthonormal columns.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check_side("basis", basis, rows, 1)
    with full_precision(rows.device.type):
        wide = _wide(rows)
        for _ in range(2):
            wide.addmm_(wide @ basis, basis.T, alpha=-1)
    if wide is not rows:
        rows.copy_(wide)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Lets products of fp32 matrices keep all their digits: without autocast, TF32, or bf16 inside.

    With TF32 (``torch.set_float32_matmul_precision("high")``) a projection would change the free part of a weight by
    1e-3 of the protected part at every step. Leaving the context gives back the settings.

    Args:
        device_type: of the tensors, as ``"cuda"``.
    """
    switches = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    switches = [switch for switch in switches if hasattr(switch, "fp32_precision")]  # from torch 2.9
    before = [switch.fp32_precision for switch in switches]
    try:
        of_all: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say it where the single switches were set
        of_all = None
    try:
        if of_all is not None:
            torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if of_all is not None:
            torch.set_float32_matmul_precision(of_all)
        for switch, setting in zip(switches, before, strict=True):
            switch.fp32_precision = setting


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuses a tensor with infinite values or NaN: a decomposition would fail, or never end.

    Args:
        name: of the argument, for the message.
        tensor: of any shape.

    Raises:
        ValueError: if a value is not finite.
    """
    wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
    if wrong:
        raise ValueError(f"{name}: {wrong} of {tensor.numel()} values are not finite, expected finite numbers only")


def _wide_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor itself if it is in fp32 or fp64, else a copy in fp32."""
    return tensor.to(_wide_type(tensor))


def _able(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, on the CPU where its device has no such type (fp64 on Apple's GPUs)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).to(dtype)


def _check_side(name: str, basis: Tensor, matrix: Tensor, side: int) -> None:
    if matrix.dim() != 2 or basis.dim() != 2 or basis.shape[0] != matrix.shape[side]:
        raise ValueError(
            f"{name}: shape {list(basis.shape)}, expected [width, directions] for side {side} of a matrix of shape "
            f"{list(matrix.shape)}"
        )


def _whole(tensor: Tensor) -> Tensor:
    """The whole value of a sum over a sharded tensor (a no-op for an ordinary one)."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor is not None else tensor
