"""Input directions that a weight must leave alone: GPM against numpy, on the inputs themselves."""

import math

import numpy as np
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_cl.functional.input_space import (
    add_second_moment_,
    grow_basis,
    project_inputs_,
    protected_outputs,
    spectrum_outside,
)
from lightning_cl.functional.subspace import protected_share


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs_of_task(seed, count=200, width=24, slope=0.4):
    """Inputs whose energy falls off along random axes, as those of a layer do."""
    axes = torch.linalg.qr(normal(width, width, seed=seed, dtype=torch.float64)).Q
    sizes = torch.exp(-slope * torch.arange(width, dtype=torch.float64))
    return (normal(count, width, seed=seed + 100, dtype=torch.float64) * sizes) @ axes.T


def moment(inputs, dtype=torch.float32):
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=dtype)
    add_second_moment_(total, inputs)
    return total


def grown_by_numpy(inputs, threshold, basis=None):
    """GPM as its paper states it: the singular vectors of the inputs without what is spanned, until the criterion."""
    columns = inputs.double().numpy().T  # [in, samples], the paper's representation matrix
    energy = (columns**2).sum()
    spanned = np.zeros((len(columns), 0)) if basis is None else basis.double().numpy()
    rest = columns - spanned @ (spanned.T @ columns)
    held = ((spanned.T @ columns) ** 2).sum()
    u, s, _ = np.linalg.svd(rest, full_matrices=False)
    count = 0
    while held + (s[:count] ** 2).sum() < threshold * energy:
        count += 1
    return np.concatenate([spanned, u[:, :count]], axis=1)


def same_space(first, second, atol):
    first, second = torch.as_tensor(first).double(), torch.as_tensor(second).double()
    torch.testing.assert_close(first @ first.T, second @ second.T, atol=atol, rtol=0)


# second moments


def test_the_second_moment_is_the_sum_over_positions():
    inputs = normal(3, 5, 8)
    total = torch.zeros(8, 8)
    assert add_second_moment_(total, inputs) == 15
    expected = sum(torch.outer(x, x) for x in inputs.reshape(-1, 8).double())
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_is_left_out_whatever_it_holds(kind):
    inputs, mask = normal(3, 5, 8), torch.ones(3, 5)
    mask[0, 3:] = 0
    mask[2, 1:] = 0
    clean = inputs[mask.bool()]
    inputs[mask == 0] = math.nan
    total = torch.zeros(8, 8)
    assert add_second_moment_(total, inputs, mask.to(kind)) == 9
    torch.testing.assert_close(total, moment(clean), atol=1e-6, rtol=1e-6)


def test_neither_the_order_nor_the_split_of_batches_matters(monkeypatch):
    inputs = normal(60, 8)
    whole = moment(inputs)
    monkeypatch.setattr("lightning_cl.functional.input_space._BLOCK_BYTES", 4 * 8 * 7)  # seven rows at a time
    parts = torch.zeros(8, 8)
    counted = [add_second_moment_(parts, part) for part in inputs.flip(0).split(17)]
    assert sum(counted) == 60
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-6)


def test_bf16_inputs_are_added_up_in_fp32_also_under_autocast():
    inputs = normal(4096, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total = moment(inputs)
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-2)


def test_normalised_positions_count_the_same():
    """A position a thousand times longer than the others would hold all of the energy."""
    inputs = normal(50, 8)
    inputs[0] *= 1e3
    total = torch.zeros(8, 8)
    add_second_moment_(total, inputs, normalize=True)
    torch.testing.assert_close(total, moment(inputs / inputs.norm(dim=1, keepdim=True)), atol=1e-5, rtol=1e-5)
    assert total.trace().item() == pytest.approx(50, rel=1e-5)
    assert grow_basis(moment(inputs), 0.9).shape[1] == 1
    assert grow_basis(total, 0.9).shape[1] > 5


def test_sums_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"total: shape \[4, 4\], expected \[8, 8\]"):
        add_second_moment_(torch.zeros(4, 4), normal(3, 8))
    with pytest.raises(ValueError, match=r"total: type torch.bfloat16, expected torch.float32"):
        add_second_moment_(torch.zeros(8, 8, dtype=torch.bfloat16), normal(3, 8))
    with pytest.raises(ValueError, match=r"mask: shape \[5, 3\], expected \[3, 5\]"):
        add_second_moment_(torch.zeros(8, 8), normal(3, 5, 8), torch.ones(5, 3))


