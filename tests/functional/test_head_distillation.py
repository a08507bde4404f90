"""Temperature, top-k and the divergence from hidden states, against sums by hand and autograd in one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cl.functional import kl_divergence
from lightning_cl.functional.lwf import head_kl_divergence


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(teacher, student, temperature=1.0, top_k=None):
    """Each position's divergence, in float64; with `top_k`, all but the teacher's first k are one class."""
    p, q = (z.detach().double().div(temperature).softmax(-1) for z in (teacher, student))
    if top_k is not None:
        best = p.topk(top_k, -1).indices
        p, q = (torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (p, q))
    return (p * (p.clamp(min=1e-300) / q.clamp(min=1e-300)).log()).sum(-1)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_temperature_divides_both_sides(temperature, top_k):
    teacher, student = 3 * randn(6, 11), 3 * randn(6, 11, seed=1)
    value = kl_divergence(teacher, student, "sum", temperature=temperature, top_k=top_k)
    assert float(value) == pytest.approx(by_hand(teacher, student, temperature, top_k).sum().item(), rel=1e-5)


def test_gradient_at_a_temperature_is_the_difference_of_the_probabilities_over_it():
    teacher, student = randn(6, 11), randn(6, 11, seed=1).requires_grad_()
    kl_divergence(teacher, student, "sum", temperature=3.0).backward()
    expected = ((student.detach() / 3).softmax(-1) - (teacher / 3).softmax(-1)) / 3
    torch.testing.assert_close(student.grad, expected)


def test_t_squared_times_the_divergence_keeps_its_size():
    # For a high temperature T² KL goes to half the variance of the logits' difference, whatever T is.
    teacher, student = randn(6, 11), randn(6, 11, seed=1)
    limit = (teacher - student).var(-1, correction=0).sum().item() / 2
    for temperature in (50.0, 100.0):
        value = temperature**2 * float(kl_divergence(teacher, student, "sum", temperature=temperature))
        assert value == pytest.approx(limit, rel=0.05)


def test_top_k_is_a_lower_bound_that_grows_with_k():
    teacher, student = 2 * randn(20, 11), 2 * randn(20, 11, seed=1)
    values = [float(kl_divergence(teacher, student, top_k=k)) for k in (1, 2, 4, 8, 10)]
    full = float(kl_divergence(teacher, student))
    assert values == sorted(values)
    assert values[0] < 0.8 * full
    assert values[-1] == pytest.approx(full, rel=1e-5)  # one other class is a class


@pytest.mark.parametrize("top_k", [11, 12, 1000])
def test_top_k_of_all_classes_is_the_whole_divergence(top_k):
    teacher, student = randn(6, 11), randn(6, 11, seed=1).requires_grad_()
    value = kl_divergence(teacher, student, top_k=top_k)
    assert float(value.detach()) == pytest.approx(float(kl_divergence(teacher, student.detach())), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()


def test_top_k_is_zero_where_both_agree_on_those_k():
    teacher = torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.0]])
    student = teacher.clone()
    student[0, 2:] = torch.tensor([1.0, -1.0, 0.5])
    student[0, 2:] += torch.logsumexp(teacher[0, 2:], 0) - torch.logsumexp(student[0, 2:], 0)
    student.requires_grad_()
    value = kl_divergence(teacher, student, top_k=2)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert float(kl_divergence(teacher, student.detach())) > 0.01
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().max() < 1e-6


def test_top_k_gradient_is_that_of_autograd():
    teacher, student = randn(6, 11).double(), randn(6, 11, seed=1).double().requires_grad_()
    q, p = student.softmax(-1), teacher.softmax(-1)
    best = p.topk(3, -1).indices
    p, q = (torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (p, q))
    (expected,) = torch.autograd.grad((p * (p / q).log()).sum(), student)
    leaf = student.detach().float().requires_grad_()
    kl_divergence(teacher.float(), leaf, "sum", top_k=3).backward()
    torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-6)


def test_top_k_stays_finite_where_the_teacher_is_certain():
    # All of the teacher's probability is in its first class: the others are together exactly nothing.
    teacher, student = torch.zeros(2, 50), randn(2, 50).requires_grad_()
    teacher[:, 3] = 200.0
    value = kl_divergence(teacher, student, "sum", top_k=4)
    expected = -student.detach().log_softmax(-1)[:, 3].sum()
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)
    value.backward()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"temperature": 2.0}, {"temperature": 2.0, "top_k": 3}], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_change_neither_value_nor_gradient(rows, settings):
    teacher = randn(10, 13)
    whole, parts = (randn(10, 13, seed=1).requires_grad_() for _ in range(2))
    one = kl_divergence(teacher, whole, **settings)
    other = kl_divergence(teacher, parts, chunk_bytes=rows * 13 * 4, **settings)
    one.backward()
    other.backward()
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(whole.grad, parts.grad)


# ---------------------------------------------------------------------- from hidden states


def heads(bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(5, 13, bias=bias), nn.Linear(5, 13, bias=bias)


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_from_hidden_states_it_is_the_sum_of_the_divergence_of_logits(rows, top_k):
    (teacher_head, student_head), teacher = heads(), randn(10, 5)
    settings = {"temperature": 2.0, "top_k": top_k}
    hidden = [randn(10, 5, seed=1).requires_grad_() for _ in range(2)]
    gradients = []
    whole = kl_divergence(teacher_head(teacher), student_head(hidden[0]), "sum", **settings)
    gradients.append(torch.autograd.grad(whole, [hidden[0], *student_head.parameters()]))
    parts = head_kl_divergence(
        teacher, hidden[1], teacher_head, student_head, 13, chunk_bytes=rows * 13 * 4, **settings
    )
    gradients.append(torch.autograd.grad(parts, [hidden[1], *student_head.parameters()]))
    torch.testing.assert_close(parts, whole)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [2, 100])
def test_nothing_flows_to_the_teacher(rows):
    (teacher_head, student_head), teacher = heads(), randn(10, 5).requires_grad_()
    student = randn(10, 5, seed=1).requires_grad_()
    head_kl_divergence(teacher, student, teacher_head, student_head, 13, chunk_bytes=rows * 13 * 4).backward()
    assert teacher.grad is None
    assert teacher_head.weight.grad is None
    assert student.grad.abs().sum() > 0
    assert student_head.weight.grad.abs().sum() > 0


def test_no_positions_are_zero_and_not_nan():
    teacher_head, student_head = heads()
    student = randn(0, 5).requires_grad_()
    value = head_kl_divergence(randn(0, 5), student, teacher_head, student_head, 13)
    assert float(value.detach()) == 0.0
