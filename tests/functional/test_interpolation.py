"""Interpolation between two states: its ends to the bit, the optimum on a segment, and SFA's steps."""

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_cl.functional import averaging_steps, interpolate

SHAPES = {"weight": (3, 4), "bias": (5,), "scale": ()}
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in SHAPES.items()}


def bits(tensor):
    return tensor.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()])


# the formula


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_each_tensor_is_on_the_segment(share):
    start, now = normal(0), normal(1)
    found = interpolate(start, now, share)
    assert list(found) == list(now)
    for name, tensor in found.items():
        a, b = start[name].numpy(), now[name].numpy()
        np.testing.assert_allclose(tensor.numpy(), (1 - share) * a + share * b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("share", [0, 1])
def test_the_ends_are_the_inputs_bit_for_bit(share, dtype):
    """Also where arithmetic would lose a bit: −0, infinities, and numbers far apart."""
    start = torch.tensor([-0.0, 0.0, math.inf, 1e4, 1e-7, -math.inf, 3.0], dtype=dtype)
    now = torch.tensor([0.0, -0.0, 1.0, 1e-7, 1e4, math.inf, math.nan], dtype=dtype)
    found = interpolate(start, now, share)
    assert torch.equal(bits(found), bits((start, now)[share]))


def test_the_result_is_new():
    """Else the next optimizer step would change what was kept."""
    start, now = normal(2), normal(3)
    for share in (0.0, 0.5, 1.0):
        for name, tensor in interpolate(start, now, share).items():
            assert tensor.data_ptr() not in (start[name].data_ptr(), now[name].data_ptr())


def test_no_graph_is_built():
    now = torch.ones(2, requires_grad=True)
    assert not any(interpolate(torch.zeros(2), now, share).requires_grad for share in (0.0, 0.5, 1.0))


def test_names_decide_and_not_their_order():
    start, now = normal(4), normal(5)
    turned = dict(reversed(start.items()))
    torch.testing.assert_close(interpolate(turned, now, 0.3), interpolate(start, now, 0.3), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_best_share_of_a_quadratic_has_a_closed_form(share):
    """On the segment ½(θ − c)ᵀH(θ − c) is least at −(a − c)ᵀH(b − a) / (b − a)ᵀH(b − a)."""
    generator = torch.Generator().manual_seed(6)
    a, b = (torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2))
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    c = a + share * (b - a)  # the optimum lies on the segment, moved along what H does not couple to it
    step = hessian @ (b - a)
    off = torch.randn(4, generator=generator, dtype=torch.float64)
    c = c + off - (off @ step) / ((b - a) @ step) * (b - a)
    best = -((a - c) @ step / ((b - a) @ step))
    assert best == pytest.approx(share)
    losses = {s: (interpolate(a, b, s) - c) @ hessian @ (interpolate(a, b, s) - c) for s in np.linspace(0, 1, 11)}
    assert min(losses, key=losses.get) == pytest.approx(share)


# precision


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_sixteen_bits_are_rounded_once(dtype, digits):
    start, now = normal(7, dtype), normal(8, dtype)
    for name, tensor in interpolate(start, now, 0.3).items():
        exact = 0.7 * start[name].double() + 0.3 * now[name].double()
        assert tensor.dtype == dtype
        assert ((tensor.double() - exact).abs() <= digits * exact.abs() + 1e-7).all()


def test_a_start_in_fp32_for_weights_in_sixteen_bits():
    start, now = torch.tensor([1.0 + 2**-12]), torch.tensor([1.0], dtype=torch.bfloat16)
    assert interpolate(start, now, 0.5).dtype == torch.bfloat16
    # 1 + 2⁻¹² + ½ · (1.0078125 − …) is above the middle between two neighbours in bf16; the rounded start is not.
    now = torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert interpolate(start, now, 0.5).item() == 1.0078125


# SFA


@pytest.mark.parametrize(
    ("steps", "period", "expected"),
    [
        (100, 0.25, (25, 50, 75, 100)),
        (130, 0.25, (33, 65, 98, 130)),
        (100, 0.3, (30, 60, 90, 100)),
        (10, 0.1, tuple(range(1, 11))),
        (7, 0.01, tuple(range(1, 8))),
        (7, 1.0, (7,)),
        (1, 0.5, (1,)),
        (3, 0.5, (2, 3)),
    ],
)
def test_the_steps_of_averaging(steps, period, expected):
    assert averaging_steps(steps, period) == expected


def test_the_steps_of_averaging_are_in_the_task_and_evenly_spread():
    for steps, period in itertools.product(range(1, 60), (0.05, 0.1, 1 / 3, 0.4, 0.7, 1.0)):
        found = averaging_steps(steps, period)
        assert found[0] >= 1
        assert found[-1] == steps
        gaps = np.diff((0, *found))
        assert (gaps[:-1] >= math.floor(max(1, period * steps))).all()
        assert (gaps <= math.ceil(max(1, period * steps))).all()


def test_averaging_with_a_period_of_one_is_wise_ft():
    """The same loop, once with SFA's steps and once with one interpolation at the end."""

    def trained(beta, period):
        start = theta = torch.tensor([1.0, -2.0], dtype=torch.float64)
        for step in range(1, 21):
            theta = theta - 0.1 * (theta - torch.tensor([5.0, 3.0], dtype=torch.float64))
            if step in averaging_steps(20, period):
                theta = interpolate(start, theta, 1 - beta)
        return theta

    goal, start = torch.tensor([5.0, 3.0]).double(), torch.tensor([1.0, -2.0]).double()
    end = goal + 0.9**20 * (start - goal)
    torch.testing.assert_close(trained(0.25, 1.0), start + 0.75 * (end - start))
    # With a period of ½ the second half starts from the first average.
    half = start + 0.75 * (goal + 0.9**10 * (start - goal) - start)
    torch.testing.assert_close(trained(0.25, 0.5), start + 0.75 * (goal + 0.9**10 * (half - goal) - start))


# refusals


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share: .*expected a number from 0 to 1"):
        interpolate(torch.zeros(2), torch.zeros(2), share)


def test_what_does_not_fit_is_refused():
    two, three = {"w": torch.zeros(2)}, {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"start\[w\]: shape \[2\], expected \[3\] as in `now`"):
        interpolate(two, three, 0.5)
    with pytest.raises(ValueError, match=r"now: no tensor 'v', expected the same names"):
        interpolate(two | {"v": torch.zeros(1)}, two, 0.5)
    with pytest.raises(ValueError, match=r"start: no tensor 'v'"):
        interpolate(two, two | {"v": torch.zeros(1)}, 0.5)
    with pytest.raises(ValueError, match="Tensor and dict, expected two tensors or two mappings"):
        interpolate(torch.zeros(2), two, 0.5)
    with pytest.raises(ValueError, match=r"type torch\.int64, expected floating-point numbers"):
        interpolate(torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0.5)


def test_impossible_averaging_is_refused():
    with pytest.raises(ValueError, match="steps: 0, expected at least 1"):
        averaging_steps(0, 0.5)
    for period in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"period: .*above 0 and up to 1"):
            averaging_steps(10, period)