# the growth of the basis


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.98, 0.995])
def test_the_basis_grows_as_numpy_says_over_three_tasks(threshold):
    basis, reference = None, None
    for task in range(3):
        inputs = inputs_of_task(task)
        basis = grow_basis(moment(inputs, torch.float64), threshold, basis)
        reference = grown_by_numpy(inputs, threshold, None if reference is None else torch.from_numpy(reference))
        assert basis.shape == reference.shape
        same_space(basis, reference, atol=1e-8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)


def test_moments_in_fp32_give_the_same_number_of_directions_and_nearly_the_same_space():
    for seed in range(5):
        inputs = inputs_of_task(seed)
        basis = grow_basis(moment(inputs), 0.95)
        assert basis.dtype == torch.float32
        same_space(basis, grown_by_numpy(inputs, 0.95), atol=1e-4)


def test_the_basis_holds_the_threshold_and_one_direction_less_would_not():
    first, second = inputs_of_task(1), inputs_of_task(2)
    old = grow_basis(moment(first), 0.9)
    new = grow_basis(moment(second), 0.9, old)

    def held(basis):
        return ((second @ basis.double()).square().sum() / second.square().sum()).item()

    assert held(new) >= 0.9
    assert held(new[:, :-1]) < 0.9
    assert held(old) < 0.9


def test_old_directions_keep_every_bit_and_new_ones_are_orthogonal_to_them():
    basis = None
    for task in range(12):
        old = basis
        basis = grow_basis(moment(inputs_of_task(task, width=64, slope=0.3)), 0.8, basis)
        if old is not None:
            assert torch.equal(basis[:, : old.shape[1]], old)
        products = basis.double().T @ basis.double()
        assert (products - torch.eye(len(products))).abs().max() < 3e-7
    assert 30 < basis.shape[1] < 64


