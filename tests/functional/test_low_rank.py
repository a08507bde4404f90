"""Products of low rank against dense matrices and the theorem of Eckart and Young."""

import math

import pytest
import torch

from lightning_cl.functional import interpolate, low_rank_product, low_rank_sum, mean_of_products, to_low_rank

OUT, IN = 7, 5


def adapter(seed, rank=2, dtype=torch.float64, out=OUT):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, IN, generator=generator, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def dense(factors, weights):
    return sum(w * (b.double() @ a.double()) for (a, b), w in zip(factors, weights, strict=True))


def error(a, b, target, scale=1.0):
    return (low_rank_product(a, b, scale) - target).norm()


def best_error(target, rank):
    """Eckart & Young: the norm of the singular values that are left out."""
    return torch.linalg.svdvals(target)[rank:].norm()


# products


def test_a_product_is_scaled_b_times_a():
    a, b = adapter(0)
    expected = [[sum(2.0 * b[i, k] * a[k, j] for k in range(2)) for j in range(IN)] for i in range(OUT)]
    torch.testing.assert_close(low_rank_product(a, b, 2.0), torch.tensor(expected, dtype=torch.float64))


def test_a_product_can_be_differentiated():
    a, b = (t.requires_grad_() for t in adapter(1))
    assert torch.autograd.gradcheck(lambda a, b: low_rank_product(a, b, 0.5), (a, b))


def test_the_mean_of_products_is_not_the_product_of_means():
    factors = [adapter(2, rank=1), adapter(3, rank=3)]
    torch.testing.assert_close(mean_of_products(factors, 0.5), dense(factors, [0.25, 0.25]))
    same_rank = [adapter(4), adapter(5)]
    mean_a, mean_b = (sum(side) / 2 for side in zip(*same_rank, strict=True))
    target = mean_of_products(same_rank)
    assert error(mean_a, mean_b, target) > 0.3 * target.norm()


def test_sixteen_bit_factors_are_multiplied_in_fp32():
    factors = [adapter(seed, dtype=torch.bfloat16) for seed in range(3)]
    found = mean_of_products(factors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dense(factors, [1 / 3] * 3), rtol=1e-5, atol=1e-6)


# the best product of a rank


