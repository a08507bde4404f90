"""Sums of low-rank products, and the best product of a given rank.

An adapter's change of a weight is ``ΔW = s · B A`` with ``A`` of shape ``[r, in]`` and ``B`` of shape ``[out, r]`` (Hu
et al. 2022, LoRA, arXiv:2106.09685, eq. 3). Adapters are merged and interpolated as products: the mean of the factors
is not a factor of the mean.

The sum of products is a product itself, of rank Σr. Its singular value decomposition needs no matrix of the weight's
size. With the QR decompositions ``[w_t B_t] = Q_b R_b`` and ``[A_t]ᵀ = Q_a R_a``::

    Σ_t w_t B_t A_t = [w_1 B_1 … w_T B_T] [A_1; …; A_T]
                    = Q_b (R_b R_aᵀ) Q_aᵀ,   R_b R_aᵀ = U S Vᵀ  of size Σr × Σr

and the best approximation of rank k, in the Frobenius norm, keeps the k largest singular values (Eckart & Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_cl.functional.tensors import wide

Factors: TypeAlias = tuple[Tensor, Tensor]
"""``A`` of shape [r, in] and ``B`` of shape [out, r], in this order."""


def low_rank_product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """``ΔW = scale · B A`` in fp32, or in fp64 if a factor is.

    Memory: the result, ``[out, in]``. Compute: ``2 · r · in · out`` operations.

    Args:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scale: of the adapter: ``alpha / r``, or ``alpha / √r`` with rank-stabilised scaling.

    Returns:
        ``[out, in]``, differentiable.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check((a, b), "a", "b")
    a, b = _same_type(a, b)
    return scale * (b @ a)


@torch.no_grad()
def mean_of_products(factors: Sequence[Factors], scale: float = 1.0) -> Tensor:
    """``Σ_t scale · B_t A_t / T``, the mean change of the weight by T adapters; they may have different ranks.

    Memory: two matrices of shape ``[out, in]``. For the mean as an adapter see :func:`low_rank_sum`.

    Args:
        factors: for each adapter ``(A_t, B_t)``, at least one.
        scale: that all adapters share.

    Returns:
        ``[out, in]`` in fp32, or in fp64 if a factor is.

    Raises:
        ValueError: if there are no factors, or if shapes do not fit.
    """
    _check_all(factors)
    total = low_rank_product(*factors[0])
    for a, b in factors[1:]:
        total = total + low_rank_product(a, b)
    return total * (scale / len(factors))


@torch.no_grad()
def to_low_rank(delta: Tensor, rank: int, scale: float = 1.0) -> Factors:
    """The factors of rank `rank` whose product ``scale · B A`` is nearest to a matrix, in the Frobenius norm.

    Both factors carry the square roots of the singular values, so that ``A Aᵀ = Bᵀ B``. The factors are unique up to
    the signs of their rows and columns, if the singular values differ.

    Compute: one singular value decomposition of the whole matrix, seconds for 4096 × 4096. For a sum of adapters
    :func:`low_rank_sum` is far cheaper.

    Args:
        delta: ``[out, in]``.
        rank: r, from 1 to ``min(out, in)``.
        scale: of the adapter that takes the factors.

    Returns:
        ``A`` of shape ``[r, in]`` and ``B`` of shape ``[out, r]``, in the type of `delta`; 16-bit matrices are
        decomposed in fp32.

    Raises:
        ValueError: if `delta` is no matrix, or if the rank or the scale does not fit.

    Example:
        >>> import torch
        >>> delta = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
        >>> a, b = to_low_rank(delta, rank=1)
        >>> round(float((delta - low_rank_product(a, b)).norm()), 3)
        0.5
    """
    if delta.dim() != 2:
        raise ValueError(f"delta: shape {list(delta.shape)}, expected a matrix [out, in]")
    _check_rank(rank, min(delta.shape), "the smaller side of `delta`")
    _check_scale(scale)
    u, s, v = torch.linalg.svd(wide(delta), full_matrices=False)
    left, right = _shared(u, s, v, rank, scale)
    return right.to(delta.dtype), left.to(delta.dtype)


