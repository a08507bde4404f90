"""The penalty on low-rank products against the dense sum, autograd, finite differences, and what must not matter."""

import pytest
import torch

from lightning_cl.functional import add_product_penalty_gradient_, product_penalty, product_penalty_gradients

OUT, IN, RANK = 7, 5, 2


def case(seed, rank=RANK, anchor_rank=RANK, dtype=torch.float64):
    """A, B, A*, B* and F."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(rank, IN), (OUT, rank), (anchor_rank, IN), (OUT, anchor_rank)]
    factors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    return [*factors, torch.rand(OUT, IN, generator=g, dtype=torch.float64)]


def by_hand(a, b, anchor_a, anchor_b, importance, strength, scale):
    """One entry of the weight after the other."""
    total = 0.0
    for i in range(OUT):
        for j in range(IN):
            now = sum(b[i, k].item() * a[k, j].item() for k in range(len(a)))
            then = sum(anchor_b[i, k].item() * anchor_a[k, j].item() for k in range(len(anchor_a)))
            total += importance[i, j].item() * (scale * now - scale * then) ** 2
    return strength / 2 * total


@pytest.mark.parametrize(("rank", "anchor_rank"), [(2, 2), (1, 3), (4, 2)])
def test_the_value_is_the_sum_over_the_weight(rank, anchor_rank):
    tensors = case(0, rank, anchor_rank)
    assert product_penalty(*tensors, 1.7, 0.5).item() == pytest.approx(by_hand(*tensors, 1.7, 0.5), rel=1e-12)


def test_the_gradients_are_those_of_autograd():
    a, b, *rest = case(1)
    a.requires_grad_()
    b.requires_grad_()
    expected = torch.autograd.grad(product_penalty(a, b, *rest, 2.3, 1.5), (a, b))
    found = product_penalty_gradients(a, b, *rest, 2.3, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_the_gradients_are_those_of_finite_differences():
    a, b, *rest = case(2)
    step = 1e-5
    for which, gradient in enumerate(product_penalty_gradients(a, b, *rest, 2.3, 1.5)):
        for i in range(gradient.numel()):
            sides = []
            for sign in (1, -1):
                moved = [a.clone(), b.clone()]
                moved[which].view(-1)[i] += sign * step
                sides.append(by_hand(*moved, *rest, 2.3, 1.5))
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(gradient.view(-1)[i].item(), rel=1e-6, abs=1e-7)


def test_the_value_depends_on_the_product_alone():
    """(R A, B R⁻¹) is the same model: the penalty stays, and a penalty on the factors would not."""
    a, b, anchor_a, anchor_b, importance = case(3)
    mix = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    turned = (mix @ a, b @ torch.linalg.inv(mix))
    anchor_turned = (mix @ anchor_a, anchor_b @ torch.linalg.inv(mix))
    expected = product_penalty(a, b, anchor_a, anchor_b, importance, 1.0)
    torch.testing.assert_close(product_penalty(*turned, anchor_a, anchor_b, importance, 1.0), expected)
    torch.testing.assert_close(product_penalty(a, b, *anchor_turned, importance, 1.0), expected)


def test_a_turn_of_the_anchor_costs_nothing():
    _, _, anchor_a, anchor_b, importance = case(5)
    mix = torch.tensor([[0.0, 2.0], [0.5, 0.0]], dtype=torch.float64)
    tensors = (mix @ anchor_a, anchor_b @ torch.linalg.inv(mix), anchor_a, anchor_b, importance)
    assert product_penalty(*tensors, 1e6).item() == pytest.approx(0, abs=1e-18)
    for gradient in product_penalty_gradients(*tensors, 1e6):
        assert gradient.abs().max() < 1e-8


def test_it_is_the_penalty_of_the_weight_itself():
    """With A = 1 the product is B, and the penalty is EWC's on a full weight."""
    b, anchor = (torch.randn(OUT, IN, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (6, 7))
    one, importance = torch.eye(IN, dtype=torch.float64), case(8)[-1]
    _, of_b = product_penalty_gradients(one, b, one, anchor, importance, 3.0)
    torch.testing.assert_close(of_b, 3.0 * importance * (b - anchor))


def test_the_optimum_with_a_quadratic_loss_is_the_weighted_mean():
    """½|B A − C|² + λ/2 Σ F (B A − D)² with full rank is least at (C + λ F D) / (1 + λ F), entry by entry."""
    g = torch.Generator().manual_seed(9)
    c, d, importance = (torch.rand(3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    a, b, one = torch.eye(3).double(), c.clone(), torch.eye(3).double()
    for _ in range(2000):
        of_a, of_b = product_penalty_gradients(a, b, one, d, importance, 2.0)
        rest = b @ a - c
        a, b = a - 0.1 * (of_a + b.T @ rest), b - 0.1 * (of_b + rest @ a.T)
    torch.testing.assert_close(b @ a, (c + 2 * importance * d) / (1 + 2 * importance), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1, 8 * IN, 3 * 8 * IN, 2**26])
def test_chunks_of_rows_do_not_matter(chunk_bytes):
    tensors = case(10)
    value, gradients = product_penalty(*tensors, 1.3, 0.7), product_penalty_gradients(*tensors, 1.3, 0.7)
    torch.testing.assert_close(product_penalty(*tensors, 1.3, 0.7, chunk_bytes), value)
    torch.testing.assert_close(product_penalty_gradients(*tensors, 1.3, 0.7, chunk_bytes), gradients)


def test_sixteen_bit_factors_are_computed_in_fp32():
    """B A − B* A* of nearly equal products: in bf16 the difference would be noise."""
    a, b, _, _, importance = case(11, dtype=torch.bfloat16)
    anchor_a = a + (a * 2**-7).to(torch.bfloat16)
    tensors = (a, b, anchor_a, b, importance.float())
    exact = tuple(t.double() for t in tensors)
    torch.testing.assert_close(product_penalty(*tensors, 1.0).double(), product_penalty(*exact, 1.0), rtol=1e-4, atol=0)
    found = product_penalty_gradients(*tensors, 1.0)
    assert [t.dtype for t in found] == [torch.float32, torch.float32]
    for gradient, expected in zip(found, product_penalty_gradients(*exact, 1.0), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_added_with_the_scale_of_the_loss(dtype):
    a, b, *rest = case(12, dtype=dtype)
    found = product_penalty_gradients(a, b, *rest, 1.1, 0.5)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    add_product_penalty_gradient_(a, b, *rest, 1.1, 0.5, loss_scale=8.0)
    for parameter, gradient in zip((a, b), found, strict=True):
        assert parameter.grad.dtype == dtype
        torch.testing.assert_close(parameter.grad.double(), 1 + 8 * gradient.double(), rtol=1e-2, atol=0.02)


def test_a_factor_without_gradient_is_skipped():
    a, b, *rest = case(13)
    b.grad = torch.zeros_like(b)
    add_product_penalty_gradient_(a, b, *rest, 1.0)
    assert a.grad is None
    assert b.grad.any()


def test_strength_zero_changes_no_bit():
    a, b, *rest = case(14)
    a.grad, b.grad = torch.full_like(a, -0.0), torch.full_like(b, -0.0)
    add_product_penalty_gradient_(a, b, *rest, 0.0)
    assert a.grad.signbit().all()
    assert b.grad.signbit().all()


def test_what_does_not_fit_is_refused():
    a, b, anchor_a, anchor_b, importance = case(15)
    for function in (product_penalty, product_penalty_gradients, add_product_penalty_gradient_):
        with pytest.raises(ValueError, match=r"a, b: shapes \[7, 2\] and \[2, 5\], expected \[r, in\] and \[out, r\]"):
            function(b, a, anchor_a, anchor_b, importance, 1.0)
        with pytest.raises(ValueError, match="anchor_a, anchor_b: shapes"):
            function(a, b, anchor_a[:1], anchor_b, importance, 1.0)
        with pytest.raises(ValueError, match=r"importance: shape \[5, 7\], expected \[7, 5\] as the product of a, b"):
            function(a, b, anchor_a, anchor_b, importance.T, 1.0)
        with pytest.raises(ValueError, match=r"expected .* as the product of anchor_a, anchor_b"):
            function(a, b, anchor_a[:, :3], anchor_b, importance, 1.0)
