"""LoRAs that are kept apart: both penalties against finite differences and autograd, and the hard form."""

import pytest
import torch

from lightning_cl.functional.orthogonal_lora import (
    down_overlap,
    earlier_basis,
    orthogonality_gradient,
    orthogonality_penalty,
    overlap_gradient,
    overlap_penalty,
    project_down_,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def finite_differences(function, at, size=1e-6):
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        change = torch.zeros(at.numel(), dtype=at.dtype)
        change[i] = size
        change = change.view_as(at)
        gradient.view(-1)[i] = (function(at + change) - function(at - change)) / (2 * size)
    return gradient


def test_the_penalty_is_the_sum_of_absolute_products_over_tasks_and_rows():
    down, earlier = normal(3, 12), [normal(2, 12, seed=1), normal(4, 12, seed=2)]
    expected = sum(abs(a @ b) for task in earlier for a in task for b in down)
    assert orthogonality_penalty(down, torch.cat(earlier)).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["penalty", "overlap"])
def test_the_gradients_are_those_of_finite_differences_and_autograd(kind):
    down, earlier = normal(3, 12).requires_grad_(), [normal(2, 12, seed=1), normal(4, 12, seed=2)]
    if kind == "penalty":
        other, function, gradient = torch.cat(earlier), orthogonality_penalty, orthogonality_gradient
    else:
        other, function, gradient = earlier_basis(earlier, 3), overlap_penalty, overlap_gradient
    found = gradient(down, other)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.autograd.grad(function(down, other), down)[0], atol=1e-12, rtol=1e-10)
    expected = finite_differences(lambda at: function(at, other), down.detach())
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_the_overlap_does_not_know_the_length_of_a_row_and_the_penalty_does():
    down, earlier = normal(3, 12), [normal(4, 12, seed=1)]
    basis, lengths = earlier_basis(earlier, 3), torch.tensor([[0.01], [1.0], [50.0]])
    torch.testing.assert_close(overlap_penalty(lengths * down, basis), overlap_penalty(down, basis))
    # Its gradient turns the rows only.
    torch.testing.assert_close(
        (overlap_gradient(down, basis) * down).sum(1), torch.zeros(3).double(), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        orthogonality_penalty(0.5 * down, earlier[0]), 0.5 * orthogonality_penalty(down, earlier[0])
    )


def test_the_ends_of_the_overlap():
    basis = earlier_basis([normal(4, 12)], 3)
    assert overlap_penalty(normal(3, 4, seed=1) @ basis.T, basis).item() == pytest.approx(1)
    outside = normal(3, 12, seed=2)
    project_down_(outside, basis)
    assert overlap_penalty(outside, basis) < 1e-30
    zeros = torch.zeros(3, 12, dtype=torch.float64, requires_grad=True)
    assert overlap_penalty(zeros, basis) == 0
    assert overlap_gradient(zeros, basis).abs().max() == 0
    assert torch.autograd.grad(overlap_penalty(zeros, basis), zeros)[0].abs().max() == 0
    assert down_overlap(zeros, basis) == 0


def test_steps_along_the_gradient_turn_the_rows_out_of_the_span():
    basis, down = earlier_basis([normal(4, 12)], 3), normal(3, 12, seed=1)
    lengths = down.norm(dim=1)
    before = overlap_penalty(down, basis)
    for _ in range(200):
        down -= overlap_gradient(down, basis)
    assert overlap_penalty(down, basis) < 0.1 * before
    assert (down.norm(dim=1) >= lengths).all()  # it is not done by making them shorter


def test_the_overlap_of_row_spaces_is_that_of_the_principal_angles():
    down, basis = normal(3, 12), earlier_basis([normal(4, 12, seed=1)], 3)
    rows = torch.linalg.qr(down.T).Q
    expected = torch.linalg.svdvals(rows.T @ basis).square().mean().item()
    assert down_overlap(down, basis).item() == pytest.approx(expected)
    other_rows = normal(3, 3, seed=2) @ down  # the same ΔW can be written with these
    assert down_overlap(other_rows, basis).item() == pytest.approx(expected)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-12), (torch.bfloat16, 2**-18)])
def test_the_hard_form_keeps_the_overlap_at_zero_over_steps_with_weight_decay(dtype, most):
    """In bf16 up to the rounding of the rows: 2^-9 of each entry, and squared."""
    earlier = [normal(8, 96, seed=seed, dtype=dtype) for seed in range(3)]
    basis = earlier_basis(earlier, 8)
    assert basis.dtype == torch.float32
    down = torch.nn.Parameter(normal(8, 96, seed=5, dtype=dtype))
    assert down_overlap(down, basis) > 0.1
    optimizer = torch.optim.AdamW([down], lr=1e-2, weight_decay=0.1)
    pull = normal(8, 24, seed=6, dtype=dtype) @ torch.cat(earlier)  # towards the span of the earlier ones
    with torch.no_grad():
        project_down_(down, basis)
        for _ in range(300):
            down.grad = (down - pull) + normal(8, 96, seed=7, dtype=dtype)
            optimizer.step()
            assert down_overlap(down, basis) > 1e-6
            project_down_(down, basis)
            assert down_overlap(down, basis) <= most
            if dtype == torch.float32:
                products = torch.cat(earlier) @ down.T
                scale = torch.cat(earlier).norm(dim=1)[:, None] * down.norm(dim=1)
                assert (products / scale).abs().max() <= 1e-6


def test_ranks_that_do_not_fit_into_the_width_are_an_error():
    earlier = [normal(4, 10), normal(3, 10, seed=1)]
    assert earlier_basis(earlier, 3).shape == (10, 7)
    with pytest.raises(
        ValueError, match=r"rank: 4, with 7 of earlier tasks more than the layer's 10 inputs: .* at most 3"
    ):
        earlier_basis(earlier, 4)
    with pytest.raises(ValueError, match=r"down: rank 4, expected at most 3: 7 of 10 directions are taken"):
        project_down_(normal(4, 10), earlier_basis(earlier, 3))
    with pytest.raises(ValueError, match="earlier: no down projection"):
        earlier_basis([], 4)
    with pytest.raises(ValueError, match=r"earlier\[1\]: shape \[3, 9\], expected \[rank, 10\]"):
        earlier_basis([normal(4, 10), normal(3, 9)], 2)


def test_shapes_that_do_not_fit_are_an_error():
    down = normal(3, 12)
    for function in (orthogonality_penalty, orthogonality_gradient):
        with pytest.raises(ValueError, match=r"earlier: shape \[2, 11\], expected \[rows, 12\]"):
            function(down, normal(2, 11))
    for function in (overlap_penalty, overlap_gradient, project_down_, down_overlap):
        with pytest.raises(ValueError, match=r"basis: shape \[2, 12\], expected \[in, directions\] with 12 rows"):
            function(down, normal(2, 12))


def test_dependent_rows_add_no_direction():
    first = normal(4, 20)
    assert earlier_basis([first, 2 * first], 4).shape == (20, 4)


def test_bf16_factors_are_computed_in_fp32_also_under_autocast():
    down, earlier = normal(3, 12, dtype=torch.bfloat16), normal(4, 12, seed=1, dtype=torch.bfloat16)
    basis = earlier_basis([earlier], 3)
    expected = orthogonality_penalty(down.double(), earlier.double()), overlap_penalty(down.double(), basis.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = orthogonality_penalty(down, earlier), overlap_penalty(down, basis)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
