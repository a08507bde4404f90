"""Dark experience: the logits that a model once gave, kept in few bytes, and how far another model is from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_cl.functional.cross_entropy import CHUNK_BYTES

Head = Callable[[Tensor], Tensor]

UNKNOWN = -torch.inf
"""A stored value that nothing is compared with."""


def index_type(classes: int) -> torch.dtype:
    """The narrowest type that holds the number of every class: two bytes up to 65,536 classes, four beyond."""
    return torch.uint16 if classes <= 2**16 else torch.int32


def top_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each position, as they are stored, and the ``logsumexp`` of all others.

    ``2(k + 1)`` bytes of values and ``2k`` or ``4k`` of indices per position. All others count as one class, whose
    probability is stored: without it, the probability of the k classes together would be unknown. With `k` at least
    `classes` there are no others, and no value for them.

    Values are mean-centred (:func:`dark_loss` does not see the mean), so that fp16 keeps them to a relative error of
    2⁻¹¹ whatever was added to all logits; beyond ±65,504 they are cut off. A logit of −∞ stays −∞, and takes no part
    in the mean. With a logit that is NaN or +∞ nothing is known of its position: all its values are −∞. Memory beyond
    the logits: one or two fp32 copies of them.

    Args:
        logits: ``[…, classes]`` in any floating-point type.
        k: number of logits; with at least `classes`, all of them in their own order.

    Returns:
        values, fp16 ``[…, k + 1]``, that of all others last, and the classes of the first k, ``[…, k]`` in the type of
        :func:`index_type`; with no others both ``[…, classes]``.

    Raises:
        ValueError: if k is below 1.
    """
    if k < 1:
        raise ValueError(f"k={k}: expected at least one logit of a position")
    logits = logits.detach()
    classes = logits.shape[-1]
    if k < classes:
        values, indices = logits.topk(k, -1)
        values = torch.cat([values.float(), _others(logits, indices, UNKNOWN)], -1)
    else:
        values, indices = logits.float(), torch.arange(classes, device=logits.device).expand(logits.shape)
    ruled_out = values == UNKNOWN
    mean = values.masked_fill(ruled_out, 0.0).sum(-1, keepdim=True) / (~ruled_out).sum(-1, keepdim=True)
    largest = torch.finfo(torch.float16).max
    centred = (values - mean).clamp(-largest, largest)
    centred = centred.masked_fill(ruled_out | ~mean.isfinite(), UNKNOWN)
    return centred.half(), indices.to(index_type(classes))


