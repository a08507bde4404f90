"""The projection of averaged gradient episodic memory: a step of the task that does not raise the buffer's loss.

Chaudhry, Ranzato, Rohrbach & Elhoseiny 2019, ICLR, arXiv:1812.00420, eqs. 10 and 11::

    minimise ½ ‖g̃ − g‖²  subject to  g̃ · g_ref ≥ 0

    g̃ = g                                       where g · g_ref ≥ 0
    g̃ = g − (g · g_ref / g_ref · g_ref) g_ref   elsewhere
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor | None] | Sequence[Tensor | None]
"""The gradients of a model's parameters, by name or in one order; None: a parameter without gradient."""


class Projection(NamedTuple):
    """Result of :func:`project_`: the products it found, and a mark of a change."""

    dot: float
    """``g · g_ref``, before the projection."""
    gradient_square: float
    """``g · g``."""
    reference_square: float
    """``g_ref · g_ref``."""
    projected: bool
    """True if the gradients were changed."""

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two gradients; NaN if one of them is zero or not finite."""
        norms = math.sqrt(self.gradient_square) * math.sqrt(self.reference_square)
        return self.dot / norms if 0 < norms < math.inf else math.nan


@torch.no_grad()
def project_(
    gradients: Gradients, reference: Gradients, reduce: Callable[[Tensor], Tensor] | None = None
) -> Projection:
    """Removes from the gradients, in place, the part that points against the reference (eq. 11 of A-GEM).

    Only parameters with a gradient on both sides count: one that this step does not move is no part of the inequality.
    Loss scaling does not matter: its factor cancels on `reference` and stays on `gradients`. Sums are taken in fp64 for
    fp64 gradients, and in fp32 for all others. With 16-bit gradients the result is rounded once.

    The gradients keep every bit if there is no conflict, if the reference is zero (its squared norm is below the range
    of fp32), or if a sum is not finite (the result has the sums).

    Memory: two temporaries of the largest gradient. Compute: two passes over both sides, a third where it projects.

    Args:
        gradients: those of the coming step, changed in place.
        reference: those of the buffer's loss, of the same shapes; with the same keys, or in the same order.
        reduce: adds up a tensor of three sums over processes that have different parts of the parameters as ordinary
            tensors. DTensors need none.

    Raises:
        ValueError: if two gradients of one parameter differ in shape, or two sequences in length.
    """
    pairs = list(_pairs(gradients, reference))
    if not pairs and reduce is None:
        return Projection(0.0, 0.0, 0.0, False)
    device = pairs[0][0].device if pairs else None
    sums = torch.zeros(3, device=device)
    for g, r in pairs:
        a, b = _wide(g), _wide(r)
        parts = [_whole(product.sum()) for product in (a * b, a.square(), b.square())]
        sums = sums + torch.stack(parts).to(sums.device)
    dot, gradient_square, reference_square = (sums if reduce is None else reduce(sums)).tolist()
    finite = math.isfinite(dot) and math.isfinite(gradient_square) and math.isfinite(reference_square)
    if not finite or dot >= 0 or reference_square < torch.finfo(torch.float32).tiny:
        return Projection(dot, gradient_square, reference_square, False)
    factor = dot / reference_square
    for g, r in pairs:
        if g.dtype == r.dtype == torch.promote_types(g.dtype, torch.float32):
            g.sub_(r, alpha=factor)
        else:
            g.copy_(_wide(g) - factor * _wide(r))
    return Projection(dot, gradient_square, reference_square, True)


def _pairs(gradients: Gradients, reference: Gradients) -> Iterator[tuple[Tensor, Tensor]]:
    both: list[tuple[Any, Any, Any]]
    if isinstance(gradients, Mapping) and isinstance(reference, Mapping):
        both = [(name, g, reference.get(name)) for name, g in gradients.items()]
    else:
        if len(gradients) != len(reference):
            raise ValueError(f"reference: {len(reference)} gradients, expected {len(gradients)} as in `gradients`")
        both = [(i, g, r) for i, (g, r) in enumerate(zip(gradients, reference, strict=True))]
    for name, g, r in both:
        if g is None or r is None:
            continue
        if g.shape != r.shape:  # it would be broadcast in silence
            raise ValueError(f"reference[{name}]: shape {list(r.shape)}, expected {list(g.shape)} as in `gradients`")
        yield g, r


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _whole(tensor: Tensor) -> Tensor:
    """The whole value of a sum over a sharded tensor (a no-op for an ordinary one)."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor is not None else tensor
