"""InfLoRA's down projection: what it reads, what it leaves alone, and when there is no room for it."""

import math

import pytest
import torch

from lightning_cl.functional.inflora import design_down_projection
from lightning_cl.functional.input_space import add_second_moment_, grow_basis
from lightning_cl.functional.subspace import protected_share


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_of_task(seed, width=24):
    axes = torch.linalg.qr(normal(width, width, seed=seed)).Q
    return (normal(300, width, seed=seed + 100) * torch.exp(-0.4 * torch.arange(width))) @ axes.T


def moment(inputs):
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    add_second_moment_(total, inputs)
    return total


def test_for_the_first_task_the_rows_are_the_leading_singular_vectors_of_its_inputs():
    inputs = inputs_of_task(0)
    down = design_down_projection(moment(inputs), rank=4, scale=1.0)
    assert (down.shape, down.dtype) == ((4, 24), torch.float32)
    right = torch.linalg.svd(inputs.double()).Vh[:4]
    torch.testing.assert_close((down.double() * right).sum(1).abs(), torch.ones(4).double(), atol=1e-5, rtol=0)


def test_the_rows_are_orthogonal_and_as_long_as_the_scale():
    basis = grow_basis(moment(inputs_of_task(0)), 0.8)
    for scale in (3**-0.5, 2.0):
        down = design_down_projection(moment(inputs_of_task(1)), 5, basis, scale)
        torch.testing.assert_close(down @ down.T, scale**2 * torch.eye(5), atol=1e-6, rtol=0)
    default = design_down_projection(moment(inputs_of_task(1)), 5, basis)
    torch.testing.assert_close(default.norm(dim=1), torch.full((5,), 3**-0.5))


def test_inputs_in_the_protected_span_give_no_change_whatever_the_up_projection_learns():
    basis = None
    for task in range(3):
        down = design_down_projection(moment(inputs_of_task(task)), 4, basis)
        if basis is not None:
            protected = normal(50, basis.shape[1], seed=7) @ basis.T
            change = protected @ down.T @ normal(10, 4, seed=8).T
            assert change.norm() < 1e-6 * protected.norm() * down.norm() * math.sqrt(10 * 4)
            assert protected_share(down, right=basis) < 1e-12
        basis = grow_basis(moment(inputs_of_task(task)), 0.8, basis)


def test_no_other_rows_of_the_complement_read_more_of_the_new_inputs():
    """The sum of squares that r orthonormal rows read is largest for the leading directions (Ky Fan)."""
    inputs, basis = inputs_of_task(1), grow_basis(moment(inputs_of_task(0)), 0.8)
    down = design_down_projection(moment(inputs), 3, basis, scale=1.0)
    most = (inputs @ down.T).square().sum()
    for seed in range(200):
        rows = normal(24, 3, seed=seed)
        if seed % 2:
            rows = down.T + 0.1 * rows  # near the solution
        rows = rows - basis @ (basis.T @ rows)
        others = torch.linalg.qr(rows).Q
        assert (inputs @ others).square().sum() <= most * (1 + 1e-5)


def test_where_the_inputs_have_fewer_directions_the_other_rows_are_in_the_complement_too():
    basis = torch.linalg.qr(normal(24, 10)).Q
    inputs = normal(100, 10, seed=1) @ basis.T  # all of it protected: nothing new to read
    inputs = torch.cat([inputs, normal(100, 2, seed=2) @ normal(2, 24, seed=3)])
    down = design_down_projection(moment(inputs), 6, basis, scale=1.0)
    torch.testing.assert_close(down @ down.T, torch.eye(6), atol=1e-6, rtol=0)
    assert (down @ basis).abs().max() < 1e-6


def test_a_rank_for_which_there_is_no_room_is_an_error():
    basis = torch.eye(8)[:, :5]
    assert design_down_projection(torch.eye(8), 3, basis).shape == (3, 8)
    with pytest.raises(ValueError, match="rank: 4, expected 1 to 3: 5 of 8 input directions are protected"):
        design_down_projection(torch.eye(8), 4, basis)
    with pytest.raises(ValueError, match="rank: 0, expected 1 to 8"):
        design_down_projection(torch.eye(8), 0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"scale: .*, expected a positive number"):
            design_down_projection(torch.eye(8), 2, scale=scale)
