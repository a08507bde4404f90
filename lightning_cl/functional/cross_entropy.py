"""The cross-entropy of a large vocabulary, computed only at positions with loss, one chunk of them at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 128 * 2**20


def head_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy ``−1/n Σ_i log softmax(head(hidden_i))[labels_i]`` and the number of right predictions.

    Logits exist for one chunk of positions at a time, in fp32 as the loss needs them. The backward pass computes those
    of each chunk again. With all positions in one chunk nothing is computed twice.

    Memory: at most about three times `chunk_bytes`, for any number of positions. All logits would take
    ``4 · n · vocabulary`` bytes several times. Compute: one more forward of the head where there are several chunks.

    Args:
        hidden: ``[n, width]``, the hidden states that predict something.
        labels: ``[n]``, what they are to predict; no −100.
        head: gives logits ``[m, vocabulary]`` of ``[m, width]``.
        vocabulary: the number of logits of a position.
        chunk_bytes: size of a chunk's fp32 logits.

    Returns:
        the loss, an fp32 scalar (0 with a graph where there are no positions), and the number of positions whose most
        probable token is the label.
    """
    count = len(labels)
    rows = max(1, chunk_bytes // (4 * vocabulary))
    if count == 0:
        # Through the head, so that its parameters have gradients (of 0), as several processes expect.
        return head(hidden).float().sum() * 0.0, torch.zeros((), dtype=torch.int64, device=hidden.device)
    if count <= rows:
        loss, hits = _sums(hidden, labels, head)
        return loss / count, hits
    # Chunks of nearly equal size: a last one of a few rows would be slow. By `split`: the gradients of slices would
    # each be as large as all hidden states.
    parts = -(-count // rows)
    sizes = [count // parts + (part < count % parts) for part in range(parts)]
    total, right = hidden.new_zeros((), dtype=torch.float32), torch.zeros((), dtype=torch.int64, device=hidden.device)
    for rows_of_part, labels_of_part in zip(hidden.split(sizes), labels.split(sizes), strict=True):
        if torch.is_grad_enabled():
            loss, hits = checkpoint(_sums, rows_of_part, labels_of_part, head, use_reentrant=False)
        else:
            loss, hits = _sums(rows_of_part, labels_of_part, head)
        total, right = total + loss, right + hits
    return total / count, right


def _sums(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    with torch.no_grad():
        hits = (logits.argmax(-1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum"), hits
