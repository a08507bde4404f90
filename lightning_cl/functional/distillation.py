"""The distance between the predictions of two models, over a whole vocabulary and a chunk of positions at a time."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_cl.functional.cross_entropy import CHUNK_BYTES


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """``KL(teacher ‖ student) = Σ_c p_c (log p_c − log q_c)`` in nats, exact over all classes, in fp32.

    A class that the teacher rules out (a logit of −∞) adds nothing; one that the student alone rules out makes the
    divergence infinite.

    Memory beyond the logits: a few times `chunk_bytes`, whatever the number of positions. With a gradient to the
    student and several chunks, the backward pass computes each chunk's again.

    Args:
        teacher_logits: scores of shape ``[..., classes]`` in any floating-point type; no gradient flows to them.
        student_logits: scores of the same shape.
        reduction: ``mean`` over the positions (all axes but the last; 0 if there are none) or their ``sum``.
        chunk_bytes: size of one side's fp32 logits of a chunk; at least one position.

    Returns:
        An fp32 scalar, with a graph to the student's logits.

    Raises:
        ValueError: if the shapes differ or the reduction is unknown.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits of shape {list(teacher_logits.shape)}, student_logits of shape"
            f" {list(student_logits.shape)}: expected the same positions and classes"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum'")
    classes = student_logits.shape[-1]
    teacher, student = (logits.reshape(-1, classes) for logits in (teacher_logits.detach(), student_logits))
    rows = max(1, chunk_bytes // (4 * classes))
    again = torch.is_grad_enabled() and student.requires_grad and len(student) > rows
    # `split` and not slices: the gradients of slices would each be as large as all logits.
    total = student.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(teacher.split(rows), student.split(rows), strict=True):
        total = total + (checkpoint(_sum, ours, theirs, use_reentrant=False) if again else _sum(ours, theirs))
    return total / max(len(student), 1) if reduction == "mean" else total


def _sum(teacher: Tensor, student: Tensor) -> Tensor:
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    p = log_p.exp()
    # 0 · log 0 is 0, and not the NaN of 0 · (−∞).
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum()
