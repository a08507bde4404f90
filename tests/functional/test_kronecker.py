"""Kronecker factors against dense matrices: the Fisher itself, products, proximal steps, the nearest product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_cl.functional import SampleGradients
from lightning_cl.functional.kfac import (
    FactorSums,
    Kronecker,
    kronecker_proximal_,
    nearest_kronecker,
    spectrum,
)

IN, OUT = 4, 3


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(size, seed=0, rank=None):
    """A random positive semi-definite matrix."""
    root = randn(size, rank or size, seed=seed)
    return root @ root.T


def factors(seed=0, inputs=IN, outputs=OUT):
    return Kronecker(positive(inputs, 2 * seed + 1), positive(outputs, 2 * seed + 2))


def vec(matrix):
    """Columns one below the other, as the equations have it."""
    return matrix.T.reshape(-1)


def dense(pair):
    """``A ⊗ G``, written out, for ``vec`` of a matrix ``[out, in]``."""
    a, g = pair
    return torch.einsum("ij,kl->ikjl", a, g).reshape(len(a) * len(g), -1)


# ---------------------------------------------------------------------- the Fisher


def dense_fisher(layer, losses):
    """``Σ vec(∂L)vec(∂L)ᵀ`` over single losses: what the factors stand for."""
    total = 0
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, layer.weight)
        column = vec(gradient.double())
        total = total + torch.outer(column, column)
    return total


def measured(layer, samples, losses, largest=100):
    sink = FactorSums(largest)
    engine = SampleGradients(layer, dict(layer.named_parameters()), sink=sink)
    engine.add(samples, losses)
    return sink, engine


def mean_factors(sink, name="weight"):
    return Kronecker(*(moment.double() / sink.positions[name] for moment in sink.sums[name]))


def linear(inputs=IN, outputs=OUT, zero=False):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layer


def test_fisher_of_a_linear_gaussian_model_is_exactly_the_product():
    # Every input with every residual: inputs and gradients at the outputs are independent.
    layer, inputs, residuals = linear(), randn(5, IN, seed=1).float(), randn(6, OUT, seed=2).float()
    x, r = inputs.repeat_interleave(6, 0), residuals.repeat(5, 1)
    y = layer(x).detach() + r
    sink, _ = measured(layer, 30, lambda: [0.5 * (y - layer(x)).square().sum()])
    expected = dense_fisher(layer, (0.5 * (y[i] - layer(x[i])).square().sum() for i in range(30))) / 30
    torch.testing.assert_close(dense(mean_factors(sink)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean_factors(sink).inputs, (inputs.T @ inputs / 5).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean_factors(sink).outputs, (residuals.T @ residuals / 6).double(), rtol=1e-5, atol=1e-6)


def test_fisher_of_softmax_regression_at_zero_is_exactly_the_product():
    # All classes are alike for every input, whatever the inputs are: G = 1/C − 1/C².
    layer, inputs = linear(zero=True), randn(7, IN, seed=3).float()
    x, y = inputs.repeat_interleave(OUT, 0), torch.arange(OUT).repeat(7)
    sink, _ = measured(layer, 21, lambda: [F.cross_entropy(layer(x), y, reduction="sum")])
    expected = dense_fisher(layer, (F.cross_entropy(layer(x[i]), y[i]) for i in range(21))) / 21
    torch.testing.assert_close(dense(mean_factors(sink)), expected, rtol=1e-4, atol=1e-6)
    closed = torch.eye(OUT, dtype=torch.float64) / OUT - 1 / OUT**2
    torch.testing.assert_close(mean_factors(sink).outputs, closed, rtol=1e-5, atol=1e-6)


def test_moments_are_sums_over_positions_of_all_samples():
    layer, x = linear(), randn(5, 6, IN, seed=4).float()
    sink, engine = measured(layer, 5, lambda: [layer(x).pow(2).sum()])
    gradients = 2 * layer(x).detach().flatten(0, 1)
    torch.testing.assert_close(sink.sums["weight"].inputs, x.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(sink.sums["weight"].outputs, gradients.T @ gradients)
    assert sink.positions["weight"] == 30
    # The sink takes the weight; the bias has its diagonal as always.
    torch.testing.assert_close(engine.total["bias"], gradients.reshape(5, 6, OUT).sum(1).square().sum(0))


def test_positions_without_loss_are_in_neither_moment():
    layer, x = linear(), randn(3, 6, IN, seed=5).float()
    bears_loss = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    sink, _ = measured(layer, 3, lambda: [layer(x)[bears_loss].pow(2).sum()])
    gradients = 2 * layer(x[bears_loss]).detach()
    torch.testing.assert_close(sink.sums["weight"].inputs, x[bears_loss].T @ x[bears_loss])
    torch.testing.assert_close(sink.sums["weight"].outputs, gradients.T @ gradients)
    assert sink.positions["weight"] == 8


def test_batches_add_up():
    layer, x = linear(), randn(8, IN, seed=6).float()
    whole, _ = measured(layer, 8, lambda: [layer(x).pow(2).sum()])
    sink = FactorSums(100)
    engine = SampleGradients(layer, dict(layer.named_parameters()), sink=sink)
    for rows in (slice(0, 3), slice(3, 8)):
        engine.add(rows.stop - rows.start, lambda rows=rows: [layer(x[rows]).pow(2).sum()])
    torch.testing.assert_close(sink.sums["weight"], whole.sums["weight"])
    assert sink.positions == whole.positions


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5)])
def test_a_layer_that_is_too_wide_has_the_diagonal(inputs, outputs):
    layer, x = linear(inputs, outputs), randn(6, inputs, seed=7).float()
    sink, engine = measured(layer, 6, lambda: [layer(x).pow(2).sum()], largest=4)
    assert not sink.sums
    gradients = 2 * layer(x).detach()
    torch.testing.assert_close(engine.total["weight"], gradients.square().T @ x.square())
    sink, engine = measured(layer, 6, lambda: [layer(x).pow(2).sum()], largest=5)
    assert set(sink.sums) == {"weight"}


# ---------------------------------------------------------------------- products


def test_times_is_the_dense_product():
    pair, delta = factors(), randn(OUT, IN, seed=9)
    torch.testing.assert_close(vec(pair.times(delta)), dense(pair) @ vec(delta))


def test_the_quadratic_form_is_the_dense_one():
    pair, delta = factors(), randn(OUT, IN, seed=9)
    value = (delta * pair.times(delta)).sum()
    torch.testing.assert_close(value, vec(delta) @ dense(pair) @ vec(delta))
    torch.testing.assert_close(value, torch.trace(delta.T @ pair.outputs @ delta @ pair.inputs))


def test_diagonal_and_trace_are_those_of_the_dense_matrix():
    pair = factors()
    torch.testing.assert_close(vec(pair.diagonal()), dense(pair).diagonal())
    assert pair.diagonal().shape == (OUT, IN)
    assert pair.trace() == pytest.approx(dense(pair).trace().item(), rel=1e-6)


# ---------------------------------------------------------------------- the proximal step


@pytest.mark.parametrize("strength", [0.0, 0.3, 50.0])
def test_proximal_step_is_a_dense_solve(strength):
    pair, weight, anchor = factors(), randn(OUT, IN, seed=10), randn(OUT, IN, seed=11)
    system = torch.eye(IN * OUT, dtype=torch.float64) + 0.2 * strength * dense(pair)
    expected = vec(anchor) + torch.linalg.solve(system, vec(weight - anchor))
    kronecker_proximal_(weight, anchor, spectrum(pair), strength, 0.2)
    torch.testing.assert_close(vec(weight), expected)


def test_proximal_step_minimises_penalty_plus_distance():
    pair, start, anchor = factors(1), randn(OUT, IN, seed=12), randn(OUT, IN, seed=13)

    def objective(weight):
        delta = weight - anchor
        return 0.5 * 0.7 * (delta * pair.times(delta)).sum() + (weight - start).square().sum() / (2 * 0.1)

    weight = start.clone()
    kronecker_proximal_(weight, anchor, spectrum(pair), 0.7, 0.1)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(weight), weight)
    assert gradient.abs().max() < 1e-6 * (start - anchor).abs().max() / 0.1


def test_proximal_step_with_a_huge_strength_pins_and_leaves_free_directions_alone():
    # One direction of the inputs has no moment at all: weights may move along it for nothing.
    pair = Kronecker(torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0])), positive(OUT, 5).float())
    start, anchor = randn(OUT, IN, seed=14).float(), randn(OUT, IN, seed=15).float()
    weight = start.clone()
    kronecker_proximal_(weight, anchor, spectrum(pair), 1e30, 1.0)
    torch.testing.assert_close(weight[:, :3], anchor[:, :3], rtol=0, atol=1e-5)
    torch.testing.assert_close(weight[:, 3], start[:, 3], rtol=0, atol=1e-5)


def test_negative_eigenvalues_of_rounding_do_not_blow_up():
    a = positive(IN, 3, rank=2) - 1e-3 * torch.eye(IN, dtype=torch.float64)
    eigen = spectrum(Kronecker(a, positive(OUT, 4)))
    assert (eigen.input_values >= 0).all()
    assert (eigen.input_values == 0).sum() == IN - 2
    weight, anchor = randn(OUT, IN, seed=16), randn(OUT, IN, seed=17)
    distance = (weight - anchor).norm()
    kronecker_proximal_(weight, anchor, eigen, 1e6, 1.0)
    assert (weight - anchor).norm() <= distance


def test_the_spectrum_makes_up_the_factors():
    pair = factors(2)
    eigen = spectrum(pair)
    for vectors, values, moment in (
        (eigen.input_vectors, eigen.input_values, pair.inputs),
        (eigen.output_vectors, eigen.output_values, pair.outputs),
    ):
        torch.testing.assert_close(
            vectors @ values.diag().to(vectors) @ vectors.T, moment.to(vectors), rtol=1e-5, atol=1e-5
        )


# ---------------------------------------------------------------------- the nearest product


def rearranged(matrix, inputs=IN, outputs=OUT):
    """Van Loan: block (i, j) of a sum of ``A ⊗ G`` becomes a row, so that one product has rank one."""
    rows = []
    for i in range(inputs):
        for j in range(inputs):
            rows.append(matrix[i * outputs : (i + 1) * outputs, j * outputs : (j + 1) * outputs].reshape(-1))
    return torch.stack(rows)


def nearest_by_svd(terms):
    total = sum(dense(term) for term in terms)
    u, s, v = torch.linalg.svd(rearranged(total), full_matrices=False)
    return dense((u[:, 0].reshape(IN, IN) * s[0], v[0].reshape(OUT, OUT))), total


@pytest.mark.parametrize("count", [2, 3, 5])
def test_nearest_product_is_that_of_the_singular_value_decomposition(count):
    terms = [factors(seed) for seed in range(count)]
    expected, total = nearest_by_svd(terms)
    found = dense(nearest_kronecker(terms))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert (found - total).norm() > 0.01 * total.norm()  # the sum itself is no product


def test_terms_of_very_different_size():
    terms = [Kronecker(1e3 * factors(0).inputs, factors(0).outputs), factors(1)]
    expected, _ = nearest_by_svd(terms)
    torch.testing.assert_close(dense(nearest_kronecker(terms)), expected, rtol=1e-5, atol=1e-3)


def single(term):
    return Kronecker(*(side.float() for side in term))


@pytest.mark.parametrize("inputs", [-18, -9, 0, 9])
@pytest.mark.parametrize("outputs", [-20, -18, -9, 0, 12])
@pytest.mark.parametrize("apart", [-3, 0])
def test_the_scale_of_the_factors_does_not_matter(inputs, outputs, apart):
    """In fp32, as they are kept: at 1e-18 squares of squares are nothing, and the earlier task was dropped."""
    terms = [factors(seed) for seed in range(2)]
    terms[0] = Kronecker(10.0**apart * terms[0].inputs, terms[0].outputs)
    expected, _ = nearest_by_svd(terms)
    scaled = [single(Kronecker(10.0**inputs * a, 10.0**outputs * g)) for a, g in terms]
    found = nearest_kronecker(scaled)
    assert all(side.dtype == torch.float32 for side in found)
    back = Kronecker(found.inputs.double() / 10.0**inputs, found.outputs.double() / 10.0**outputs)
    error = (dense(back) - expected).norm() / expected.norm()
    assert error < 1e-6
    assert (dense(terms[1]) - expected).norm() > 1e-4 * expected.norm()  # the first one is noticed


@pytest.mark.parametrize("decades", range(-30, 31, 6))
def test_a_size_may_stand_in_either_factor(decades):
    """``c A ⊗ G`` is ``A ⊗ c G``: how a term's size is shared out among its factors changes nothing."""
    c = 10.0**decades
    one, other = factors(0), factors(1)
    expected = dense(nearest_kronecker([one, other]))
    found = nearest_kronecker([single(Kronecker(c * one.inputs, one.outputs / c)), single(other)])
    error = (dense(Kronecker(*(side.double() for side in found))) - expected).norm() / expected.norm()
    assert error < 1e-6


