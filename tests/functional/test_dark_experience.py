"""Stored logits against sums by hand, finite differences and autograd in one piece; what fp16 and chunks may cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cl.functional.derpp import (
    UNKNOWN,
    dark_loss,
    head_dark_loss,
    head_top_logits,
    top_logits,
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(logits, values, indices):
    """Each position's loss, one number after the other, in Python's own floats."""
    losses = []
    for z, kept, places in zip(logits.tolist(), values.tolist(), indices.tolist(), strict=True):
        student = [z[place] for place in places]
        if len(kept) > len(places):
            student.append(math.log(sum(math.exp(value) for place, value in enumerate(z) if place not in places)))
        pairs = [(z, v) for z, v in zip(student, kept, strict=True) if v != float("-inf")]
        z_mean, v_mean = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
        losses.append(sum(((z - z_mean) - (v - v_mean)) ** 2 for z, v in pairs) / len(pairs))
    return losses


# ---------------------------------------------------------------------- what is stored


def test_two_classes_by_hand():
    # d = (1, 0): half a unit from its mean on either side, whatever is added to all logits of one side.
    logits, values = torch.tensor([[4.0, 3.0]]), torch.tensor([[7.0, 7.0]])
    assert float(dark_loss(logits, values, torch.tensor([[0, 1]]))) == 0.25
    assert float(dark_loss(logits, values, torch.tensor([[1, 0]]))) == 0.25


def with_all_others(logits, indices):
    """The logits of those classes, and last the log of the sum of the exponentials of all others, in double precision.

    With their indices given in the order of the logits' size.
    """
    ordered = logits.double().sort(-1, descending=True).values
    others = ordered[..., indices.shape[-1] :].exp().sum(-1, keepdim=True).log()
    return torch.cat([logits.double().gather(-1, indices.long()), others], -1)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_largest_are_kept_mean_centred_with_their_classes_and_all_others_as_one(k):
    logits = 5 * randn(2, 4, 11)
    values, indices = top_logits(logits, k)
    assert values.shape == (2, 4, k + 1)
    assert indices.shape == (2, 4, k)
    expected = logits.sort(-1, descending=True)
    assert torch.equal(indices.long().sort(-1).values, expected.indices[..., :k].sort(-1).values)
    chosen = with_all_others(logits, indices)
    exact = chosen - chosen.mean(-1, keepdim=True)
    torch.testing.assert_close(values.double(), exact, rtol=2**-11 + 1e-6, atol=1e-6)


def test_probabilities_of_the_stored_classes_come_back_from_what_is_stored():
    logits = 3 * randn(5, 300) + 40
    values, indices = top_logits(logits, 7)
    p = logits.softmax(-1).gather(-1, indices.long())
    torch.testing.assert_close(values.float().softmax(-1)[:, :-1], p, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("k", [11, 12, 1000])
def test_with_as_many_as_there_are_all_are_kept_in_their_order(k):
    values, indices = top_logits(randn(3, 11), k)
    assert indices.tolist() == [list(range(11))] * 3
    assert values.shape == (3, 11)


@pytest.mark.parametrize(("classes", "bytes_of_an_index"), [(65_535, 2), (65_536, 2), (65_537, 4)])
def test_indices_are_as_narrow_as_the_vocabulary_allows(classes, bytes_of_an_index):
    logits = torch.zeros(2, classes)
    logits[0, -1], logits[1, 0] = 1.0, 1.0
    values, indices = top_logits(logits, 64)
    assert indices.element_size() == bytes_of_an_index
    assert values.element_size() == 2
    assert int(indices[0].long().max()) == classes - 1
    assert indices[1, values[1, :-1].argmax()].long() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_stored_is_exact_but_for_the_rounding_to_fp16(dtype):
    logits = (8 * randn(50, 300) + 100).to(dtype)  # an offset that costs no precision
    values, indices = top_logits(logits, 64)
    chosen = with_all_others(logits, indices)
    exact = chosen - chosen.mean(-1, keepdim=True)
    assert ((values.double() - exact).abs() <= 2**-11 * exact.abs() + 1e-4).all()
    # So a model that has not changed is at most this far from what it gave.
    assert float(dark_loss(logits, values, indices)) <= (2**-11 * float(exact.abs().max()) + 1e-4) ** 2


def test_logits_that_fp16_does_not_hold_are_cut_off():
    values, _ = top_logits(torch.tensor([[1e6, -1e6, 0.0]]), 3)
    assert values.tolist() == [[65504.0, -65504.0, 0.0]]


def test_a_class_that_is_ruled_out_takes_no_part():
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 5.0]])
    values, indices = top_logits(logits, 4)
    assert values.tolist() == [[-2.0, UNKNOWN, 0.0, 2.0]]
    student = torch.tensor([[1.0, 70.0, 3.0, 8.0]], requires_grad=True)
    loss = dark_loss(student, values, indices)
    assert float(loss.detach()) == pytest.approx(2.0)  # d = (0, 0, 3)
    loss.backward()
    assert student.grad.tolist() == [pytest.approx([-2 / 3, 0.0, -2 / 3, 4 / 3])]
    ruled_out_too = logits.clone().requires_grad_()
    dark_loss(ruled_out_too, values, indices).backward()
    assert ruled_out_too.grad.tolist() == [[0.0] * 4]


def test_a_position_of_which_nothing_is_known_adds_nothing():
    logits = randn(2, 3).requires_grad_()
    values, indices = torch.full((2, 2), UNKNOWN).half(), torch.tensor([[0, 1], [1, 2]])
    loss = dark_loss(logits, values, indices, "sum")
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad.tolist() == [[0.0] * 3] * 2
    for k in (1, 2, 3):
        values, _ = top_logits(torch.full((1, 3), -torch.inf), k)
        assert values.tolist() == [[UNKNOWN] * min(k + 1, 3)]


def test_where_all_others_are_ruled_out_they_take_no_part():
    logits = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf]])
    values, indices = top_logits(logits, 2)
    assert values.tolist() == [[1.0, -1.0, UNKNOWN]]
    assert indices.tolist() == [[0, 2]]
    for others in (-torch.inf, 5.0):  # of the student
        student = torch.tensor([[3.0, others, 3.0, others]], requires_grad=True)
        loss = dark_loss(student, values, indices)
        loss.backward()
        assert float(loss.detach()) == 1.0  # d = (2, 4)
        assert student.grad.tolist() == [[-1.0, 0.0, 1.0, 0.0]]


def test_with_fewer_classes_than_k_that_are_not_ruled_out_only_those_take_part():
    logits = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf, -torch.inf]])
    values, indices = top_logits(logits, 3)
    assert sorted(values.tolist()[0]) == [UNKNOWN, UNKNOWN, -1.0, 1.0]
    student = torch.tensor([[3.0, 0.0, 3.0, 2.0, -torch.inf]], requires_grad=True)
    loss = dark_loss(student, values, indices)
    loss.backward()
    assert float(loss.detach()) == 1.0
    assert student.grad.tolist() == [[-1.0, 0.0, 1.0, 0.0, 0.0]]


def test_a_student_that_alone_rules_out_all_others_is_infinitely_far():
    values, indices = top_logits(torch.tensor([[3.0, 0.0, 1.0, 0.0]]), 2)
    student = torch.tensor([[3.0, -torch.inf, 1.0, -torch.inf]])
    assert float(dark_loss(student, values, indices)) == torch.inf


@pytest.mark.parametrize("others", [-1e6, -1e30])
def test_all_others_that_fp16_does_not_hold_are_cut_off(others):
    logits = torch.tensor([[2.0, others, 1.0, others]])
    values, indices = top_logits(logits, 2)
    assert values.isfinite().all()
    assert float(values[0, -1]) == -65504.0
    student = torch.tensor([[2.0, 0.0, 1.0, 0.0]], requires_grad=True)
    loss = dark_loss(student, values, indices)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[0, [1, 3]] > 0).all()  # downwards


def test_large_logits_do_not_overflow_the_sum_over_all_others():
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([[1000.0, 800.0, 800.0, -1000.0]], dtype=dtype).requires_grad_()
        values, indices = top_logits(logits, 1)
        assert values.tolist() == [pytest.approx([100 - math.log(2) / 2, -100 + math.log(2) / 2], rel=1e-3)]
        loss = dark_loss(logits, values, indices)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) < 0.01
        assert gradient.isfinite().all()


def test_no_logit_at_all_is_an_error():
    with pytest.raises(ValueError, match="k=0"):
        top_logits(torch.zeros(1, 3), 0)


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("k", [1, 2, 5, 13])
def test_value_and_gradient_are_those_of_the_sum_by_hand(k):
    values, indices = top_logits(3 * randn(6, 13), k)
    logits = (3 * randn(6, 13, seed=1)).requires_grad_()
    loss = dark_loss(logits, values, indices)
    expected = by_hand(logits.detach(), values, indices)
    assert float(loss.detach()) == pytest.approx(sum(expected) / 6, rel=1e-5)
    assert float(dark_loss(logits, values, indices, "sum").detach()) == pytest.approx(sum(expected), rel=1e-5)
    loss.backward()
    for position in range(6):
        for place in range(13):
            moved = []
            for step in (1e-4, -1e-4):
                other = logits.detach().double()
                other[position, place] += step
                moved.append(by_hand(other, values, indices)[position] / 6)
            slope = (moved[0] - moved[1]) / 2e-4
            assert float(logits.grad[position, place]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_gradient_is_two_over_n_of_the_centred_difference_and_that_of_all_others_is_shared_out():
    values, indices = top_logits(randn(6, 13), 4)
    logits = randn(6, 13, seed=1).requires_grad_()
    dark_loss(logits, values, indices, "sum").backward()
    taken, z = indices.long(), logits.detach()
    kept_out = z.exp().scatter(-1, taken, 0.0)
    others = kept_out.sum(-1, keepdim=True)
    difference = torch.cat([z.gather(-1, taken), others.log()], -1) - values.float()
    per_class = 2 / 5 * (difference - difference.mean(-1, keepdim=True))
    expected = (per_class[:, -1:] * kept_out / others).scatter(-1, taken, per_class[:, :-1])
    torch.testing.assert_close(logits.grad, expected)
    assert (logits.grad != 0).all()


def test_of_values_without_all_others_nothing_else_is_seen():
    values, indices = top_logits(randn(6, 13), 4)
    logits = randn(6, 13, seed=1).requires_grad_()
    loss = dark_loss(logits, values[:, :-1], indices, "sum")
    loss.backward()
    assert float(loss.detach()) == pytest.approx(sum(by_hand(logits.detach(), values[:, :-1], indices)), rel=1e-5)
    assert int((logits.grad != 0).sum()) == 6 * 4


@pytest.mark.parametrize("shift", [30.0, 3.0, -3.0])
def test_a_common_shift_of_all_other_classes_is_seen_as_it_is_by_a_softmax(shift):
    """What a new task does: the stored classes keep their places among each other, and lose to all others."""
    k, teacher = 64, 3 * randn(4, 1000)
    values, indices = top_logits(teacher, k)
    stored = torch.zeros(4, 1000, dtype=torch.bool).scatter(-1, indices.long(), True)
    student = torch.where(stored, teacher, teacher + shift).requires_grad_()
    kl = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student.detach().log_softmax(-1))).sum(-1).mean()
    loss = dark_loss(student, values, indices)
    # One of k + 1 differences is the shift, and the others are 0.
    assert float(loss.detach()) == pytest.approx(shift**2 * k / (k + 1) ** 2, rel=2e-2)
    assert float(loss.detach()) > 0.2 * float(kl)
    loss.backward()
    for at in range(4):
        others = student.grad[at][~stored[at]]
        # Away from the shift: a step against it undoes it.
        assert (others * shift > 0).all()
        assert float(others.sum()) == pytest.approx(2 / (k + 1) * shift * k / (k + 1) / 4, rel=1e-2)
        assert float(student.grad[at][stored[at]].sum()) == pytest.approx(-float(others.sum()), rel=1e-3)


def test_descent_brings_back_the_probabilities_of_the_stored_classes():
    teacher, moved = 2 * randn(3, 20), (2 * randn(3, 20, seed=1)).requires_grad_()
    kept = top_logits(teacher, 4)
    optimizer = torch.optim.LBFGS([moved], max_iter=200, tolerance_grad=1e-9)

    def closure():
        optimizer.zero_grad()
        loss = dark_loss(moved, *kept, "sum")
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    places = kept[1].long()
    p, q = teacher.softmax(-1).gather(-1, places), moved.detach().softmax(-1).gather(-1, places)
    torch.testing.assert_close(q, p, rtol=5e-3, atol=1e-4)


def test_with_all_classes_it_is_the_mean_squared_error_of_centred_logits():
    teacher, student = randn(2, 5, 13), randn(2, 5, 13, seed=1)
    a, b = (side - side.mean(-1, keepdim=True) for side in (student, teacher))
    loss = dark_loss(student, *top_logits(teacher, 13))
    torch.testing.assert_close(loss, nn.functional.mse_loss(a, b), rtol=1e-3, atol=0)


def test_what_is_added_to_all_logits_of_a_position_is_not_seen():
    teacher, student = randn(5, 13), randn(5, 13, seed=1)
    one = dark_loss(student, *top_logits(teacher, 4))
    other = dark_loss(student + torch.arange(5.0)[:, None], *top_logits(teacher - 30, 4))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=0)
    assert float(one) > 0.1


def test_a_model_that_has_not_changed_has_no_loss_and_no_gradient():
    logits = torch.tensor([[3.0, 1.0, 0.5, -2.0], [0.25, 0.0, 8.0, -8.25]], requires_grad=True)  # exact in fp16
    for k in (3, 4):  # with 3 all others are one class, and its logit as exact as theirs
        values, indices = top_logits(logits, k)
        values = values.float() if k == 4 else with_all_others(logits.detach(), indices).float()
        loss = dark_loss(logits, values, indices)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert float(loss.detach()) == 0.0
        assert gradient.tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("k", [1, 2, 16, 64])
def test_a_model_that_has_not_changed_is_as_far_as_fp16_rounds(k):
    logits = (4 * randn(6, 200)).requires_grad_()
    loss = dark_loss(logits, *top_logits(logits, k))
    (gradient,) = torch.autograd.grad(loss, logits)
    rounding = 2**-11 * 20  # of a centred value below 20
    assert float(loss.detach()) < rounding**2
    assert gradient.abs().max() < 2 * rounding


def test_a_step_against_the_gradient_goes_back_to_what_was_stored():
    # With all classes it is quadratic with Hessian 2/k · (I − 1/k): a step of k/2 lands on its minimum.
    teacher, student = randn(6, 13), randn(6, 13, seed=1).requires_grad_()
    kept = top_logits(teacher, 13)
    (gradient,) = torch.autograd.grad(dark_loss(student, *kept, "sum"), student)
    assert float(dark_loss(student.detach() - 13 / 2 * gradient, *kept, "sum")) < 1e-10


def test_nothing_flows_to_what_was_stored():
    values = randn(2, 3).requires_grad_()
    dark_loss(randn(2, 5, seed=1).requires_grad_(), values, torch.tensor([[0, 1, 2]] * 2)).backward()
    assert values.grad is None


def test_sixteen_bit_logits_are_compared_in_fp32():
    kept = top_logits(randn(40, 500), 64)
    student = randn(40, 500, seed=1, dtype=torch.bfloat16)
    assert float(dark_loss(student, *kept)) == float(dark_loss(student.float(), *kept))


def test_no_positions_are_zero_and_not_nan():
    student = torch.zeros(0, 5, requires_grad=True)
    loss = dark_loss(student, *top_logits(torch.zeros(0, 5), 2))
    loss.backward()
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    ("logits", "values", "indices"),
    [((3, 5), (2, 4), (2, 4)), ((2, 5), (2, 4), (2, 2)), ((2, 5), (2, 2), (2, 3)), ((2, 3, 5), (6, 4), (6, 4))],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(logits, values, indices):
    with pytest.raises(ValueError, match=r"logits of shape \[.*values of shape \[.*indices of shape \["):
        dark_loss(torch.zeros(logits), torch.zeros(values), torch.zeros(indices, dtype=torch.int64))


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match=r"reduction='batchmean'.*'mean' or 'sum'"):
        dark_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0, 1]]), "batchmean")


# ---------------------------------------------------------------------- from hidden states


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_from_hidden_states_it_is_the_sum_of_the_loss_of_logits(rows):
    torch.manual_seed(0)
    head, kept = nn.Linear(5, 13), top_logits(randn(10, 13), 4)
    gradients, values = [], []
    for parts in (False, True):
        hidden = randn(10, 5, seed=1).requires_grad_()
        if parts:
            loss = head_dark_loss(hidden, *kept, head, 13, chunk_bytes=rows * 13 * 4)
        else:
            loss = dark_loss(head(hidden), *kept, "sum")
        gradients.append(torch.autograd.grad(loss, [hidden, *head.parameters()]))
        values.append(loss.detach())
    torch.testing.assert_close(*values)
    assert values[0] > 1
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_what_is_stored_from_hidden_states_is_what_is_stored_of_logits(rows):
    torch.manual_seed(0)
    head, hidden = nn.Linear(5, 13), randn(10, 5).requires_grad_()
    for one, other in zip(
        head_top_logits(hidden, head, 13, 4, chunk_bytes=rows * 13 * 4), top_logits(head(hidden), 4), strict=True
    ):
        # Indices as numbers: torch compares no unsigned ones.
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-3, atol=1e-3)
        assert one.dtype == other.dtype
        assert not one.requires_grad


def test_under_autocast_it_is_stored_and_compared():
    head, hidden = nn.Linear(5, 13), randn(10, 5).requires_grad_()
    exact = top_logits(head(hidden), 4)
    with torch.autocast("cpu", torch.bfloat16):
        kept = head_top_logits(hidden, head, 13, 4, chunk_bytes=3 * 13 * 4)
        loss = head_dark_loss(hidden, *exact, head, 13, chunk_bytes=3 * 13 * 4)
    assert kept[0].dtype == torch.float16
    assert float(dark_loss(head(hidden), *kept).detach()) < 1e-4
    assert 0 < float(loss.detach()) < 1e-3
    loss.backward()
    assert hidden.grad.isfinite().all()


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation has made: of any type, and of fp32."""

    def __init__(self):
        super().__init__()
        self.numel = self.fp32 = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
                if tensor.dtype == torch.float32:
                    self.fp32 = max(self.fp32, tensor.numel())
        return out


