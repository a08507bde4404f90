"""The down projection of InfLoRA: a LoRA whose inputs are chosen before it trains.

A new LoRA ``ΔW = s · B A`` of a task reads its inputs through the rows of ``A``, which stays frozen; ``B`` starts at
zero and trains. The rows lie in the complement of the earlier tasks' input directions ``M``, and hold as much of the
new task's inputs as ``r`` rows can::

    A = scale · [e_1 … e_r]ᵀ,   e_i the leading eigenvectors of (I − M Mᵀ) C (I − M Mᵀ),   C = Σ x xᵀ

So ``ΔW x = 0`` for each ``x`` in the span of ``M``, whatever ``B`` learns. Inputs of earlier tasks have a small part
outside of ``M``, which is not protected. After the task ``M`` grows by :func:`~lightning_cl.functional.grow_basis`.

Source: Liang & Li 2024 (InfLoRA), CVPR, arXiv:2404.00228, section 3.2. The paper's names are the other way round: its
``B_t`` is the down projection, its ``A_t`` the one that trains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.input_space import spectrum_outside

SCALE = 3**-0.5
"""The factor on the rows in the authors' code."""


@torch.no_grad()
def design_down_projection(
    second_moment: Tensor, rank: int, basis: Tensor | None = None, scale: float = SCALE
) -> Tensor:
    """The rows ``A`` of a LoRA that reads the most of a task's inputs and nothing of the protected ones.

    The rows are orthogonal to each other and to the basis, each of length `scale`. Where the inputs have fewer than
    `rank` directions outside the basis, the other rows are any directions of the complement.

    Memory and compute: those of :func:`~lightning_cl.functional.input_space.spectrum_outside`, once per task and layer.

    Args:
        second_moment: ``C``, ``[in, in]``: of the new task's inputs, before training.
        rank: the number of rows, at least 1.
        basis: ``M``, ``[in, k]`` with orthonormal columns, the earlier tasks' input directions; None: no earlier task.
        scale: the length of each row.

    Returns:
        ``[rank, in]`` in fp32 (fp64 for a second moment in fp64). How much of it lies in the span of the basis is
        ``protected_share(A, right=basis)``: 0 up to rounding.

    Raises:
        ValueError: if `rank` is less than 1 or more than the directions that are left, if `scale` is not a positive
            number, if the shapes do not fit, or if a value is not finite.

    Example::

        >>> energy = torch.diag(torch.tensor([1.0, 6.0, 3.0]))
        >>> protected = torch.tensor([[0.0], [1.0], [0.0]])
        >>> design_down_projection(energy, rank=1, basis=protected, scale=1.0).abs()
        tensor([[0., 0., 1.]])
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: {scale}, expected a positive number")
    _, vectors = spectrum_outside(second_moment, basis)
    left = vectors.shape[1]
    if not 1 <= rank <= left:
        taken = second_moment.shape[0] - left
        raise ValueError(
            f"rank: {rank}, expected 1 to {left}: {taken} of {second_moment.shape[0]} input directions are protected"
        )
    kept = torch.promote_types(second_moment.dtype, torch.float32)
    return (scale * vectors[:, :rank].T).to(second_moment.device, kept).contiguous()
