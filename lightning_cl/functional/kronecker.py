"""The Kronecker-factored Fisher of linear layers: beyond the diagonal.

For ``z = W a`` the gradient of one position's loss is ``g aᵀ`` with ``g = ∂L/∂z``. Its second moment over positions is
approximated by the product of the moments (Martens & Grosse 2015, ICML, eq. 1)::

    F ≈ A ⊗ G,   A = E[a aᵀ],   G = E[g gᵀ],   vec(Δ)ᵀ F vec(Δ) = tr(Δᵀ G Δ A)

``A`` is ``[in, in]``, ``G`` is ``[out, out]``, ``Δ = W − W*`` is ``[out, in]``. Layers that are used at many positions
are taken as "expand" (Eschenhagen et al. 2023, arXiv:2311.00636): positions of one sample count as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kronecker(NamedTuple):
    """``A ⊗ G``."""

    inputs: Tensor
    outputs: Tensor

    def times(self, matrix: Tensor) -> Tensor:
        """``(A ⊗ G) vec(Δ)`` as a matrix: ``G Δ A``."""
        return self.outputs @ matrix @ self.inputs

    def diagonal(self) -> Tensor:
        """The diagonal as a matrix of the weight's shape: ``diag(G) diag(A)ᵀ``."""
        return torch.outer(self.outputs.diagonal(), self.inputs.diagonal())

    def trace(self) -> float:
        """``tr(A) · tr(G)``, the sum of the diagonal."""
        return float(self.inputs.trace().double() * self.outputs.trace().double())


class FactorSums:
    """Adds up the factors of linear layers from what they see.

    It is a sink of :class:`~lightning_cl.functional.SampleGradients`. Positions whose gradient is zero, padding among
    them, have no part in the loss and are left out of both moments.

    Args:
        largest: layers with more inputs or outputs than this are left to the diagonal.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.sums: dict[str, Kronecker] = {}
        self.positions: dict[str, int] = {}

    def __call__(self, layer: nn.Module, name: str, inputs: Tensor, gradients: Tensor) -> bool:
        """Takes the weights of ``nn.Linear``."""
        if type(layer) is not nn.Linear or not name.endswith("weight"):
            return False
        if max(layer.in_features, layer.out_features) > self.largest:
            return False
        a, g = (side.detach().float().reshape(-1, side.shape[-1]) for side in (inputs, gradients))
        counted = (g != 0).any(-1)
        a, g = a[counted], g[counted]
        if name not in self.sums:
            square = [torch.zeros(n, n, device=a.device) for n in (a.shape[1], g.shape[1])]
            self.sums[name], self.positions[name] = Kronecker(*square), 0
        self.sums[name].inputs.addmm_(a.T, a)
        self.sums[name].outputs.addmm_(g.T, g)
        self.positions[name] += len(a)
        return True


def nearest_kronecker(terms: Sequence[Kronecker], iterations: int = 100) -> Kronecker:
    """The ``A ⊗ G`` nearest to a sum of such products, in the Frobenius norm (Van Loan & Pitsianis 1993).

    A sum of Kronecker products is a matrix of low rank when it is rearranged; its leading singular vectors are
    combinations of the terms' factors, found by power iteration on their inner products alone. For positive
    semi-definite terms the coefficients, and so the result, are not negative.

    Args:
        terms: at least one.
        iterations: of the power iteration.
    """
    if len(terms) == 1:
        return terms[0]
    alpha, gamma = (
        torch.tensor([[float((p[side] * q[side]).sum(dtype=torch.float64)) for q in terms] for p in terms])
        for side in (0, 1)
    )
    x = torch.ones(len(terms), dtype=alpha.dtype)
    for _ in range(iterations):
        x = gamma @ (alpha @ x)
        if float(x.norm()) == 0.0:
            return terms[-1]
        x = x / x.norm()
    y = alpha @ x
    length = float(x @ y)
    inputs = sum((float(c) * t.inputs for c, t in zip(x, terms, strict=True)), torch.zeros_like(terms[0].inputs))
    outputs = sum((float(c) * t.outputs for c, t in zip(y, terms, strict=True)), torch.zeros_like(terms[0].outputs))
    return Kronecker(inputs, outputs / length)


class Spectrum(NamedTuple):
    """Eigenvectors and eigenvalues of both factors."""

    input_vectors: Tensor
    input_values: Tensor
    output_vectors: Tensor
    output_values: Tensor


def spectrum(factors: Kronecker) -> Spectrum:
    """The eigendecomposition of both factors, negative eigenvalues (rounding) set to 0."""
    input_values, input_vectors = torch.linalg.eigh(factors.inputs)
    output_values, output_vectors = torch.linalg.eigh(factors.outputs)
    return Spectrum(input_vectors, input_values.clamp(min=0), output_vectors, output_values.clamp(min=0))


@torch.no_grad()
def kronecker_proximal_(weight: Tensor, anchor: Tensor, eigen: Spectrum, strength: float, learning_rate: float) -> None:
    """``W ← W* + (I + lr · strength · A ⊗ G)⁻¹ (W − W*)`` in place, exact, in the eigenbasis of both factors.

    Args:
        weight: ``[out, in]``.
        anchor: ``W*``.
        eigen: of the factors.
        strength: the factor of the penalty.
        learning_rate: the optimizer's.
    """
    if strength == 0.0 or learning_rate == 0.0:
        return
    gap = weight.detach().float() - anchor
    q = torch.outer(eigen.output_values, eigen.input_values) * min(
        learning_rate * strength, torch.finfo(torch.float32).max
    )
    share = (q / (1.0 + q)).nan_to_num_(nan=1.0)  # an overflow gives inf / inf; its limit is 1
    rotated = eigen.output_vectors.T @ gap @ eigen.input_vectors
    moved = eigen.output_vectors @ (rotated * share) @ eigen.input_vectors.T
    weight.copy_(weight.float() - moved)