def test_nearly_equal_singular_values_are_told_apart():
    """Two terms that have next to nothing in common: 100 steps of a power iteration would not do."""
    a, b = torch.diag(torch.tensor([1.0, 1e-4])).double(), torch.diag(torch.tensor([1e-4, 1.0])).double()
    found = nearest_kronecker([Kronecker(1.001 * a, a), Kronecker(b, b)])
    total = 1.001 * dense((a, a)) + dense((b, b))
    u, sizes, v = torch.linalg.svd(rearranged(total, 2, 2))
    assert 1.0005 < sizes[0] / sizes[1] < 1.0015
    expected = dense(Kronecker(u[:, 0].reshape(2, 2) * sizes[0], v[0].reshape(2, 2)))
    torch.testing.assert_close(dense(found), expected, rtol=1e-6, atol=1e-7)


def test_one_term_is_itself():
    pair = factors()
    torch.testing.assert_close(dense(nearest_kronecker([pair])), dense(pair), rtol=1e-6, atol=1e-9)


def test_terms_that_share_a_factor_add_up_exactly():
    one, other = factors(0), factors(1)
    shared = [one, Kronecker(one.inputs, other.outputs), Kronecker(3 * one.inputs, one.outputs)]
    torch.testing.assert_close(dense(nearest_kronecker(shared)), sum(map(dense, shared)), rtol=1e-5, atol=1e-6)


def test_the_nearest_product_is_positive_semi_definite():
    for seed in range(5):
        terms = [
            Kronecker(positive(IN, 10 * seed + i, rank=1 + i), positive(OUT, 10 * seed + i + 50, rank=1))
            for i in range(3)
        ]
        values = torch.linalg.eigvalsh(dense(nearest_kronecker(terms)))
        assert values.min() >= -1e-6 * values.max()
        for moment in nearest_kronecker(terms):
            assert torch.linalg.eigvalsh(moment).min() >= -1e-6 * moment.abs().max()


def test_a_term_of_zeros_changes_nothing():
    pair = factors()
    nothing = Kronecker(torch.zeros(IN, IN, dtype=torch.float64), torch.zeros(OUT, OUT, dtype=torch.float64))
    for terms in ([pair, nothing], [nothing, pair]):
        torch.testing.assert_close(dense(nearest_kronecker(terms)), dense(pair), rtol=1e-6, atol=1e-9)
    assert not dense(nearest_kronecker([nothing, nothing])).any()  # and not NaN