@torch.no_grad()
def low_rank_sum(
    factors: Sequence[Factors], weights: Sequence[float] | None = None, rank: int | None = None, scale: float = 1.0
) -> Factors:
    """The sum ``Σ_t w_t B_t A_t`` of adapters as one adapter, exact or as the best of a given rank.

    Without a rank the factors are put next to each other: the result has rank Σr and the exact product. With a rank,
    the singular value decomposition goes through QR as this module's docstring says. For T adapters the weights
    ``1 / T`` give the mean; ``1 − share`` and ``share`` interpolate between two states of one adapter.

    If the sum has a lower rank than asked for, the rows of A and columns of B that are left are 0. No gradient reaches
    them, so that an adapter that is to be trained further should ask for a lower rank.

    Memory: a few matrices of shape ``[Σr, in]``, ``[out, Σr]`` and ``[Σr, Σr]``, none of shape ``[out, in]``. Compute:
    about ``4 · (in + out) · (Σr)²`` operations.

    Args:
        factors: for each adapter ``(A_t, B_t)``, at least one; they may have different ranks.
        weights: for each adapter its ``w_t``, with the adapter's own scale in it. None: 1 for all.
        rank: of the result, at most Σr and at most the smaller side of the weight. None: Σr.
        scale: of the adapter that takes the factors; ``scale · B A`` is the sum.

    Returns:
        ``A`` of shape ``[rank, in]`` and ``B`` of shape ``[out, rank]``, in the type of the first ``A`` and ``B``.

    Raises:
        ValueError: if there are no factors, or if shapes, the number of weights, the rank or the scale do not fit.

    Example:
        >>> import torch
        >>> old = (torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0], [0.0]]))
        >>> new = (torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]))
        >>> low_rank_product(*low_rank_sum([old, new], weights=[0.5, 0.5]))
        tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])
    """
    _check_all(factors)
    _check_scale(scale)
    weights = [1.0] * len(factors) if weights is None else weights
    if len(weights) != len(factors):
        raise ValueError(f"weights: {len(weights)} numbers, expected {len(factors)} as there are adapters")
    kind = (factors[0][0].dtype, factors[0][1].dtype)
    pairs = [_same_type(a, b) for a, b in factors]
    down = torch.cat([a for a, _ in pairs])
    up = torch.cat([b * weight for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
    if rank is None:
        return down.to(kind[0]), (up / scale).to(kind[1])
    _check_rank(rank, min(len(down), down.shape[1], len(up)), "the sum of the ranks and the sides of the weight")
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    left, right = _shared(u, s, v, rank, scale)
    return (right @ q_down.T).to(kind[0]), (q_up @ left).to(kind[1])


def _shared(u: Tensor, s: Tensor, v: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """``U √(S/|scale|)`` and ``√(S/|scale|) V`` of the leading `rank` directions; the first has the scale's sign."""
    root = (s[:rank] / abs(scale)).sqrt()
    return u[:, :rank] * (root if scale > 0 else -root), root[:, None] * v[:rank]


def _same_type(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(wide(a).dtype, wide(b).dtype)
    return a.to(kind), b.to(kind)


def _check(pair: Factors, a_name: str, b_name: str) -> None:
    a, b = pair
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{a_name}, {b_name}: shapes {list(a.shape)} and {list(b.shape)}, expected [r, in] and [out, r]"
        )


def _check_all(factors: Sequence[Factors]) -> None:
    if not factors:
        raise ValueError("factors: empty, expected at least one pair (A, B)")
    for t, pair in enumerate(factors):
        _check(pair, f"factors[{t}][0]", f"factors[{t}][1]")
        sides, expected = ([p[1].shape[0], p[0].shape[1]] for p in (pair, factors[0]))
        if sides != expected:
            raise ValueError(f"factors[{t}]: product of shape {sides}, expected {expected} as that of factors[0]")


def _check_rank(rank: int, most: int, what: str) -> None:
    if not 1 <= rank <= most:
        raise ValueError(f"rank: {rank}, expected 1 to {most}: at most {what}")


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale) or scale == 0.0:
        raise ValueError(f"scale: {scale}, expected a finite number that is not 0")