@pytest.mark.parametrize("scale", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
def test_to_low_rank_is_the_nearest(shape, rank, scale):
    target = torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    a, b = to_low_rank(target, rank, scale)
    assert (tuple(a.shape), tuple(b.shape)) == ((rank, shape[1]), (shape[0], rank))
    torch.testing.assert_close(error(a, b, target, scale), best_error(target, rank), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a @ a.T, b.T @ b, rtol=1e-9, atol=1e-12)  # both sides carry the same


def test_to_low_rank_gives_a_matrix_of_that_rank_back():
    a, b = adapter(7)
    assert error(*to_low_rank(low_rank_product(a, b), 2), b @ a) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_matrices_are_decomposed_in_fp32(dtype):
    target = dense([adapter(8, rank=1)], [1.0]).to(dtype)
    a, b = to_low_rank(target, 1)
    assert a.dtype == b.dtype == dtype
    torch.testing.assert_close(low_rank_product(a, b), target.float(), rtol=0.03, atol=0.03)


# sums


def test_without_a_rank_the_sum_is_exact():
    factors, weights = [adapter(9, 1), adapter(10, 2), adapter(11, 4)], [0.5, -1.0, 2.0]
    a, b = low_rank_sum(factors, weights, scale=0.25)
    assert len(a) == 7
    torch.testing.assert_close(low_rank_product(a, b, 0.25), dense(factors, weights))


@pytest.mark.parametrize("scale", [1.0, 4.0, -2.0])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_sum_of_a_rank_is_the_svd_of_the_dense_sum(rank, scale):
    factors, weights = [adapter(12), adapter(13)], [0.3, 0.7]
    target = dense(factors, weights)
    a, b = low_rank_sum(factors, weights, rank, scale)
    assert (tuple(a.shape), tuple(b.shape)) == ((rank, IN), (OUT, rank))
    torch.testing.assert_close(error(a, b, target, scale), best_error(target, rank), rtol=1e-9, atol=1e-12)
    full = low_rank_product(*to_low_rank(target, rank))
    torch.testing.assert_close(low_rank_product(a, b, scale), full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("out", [3, 9])
def test_more_ranks_than_the_weight_has_sides(out):
    factors = [adapter(seed, rank=4, out=out) for seed in range(5)]
    target = dense(factors, [1.0] * 5)
    for rank in range(1, min(out, IN) + 1):
        a, b = low_rank_sum(factors, rank=rank)
        torch.testing.assert_close(error(a, b, target), best_error(target, rank), rtol=1e-9, atol=1e-11)


def test_no_matrix_of_the_weights_size_is_made():
    """A weight of a million rows and columns would take 8 TB."""
    ones = (torch.ones(1, 1_000_000).double(), torch.ones(1_000_000, 1).double())
    a, b = low_rank_sum([ones, ones], [0.5, 0.25], rank=1)
    torch.testing.assert_close(b[::250_000] @ a[:, ::250_000], torch.full((4, 4), 0.75).double())


def test_one_adapter_with_weight_one_gives_itself_back():
    a, b = adapter(14, dtype=torch.float32)
    again = low_rank_sum([(a, b)], [2.0], rank=2, scale=2.0)
    torch.testing.assert_close(low_rank_product(*again), low_rank_product(a, b), rtol=1e-5, atol=1e-5)


def test_two_states_of_an_adapter_are_interpolated_as_products():
    start, now, share = adapter(15), adapter(16), 0.3
    expected = interpolate(low_rank_product(*start), low_rank_product(*now), share)
    found = low_rank_product(*low_rank_sum([start, now], [1 - share, share]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_fresh_adapter_adds_nothing():
    """B is zero before the first step, so that ranks are missing; the result is finite all the same."""
    a, b = adapter(17)
    fresh = (adapter(18)[0], torch.zeros(OUT, 2, dtype=torch.float64))
    found_a, found_b = low_rank_sum([(a, b), fresh], rank=3)
    assert error(found_a, found_b, b @ a) < 1e-12
    nothing = low_rank_sum([fresh, fresh], rank=2)
    assert not low_rank_product(*nothing).any()
    assert nothing[0].isfinite().all()


def test_the_order_of_adapters_does_not_matter():
    factors, weights = [adapter(19), adapter(20), adapter(21)], [0.2, 0.3, 0.5]
    one = low_rank_product(*low_rank_sum(factors, weights, rank=2))
    other = low_rank_product(*low_rank_sum(factors[::-1], weights[::-1], rank=2))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_sum_has_the_type_of_the_first_adapter():
    factors = [adapter(22, dtype=torch.bfloat16), adapter(23, dtype=torch.float32)]
    for rank in (None, 2):
        a, b = low_rank_sum(factors, rank=rank)
        assert a.dtype == b.dtype == torch.bfloat16


# refusals


def test_what_does_not_fit_is_refused():
    a, b = adapter(24)
    with pytest.raises(ValueError, match=r"a, b: shapes \[7, 2\] and \[2, 5\], expected \[r, in\] and \[out, r\]"):
        low_rank_product(b, a)
    with pytest.raises(ValueError, match=r"factors\[1\]: product of shape \[3, 5\], expected \[7, 5\]"):
        mean_of_products([(a, b), adapter(25, out=3)])
    for function in (mean_of_products, low_rank_sum):
        with pytest.raises(ValueError, match="factors: empty"):
            function([])
    with pytest.raises(ValueError, match="weights: 1 numbers, expected 2"):
        low_rank_sum([(a, b), (a, b)], [1.0])
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank: {rank}, expected 1 to 4: at most the sum of the ranks"):
            low_rank_sum([(a, b), (a, b)], rank=rank)
    with pytest.raises(ValueError, match="rank: 6, expected 1 to 5: at most the smaller side"):
        to_low_rank(b @ a, 6)
    with pytest.raises(ValueError, match=r"delta: shape \[7\], expected a matrix"):
        to_low_rank(b[:, 0], 1)
    for scale in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"scale: .*finite number that is not 0"):
            low_rank_sum([(a, b)], scale=scale)
