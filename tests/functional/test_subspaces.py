"""Protected subspaces of a weight: the algebra in double precision, and thousands of steps that must not move them."""

import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_cl.functional.subspace import (
    directions_of_share,
    full_precision,
    orthonormal_basis,
    principal_subspace,
    project_weights_,
    protected_share,
    protected_square,
    remove_span_,
    subspace_overlap,
)

SHAPES = [(24, 24), (40, 16), (16, 40)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def basis(width, count, seed=0):
    return torch.linalg.qr(normal(width, count, seed=seed, dtype=torch.float64)).Q.float()


def restored(weight, start, share):
    """``W_h + P_U W P_V`` by numpy, with all matrices written out."""
    u, s, vt = np.linalg.svd(start.double().numpy(), full_matrices=False)
    k = int(share * min(start.shape))
    u, s, v = u[:, :k], s[:k], vt[:k].T
    outer, inner = np.eye(len(u)) - u @ u.T, np.eye(len(v)) - v @ v.T
    return torch.from_numpy(u @ np.diag(s) @ v.T + outer @ weight.double().numpy() @ inner)


def drift(weight, start, subspace):
    """The largest entry of ``Uᵀ ΔW`` and ``ΔW V``, in double precision."""
    change = weight.double() - start.double()
    return max(
        (subspace.left.double().T @ change).abs().max().item(), (change @ subspace.right.double()).abs().max().item()
    )


# the principal subspace


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factors_are_the_leading_part_of_the_decomposition(shape):
    weight = normal(*shape)
    left, values, right = principal_subspace(weight, 0.5)
    k = min(shape) // 2
    assert (left.shape, values.shape, right.shape) == ((shape[0], k), (k,), (shape[1], k))
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:k]
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6)
    for side in (left, right):
        torch.testing.assert_close(
            side.double().T @ side.double(), torch.eye(k, dtype=torch.float64), atol=3e-7, rtol=0
        )
    # The best approximation of rank k (Eckart & Young): what is left has the other singular values.
    rest = weight.double() - (left * values).double() @ right.double().T
    others = np.linalg.svd(weight.double().numpy(), compute_uv=False)[k:]
    assert rest.square().sum().item() == pytest.approx((others**2).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("share", "shape", "count"), [(0.29, (100, 200), 29), (0.3, (10, 10), 3), (0.5, (5, 9), 2), (1, (3, 7), 3)]
)
def test_a_share_is_cut_to_a_whole_number_of_directions(share, shape, count):
    assert directions_of_share(share, shape) == count


@pytest.mark.parametrize("share", [0, -0.1, 1.01, math.nan])
def test_a_share_out_of_range_is_an_error(share):
    with pytest.raises(ValueError, match=r"share: .*, expected a number above 0 and at most 1"):
        principal_subspace(normal(4, 4), share)


def test_a_share_of_less_than_one_direction_is_an_error():
    with pytest.raises(ValueError, match=r"share: 0.2 of 4 directions is less than one, expected at least 0.25"):
        principal_subspace(normal(4, 8), 0.2)


def test_weights_that_cannot_be_decomposed_are_an_error():
    with pytest.raises(ValueError, match=r"weight: shape \[4\], expected a matrix"):
        principal_subspace(normal(4), 0.5)
    weight = normal(4, 4)
    weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="weight: 1 of 16 values are not finite"):
        principal_subspace(weight, 0.5)


# the projection of weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.25, 0.75, 1.0])
def test_the_projection_is_the_formula(shape, share):
    start, weight = normal(*shape), normal(*shape, seed=1)
    expected = restored(weight, start, share)
    project_weights_(weight, principal_subspace(start, share))
    torch.testing.assert_close(weight.double(), expected, atol=5e-6, rtol=0)


def test_a_weight_that_did_not_move_is_left_and_a_second_projection_changes_nothing():
    start = normal(24, 16)
    subspace, weight = principal_subspace(start, 0.5), normal(24, 16)
    project_weights_(weight, subspace)
    torch.testing.assert_close(weight, start, atol=3e-6, rtol=0)
    weight += 0.1 * normal(24, 16, seed=2)
    project_weights_(weight, subspace)
    once = weight.clone()
    project_weights_(weight, subspace)
    torch.testing.assert_close(weight, once, atol=3e-6, rtol=0)


