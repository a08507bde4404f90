"""Synaptic Intelligence against the loss drop and a reference written from Zenke, Poole & Ganguli (2017)."""

import math
import random

import pytest
import torch
from torch.nn import functional as F

from lightning_cl.functional import (
    add_penalty_gradient_,
    path_importance,
    path_integral_step_,
    quadratic_penalty,
    relative_damping,
)


def test_the_path_integral_of_small_full_batch_steps_is_the_drop_of_the_loss():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    y = torch.randint(3, (32,), generator=generator)
    theta = {"w1": torch.randn(4, 6, generator=generator), "w2": torch.randn(6, 3, generator=generator)}
    omega = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}

    def loss():
        return F.cross_entropy(torch.tanh(x @ theta["w1"]) @ theta["w2"], y)

    first = loss().item()
    for _ in range(400):
        for tensor in theta.values():
            tensor.requires_grad_()
        gradients = torch.autograd.grad(loss(), list(theta.values()))
        for (name, tensor), gradient in zip(theta.items(), gradients, strict=True):
            old = tensor.detach()
            theta[name] = old - 0.01 * gradient
            path_integral_step_(omega[name], gradient, theta[name] - old)
    drop = first - loss().item()
    assert drop > 0.3
    assert sum(tensor.sum().item() for tensor in omega.values()) == pytest.approx(drop, rel=0.01)


class ReferenceSI:
    """Plain SGD with SI on a list of floats: eqs. 3 to 5 of the paper, the authors' clamp at zero included."""

    def __init__(self, theta, c, damping):
        self.theta, self.c, self.damping = list(theta), c, damping
        self.importance = [0.0] * len(theta)
        self.anchor = list(theta)
        self.omega = [0.0] * len(theta)

    def step(self, task_gradient, rate, noise):
        for k, g in enumerate(task_gradient(self.theta)):
            surrogate = 2 * self.c * self.importance[k] * (self.theta[k] - self.anchor[k])
            delta = -rate * (g + surrogate) + noise[k]
            self.omega[k] -= g * delta
            self.theta[k] += delta

    def penalty(self):
        return self.c * sum(i * (a - t) ** 2 for i, a, t in zip(self.importance, self.anchor, self.theta, strict=True))

    def end_task(self):
        for k, omega in enumerate(self.omega):
            displacement = self.theta[k] - self.anchor[k]
            self.importance[k] += max(omega, 0.0) / (displacement**2 + self.damping)
        self.anchor = list(self.theta)
        self.omega = [0.0] * len(self.omega)


def test_lockstep_with_the_reference_over_two_tasks():
    draw = random.Random(1)
    size, c, damping, rate = 6, 0.3, 0.5, 0.02
    start = [draw.gauss(0, 1) for _ in range(size)]
    reference = ReferenceSI(start, c, damping)
    theta = torch.tensor(start, dtype=torch.float64)
    anchor, importance = theta.clone(), torch.zeros(size, dtype=torch.float64)
    clamped = 0
    for _ in range(2):
        target = [draw.gauss(0, 1) for _ in range(size)]
        omega = torch.zeros(size)

        def task_gradient(values, target=target):
            return [(v - t) + math.sin(v - t) for v, t in zip(values, target, strict=True)]

        for _ in range(10):
            noise = [draw.gauss(0, 0.2) for _ in range(size)]
            gradient = torch.tensor(task_gradient(theta.tolist()), dtype=torch.float64)
            theta.grad = gradient.clone()
            add_penalty_gradient_({"w": theta}, {"w": anchor}, {"w": importance}, 2 * c)
            step = -rate * theta.grad + torch.tensor(noise, dtype=torch.float64)
            theta = theta + step
            path_integral_step_(omega, gradient.float(), step.float())
            reference.step(task_gradient, rate, noise)
            assert omega.tolist() == pytest.approx(reference.omega, rel=1e-4, abs=1e-6)
            assert theta.tolist() == pytest.approx(reference.theta, rel=1e-4, abs=1e-6)
            # The paper's surrogate loss has c and no ½, so its c is half of this library's strength.
            value = quadratic_penalty({"w": theta}, {"w": anchor}, {"w": importance}, 2 * c).item()
            assert value == pytest.approx(reference.penalty(), rel=1e-4, abs=1e-9)
        clamped += sum(value < 0 for value in reference.omega)
        importance = importance + path_importance({"w": omega}, {"w": theta - anchor}, damping)["w"]
        anchor = theta.clone()
        reference.end_task()
        assert importance.tolist() == pytest.approx(reference.importance, rel=1e-4, abs=1e-6)
    assert clamped > 0  # otherwise the clamp would not be part of the comparison


def test_a_step_downhill_adds_and_a_step_uphill_takes_away():
    omega = torch.tensor([1.0, 1.0])
    path_integral_step_(omega, torch.tensor([2.0, 2.0]), torch.tensor([-0.25, 0.25]))
    assert omega.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["gradient", "step"])
