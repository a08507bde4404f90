"""A-GEM's projection against its optimisation problem, a reference in double precision, and what must not change."""

import math

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_cl.functional.agem import project_

SHAPES = {"weight": (3, 4), "bias": (5,), "scale": ()}


def normal(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in SHAPES.items()}


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def conflict(seed, dtype=torch.float64):
    """Gradients and a reference that point apart: turned around where they do not."""
    gradients, reference = normal(seed, dtype), normal(seed + 1000, dtype)
    if flat(gradients) @ flat(reference) > 0:
        reference = {name: -tensor for name, tensor in reference.items()}
    return gradients, reference


def agreement(seed, dtype=torch.float64):
    gradients, reference = conflict(seed, dtype)
    return gradients, {name: -tensor for name, tensor in reference.items()}


# the mathematics


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_the_nearest_gradient_that_does_not_raise_the_memorys_loss(seed):
    """min ½‖g̃ − g‖² s.t. g̃·r ≥ 0: it is feasible, and no feasible point of many is nearer."""
    gradients, reference = conflict(seed)
    g, r = flat(gradients), flat(reference)
    assert project_(gradients, reference).projected
    found = flat(gradients)
    assert found @ r >= -1e-12 * g.norm() * r.norm()
    distance = (found - g).norm()
    generator = torch.Generator().manual_seed(seed)
    for size in (1e-3, 1e-1, 1.0, 10.0):
        others = found + size * torch.randn(500, len(g), generator=generator, dtype=torch.float64)
        feasible = others[others @ r >= 0]
        assert len(feasible) > 100
        assert ((feasible - g).norm(dim=1) >= distance).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_conditions_of_karush_kuhn_and_tucker_hold(seed):
    """g̃ − g = λ r with λ ≥ 0, and λ · (g̃·r) = 0: with a convex problem, these say that it is the solution."""
    gradients, reference = conflict(seed)
    g, r = flat(gradients), flat(reference)
    project_(gradients, reference)
    change = flat(gradients) - g
    multiplier = (change @ r) / (r @ r)
    assert multiplier > 0
    torch.testing.assert_close(change, multiplier * r, rtol=1e-12, atol=1e-14)
    assert abs(flat(gradients) @ r) < 1e-12 * g.norm() * r.norm()


def test_by_hand():
    gradients = {"w": torch.tensor([3.0, 1.0])}
    found = project_(gradients, {"w": torch.tensor([-2.0, 0.0])})
    # −6 / 4 · (−2, 0) = (3, 0) is taken out.
    assert gradients["w"].tolist() == [0.0, 1.0]
    assert found == (-6.0, 10.0, 4.0, True)
    assert found.cosine == pytest.approx(-3 / math.sqrt(10))


def test_the_tensors_are_one_vector():
    """The first tensor alone agrees with its reference; it is changed all the same, since the whole does not."""
    gradients = {"a": torch.tensor([1.0]), "b": torch.tensor([-2.0])}
    project_(gradients, {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])})
    assert gradients["a"].tolist() == [1.5]
    assert gradients["b"].tolist() == [-1.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_stays_where_the_two_agree(dtype):
    for seed in range(5):
        gradients, reference = agreement(seed, dtype)
        before = clones(gradients)
        found = project_(gradients, reference)
        assert found.dot > 0
        assert not found.projected
        torch.testing.assert_close(gradients, before, rtol=0, atol=0)


def test_a_right_angle_is_no_conflict():
    gradients, reference = {"w": torch.tensor([0.1, 0.0])}, {"w": torch.tensor([0.0, 0.3])}
    assert not project_(gradients, reference).projected
    assert gradients["w"].tolist() == [torch.tensor(0.1).item(), 0.0]


def test_the_reference_is_not_changed():
    gradients, reference = conflict(3)
    before = clones(reference)
    project_(gradients, reference)
    torch.testing.assert_close(reference, before, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**16])
def test_a_loss_scale_of_the_reference_cancels_and_one_of_the_gradients_stays(factor):
    gradients, reference = conflict(4, torch.float32)
    scaled, larger = clones(gradients), {name: factor * tensor for name, tensor in gradients.items()}
    project_(gradients, reference)
    project_(scaled, {name: factor * tensor for name, tensor in reference.items()})
    project_(larger, reference)
    torch.testing.assert_close(scaled, gradients, rtol=0, atol=0)  # powers of two change no digit
    torch.testing.assert_close(larger, {n: factor * t for n, t in gradients.items()}, rtol=0, atol=0)


# which parameters count


def test_only_parameters_with_both_gradients_count():
    """An old head that this step does not move cannot give way, and its length is no part of the reference's."""
    gradients, reference = conflict(5)
    alone, its_reference = clones(gradients), clones(reference)
    gradients |= {"new head": torch.ones(2), "frozen": None}
    reference |= {"old head": 100 * torch.ones(7), "frozen": 100 * torch.ones(3), "new head": None}
    found, expected = project_(gradients, reference), project_(alone, its_reference)
    assert found == expected
    assert gradients.pop("new head").tolist() == [1.0, 1.0]
    assert gradients.pop("frozen") is None
    torch.testing.assert_close(gradients, alone, rtol=0, atol=0)


def test_lists_are_taken_in_their_order():
    gradients, reference = conflict(6)
    listed = [*clones(gradients).values(), None]
    project_(listed, [*reference.values(), torch.ones(2)])
    project_(gradients, reference)
    torch.testing.assert_close(listed[:-1], list(gradients.values()), rtol=0, atol=0)