@pytest.mark.parametrize("rows", [4, 40])
def test_logits_exist_for_one_chunk_at_a_time_in_fp32_too(rows):
    torch.manual_seed(0)
    head, hidden = nn.Linear(2, 512, dtype=torch.bfloat16), randn(40, 2, dtype=torch.bfloat16).requires_grad_()
    size = {"head": head, "classes": 512, "chunk_bytes": rows * 512 * 4}
    kept = head_top_logits(hidden, k=16, **size)
    with Largest() as storing:
        head_top_logits(hidden, k=16, **size)
    with Largest() as learning:
        head_dark_loss(hidden, *kept, **size).backward()
    for largest in (storing, learning):
        assert largest.numel == rows * 512
        assert largest.fp32 == rows * 512
    assert hidden.grad.dtype == torch.bfloat16


def test_with_all_classes_stored_there_is_no_value_of_all_others_and_no_sum_over_them():
    logits, student = randn(6, 13), randn(6, 13, seed=1).requires_grad_()
    values, indices = top_logits(logits, 13)
    assert values.shape == indices.shape == (6, 13)
    loss = dark_loss(student, values, indices)
    d = student - values.float()
    expected = (d - d.mean(-1, keepdim=True)).square().mean()
    torch.testing.assert_close(loss, expected)
    for one, other in zip(*(torch.autograd.grad(x, student) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_logits_of_many_chunks_are_compared_chunk_by_chunk(monkeypatch):
    kept = top_logits(randn(10, 512), 16)
    ends = []
    for chunk_bytes in (2**27, 3 * 512 * 4):
        monkeypatch.setattr(head_dark_loss, "__defaults__", (chunk_bytes,))
        student = randn(2, 5, 512, seed=1).requires_grad_()
        loss = dark_loss(student, *(side.reshape(2, 5, -1) for side in kept))
        ends.append((loss.detach(), *torch.autograd.grad(loss, student)))
    torch.testing.assert_close(ends[1][0], ends[0][0])
    torch.testing.assert_close(ends[1][1], ends[0][1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("k", [2, 5])
def test_of_a_position_that_is_not_finite_nothing_is_known(bad, k):
    logits = randn(3, 5)
    logits[1, 3] = bad
    values, indices = top_logits(logits, k)
    assert (values[1] == -torch.inf).all()
    assert values[[0, 2]].isfinite().all()
    student = randn(3, 5).requires_grad_()
    dark_loss(student, values, indices).backward()
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()
    assert (student.grad[[0, 2]] != 0).any(1).all()