def test_a_step_that_is_not_finite_adds_nothing(bad, where):
    # A bad gradient with a zero step is what a gradient scaler leaves behind when it skips: inf · 0 is NaN.
    omega = torch.tensor([1.0, 2.0])
    gradient = torch.tensor([bad, bad]) if where == "gradient" else torch.tensor([1.0, 0.0])
    step = torch.tensor([0.0, 1.0]) if where == "gradient" else torch.tensor([bad, bad])
    path_integral_step_(omega, gradient, step)
    assert omega.tolist() == [1.0, 2.0]


def test_a_product_that_overflows_adds_nothing():
    omega = torch.tensor([1.0])
    path_integral_step_(omega, torch.tensor([1e30]), torch.tensor([1e30]))
    assert omega.tolist() == [1.0]


def test_the_sum_goes_on_after_a_step_that_was_not_finite():
    omega = torch.zeros(1)
    path_integral_step_(omega, torch.tensor([float("nan")]), torch.tensor([1.0]))
    path_integral_step_(omega, torch.tensor([2.0]), torch.tensor([-3.0]))
    assert omega.tolist() == [6.0]


def test_tiny_steps_of_bf16_gradients_are_summed_in_fp32():
    # Each contribution is 2^-10 of the sum: bf16 would drop all of them.
    omega = torch.ones(1)
    for _ in range(1024):
        path_integral_step_(omega, torch.tensor([0.5], dtype=torch.bfloat16), torch.tensor([-(2.0**-9)]))
    assert omega.item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "gradient", "step"),
    [(torch.bfloat16, 1.0078125, -1.0078125), (torch.float16, 2.0**-13, -(2.0**-13))],
    ids=["bf16 rounds the product", "fp16 loses the product"],
)
def test_the_product_of_half_precision_tensors_is_taken_in_fp32(dtype, gradient, step):
    omega = torch.zeros(1)
    path_integral_step_(omega, torch.tensor([gradient], dtype=dtype), torch.tensor([step], dtype=dtype))
    assert omega.item() == pytest.approx(-gradient * step, rel=1e-5)


# importance


def test_importance_is_omega_over_squared_displacement_plus_damping():
    importance = path_importance({"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([0.5, -2.0])}, 0.25)
    assert importance["w"].tolist() == pytest.approx([3.0 / 0.5, 1.0 / 4.25])


def test_negative_path_integrals_become_zero():
    importance = path_importance({"w": torch.tensor([-1.0, 2.0])}, {"w": torch.tensor([1.0, 1.0])}, 1.0)
    assert importance["w"].tolist() == [0.0, 1.0]


def test_damping_far_above_the_displacement_leaves_the_bare_path_integral():
    importance = path_importance({"w": torch.tensor([0.4])}, {"w": torch.tensor([1e-6])}, 0.1)
    assert importance["w"].item() == pytest.approx(4.0, rel=1e-5)


def test_a_bf16_displacement_is_squared_in_fp32():
    displacement = torch.tensor([1.0078125], dtype=torch.bfloat16)  # its square has more bits than bf16
    importance = path_importance({"w": torch.tensor([1.0])}, {"w": displacement}, 1e-3)["w"]
    assert importance.dtype == torch.float32
    assert importance.item() == pytest.approx(1 / (1.0078125**2 + 1e-3), rel=1e-6)


def test_importance_leaves_omega_and_displacement_alone():
    omega, displacement = torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 3.0])
    path_importance({"w": omega}, {"w": displacement}, 0.1)
    assert (omega.tolist(), displacement.tolist()) == ([-1.0, 2.0], [0.5, 3.0])


def ranks(values):
    return values.argsort().argsort().double()


def rank_correlation(a, b):
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].item()


def path(scale):
    """Path integrals and displacements of a training at some learning rate: both go with it."""
    generator = torch.Generator().manual_seed(0)
    omega = torch.rand(1000, generator=generator).double() * scale
    moved = torch.randn(1000, generator=generator).double().exp() * scale
    return {"a": omega[:300], "b": omega[300:]}, {"a": moved[:300], "b": moved[300:]}


def test_the_relative_damping_is_the_mean_over_all_weights():
    _, moved = path(1.0)
    expected = torch.cat(list(moved.values())).square().mean().item()
    assert relative_damping(m.square() for m in moved.values()) == pytest.approx(expected, rel=1e-6)
    assert relative_damping([]) == 0.0


def test_equation_5_does_the_same_at_every_learning_rate():
    found = {}
    for scale in (1.0, 1e-4):
        omega, moved = path(scale)
        damping = relative_damping(m.square() for m in moved.values())
        importance = torch.cat(list(path_importance(omega, moved, damping).values())).double()
        found[scale] = importance / importance.mean()
        bare = torch.cat(list(omega.values()))
        assert rank_correlation(importance, bare) < 0.9
        constant = torch.cat(list(path_importance(omega, moved, 0.1).values())).double()
        if scale < 1:  # the paper's constant switches the division off at the learning rates of fine-tuning
            assert rank_correlation(constant, bare) > 0.9999
    torch.testing.assert_close(found[1.0], found[1e-4], rtol=1e-4, atol=0)


def test_a_task_that_moved_nothing_has_no_importance():
    zeros = {"a": torch.zeros(3)}
    assert path_importance(zeros, zeros, relative_damping(z for z in zeros.values()))["a"].tolist() == [0.0, 0.0, 0.0]