def test_of_a_step_the_free_part_stays_and_the_protected_part_goes():
    start = normal(24, 16, dtype=torch.float64)
    subspace = principal_subspace(start, 0.5)
    left, _, right = subspace
    step = normal(24, 16, seed=3, dtype=torch.float64)
    free = (torch.eye(24) - left @ left.T) @ step @ (torch.eye(16) - right @ right.T)
    weight = start + step
    project_weights_(weight, subspace)
    torch.testing.assert_close(weight, start + free, atol=1e-12, rtol=0)
    # Inputs in the subspace give the same outputs; what the weight gives out in its direction is the same, too.
    torch.testing.assert_close(weight @ right, start @ right, atol=1e-12, rtol=0)
    torch.testing.assert_close(left.T @ weight, left.T @ start, atol=1e-12, rtol=0)


def test_the_view_of_a_transposed_weight_is_projected_in_place():
    """GPT-2 stores its linear layers as [in, out]."""
    start, moved = normal(24, 16), normal(24, 16, seed=1)
    subspace, stored = principal_subspace(start, 0.5), moved.T.contiguous()
    project_weights_(stored.T, subspace)
    project_weights_(moved, subspace)
    torch.testing.assert_close(stored.T, moved, atol=1e-6, rtol=0)


def trained(weight, steps, after_step, lr=1e-3, dtype=torch.float32, seed=5):
    """AdamW with weight decay on a target that pulls at the protected part as much as at the rest."""
    parameter = torch.nn.Parameter(weight.clone().to(dtype))
    optimizer = torch.optim.AdamW([parameter], lr=lr, weight_decay=0.1)
    target = normal(*weight.shape, seed=seed)
    inputs = normal(steps, 8, weight.shape[1], seed=seed + 1)
    for x in inputs:
        optimizer.zero_grad()
        ((x.to(dtype) @ parameter.T).float() - x @ target.T).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            after_step(parameter)
    return parameter.detach()


def test_three_thousand_steps_of_adamw_with_weight_decay_do_not_move_the_protected_part():
    start = 0.1 * normal(32, 24)
    subspace = principal_subspace(start, 0.5)
    drifts = []

    def after_step(parameter):
        project_weights_(parameter, subspace)
        drifts.append(drift(parameter.detach(), start, subspace))

    weight = trained(start, 3000, after_step)
    assert (weight - start).abs().max() > 0.5  # the rest has learnt
    assert max(drifts) <= 1e-6
    assert np.mean(drifts[-500:]) <= 3 * np.mean(drifts[500:1000])  # they grow with the weight, not with the steps
    before, other = start.clone(), trained(start, 200, lambda parameter: None)
    assert protected_share(other - before, subspace.left, subspace.right) > 0.3  # without it, they move
    assert protected_share(weight - before, subspace.left, subspace.right) < 1e-11


def test_projecting_the_gradient_only_would_not_protect():
    start = 0.1 * normal(32, 24)
    subspace = principal_subspace(start, 0.5)
    left, _, right = subspace
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0)
    parameter.grad = normal(32, 24, seed=4)
    parameter.grad -= left @ (left.T @ parameter.grad)
    parameter.grad -= parameter.grad @ right @ right.T
    assert protected_share(parameter.grad, left, right) < 1e-11
    optimizer.step()
    assert protected_share(parameter.detach() - start, left, right) > 0.02


def test_in_bf16_the_protected_part_stays_within_one_rounding_of_the_weight():
    start = (0.1 * normal(32, 24)).bfloat16()
    subspace = principal_subspace(start, 0.5)
    assert subspace.left.dtype == torch.float32
    drifts = []

    def after_step(parameter):
        project_weights_(parameter, subspace)
        # Half a unit of the last place: a part in 2^9 of each entry; a projection adds up 32 of them.
        rounding = parameter.detach().float().abs().square().sum(0).sqrt().max().item() / 2**9
        drifts.append(drift(parameter.detach(), start, subspace) / rounding)

    weight = trained(start, 1000, after_step, dtype=torch.bfloat16)
    assert weight.dtype == torch.bfloat16
    assert (weight.float() - start.float()).abs().max() > 0.2
    assert max(drifts) < 1.5
    assert np.mean(drifts[-200:]) <= 1.5 * np.mean(drifts[200:400])


