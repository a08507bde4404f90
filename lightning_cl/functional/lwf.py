"""The distance between the predictions of two models, over a whole vocabulary and a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_cl.functional.cross_entropy import CHUNK_BYTES

Head = Callable[[Tensor], Tensor]


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_bytes: int = CHUNK_BYTES,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """``KL(teacher ‖ student) = Σ_c p_c (log p_c − log q_c)`` in nats, in fp32, with ``p = softmax(z / temperature)``.

    A class that the teacher rules out (a logit of −∞) adds nothing; one that the student alone rules out makes the
    divergence infinite. With `top_k`, the teacher's k most probable classes are told apart and all others are one: a
    lower bound, 0 where both agree on those k.

    Memory beyond the logits: a few times `chunk_bytes`, for any number of positions. With a gradient to the student and
    several chunks, the backward pass computes the logits of each chunk again.

    Args:
        teacher_logits: scores of shape ``[..., classes]`` in any floating-point type; no gradient flows to them.
        student_logits: scores of the same shape.
        reduction: ``mean`` over the positions (all axes but the last; 0 if there are none) or their ``sum``.
        chunk_bytes: size of one side's fp32 logits of a chunk; at least one position.
        temperature: divides both sides' logits. The factor ``temperature²`` of distillation losses is not in.
        top_k: number of classes that are told apart; None: all.

    Returns:
        An fp32 scalar, with a graph to the student's logits.

    Raises:
        ValueError: if the shapes differ or the reduction is unknown.

    Example:
        >>> import torch
        >>> from lightning_cl.functional import kl_divergence
        >>> teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> kl_divergence(teacher, teacher + 3.0).item()
        0.0
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
    total = head_kl_divergence(teacher, student, _same, _same, classes, temperature, top_k, chunk_bytes)
    return total / max(len(student), 1) if reduction == "mean" else total


def head_kl_divergence(
    teacher: Tensor,
    student: Tensor,
    teacher_head: Head,
    student_head: Head,
    classes: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """The sum of :func:`kl_divergence` over positions, from hidden states: logits exist for one chunk at a time.

    Args:
        teacher: ``[positions, width]``, the teacher's hidden states.
        student: the student's.
        teacher_head: gives logits ``[m, classes]`` of ``[m, width]``.
        student_head: the same for the student.
        classes: the number of logits of a position.
        temperature: divides both sides' logits.
        top_k: number of classes that are told apart; None: all.
        chunk_bytes: size of one side's fp32 logits of a chunk; at least one position.

    Returns:
        An fp32 scalar, with a graph to the student.
    """
    rows = max(1, chunk_bytes // (4 * classes))
    again = torch.is_grad_enabled() and student.requires_grad and len(student) > rows

    def chunk(ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.no_grad():
            p = teacher_head(ours).float() / temperature
        # A teacher with fewer classes (a head that has grown since) is asked about those that it knows.
        return _sum(p, student_head(theirs)[..., : p.shape[-1]].float() / temperature, top_k)

    # `split` and not slices: the gradients of slices would each be as large as all logits.
    total = student.new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(teacher.detach().split(rows), student.split(rows), strict=True):
        total = total + (checkpoint(chunk, ours, theirs, use_reentrant=False) if again else chunk(ours, theirs))
    return total


def _same(rows: Tensor) -> Tensor:
    return rows


def _sum(teacher: Tensor, student: Tensor, top_k: int | None) -> Tensor:
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    if top_k is not None and top_k < log_p.shape[-1]:
        log_p, largest = log_p.topk(top_k, -1)
        others = torch.ones_like(log_q, dtype=torch.bool).scatter_(-1, largest, False)
        # All other classes as one, from their own sum: 1 − Σ would lose a small rest.
        rest_p = teacher.log_softmax(-1).masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
        rest_q = log_q.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
        log_p = torch.cat([log_p, rest_p], -1)
        log_q = torch.cat([log_q.gather(-1, largest), rest_q], -1)
    p = log_p.exp()
    # 0 · log 0 is 0, and not the NaN of 0 · (−∞).
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum()
