"""The diagonal of the Fisher information, from gradients of single samples.

Definition used everywhere in this library, for a set of samples ``x`` (a sequence is one sample) with ``n(x)``
positions that bear loss (``n(x) = 1`` for a classifier)::

    F = Σ_x E_y[(∂/∂θ Σ_t log p_θ(y_t | x))²] / Σ_x n(x)

The estimators differ in where the labels ``y`` come from:

* ``sample``: one draw per position from the model's own softmax (teacher-forced); unbiased.
* ``exact``: the expectation over all labels; one backward pass per position and class, so for small outputs only.
* ``empirical``: the labels of the data; the Fisher only where the model has the distribution of the data.

Squaring the gradient of a batch's mean loss instead is not an estimate of any of these: it is too small by about the
batch size, and it distorts the rank order of the parameters.

The functions here follow the definition literally: one sample at a time, by plain autograd.
:class:`~lightning_cl.functional.SampleGradients` gives the same sums from whole batches.

Source: Kirkpatrick et al. 2017 (EWC), eq. 3; van de Ven 2025 (arXiv:2502.11756) on the estimators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_cl.functional.cross_entropy import CHUNK_BYTES, head_cross_entropy
from lightning_cl.functional.sample_gradients import with_last

WeightedLosses: TypeAlias = Iterable[tuple[float, Tensor]]


def sampled_label_loss(
    logits: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None
) -> Tensor:
    """``Σ_t -log p(y_t)`` with each ``y_t`` drawn from the model's own softmax.

    The draw inverts the cumulative distribution with uniform numbers from the CPU, so that the same generator gives the
    same labels on every device and for every split of the samples over processes.

    Args:
        logits: scores of shape ``[..., classes]``; every position before the last axis is one draw.
        generator: a CPU generator.
        uniform: the uniform numbers themselves, ``[positions]``, instead of a generator.

    Returns:
        A scalar with a graph.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    if uniform is None:
        uniform = torch.rand(flat.shape[0], generator=generator)
    return label_loss(flat, sampled_labels(flat, uniform))


@torch.no_grad()
def sampled_labels(logits: Tensor, uniform: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Labels drawn from ``softmax(logits)`` by inverting its cumulative distribution, a chunk of positions at a time.

    Args:
        logits: ``[positions, classes]``.
        uniform: ``[positions]``, uniform numbers in [0, 1).
        chunk_bytes: size of a chunk's fp32 probabilities.
    """
    rows = max(1, chunk_bytes // (4 * logits.shape[-1]))
    labels = [torch.empty(0, dtype=torch.int64, device=logits.device)]
    for part, numbers in zip(logits.split(rows), uniform.to(logits.device).split(rows), strict=True):
        cumulative = part.float().softmax(-1).cumsum(-1)
        # The last entry is 1 up to rounding: scaling by it keeps every draw inside the vocabulary.
        # right=True: a uniform number of exactly 0 must not pick a class of probability 0.
        drawn = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
        labels.append(drawn.clamp_(max=logits.shape[-1] - 1))
    return torch.cat(labels)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``Σ_t -log softmax(logits_t)[labels_t]`` in fp32, a chunk of positions at a time.

    Args:
        logits: ``[positions, classes]``.
        labels: ``[positions]``.
    """
    mean, _ = head_cross_entropy(logits, labels, lambda rows: rows, logits.shape[-1])
    return mean * len(labels)


def expected_label_losses(logits: Tensor) -> Iterator[tuple[float, Tensor]]:
    """All labels of all positions with their probability: the terms of the exact expectation.

    Labels at different positions are drawn independently and their score has mean zero, so the expectation of the
    squared sum is the sum over positions of ``Σ_c p_c (∂ log p_c)²``.

    Args:
        logits: scores of shape ``[..., classes]``.

    Yields:
        ``(p_c, -log p_c)`` for every position and class, the loss with a graph.
    """
    log_probabilities = logits.float().reshape(-1, logits.shape[-1]).log_softmax(-1)
    probabilities = log_probabilities.detach().exp()
    for position in range(log_probabilities.shape[0]):
        for label in range(log_probabilities.shape[1]):
            yield float(probabilities[position, label]), -log_probabilities[position, label]


def expected_label_losses_of_batch(logits: Tensor, samples: Tensor) -> Iterator[Tensor]:
    """The exact expectation for a whole batch: scalars, each of one label of one position of every sample.

    ``Σ_b −√p_bc log p_bc``: the square of a sample's gradient then carries the factor ``p_bc``. There are as many as
    the longest sample has positions, times the classes.

    Args:
        logits: scores ``[positions, classes]``.
        samples: ``[positions]``, which sample of the batch a position belongs to, ascending.
    """
    log_probabilities = logits.float().log_softmax(-1)
    root = log_probabilities.detach().mul(0.5).exp()
    starts = torch.searchsorted(samples, samples)  # where a position's sample begins
    nth = torch.arange(len(samples), device=samples.device) - starts
    for position in range(int(nth.max()) + 1 if len(nth) else 0):
        rows = nth == position
        for label in range(logits.shape[-1]):
            weight = root[rows, label]
            # A class that is ruled out has no part: 0 times infinity is not 0.
            terms = (weight * log_probabilities[rows, label]).masked_fill(weight == 0, 0.0)
            yield -terms.sum()


def squared_gradients(losses: WeightedLosses, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``Σ_k w_k (∂ loss_k / ∂θ)²`` in fp32, leaving ``.grad`` untouched.

    Args:
        losses: pairs of weight and scalar loss; their graphs may be shared.
        parameters: name to parameter, each with ``requires_grad``.

    Returns:
        name to a tensor of the parameter's shape; a parameter that no loss depends on has zeros.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    add_squared_gradients_(total, losses, parameters)
    return total


def add_squared_gradients_(
    total: Mapping[str, Tensor], losses: WeightedLosses, parameters: Mapping[str, Tensor]
) -> None:
    """``total += Σ_k w_k (∂ loss_k / ∂θ)²`` in place: what :func:`squared_gradients` accumulates with.

    Args:
        total: name to fp32 tensor.
        losses: pairs of weight and scalar loss. Weights may undo a loss scale: they multiply the *square*.
        parameters: name to parameter.
    """
    for (weight, loss), last in with_last(losses):
        gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=not last, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.float()
                total[name].addcmul_(gradient, gradient, value=weight)


def fisher_diagonal(
    samples: Iterable[tuple[WeightedLosses, int]], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Computes the Fisher diagonal as in this module's docstring, but without the division by ``Σ n(x)``.

    The sum and the count are returned apart because processes that share the samples add up both before dividing.

    Args:
        samples: for each sample its losses (see :func:`squared_gradients`) and its number of positions with loss. Each
            sample has a graph of its own.
        parameters: name to parameter.

    Returns:
        The sum of squared gradients (name to fp32 tensor) and the number of positions.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    positions = 0
    for losses, count in samples:
        add_squared_gradients_(total, losses, parameters)
        positions += count
    return total, positions
