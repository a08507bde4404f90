"""head_cross_entropy against F.cross_entropy of all logits: value, gradients, right predictions, and memory."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_cl.functional.cross_entropy import CHUNK_BYTES, head_cross_entropy

POSITIONS, WIDTH, VOCABULARY = 37, 8, 53


def bytes_for(rows):
    return rows * 4 * VOCABULARY


def problem(positions=POSITIONS, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(VOCABULARY, (positions,))
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    return hidden, labels, head


def gradients(loss, hidden, head):
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


# One chunk for all; two; uneven ones; a row each.
@pytest.mark.parametrize("rows", [POSITIONS + 1, POSITIONS, POSITIONS - 1, 10, 1])
def test_value_gradients_and_hits_are_those_of_all_logits(rows):
    hidden, labels, head = problem()
    loss, hits = head_cross_entropy(hidden, labels, head, VOCABULARY, bytes_for(rows))
    logits = head(hidden)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss, expected)
    assert int(hits) == int((logits.argmax(-1) == labels).sum())
    for made, right in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(made, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [POSITIONS, 5])
def test_by_hand(rows):
    """Logits log 1, log 3, log 4: probabilities ⅛, ⅜ and ½."""
    head = lambda hidden: hidden.new_tensor([1.0, 3.0, 4.0]).log() + 0 * hidden[:, :1]  # noqa: E731
    labels = torch.tensor([0, 1, 2, 2, 1] * 2)
    loss, hits = head_cross_entropy(torch.zeros(10, 2), labels, head, 3, rows * 4 * 3 // 5)
    eighths = torch.tensor([1.0, 3.0, 4.0, 4.0, 3.0]) / 8
    torch.testing.assert_close(loss, -eighths.log().mean())
    assert int(hits) == 4


def test_gradients_are_those_of_finite_differences():
    hidden, labels, head = problem(positions=6)
    hidden, head = hidden.detach().double().requires_grad_(), head.double()
    # In double precision throughout: what the function casts to fp32 would drown the differences.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda self: self)
        assert torch.autograd.gradcheck(
            lambda h, w: head_cross_entropy(h, labels, lambda x: F.linear(x, w, head.bias), VOCABULARY, bytes_for(2))[
                0
            ],
            (hidden, head.weight),
        )


@pytest.mark.parametrize("rows", [POSITIONS, 5])
@pytest.mark.parametrize("mixed", [False, True], ids=["bf16", "autocast"])
def test_in_16_bits_the_softmax_is_in_32(rows, mixed):
    hidden, labels, head = problem(dtype=torch.float32 if mixed else torch.bfloat16)
    context = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with context:
        loss, hits = head_cross_entropy(hidden, labels, head, VOCABULARY, bytes_for(rows))
        logits = head(hidden)
        assert logits.dtype == torch.bfloat16
        expected = F.cross_entropy(logits.float(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert int(hits) == int((logits.argmax(-1) == labels).sum())
    for made, right in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        assert made.dtype == right.dtype
        # Sums over chunks are rounded to 16 bits once per chunk.
        torch.testing.assert_close(made.float(), right.float(), rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("chunk_bytes", [1, CHUNK_BYTES])
def test_one_position(chunk_bytes):
    hidden, labels, head = problem(positions=1)
    loss, hits = head_cross_entropy(hidden, labels, head, VOCABULARY, chunk_bytes)
    expected = F.cross_entropy(head(hidden), labels)
    torch.testing.assert_close(loss, expected)
    assert int(hits) == int(head(hidden).argmax() == labels)
    torch.testing.assert_close(gradients(loss, hidden, head), gradients(expected, hidden, head))


def test_no_position_gives_a_loss_of_zero_that_can_be_differentiated():
    hidden, labels, head = problem(positions=0)
    upstream = torch.ones(3, requires_grad=True)
    loss, hits = head_cross_entropy(hidden * upstream.sum(), labels, head, VOCABULARY)
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    assert int(hits) == 0
    loss.backward()
    assert torch.equal(upstream.grad, torch.zeros(3))


def test_gradients_accumulate_as_without_chunks():
    """Two batches, weighed differently, into one `.grad`, the head's weight shared with what made the hidden states."""

    def accumulated(rows):
        torch.manual_seed(1)
        embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        head.weight = embedding.weight
        for scale in (0.5, 0.25):
            ids = torch.randint(VOCABULARY, (POSITIONS,))
            loss, _ = head_cross_entropy(embedding(ids).tanh(), ids.roll(1), head, VOCABULARY, bytes_for(rows))
            (loss * scale).backward()
        return head.weight.grad

    torch.testing.assert_close(accumulated(4), accumulated(POSITIONS), rtol=1e-5, atol=1e-7)


def test_dropout_of_the_head_is_the_same_in_the_second_computation():
    """The backward pass computes a chunk's logits again: with other random numbers its gradient would be another."""
    hidden, labels, _ = problem()
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    masks = []

    def head(states):
        kept = F.dropout(states, 0.5)
        masks.append((kept != 0).detach())
        return F.linear(kept, weight)

    loss, _ = head_cross_entropy(hidden, labels, head, VOCABULARY, bytes_for(10))
    forward = torch.cat(masks)
    masks.clear()
    (made,) = torch.autograd.grad(loss, weight)
    assert len(masks) == 4  # once more each
    kept = hidden.detach() * forward * 2
    (right,) = torch.autograd.grad(F.cross_entropy(F.linear(kept, weight), labels), weight)
    torch.testing.assert_close(made, right, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest storage that any operation gives back."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.untyped_storage().nbytes() // value.element_size())
        return made


def largest(rows, positions, vocabulary=1000, grad=True):
    torch.manual_seed(0)
    hidden = torch.randn(positions, WIDTH, requires_grad=grad)
    head = nn.Linear(WIDTH, vocabulary)
    labels = torch.randint(vocabulary, (positions,))
    watch = Largest()
    with watch, torch.set_grad_enabled(grad):
        loss, _ = head_cross_entropy(hidden, labels, head, vocabulary, rows * 4 * vocabulary)
        if grad:
            loss.backward()
    return watch.numbers


@pytest.mark.parametrize("grad", [True, False], ids=["forward and backward", "without gradients"])
def test_no_more_logits_than_a_chunks_exist(grad):
    chunk = 20 * 1000
    assert largest(20, 500, grad=grad) <= chunk
    assert largest(20, 2000, grad=grad) <= chunk
    # The watch sees them where they are: all positions in one chunk.
    assert largest(500, 500, grad=grad) == 500 * 1000


def test_chunks_are_computed_twice_and_a_single_one_once():
    hidden, labels, head = problem()
    calls = []

    def counted(states):
        calls.append(len(states))
        return head(states)

    loss, _ = head_cross_entropy(hidden, labels, counted, VOCABULARY, bytes_for(POSITIONS))
    loss.backward()
    assert calls == [POSITIONS]
    calls.clear()
    loss, _ = head_cross_entropy(hidden, labels, counted, VOCABULARY, bytes_for(10))
    assert calls == [10, 9, 9, 9]
    loss.backward()
    assert sorted(calls) == sorted([10, 9, 9, 9] * 2)


def test_a_vocabulary_larger_than_the_chunk_is_taken_a_row_at_a_time():
    hidden, labels, head = problem()
    sizes = []
    loss, _ = head_cross_entropy(
        hidden, labels, lambda states: sizes.append(len(states)) or head(states), VOCABULARY, chunk_bytes=1
    )
    assert sizes == [1] * POSITIONS
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden), labels))