def test_nothing_in_common_is_no_conflict():
    assert project_({}, {}) == (0.0, 0.0, 0.0, False)
    assert project_({"a": torch.ones(1)}, {"b": -torch.ones(1)}) == (0.0, 0.0, 0.0, False)
    assert math.isnan(project_({}, {}).cosine)


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"reference\[w\]: shape \[1\], expected \[3\]"):
        project_({"w": torch.ones(3)}, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="reference: 1 gradients, expected 2"):
        project_([torch.ones(3), None], [torch.ones(3)])


# numbers at the edges


@pytest.mark.parametrize("value", [0.0, 1e-25])
def test_a_zero_reference_changes_nothing(value):
    """Also one so small that its square is none in fp32: the quotient would be a random number."""
    gradients, before = normal(7, torch.float32), normal(7, torch.float32)
    reference = {name: -value * gradient.sign() for name, gradient in gradients.items()}
    found = project_(gradients, reference)
    assert not found.projected
    torch.testing.assert_close(gradients, before, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_reference_that_is_not_finite_changes_nothing_and_is_told(value):
    """One whose square overflows, too."""
    gradients, reference = conflict(8, torch.float32)
    before = clones(gradients)
    reference["weight"][1, 2] = value
    found = project_(gradients, reference)
    assert not found.projected
    assert not math.isfinite(found.reference_square)
    torch.testing.assert_close(gradients, before, rtol=0, atol=0)


def test_gradients_that_are_not_finite_are_left_as_they_are():
    """They are an overflow's: the step will be skipped."""
    gradients, reference = conflict(9, torch.float32)
    gradients["bias"][0] = math.inf
    before = clones(gradients)
    found = project_(gradients, reference)
    assert not found.projected
    assert math.isfinite(found.reference_square)
    assert not math.isfinite(found.gradient_square)
    torch.testing.assert_close(gradients, before, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_in_fewer_bits_the_result_is_that_of_double_precision_rounded_once(dtype, error):
    for seed in range(5):
        gradients, reference = conflict(seed, dtype)
        g, r = flat(gradients), flat(reference)
        project_(gradients, reference)
        expected = g - (g @ r) / (r @ r) * r
        assert all(tensor.dtype == dtype for tensor in gradients.values())
        assert ((flat(gradients) - expected).abs() <= error * expected.abs() + 1e-6).all()


def test_sums_are_taken_in_full_precision():
    """A million products of 1e-4 · 1e-4: in fp16 each is 0, and a sum in bf16 stops growing at 256 of them."""
    for dtype in (torch.float16, torch.bfloat16):
        gradients = [torch.full((1_000_000,), 1e-4, dtype=dtype)]
        found = project_(gradients, [torch.full((1_000_000,), -1e-4, dtype=dtype)])
        assert found.dot == pytest.approx(-0.01, rel=0.02)
        assert gradients[0].abs().max() <= 1e-6


def test_a_gradient_and_a_reference_of_different_types():
    gradients, reference = conflict(10)
    half = {name: tensor.to(torch.bfloat16) for name, tensor in gradients.items()}
    g, r = flat(half), flat(reference)
    project_(half, reference)
    expected = g - (g @ r) / (r @ r) * r
    torch.testing.assert_close(flat(half), expected, rtol=8e-3, atol=1e-3)
    whole = {name: tensor.float() for name, tensor in gradients.items()}
    project_(whole, {name: tensor.float() for name, tensor in reference.items()})
    project_(gradients, reference)
    torch.testing.assert_close(flat(whole), flat(gradients), rtol=1e-5, atol=1e-6)


# parts of parameters


def part_of(tensors, process):
    """A third of each tensor for the first process, the rest for the second."""
    flattened = {name: tensor.flatten() for name, tensor in tensors.items()}
    return {n: t[: len(t) // 3] if process == 0 else t[len(t) // 3 :] for n, t in flattened.items()}


def test_parts_with_their_sums_added_up_are_projected_as_the_whole():
    gradients, reference = conflict(11)
    parts = [(part_of(clones(gradients), process), part_of(reference, process)) for process in (0, 1)]
    sums = []
    for mine, theirs in parts:
        project_(clones(mine), theirs, reduce=lambda own: sums.append(own) or own)
    found = [project_(mine, theirs, reduce=lambda own: sums[0] + sums[1]) for mine, theirs in parts]
    expected = project_(gradients, reference)
    assert found[0] == found[1]
    assert found[0].projected
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected))
    for name, tensor in gradients.items():
        together = torch.cat([mine[name] for mine, _ in parts])
        torch.testing.assert_close(together, tensor.flatten())


def test_a_process_without_any_part_still_takes_part_in_the_sums():
    """Else the others would wait for it for ever."""
    calls = []
    project_({}, {}, reduce=lambda sums: calls.append(sums) or sums)
    assert [sums.tolist() for sums in calls] == [[0.0, 0.0, 0.0]]


@pytest.fixture
def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_tensors_give_ordinary_numbers(mesh):
    """On two processes: see tests/distributed."""
    gradients, reference = conflict(12)
    placements = {"weight": Shard(0), "bias": Shard(0), "scale": Replicate()}
    sharded, its_reference = (
        {name: distribute_tensor(tensor.clone(), mesh, [placements[name]]) for name, tensor in side.items()}
        for side in (gradients, reference)
    )
    found, expected = project_(sharded, its_reference), project_(gradients, reference)
    assert found == expected
    assert found.projected
    for name, tensor in gradients.items():
        torch.testing.assert_close(sharded[name].full_tensor(), tensor, rtol=0, atol=0)