def test_in_bf16_the_weight_comes_to_rest_if_no_step_moves_it():
    """Rounding and projecting in turn never take the weight further away, so it cannot wander."""
    start = normal(32, 24).bfloat16()
    subspace = principal_subspace(start, 0.5)
    weight = (start + 0.1 * normal(32, 24, seed=1)).bfloat16()
    seen = []
    for _ in range(300):
        project_weights_(weight, subspace)
        seen.append(weight.clone())
    assert torch.equal(seen[-1], seen[-2])
    assert (seen[-1].float() - seen[0].float()).abs().max() < 0.05


def test_bf16_is_rounded_once():
    start, moved = normal(24, 16), normal(24, 16, seed=1).bfloat16()
    subspace, wide = principal_subspace(start, 0.5), moved.float()
    project_weights_(moved, subspace)
    project_weights_(wide, subspace)
    torch.testing.assert_close(moved, wide.bfloat16(), atol=0, rtol=0)


def test_tf32_and_autocast_have_no_part_in_it():
    """TF32 does not exist on the CPU, but the switches that a product looks at do."""
    start, moved = normal(64, 64), normal(64, 64, seed=1)
    subspace, expected = principal_subspace(start, 0.5), moved.clone()
    project_weights_(expected, subspace)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            project_weights_(moved, subspace)
            with full_precision("cpu"):
                assert torch.get_float32_matmul_precision() == "highest"
                assert (normal(3, 3) @ normal(3, 3)).dtype == torch.float32
            assert (normal(3, 3) @ normal(3, 3)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(moved, expected, atol=0, rtol=0)


@pytest.fixture
def switches():
    """Of torch: the old one, and the new ones; put back afterwards."""
    new = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    old, before = torch.get_float32_matmul_precision(), [switch.fp32_precision for switch in new]
    yield new
    torch.set_float32_matmul_precision(old)
    for switch, setting in zip(new, before, strict=True):
        switch.fp32_precision = setting


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_turns_the_old_switch_off_and_back_after_an_error(switches, setting):
    torch.set_float32_matmul_precision(setting)
    before = [switch.fp32_precision for switch in switches]

    def fail():
        with full_precision("cpu"):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.backends.cuda.matmul.allow_tf32 == (setting != "highest")
    assert torch.get_float32_matmul_precision() == setting
    assert [switch.fp32_precision for switch in switches] == before


def test_full_precision_turns_the_new_switches_off_and_back(switches):
    switches[0].fp32_precision = "tf32"
    with full_precision("cpu"):
        assert not torch.backends.cuda.matmul.allow_tf32
        assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
    assert switches[0].fp32_precision == "tf32"


def test_shapes_that_do_not_fit_are_an_error():
    subspace = principal_subspace(normal(6, 4), 0.5)
    with pytest.raises(ValueError, match=r"left: shape \[6, 2\].*of a matrix of shape \[4, 6\]"):
        project_weights_(normal(4, 6), subspace)


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_projected_as_whole_ones(mesh):
    start, weight = normal(24, 16), normal(24, 16, seed=1)
    left, values, right = subspace = principal_subspace(start, 0.5)
    sharded = distribute_tensor(weight.clone(), mesh, [Shard(0)])
    placed = type(subspace)(
        distribute_tensor(left, mesh, [Shard(0)]),
        distribute_tensor(values, mesh, [Replicate()]),
        distribute_tensor(right, mesh, [Replicate()]),
    )
    project_weights_(sharded, placed)
    project_weights_(weight, subspace)
    assert sharded.placements == (Shard(0),)
    torch.testing.assert_close(sharded.full_tensor(), weight, atol=1e-6, rtol=0)
    share = protected_share(sharded, placed.left, placed.right)
    assert share.item() == pytest.approx(protected_share(weight, left, right).item(), rel=1e-5)


# the share of a step


@pytest.mark.parametrize("sides", ["left", "right", "both"])
def test_the_share_is_what_the_projection_takes_away(sides):
    step = normal(12, 9)
    left = basis(12, 4) if sides != "right" else None
    right = basis(9, 3, seed=1) if sides != "left" else None
    outer = torch.eye(12) - (left @ left.T if left is not None else 0)
    inner = torch.eye(9) - (right @ right.T if right is not None else 0)
    taken = step - outer @ step @ inner
    assert protected_square(step, left, right).item() == pytest.approx(taken.square().sum().item(), rel=1e-5)
    expected = (taken.square().sum() / step.square().sum()).item()
    assert protected_share(step, left, right).item() == pytest.approx(expected, rel=1e-5)


def test_a_share_of_nothing_is_zero_and_of_everything_one():
    left, right = basis(12, 4), basis(9, 3)
    assert protected_share(torch.zeros(12, 9), left, right) == 0
    assert protected_share(left @ normal(4, 9), left, right).item() == pytest.approx(1, abs=1e-6)
    assert protected_share(normal(12, 9), left=torch.eye(12)).item() == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="expected at least one basis"):
        protected_share(normal(2, 2))


