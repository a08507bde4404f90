"""Progressive networks (Rusu et al. 2016): lateral connections from the frozen columns of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def lateral_sum(
    hidden: Sequence[Tensor],
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scales: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """The sum that earlier columns add to one layer of a new column: Σ_j U_j σ(α_j V_j h_j) (equation 2).

    ``h_j`` is what column j has one layer below. With all ``U_j`` zero the sum is 0 to the bit.

    Args:
        hidden: for each earlier column ``h_j``, ``[…, inputs_j]``.
        down: for each of them ``V_j``, ``[width, inputs_j]``.
        up: for each of them ``U_j``, ``[outputs, width]``.
        scales: for each of them ``α_j``, a number.
        activation: σ, elementwise.

    Returns:
        ``[…, outputs]``.

    Raises:
        ValueError: if there is no earlier column, or the lists differ in length.

    Compute: ``width · (inputs_j + outputs)`` multiplications for each row and column.

    Example:
        >>> h, one = torch.tensor([[2.0, -1.0]]), torch.eye(2)
        >>> lateral_sum([h], [one], [one], [torch.tensor(0.5)])
        tensor([[1., 0.]])
    """
    counts = {"hidden": len(hidden), "down": len(down), "up": len(up), "scales": len(scales)}
    if not hidden or len(set(counts.values())) > 1:
        raise ValueError(f"{counts}: expected one entry for each earlier column in all four lists, and at least one")
    terms = [activation(scale * (h @ v.T)) @ u.T for h, v, u, scale in zip(hidden, down, up, scales, strict=True)]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def count_parameters(widths: Sequence[int], columns: int, lateral_width: int) -> int:
    """The number of parameters of a progressive network whose columns are all of the same widths.

    Each layer has ``inputs · outputs + outputs``. Each layer but the first has
    ``lateral_width · (inputs + outputs) + 1`` for each pair of columns: the total grows with the square of the tasks.

    Args:
        widths: of input, hidden layers and output.
        columns: one for each task.
        lateral_width: rows of ``V_j``.

    Raises:
        ValueError: if there are fewer than two widths, or a number is negative.

    Example:
        >>> count_parameters([4, 8, 2], columns=2, lateral_width=3)
        147
    """
    if len(widths) < 2 or min(*widths, columns, lateral_width) < 0:
        raise ValueError(
            f"widths={list(widths)!r}, columns={columns!r}, lateral_width={lateral_width!r}: expected at least two"
            " widths, and no negative number"
        )
    pairs = list(pairwise(widths))
    column = sum(inputs * outputs + outputs for inputs, outputs in pairs)
    lateral = sum(lateral_width * (inputs + outputs) + 1 for inputs, outputs in pairs[1:])
    return columns * column + columns * (columns - 1) // 2 * lateral
