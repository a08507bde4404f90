"""The KL divergence against a sum by hand, autograd in one piece, and the memory that chunks may take."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cl.functional import kl_divergence


def logits(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2), whatever is added to all classes of a position.
    teacher = torch.tensor([[math.log(3.0), 0.0]]) + 5
    by_hand = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(kl_divergence(teacher, torch.zeros(1, 2))) == pytest.approx(by_hand)


def test_the_teacher_comes_first():
    a, b = logits(4, 7), logits(4, 7, seed=1)
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    expected = (p * (p.log() - q.log())).sum()
    assert float(kl_divergence(a, b, "sum")) == pytest.approx(float(expected), rel=1e-6)
    assert float(kl_divergence(b, a, "sum")) != pytest.approx(float(expected), rel=1e-2)


def test_mean_is_over_all_positions():
    a, b = logits(2, 3, 5), logits(2, 3, 5, seed=1)
    assert float(kl_divergence(a, b)) == pytest.approx(float(kl_divergence(a, b, "sum")) / 6)


def test_equal_models_have_no_divergence_at_all():
    assert float(kl_divergence(logits(9, 50), logits(9, 50))) == 0.0


def test_gradient_is_the_difference_of_the_probabilities():
    teacher, student = logits(6, 11), logits(6, 11, seed=1).requires_grad_()
    kl_divergence(teacher, student, "sum").backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))


def test_nothing_flows_to_the_teacher():
    teacher, student = logits(2, 3).requires_grad_(), logits(2, 3, seed=1).requires_grad_()
    kl_divergence(teacher, student).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_chunks_change_neither_value_nor_gradient(rows):
    teacher = logits(10, 13)
    whole, parts = (logits(10, 13, seed=1).requires_grad_() for _ in range(2))
    one, other = kl_divergence(teacher, whole), kl_divergence(teacher, parts, chunk_bytes=rows * 13 * 4)
    torch.testing.assert_close(one, other)
    one.backward()
    other.backward()
    torch.testing.assert_close(whole.grad, parts.grad)


class Largest(TorchDispatchMode):
    """The largest fp32 tensor that an operation has made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("rows", [4, 40])
def test_fp32_logits_exist_for_one_chunk_at_a_time(rows):
    teacher, student = (logits(40, 64, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    student.requires_grad_()
    with Largest() as largest:
        kl_divergence(teacher, student, chunk_bytes=rows * 64 * 4).backward()
    assert largest.numel == rows * 64
    assert student.grad.dtype == torch.bfloat16


def test_sixteen_bit_logits_are_compared_in_fp32():
    teacher, student = (logits(40, 500, seed=seed, dtype=torch.bfloat16) for seed in range(2))
    expected = float(kl_divergence(teacher.float(), student.float()))
    assert float(kl_divergence(teacher, student)) == expected


def test_a_class_that_is_ruled_out_on_both_sides_adds_nothing():
    teacher, student = logits(3, 5), logits(3, 5, seed=1)
    expected = kl_divergence(teacher[:, 1:], student[:, 1:])
    teacher[:, 0] = student[:, 0] = -torch.inf
    student.requires_grad_()
    value = kl_divergence(teacher, student)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert student.grad.isfinite().all()


def test_a_class_that_the_student_alone_rules_out_is_infinitely_far():
    assert float(kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, -torch.inf]]))) == math.inf


def test_no_positions_are_zero_and_not_nan():
    student = torch.zeros(0, 5, requires_grad=True)
    assert float(kl_divergence(torch.zeros(0, 5), student).detach()) == 0.0


def test_other_shapes_and_reductions_are_named():
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[3, 3\]"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"reduction='batchmean'.*'mean' or 'sum'"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3), "batchmean")