def test_a_small_share_is_not_lost_in_rounding():
    """1e-10 of the squared norm: a difference of two sums in fp32 has 1e-7."""
    left = basis(64, 8)
    step = normal(64, 32)
    step -= left @ (left.T @ step)
    step = step / step.norm()
    inside = left @ normal(8, 32, seed=1)
    step = step.double() + 1e-5 * (inside / inside.norm()).double()
    assert protected_share(step, left.double()).item() == pytest.approx(1e-10, rel=1e-2)
    assert protected_share(step.float(), left).item() == pytest.approx(1e-10, rel=0.1)


# bases and their overlap


def test_a_basis_spans_the_columns_and_leaves_out_what_the_others_give():
    vectors = normal(20, 3)
    vectors = torch.cat([vectors, vectors @ normal(3, 4, seed=1), torch.zeros(20, 1)], dim=1)
    found = orthonormal_basis(vectors)
    assert found.shape == (20, 3)
    torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(found @ (found.T @ vectors), vectors, atol=1e-5, rtol=0)
    assert orthonormal_basis(torch.zeros(5, 2)).shape == (5, 0)
    assert orthonormal_basis(torch.zeros(5, 0)).shape == (5, 0)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90])
def test_the_overlap_of_two_lines_is_the_squared_cosine(degrees):
    angle = math.radians(degrees)
    first = torch.tensor([[1.0], [0.0], [0.0]])
    second = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0]])
    assert subspace_overlap(first, second).item() == pytest.approx(math.cos(angle) ** 2, abs=1e-7)


def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles():
    first, second = basis(30, 5), basis(30, 8, seed=1)
    cosines = torch.linalg.svdvals(first.double().T @ second.double())
    expected = cosines.square().mean().item()
    assert subspace_overlap(first, second).item() == pytest.approx(expected, rel=1e-5)
    assert subspace_overlap(second, first).item() == pytest.approx(expected, rel=1e-5)
    turned = first @ torch.linalg.qr(normal(5, 5, seed=2)).Q  # another basis of the same space
    assert subspace_overlap(turned, second).item() == pytest.approx(expected, rel=1e-5)
    assert subspace_overlap(second, second).item() == pytest.approx(1, abs=1e-6)
    assert subspace_overlap(first[:, :0], second) == 0
    with pytest.raises(ValueError, match=r"second: shape \[4, 1\]"):
        subspace_overlap(first, basis(4, 1))


def test_random_subspaces_overlap_by_their_share_of_the_width():
    overlaps = [subspace_overlap(basis(96, 8, seed=i), basis(96, 8, seed=i + 1000)).item() for i in range(200)]
    assert np.mean(overlaps) == pytest.approx(8 / 96, rel=0.05)


# rows without a span


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_lose_what_lies_in_the_span(dtype):
    span = basis(20, 5)
    span = span.double() if dtype == torch.float64 else span
    rows = normal(4, 20, seed=1, dtype=dtype)
    wide = rows.double()
    expected = wide - wide @ span.double() @ span.double().T
    remove_span_(rows, span)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.double(), expected, atol=1e-6 if dtype != torch.bfloat16 else 8e-3, rtol=8e-3)


def test_rows_that_lie_almost_in_the_span_are_clean_as_well():
    """The first pass leaves 1e-7 of what it takes away, which is as much as is left of the row."""
    span = basis(20, 5)
    outside = normal(1, 20, seed=2)
    remove_span_(outside, span)
    rows = 1e3 * normal(1, 5, seed=1) @ span.T + 1e-3 * outside
    remove_span_(rows, span)
    assert ((rows @ span).norm() / rows.norm()) < 2e-6


def test_both_factors_of_a_lora_give_a_change_that_is_free_of_the_subspace():
    """OPLoRA: the weight is frozen, the product of the projected factors has no protected part."""
    weight = normal(24, 16)
    left, _, right = principal_subspace(weight, 0.5)
    down, up = normal(4, 16, seed=1), normal(24, 4, seed=2)
    remove_span_(down, right)
    remove_span_(up.T, left)
    assert protected_share(up @ down, left, right) < 1e-12
