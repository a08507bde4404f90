"""The diagonal of the Fisher information, from gradients of single samples.

Definition used everywhere in this library, for a set of samples ``x`` (a sequence is one sample) with ``n(x)``
positions that bear loss (``n(x) = 1`` for a classifier)::

    F = Σ_x E_y[(∂/∂θ Σ_t log p_θ(y_t | x))²] / Σ_x n(x)

The estimators differ in where the labels ``y`` come from:

* ``sample``: one draw per position from the model's own softmax (teacher-forced); unbiased.
* ``exact``: the expectation over all labels; one backward pass per position and class, so for small outputs only.
* ``empirical``: the labels of the data; the Fisher only where the model has the distribution of the data.

Squaring the gradient of a batch mean instead is not an estimate of any of these: it is too small by about the batch
size, and it distorts the rank order of the parameters.

Source: Kirkpatrick et al. 2017 (EWC), eq. 3; van de Ven 2025 (arXiv:2502.11756) on the estimators.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

WeightedLosses: TypeAlias = Iterable[tuple[float, Tensor]]


def sampled_label_loss(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``Σ_t -log p(y_t)`` with each ``y_t`` drawn from the model's own softmax.

    The draw inverts the cumulative distribution with uniform numbers from the CPU, so that the same generator gives the
    same labels on every device and for every split of the samples over processes.

    Args:
        logits: scores of shape ``[..., classes]``; every position before the last axis is one draw.
        generator: a CPU generator.

    Returns:
        A scalar with a graph.
    """
    flat = logits.float().reshape(-1, logits.shape[-1])
    with torch.no_grad():
        cumulative = flat.softmax(-1).cumsum(-1)
        uniform = torch.rand(flat.shape[0], 1, generator=generator).to(flat.device)
        # The last entry is 1 up to rounding: scaling by it keeps every draw inside the vocabulary.
        # right=True: a uniform number of exactly 0 must not pick a class of probability 0.
        labels = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)
        labels.clamp_(max=flat.shape[-1] - 1)
    return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")


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
    pending = None
    for weight, loss in losses:
        # One step of delay: only the last loss of a shared graph may free it.
        if pending is not None:
            _add_one(total, *pending, parameters, retain_graph=True)
        pending = (weight, loss)
    if pending is not None:
        _add_one(total, *pending, parameters, retain_graph=False)


def _add_one(
    total: Mapping[str, Tensor], weight: float, loss: Tensor, parameters: Mapping[str, Tensor], retain_graph: bool
) -> None:
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=retain_graph, allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient.float()
            total[name].addcmul_(gradient, gradient, value=weight)


def fisher_diagonal(
    samples: Iterable[tuple[WeightedLosses, int]], parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """The Fisher diagonal of this module's docstring, before the division by ``Σ n(x)``.

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