def test_nothing_is_added_where_the_inputs_are_spanned_already():
    inputs = inputs_of_task(3)
    basis = grow_basis(moment(inputs), 0.95)
    assert torch.equal(grow_basis(moment(inputs), 0.95, basis), basis)
    assert torch.equal(grow_basis(torch.zeros(24, 24), 0.95, basis), basis)
    assert grow_basis(torch.zeros(24, 24), 0.95).shape == (24, 0)
    everything = torch.eye(24)
    assert torch.equal(grow_basis(moment(inputs), 1.0, everything), everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_of_one_takes_the_directions_that_inputs_have_and_no_rounding(dtype):
    inputs = normal(400, 5) @ normal(5, 24, seed=1)
    basis = grow_basis(moment(inputs, dtype), 1.0)
    assert basis.shape == (24, 5)
    wide = inputs.to(dtype)
    torch.testing.assert_close(wide @ basis @ basis.T, wide, atol=1e-4, rtol=0)


def test_the_number_of_directions_can_be_limited():
    total = moment(inputs_of_task(4))
    basis = grow_basis(total, 0.999, most=3)
    torch.testing.assert_close(basis, grow_basis(total, 0.999)[:, :3])
    assert torch.equal(grow_basis(moment(inputs_of_task(5)), 0.999, basis, most=3), basis)
    assert grow_basis(total, 0.999, most=0).shape == (24, 0)
    with pytest.raises(ValueError, match="most: 2, expected at least 3"):
        grow_basis(total, 0.999, basis, most=2)


@pytest.mark.parametrize("threshold", [0, -1, 1.001, math.nan])
def test_a_threshold_out_of_range_is_an_error(threshold):
    with pytest.raises(ValueError, match=r"threshold: .*, expected a number above 0 and at most 1"):
        grow_basis(torch.eye(4), threshold)


def test_moments_that_cannot_be_decomposed_are_an_error():
    with pytest.raises(ValueError, match=r"second_moment: shape \[3, 4\], expected a square matrix"):
        grow_basis(torch.zeros(3, 4), 0.9)
    with pytest.raises(ValueError, match="second_moment: 1 of 16 values are not finite"):
        grow_basis(torch.full((4, 4), 1.0).put_(torch.tensor(3), torch.tensor(math.inf)), 0.9)
    with pytest.raises(ValueError, match=r"basis: shape \[5, 1\]"):
        grow_basis(torch.eye(4), 0.9, torch.eye(5)[:, :1])


def test_the_spectrum_outside_is_that_of_the_projected_moment():
    total = moment(inputs_of_task(6), torch.float64)
    basis = grow_basis(moment(inputs_of_task(7), torch.float64), 0.9)
    outside = torch.eye(24) - basis @ basis.T
    values, vectors = spectrum_outside(total, basis)
    left = 24 - basis.shape[1]
    expected = torch.linalg.eigvalsh(outside @ total @ outside).flip(0)[:left]
    torch.testing.assert_close(values, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(outside @ total @ outside @ vectors, vectors * values, atol=1e-9, rtol=0)
    assert (basis.T @ vectors).abs().max() < 1e-12


# the projection of weights


def test_the_change_of_a_weight_loses_its_part_along_protected_inputs():
    start, step = normal(10, 24, dtype=torch.float64), normal(10, 24, seed=1, dtype=torch.float64)
    basis = grow_basis(moment(inputs_of_task(1), torch.float64), 0.9)
    weight = start + step
    project_inputs_(weight, basis, protected_outputs(start, basis))
    expected = start + step @ (torch.eye(24) - basis @ basis.T)
    torch.testing.assert_close(weight, expected, atol=1e-12, rtol=0)
    protected = basis @ normal(basis.shape[1], 30, seed=2, dtype=torch.float64)
    torch.testing.assert_close(weight @ protected, start @ protected, atol=1e-11, rtol=0)
    once = weight.clone()
    project_inputs_(weight, basis, protected_outputs(start, basis))
    torch.testing.assert_close(weight, once, atol=1e-13, rtol=0)


def test_with_a_threshold_of_one_old_inputs_give_the_same_outputs():
    old = normal(50, 6) @ normal(6, 24, seed=1)
    basis = grow_basis(moment(old), 1.0)
    start = normal(10, 24, seed=2)
    outputs, weight = protected_outputs(start, basis), start + normal(10, 24, seed=3)
    project_inputs_(weight, basis, outputs)
    torch.testing.assert_close(old @ weight.T, old @ start.T, atol=1e-4, rtol=0)
    assert (weight - start).norm() > 5


def test_three_thousand_steps_of_adamw_with_weight_decay_do_not_move_protected_outputs():
    start = 0.1 * normal(16, 24)
    basis = grow_basis(moment(inputs_of_task(1)), 0.95)
    outputs = protected_outputs(start, basis)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1)
    target, inputs = normal(16, 24, seed=5), normal(3000, 8, 24, seed=6)
    drifts = []
    for x in inputs:
        optimizer.zero_grad()
        (x @ parameter.T - x @ target.T).square().mean().backward()
        optimizer.step()
        project_inputs_(parameter, basis, outputs)
        change = parameter.detach().double() - start.double()
        drifts.append((change @ basis.double()).abs().max().item())
    assert max(drifts) <= 1e-6
    assert np.mean(drifts[-500:]) <= 3 * np.mean(drifts[500:1000])
    assert (parameter.detach() - start).abs().max() > 0.5
    assert protected_share(parameter.detach() - start, right=basis) < 1e-11


def test_bf16_weights_are_rounded_once_and_transposed_ones_are_changed_in_place():
    basis = grow_basis(moment(inputs_of_task(1)), 0.9)
    start, moved = normal(10, 24), normal(10, 24, seed=1).bfloat16()
    outputs, wide, stored = protected_outputs(start, basis), moved.float(), moved.float().T.contiguous()
    project_inputs_(moved, basis, outputs)
    project_inputs_(wide, basis, outputs)
    project_inputs_(stored.T, basis, outputs)
    assert torch.equal(moved, wide.bfloat16())
    torch.testing.assert_close(stored.T, wide, atol=1e-6, rtol=0)
    assert protected_outputs(moved, basis).dtype == torch.float32


def test_shapes_that_do_not_fit_are_an_error():
    basis = torch.eye(24)[:, :3]
    with pytest.raises(ValueError, match=r"basis: shape \[24, 3\], expected .* of shape \[24, 10\]"):
        protected_outputs(normal(24, 10), basis)
    with pytest.raises(ValueError, match=r"outputs: shape \[10, 2\], expected \[10, 3\]"):
        project_inputs_(normal(10, 24), basis, torch.zeros(10, 2))


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights_are_projected_as_whole_ones(mesh):
    basis = grow_basis(moment(inputs_of_task(1)), 0.9)
    start, weight = normal(10, 24), normal(10, 24, seed=1)
    sharded = distribute_tensor(weight.clone(), mesh, [Shard(0)])
    placed = distribute_tensor(basis, mesh, [Replicate()])
    outputs = protected_outputs(distribute_tensor(start, mesh, [Shard(0)]), placed)
    assert outputs.placements == (Shard(0),)
    project_inputs_(sharded, placed, outputs)
    project_inputs_(weight, basis, protected_outputs(start, basis))
    torch.testing.assert_close(sharded.full_tensor(), weight, atol=1e-6, rtol=0)
