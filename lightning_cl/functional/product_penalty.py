"""The quadratic penalty of EWC for low-rank adapters, on their product instead of their factors.

::

    penalty(A, B) = strength / 2 · Σ_ij F_ij (s B A − s B* A*)²_ij

``F`` is the importance of the entries of the weight that the adapter changes, ``[out, in]``. The model depends on the
factors through their product alone, and many factors have the same product: ``B R⁻¹`` and ``R A`` for any invertible
R. A penalty on A and on B apart holds back such changes, which cost nothing, and forgets that the curvature for A
depends on B. This one does neither. With ``G = strength · F ⊙ (s B A − s B* A*)`` its gradients are::

    ∂/∂A = s Bᵀ G        ∂/∂B = s G Aᵀ

Kirkpatrick et al. 2017 (EWC, arXiv:1612.00796), eq. 3, for the weight ``W + s B A`` of Hu et al. 2022 (LoRA,
arXiv:2106.09685), eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_cl.functional.tensors import wide

CHUNK_BYTES = 2**26
"""The size of one temporary of the shape ``[rows, in]``, in bytes."""


def product_penalty(
    a: Tensor,
    b: Tensor,
    anchor_a: Tensor,
    anchor_b: Tensor,
    importance: Tensor,
    strength: float,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The penalty's value as a scalar, differentiable in A and B.

    Memory: without a graph one chunk of rows at a time; with one, all chunks. Compute: ``4 · r · in · out`` operations.

    Args:
        a: ``A``, ``[r, in]``.
        b: ``B``, ``[out, r]``.
        anchor_a: ``A*``, ``[r*, in]``; its rank may be another one.
        anchor_b: ``B*``, ``[out, r*]``.
        importance: ``F``, ``[out, in]``, not negative.
        strength: the factor λ.
        scale: the adapter's s.
        chunk_bytes: the size of one fp32 temporary.

    Returns:
        A scalar in fp32, or in fp64 if a factor is.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(a, b, anchor_a, anchor_b, importance)
    kind = _type(a, b)
    total = torch.zeros((), dtype=kind, device=a.device)
    for rows in _rows(importance, kind, chunk_bytes):
        change = scale * (b[rows].to(kind) @ a.to(kind) - anchor_b[rows].to(kind) @ anchor_a.to(kind))
        total = total + (importance[rows].to(kind) * change.square()).sum()
    return 0.5 * strength * total


@torch.no_grad()
def product_penalty_gradients(
    a: Tensor,
    b: Tensor,
    anchor_a: Tensor,
    anchor_b: Tensor,
    importance: Tensor,
    strength: float,
    scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The penalty's gradients for A and B, in closed form and without a graph.

    Memory: both results, and about three temporaries of `chunk_bytes`. Compute: ``8 · r · in · out`` operations, as
    many as forward and backward pass of the frozen weight spend on ``2 · r`` tokens.

    Args:
        a: see :func:`product_penalty`.
        b: see :func:`product_penalty`.
        anchor_a: see :func:`product_penalty`.
        anchor_b: see :func:`product_penalty`.
        importance: see :func:`product_penalty`.
        strength: see :func:`product_penalty`.
        scale: see :func:`product_penalty`.
        chunk_bytes: see :func:`product_penalty`.

    Returns:
        ``∂/∂A`` and ``∂/∂B`` in fp32, or in fp64 if a factor is.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> product_penalty_gradients(one, two, one, one, importance=torch.tensor([[3.0]]), strength=1.0)
        (tensor([[6.]]), tensor([[3.]]))
    """
    _check(a, b, anchor_a, anchor_b, importance)
    kind = _type(a, b)
    down, anchor_down = a.to(kind), anchor_a.to(kind)
    of_a, of_b = torch.zeros_like(down), torch.zeros_like(b, dtype=kind)
    for rows in _rows(importance, kind, chunk_bytes):
        up = b[rows].to(kind)
        g = (up @ down).sub_(anchor_b[rows].to(kind) @ anchor_down).mul_(importance[rows].to(kind))
        of_a.addmm_(up.T, g, alpha=strength * scale**2)
        of_b[rows] = (g @ down.T).mul_(strength * scale**2)
    return of_a, of_b


@torch.no_grad()
def add_product_penalty_gradient_(
    a: Tensor,
    b: Tensor,
    anchor_a: Tensor,
    anchor_b: Tensor,
    importance: Tensor,
    strength: float,
    scale: float = 1.0,
    loss_scale: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Adds ``loss_scale ·`` the penalty's gradients to ``a.grad`` and ``b.grad`` in place.

    A factor without ``.grad`` takes no part in this step and is skipped.

    Args:
        a: the parameter A.
        b: the parameter B.
        anchor_a: see :func:`product_penalty`.
        anchor_b: see :func:`product_penalty`.
        importance: see :func:`product_penalty`.
        strength: see :func:`product_penalty`.
        scale: see :func:`product_penalty`.
        loss_scale: the factor that the other gradients carry (a loss scale that is not undone yet).
        chunk_bytes: see :func:`product_penalty`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if strength == 0.0:
        _check(a, b, anchor_a, anchor_b, importance)
        return  # bit for bit: −0 + 0 is not −0
    found = product_penalty_gradients(a, b, anchor_a, anchor_b, importance, strength, scale, chunk_bytes)
    for parameter, gradient in zip((a, b), found, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(gradient.mul_(loss_scale).to(parameter.grad.dtype))


def _rows(importance: Tensor, kind: torch.dtype, chunk_bytes: int) -> Iterator[slice]:
    rows = max(1, chunk_bytes // max(1, importance.shape[1] * kind.itemsize))
    for start in range(0, importance.shape[0], rows):
        yield slice(start, start + rows)


def _type(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(wide(a).dtype, wide(b).dtype)


def _check(a: Tensor, b: Tensor, anchor_a: Tensor, anchor_b: Tensor, importance: Tensor) -> None:
    for names, down, up in (("a, b", a, b), ("anchor_a, anchor_b", anchor_a, anchor_b)):
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"{names}: shapes {list(down.shape)} and {list(up.shape)}, expected [r, in] and [out, r]")
        product = [up.shape[0], down.shape[1]]
        if list(importance.shape) != product:
            shape = list(importance.shape)
            raise ValueError(f"importance: shape {shape}, expected {product} as the product of {names}")
