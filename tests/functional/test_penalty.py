"""Quadratic penalty against hand formulas, autograd, finite differences and numeric optimisers."""

import itertools

import pytest
import torch

from lightning_cl.functional import (
    add_penalty_gradient_,
    merge_quadratics,
    normalize_importance,
    proximal_step_,
    quadratic_penalty,
)

SHAPES = {"weight": (3, 4), "bias": (5,)}


def rng(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, dtype=torch.float64):
    generator = rng(seed)
    return {name: torch.randn(*shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def positive(seed, dtype=torch.float64):
    generator = rng(seed)
    return {name: torch.rand(*shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def quadratic(theta, anchor, importance):
    """The reference: ½ Σ F (θ − a)² in float64."""
    return sum(
        0.5 * (importance[name].double() * (theta[name].double() - anchor[name].double()).square()).sum().item()
        for name in importance
    )


# value and gradient


def test_value_has_the_half():
    theta, anchor = {"w": torch.tensor([1.0, 4.0])}, {"w": torch.tensor([3.0, 1.0])}
    importance = {"w": torch.tensor([0.5, 2.0])}
    # 3/2 · (0.5 · 4 + 2 · 9)
    assert quadratic_penalty(theta, anchor, importance, 3.0).item() == pytest.approx(30.0)


def test_value_sums_over_all_parameters():
    theta, anchor, importance = normal(0), normal(1), positive(2)
    value = quadratic_penalty(theta, anchor, importance, 1.7).item()
    assert value == pytest.approx(1.7 * quadratic(theta, anchor, importance), rel=1e-6)


def test_closed_form_gradient_equals_autograd():
    theta, anchor, importance = normal(0), normal(1), positive(2)
    for parameter in theta.values():
        parameter.requires_grad_()
    expected = torch.autograd.grad(quadratic_penalty(theta, anchor, importance, 1.7), list(theta.values()))
    for parameter in theta.values():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient_(theta, anchor, importance, 1.7)
    for parameter, gradient in zip(theta.values(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-8)


def test_closed_form_gradient_equals_finite_differences():
    theta, anchor, importance, step = normal(3), normal(4), positive(5), 1e-3
    for parameter in theta.values():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient_(theta, anchor, importance, 2.3)
    for name, parameter in theta.items():
        for i in range(parameter.numel()):
            up, down = clones(theta), clones(theta)
            up[name].view(-1)[i] += step
            down[name].view(-1)[i] -= step
            # Central differences are exact for a quadratic, up to rounding.
            slope = 2.3 * (quadratic(up, anchor, importance) - quadratic(down, anchor, importance)) / (2 * step)
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_scale_multiplies_the_penalty_but_not_the_gradient_that_is_there():
    theta, anchor, importance = normal(6), normal(7), positive(8)
    for parameter in theta.values():
        parameter.grad = torch.ones_like(parameter)
    add_penalty_gradient_(theta, anchor, importance, 0.5, scale=1024.0)
    for name, parameter in theta.items():
        expected = 1 + 1024.0 * 0.5 * importance[name] * (parameter - anchor[name])
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)


def test_parameter_without_grad_is_skipped():
    theta, anchor, importance = normal(9), normal(10), positive(11)
    theta["weight"].grad = torch.zeros_like(theta["weight"])
    add_penalty_gradient_(theta, anchor, importance, 1.0)
    assert theta["bias"].grad is None
    assert theta["weight"].grad.abs().sum() > 0


def test_parameter_without_anchor_is_not_penalised():
    theta, anchor, importance = normal(12), normal(13), positive(14)
    del anchor["bias"], importance["bias"]
    value = quadratic_penalty(theta, anchor, importance, 1.0).item()
    assert value == pytest.approx(quadratic(theta, anchor, importance), rel=1e-6)
    before = clones(theta)
    for parameter in theta.values():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient_(theta, anchor, importance, 1.0)
    proximal_step_(theta, anchor, importance, 1.0, 0.1)
    assert torch.equal(theta["bias"].grad, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(theta["bias"], before["bias"])


def test_gradient_step_leaves_anchor_and_importance_alone():
    theta, anchor, importance = normal(15), normal(16), positive(17)
    anchor_before, importance_before = clones(anchor), clones(importance)
    for parameter in theta.values():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient_(theta, anchor, importance, 3.0)
    proximal_step_(theta, anchor, importance, 3.0, 0.1)
    torch.testing.assert_close(anchor, anchor_before, rtol=0, atol=0)
    torch.testing.assert_close(importance, importance_before, rtol=0, atol=0)


# bf16 parameters, fp32 importance and anchor


def bf16_case():
    # The displacement is below the resolution of bf16 (2^-8 relative): it is lost where the anchor is rounded.
    theta = {"w": (1 + torch.rand(200, generator=rng(20))).bfloat16()}
    anchor = {"w": theta["w"].float() + 1e-3 * torch.randn(200, generator=rng(21))}
    return theta, anchor, {"w": torch.rand(200, generator=rng(22))}


def test_bf16_value_is_the_fp32_value():
    theta, anchor, importance = bf16_case()
    value = quadratic_penalty(theta, anchor, importance, 2.0).item()
    assert value == pytest.approx(2.0 * quadratic(theta, anchor, importance), rel=1e-5)


def test_bf16_gradient_is_the_fp32_gradient_rounded():
    theta, anchor, importance = bf16_case()
    theta["w"].grad = torch.zeros_like(theta["w"])
    add_penalty_gradient_(theta, anchor, importance, 2.0)
    expected = 2.0 * importance["w"] * (theta["w"].float() - anchor["w"])
    torch.testing.assert_close(theta["w"].grad.float(), expected, rtol=2.0**-7, atol=1e-7)


def test_bf16_proximal_step_is_near_the_fp32_step():
    theta, anchor, importance = bf16_case()
    anchor["w"] += 0.5
    start = theta["w"].float()
    proximal_step_(theta, anchor, importance, 50.0, 0.1)
    expected = anchor["w"] + (start - anchor["w"]) / (1 + 5.0 * importance["w"])
    assert theta["w"].dtype == torch.bfloat16
    torch.testing.assert_close(theta["w"].float(), expected, rtol=2.0**-7, atol=0)


def test_bf16_proximal_step_rounds_only_the_result():
    # A move that is rounded before it is taken is off by a part of the distance, however small the result is.
    theta, anchor = torch.tensor([100.0], dtype=torch.bfloat16), torch.tensor([2.0**-10])
    proximal_step_({"w": theta}, {"w": anchor}, {"w": torch.ones(1)}, 1e12, 0.1)
    assert theta.item() == pytest.approx(2.0**-10, rel=0.01)


# proximal step


def ternary_search(function, low, high):
    for _ in range(200):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if function(left) < function(right):
            high = right
        else:
            low = left
    return (low + high) / 2


@pytest.mark.parametrize("strength", [1e-3, 0.5, 10.0, 1e4])
def test_proximal_step_is_the_numeric_minimiser(strength):
    theta, anchor, importance, rate = 1.3, -0.4, 0.8, 0.05
    found = ternary_search(
        lambda x: strength / 2 * importance * (x - anchor) ** 2 + (x - theta) ** 2 / (2 * rate), -2.0, 2.0
    )
    parameter = torch.tensor([theta], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    proximal_step_({"w": parameter}, {"w": anchor * one}, {"w": importance * one}, strength, rate)
    assert parameter.item() == pytest.approx(found, abs=1e-6)


def test_proximal_step_comes_ever_closer_to_the_anchor_over_twenty_decades():
    start, anchor = torch.randn(100, generator=rng(30)), torch.randn(100, generator=rng(31))
    importance = 0.1 + torch.rand(100, generator=rng(32))
    distances = []
    for exponent in range(-10, 11):
        theta = start.clone()
        proximal_step_({"w": theta}, {"w": anchor}, {"w": importance}, 10.0**exponent, 0.1)
        assert torch.isfinite(theta).all()
        distances.append((theta - anchor).abs())
    # A unit in the last place of the values is all that rounding may take from the order.
    assert all((after <= before + 1e-6).all() for before, after in itertools.pairwise(distances))
    torch.testing.assert_close(distances[0], (start - anchor).abs())
    assert distances[-1].max() < 1e-5
    assert distances[10].mean() < 0.99 * distances[0].mean()


@pytest.mark.parametrize("strength", [1e30, 1e39, 1e300])
def test_proximal_step_survives_strengths_beyond_fp32(strength):
    theta, anchor = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 0.5])
    proximal_step_({"w": theta}, {"w": anchor}, {"w": torch.tensor([0.0, 1.0, 1e20])}, strength, 0.1)
    assert theta.tolist() == pytest.approx([1.0, 0.5, 0.5])


# nothing asked for, nothing changed


def awkward_pair():
    # Of very different sizes, so that anchor + (θ − anchor) is not θ in floating point.
    theta, anchor = torch.randn(100, generator=rng(40)), 1000 * torch.randn(100, generator=rng(41))
    assert not torch.equal(anchor + (theta - anchor), theta)
    return theta, anchor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("strength", "importance"), [(0.0, 1.0), (5.0, 0.0)], ids=["strength 0", "importance 0"])
def test_proximal_step_is_bit_identical(dtype, strength, importance):
    theta, anchor = awkward_pair()
    theta = theta.to(dtype)
    before = theta.clone()
    proximal_step_({"w": theta}, {"w": anchor}, {"w": torch.full_like(anchor, importance)}, strength, 0.1)
    assert torch.equal(theta, before)


@pytest.mark.parametrize(("strength", "importance"), [(0.0, 1.0), (5.0, 0.0)], ids=["strength 0", "importance 0"])
def test_gradient_is_bit_identical(strength, importance):
    theta, anchor = awkward_pair()
    theta.grad = torch.randn(100, generator=rng(42))
    before = theta.grad.clone()
    add_penalty_gradient_({"w": theta}, {"w": anchor}, {"w": torch.full_like(anchor, importance)}, strength)
    assert torch.equal(theta.grad, before)


def test_only_the_weights_of_importance_zero_stay():
    theta, anchor = awkward_pair()
    before, importance = theta.clone(), torch.ones(100)
    importance[::2] = 0
    proximal_step_({"w": theta}, {"w": anchor}, {"w": importance}, 1.0, 0.1)
    assert torch.equal(theta[::2], before[::2])
    assert (theta[1::2] != before[1::2]).all()


# the optimum of two tasks


def two_task_optimum():
    a_hessian, b_hessian = (0.1 + torch.rand(6, generator=rng(s), dtype=torch.float64) for s in (50, 51))
    a, b = (torch.randn(6, generator=rng(s), dtype=torch.float64) for s in (52, 53))
    return a_hessian, a, b_hessian, b, (a_hessian * a + b_hessian * b) / (a_hessian + b_hessian)


def test_gradient_descent_with_the_penalty_finds_the_joint_optimum():
    a_hessian, a, b_hessian, b, optimum = two_task_optimum()
    theta = torch.zeros(6, dtype=torch.float64)
    for _ in range(500):
        theta.grad = b_hessian * (theta - b)
        add_penalty_gradient_({"w": theta}, {"w": a}, {"w": a_hessian}, 1.0)
        theta -= 0.5 * theta.grad
    torch.testing.assert_close(theta, optimum, rtol=1e-6, atol=1e-7)


def test_proximal_gradient_descent_finds_the_joint_optimum():
    a_hessian, a, b_hessian, b, optimum = two_task_optimum()
    theta = torch.zeros(6, dtype=torch.float64)
    for _ in range(500):
        theta -= 0.5 * b_hessian * (theta - b)
        proximal_step_({"w": theta}, {"w": a}, {"w": a_hessian}, 1.0, 0.5)
    torch.testing.assert_close(theta, optimum, rtol=1e-6, atol=1e-7)


def test_gradient_of_the_penalised_loss_vanishes_at_the_joint_optimum():
    a_hessian, a, b_hessian, b, optimum = two_task_optimum()
    theta = optimum.clone().requires_grad_()
    loss = 0.5 * (b_hessian * (theta - b).square()).sum()
    loss = loss + quadratic_penalty({"w": theta}, {"w": a}, {"w": a_hessian}, 1.0)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() < 1e-6


# merging


@pytest.mark.parametrize("tasks", [2, 5])
def test_merged_quadratics_equal_their_sum_everywhere(tasks):
    parts = [(positive(60 + t), normal(70 + t)) for t in range(tasks)]
    (importance, anchor), constant = parts[0], 0.0
    for new_importance, new_anchor in parts[1:]:
        importance, anchor, c = merge_quadratics(importance, anchor, new_importance, new_anchor)
        constant += c
    for seed in range(80, 85):
        theta = normal(seed)
        expected = sum(quadratic(theta, a, f) for f, a in parts)
        assert quadratic(theta, anchor, importance) + constant == pytest.approx(expected, rel=1e-5)


def test_the_merged_anchor_is_the_new_one_where_both_importances_are_zero():
    a, b = {"w": torch.tensor([1.0, 1.0, 1.0])}, {"w": torch.tensor([5.0, 5.0, 5.0])}
    f_a, f_b = {"w": torch.tensor([0.0, 2.0, 0.0])}, {"w": torch.tensor([0.0, 0.0, 3.0])}
    importance, anchor, constant = merge_quadratics(f_a, a, f_b, b)
    assert importance["w"].tolist() == [0.0, 2.0, 3.0]
    assert anchor["w"].tolist() == [5.0, 1.0, 5.0]
    assert constant == 0.0


@pytest.mark.parametrize("missing_in_first", [True, False], ids=["first", "second"])
def test_a_parameter_that_is_missing_on_one_side_counts_as_importance_zero(missing_in_first):
    f_a, a, f_b, b = positive(90), normal(91), positive(92), normal(93)
    (missing_f, missing), (kept_f, kept) = ((f_a, a), (f_b, b)) if missing_in_first else ((f_b, b), (f_a, a))
    del missing_f["bias"], missing["bias"]
    importance, anchor, constant = merge_quadratics(f_a, a, f_b, b)
    assert torch.equal(importance["bias"], kept_f["bias"])
    assert torch.equal(anchor["bias"], kept["bias"])
    theta = normal(94)
    expected = quadratic(theta, a, f_a) + quadratic(theta, b, f_b)
    assert quadratic(theta, anchor, importance) + constant == pytest.approx(expected, rel=1e-5)


def test_merging_leaves_its_inputs_alone():
    inputs = [positive(95), normal(96), positive(97), normal(98)]
    before = [clones(tensors) for tensors in inputs]
    merge_quadratics(*inputs)
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)


def test_the_merged_anchor_does_not_follow_the_live_weights():
    # The new anchor is often a view of the parameters; an alias would make the penalty zero for ever.
    live = normal(99)
    _, anchor, _ = merge_quadratics({}, {}, positive(100), live)
    before = clones(anchor)
    for tensor in live.values():
        tensor += 1
    torch.testing.assert_close(anchor, before, rtol=0, atol=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_merging_tiny_or_huge_importances_keeps_the_weighted_mean(magnitude):
    # Per-token Fisher values of large models are tiny; their product underflows (overflows) in fp32.
    f_a, f_b = torch.tensor([1.0]) * magnitude, torch.tensor([3.0]) * magnitude
    importance, anchor, constant = merge_quadratics(
        {"w": f_a}, {"w": torch.tensor([0.0])}, {"w": f_b}, {"w": torch.tensor([4.0])}
    )
    assert importance["w"].item() == pytest.approx(4 * magnitude, rel=1e-5)
    assert anchor["w"].item() == pytest.approx(3.0, rel=1e-5)
    assert constant == pytest.approx(0.5 * 0.75 * magnitude * 16, rel=1e-5)


# normalising


def test_normalised_importance_has_global_mean_one():
    importance = {"small": torch.full((2,), 10.0), "large": torch.ones(18)}
    # The mean over all 20 entries is 38/20; the mean of the two tensors' means would be 5.5.
    assert normalize_importance(importance) == pytest.approx(1.9)
    assert torch.cat(list(importance.values())).mean().item() == pytest.approx(1.0)
    assert (importance["small"][0] / importance["large"][0]).item() == pytest.approx(10.0)


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_normalised_importance_does_not_depend_on_the_scale(factor):
    importance, scaled = positive(110, torch.float32), positive(110, torch.float32)
    for tensor in scaled.values():
        tensor *= factor
    mean = normalize_importance(importance)
    assert normalize_importance(scaled) == pytest.approx(mean * factor, rel=1e-5)
    torch.testing.assert_close(scaled, importance)


def test_nothing_to_normalise_changes_nothing():
    importance = {"w": torch.zeros(3)}
    assert normalize_importance(importance) == 0.0
    assert importance["w"].tolist() == [0.0, 0.0, 0.0]
    assert normalize_importance({}) == 0.0
