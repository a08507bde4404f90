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


def nearest_kronecker(terms: Sequence[Kronecker], squarings: int = 50) -> Kronecker:
    """The ``A ⊗ G`` nearest to a sum of such products, in the Frobenius norm (Van Loan & Pitsianis 1993).

    With factors of norm 1 the sum is ``Σ_k w_k A_k ⊗ G_k``. Rearranged, it is a matrix of low rank, and its leading
    singular vectors are ``Σ_k x_k A_k`` and ``Σ_k y_k G_k``. The vector x is the leading eigenvector of ``D γ D α``,
    with ``D = diag(w)`` and the inner products α of the ``A_k`` and γ of the ``G_k``; ``y = D α x``. It is found by
    power iteration: the small matrix is squared again and again. For positive semi-definite terms its entries, the
    coefficients, and so the result, are not negative. Sizes and small matrices are in float64, so that the scale of the
    terms does not matter; the result has the balance between both factors that the largest term has.

    Args:
        terms: at least one.
        squarings: of the small matrix: as many as ``2 ** squarings`` iterations.
    """
    if len(terms) == 1:
        return terms[0]
    (a_sizes, a_units), (g_sizes, g_units) = (_units([term[side] for term in terms]) for side in (0, 1))
    weights = [a * g for a, g in zip(a_sizes, g_sizes, strict=True)]
    largest = max(range(len(terms)), key=weights.__getitem__)
    if weights[largest] == 0.0:
        return terms[-1]
    w = torch.tensor(weights, dtype=torch.float64) / weights[largest]
    alpha, gamma = _inner_products(a_units), _inner_products(g_units)
    power = (w[:, None] * gamma * w) @ alpha
    for _ in range(squarings):
        power = power @ power
        power = power / power.abs().max()
    x = power.sum(1)
    x = x / x.abs().max()
    y = w * (alpha @ x)
    y = y / (x @ alpha @ x)
    # The factors of the largest term have their own sizes again; what is relative to them is near 1.
    inputs = _combined(x * a_sizes[largest], a_units)
    return Kronecker(inputs, _combined(y * g_sizes[largest], g_units))


def _units(sides: Sequence[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Norms in float64, and the tensors divided by them; a tensor of zeros stays one."""
    sizes, units = [], []
    for side in sides:
        # In two steps: the square of what is small is nothing in fp32.
        largest = float(side.abs().max())
        unit = side / largest if largest > 0 else side
        norm = float(unit.square().sum(dtype=torch.float64)) ** 0.5
        sizes.append(largest * norm)
        units.append(unit / norm if norm > 0 else unit)
    return sizes, units


def _inner_products(units: Sequence[Tensor]) -> Tensor:
    return torch.tensor([[float((p * q).sum(dtype=torch.float64)) for q in units] for p in units], dtype=torch.float64)


def _combined(coefficients: Tensor, units: Sequence[Tensor]) -> Tensor:
    return sum((c * unit for c, unit in zip(coefficients.tolist(), units, strict=True)), torch.zeros_like(units[0]))


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