def head_top_logits(
    hidden: Tensor, head: Head, classes: int, k: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """:func:`top_logits` of hidden states, on the CPU: logits exist for one chunk of positions at a time.

    Args:
        hidden: ``[positions, width]``.
        head: gives logits ``[m, classes]`` of ``[m, width]``.
        classes: the number of logits of a position.
        k: number of logits to keep.
        chunk_bytes: size of a chunk's fp32 logits; at least one position.

    Returns:
        values ``[positions, k + 1]`` and indices ``[positions, k]``; with `k` at least `classes`, both
        ``[positions, classes]``.
    """
    rows, kept = max(1, chunk_bytes // (4 * classes)), min(k, classes)
    # Not by `cat`: autocast on the CPU refuses fp16.
    values = torch.empty(len(hidden), kept + (k < classes), dtype=torch.float16)
    indices = torch.empty(len(hidden), kept, dtype=index_type(classes))
    with torch.no_grad():
        for start in range(0, len(hidden), rows):
            found = top_logits(head(hidden[start : start + rows]), k)
            values[start : start + rows], indices[start : start + rows] = found
    return values, indices


def dark_loss(logits: Tensor, values: Tensor, indices: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """The squared distance to stored logits (Buzzega et al. 2020, eqs. 5 and 6), each side mean-centred, in fp32.

    ::

        1/n Σ_i ((z_i − mean z) − (v_i − mean v))²

    of a position, over its k stored classes and, as one more, all others with ``z = logsumexp`` of their logits
    (``n = k + 1``; ``n = k`` where all classes are stored): the variance of ``z − v``, and the least that the mean
    square of ``z − v`` can be made by adding a constant to all logits of all classes, which no softmax sees. It is 0
    only where the stored classes have their probabilities again. The paper writes the sum over all classes; its
    authors' code takes the mean, as here. So a factor has the same effect for every k, and the authors' factors (0.1 to
    0.5) fit. Its gradient is ``g_i = 2/n · (d_i − mean d)`` with ``d = z − v`` in a stored class, and that of all
    others is shared out among them as a softmax over them. The loss does not depend on the ratios among those others.

    Stored classes of which nothing is known (a value of −∞) are left out of both means. Classes that a head has got
    since then are among all others, where there are any. No gradient flows to the values. Memory beyond the logits: a
    few times ``CHUNK_BYTES`` (fp32 logits of a chunk of positions), and a few times ``4k`` bytes per position.

    Args:
        logits: ``[…, classes]`` in any floating-point type.
        values: ``[…, k + 1]``, as :func:`top_logits` gives them; ``[…, k]``: nothing is known of all others.
        indices: ``[…, k]``, the classes of the first k; integers of any type.
        reduction: ``mean`` over the positions (all axes but the last; 0 if there are none) or their ``sum``.

    Returns:
        An fp32 scalar, with a graph to the logits.

    Raises:
        ValueError: if the shapes do not fit each other or the reduction is unknown.

    Example:
        >>> import torch
        >>> from lightning_cl.functional import dark_loss, top_logits
        >>> values, indices = top_logits(torch.tensor([[2.0, 0.0, -2.0]]), k=3)
        >>> dark_loss(torch.tensor([[3.0, 1.0, -1.0]]), values, indices).item()
        0.0
    """
    positions, k = logits.shape[:-1], indices.shape[-1]
    if not positions == values.shape[:-1] == indices.shape[:-1] or values.shape[-1] not in (k, k + 1):
        raise ValueError(
            f"logits of shape {list(logits.shape)}, values of shape {list(values.shape)}, indices of shape"
            f" {list(indices.shape)}: expected the same positions, and an index for each value, or for each but the"
            " last, which is that of all other classes"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    rows, kept, stored = (side.reshape(positions.numel(), side.shape[-1]) for side in (logits, values, indices))
    total = head_dark_loss(rows, kept, stored, _same, logits.shape[-1])
    return total / max(positions.numel(), 1) if reduction == "mean" else total


def head_dark_loss(
    hidden: Tensor, values: Tensor, indices: Tensor, head: Head, classes: int, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """The sum of :func:`dark_loss` over positions, from hidden states: logits exist for one chunk at a time.

    With a gradient and several chunks, the backward pass computes each chunk's logits again. Memory: a few times
    `chunk_bytes`.

    Args:
        hidden: ``[positions, width]``.
        values: ``[positions, k + 1]``, or ``[positions, k]`` where nothing is known of all others.
        indices: ``[positions, k]``.
        head: gives logits ``[m, classes]`` of ``[m, width]``.
        classes: the number of logits of a position.
        chunk_bytes: size of a chunk's fp32 logits; at least one position.

    Returns:
        An fp32 scalar, with a graph to the hidden states and to what the head is made of.
    """
    rows = max(1, chunk_bytes // (4 * classes))
    again = torch.is_grad_enabled() and len(hidden) > rows

    def chunk(states: Tensor, kept: Tensor, stored: Tensor) -> Tensor:
        return _sum(head(states), kept, stored)

    # `split` and not slices: the gradients of slices would each be as large as all hidden states.
    total = hidden.new_zeros((), dtype=torch.float32)
    for part in zip(hidden.split(rows), values.split(rows), indices.split(rows), strict=True):
        total = total + (checkpoint(chunk, *part, use_reentrant=False) if again else chunk(*part))
    return total


def _same(rows: Tensor) -> Tensor:
    return rows


def _others(logits: Tensor, indices: Tensor, left_out: float) -> Tensor:
    """``logsumexp`` of all logits but those, ``[…, 1]`` in fp32; `left_out` stands for those."""
    return logits.float().scatter(-1, indices, left_out).logsumexp(-1, keepdim=True)


def _sum(logits: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    stored = indices.to(torch.int64)
    student = logits.gather(-1, stored).float()
    if values.shape[-1] > stored.shape[-1]:
        # The least number and not −∞: where all others are ruled out, the gradient of −∞ alone would be NaN.
        others = _others(logits, stored, torch.finfo(torch.float32).min)
        student = torch.cat([student, others], -1)
    known = values != UNKNOWN
    difference = (student - values.detach().float()).masked_fill(~known, 0.0)
    count = known.sum(-1, keepdim=True).clamp(min=1)
    mean = difference.sum(-1, keepdim=True) / count
    return ((difference - mean).masked_fill(~known, 0.0).square() / count).sum()
