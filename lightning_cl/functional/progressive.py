"""Lateral connections of progressive networks (Rusu et al. 2016), and their linear form for adapters.

A column is the model of one task. Column ``k`` sees what the earlier columns ``j < k`` have at the same depth through
small bottlenecks (Rusu et al. 2016, arXiv:1606.04671, eq. 2, here added to a residual stream)::

    h_k ← h_k + Σ_{j<k} U_j σ(α_j V_j h_j)

``U`` starts at zero, so a new column computes what it computed without the connections, bit for bit.

The form that LoRAs allow keeps one model and one adapter per task. Earlier adapters are frozen, and a scalar gate per
layer and earlier task, 0 at the start, says how much of each the new task uses::

    y = W x + s · B_t A_t x + Σ_{i<t} g_i · s · B_i A_i x

It is linear, so a task's adapters fold into one of rank ``Σ r_i`` (:func:`fold_gated_adapters`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def lateral_sum(
    hidden: Sequence[Tensor],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    gates: Sequence[Tensor],
    activation: Callable[[Tensor], Tensor] = torch.relu,
) -> Tensor:
    """``Σ_j U_j σ(α_j V_j h_j)``: what the earlier columns add to the newest at one depth.

    Compute: ``4 · positions · width · r`` operations per earlier column; parameters: ``2 · width · r + 1``.

    Args:
        hidden: ``h_j``, each ``[..., width]``, of the earlier columns; at least one.
        downs: ``V_j``, each ``[r, width]``.
        ups: ``U_j``, each ``[width, r]``; zeros at the start.
        gates: ``α_j``, each a scalar or ``[r]``. A gate of 0 with a ``U`` of zeros would never get a gradient.
        activation: ``σ``, entry by entry.

    Returns:
        ``[..., width]``, to be added to the newest column's stream.

    Raises:
        ValueError: if there is no earlier column, or the numbers of the parts differ.
    """
    _check_counts("hidden", hidden, {"downs": downs, "ups": ups, "gates": gates})
    parts = [activation(g * (h @ v.T)) @ u.T for h, v, u, g in zip(hidden, downs, ups, gates, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


@torch.no_grad()
def fold_gated_adapters(
    downs: Sequence[Tensor], ups: Sequence[Tensor], gates: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One adapter that computes ``Σ_i g_i B_i A_i``, exactly: the factors next to each other.

    Memory: ``Σ r_i · (in + out)`` numbers; the product itself is never made.

    Args:
        downs: ``A_i``, each ``[r_i, in]``; at least one.
        ups: ``B_i``, each ``[out, r_i]``.
        gates: ``g_i``; 1 for the newest task's own adapter. Where scales differ, hand in ``g_i · s_i / s``.

    Returns:
        The down projection ``[Σ r_i, in]`` and the up projection ``[out, Σ r_i]``, which holds the gates.

    Raises:
        ValueError: if there is no adapter, if the numbers of the parts differ, or if the factors of one do not fit.

    Example::

        >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> down, up = fold_gated_adapters([one, two], [one.T, one.T], gates=[0.5, 1.0])
        >>> up @ down
        tensor([[0.5000, 1.0000],
                [0.0000, 0.0000]])
    """
    _check_counts("downs", downs, {"ups": ups, "gates": gates})
    for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
        if up.shape[-1] != down.shape[0] or up.shape[0] != ups[0].shape[0] or down.shape[-1] != downs[0].shape[-1]:
            expected = f"[{ups[0].shape[0]}, r] and [r, {downs[0].shape[-1]}]"
            raise ValueError(f"ups[{i}], downs[{i}]: {list(up.shape)} and {list(down.shape)}, expected {expected}")
    return torch.cat(list(downs)), torch.cat([up * gate for up, gate in zip(ups, gates, strict=True)], dim=1)


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


def _check_counts(name: str, first: Sequence[object], others: dict[str, Sequence[object]]) -> None:
    if not first:
        raise ValueError(f"{name}: no entry, expected at least one")
    for other, parts in others.items():
        if len(parts) != len(first):
            raise ValueError(f"{other}: {len(parts)} entries, expected {len(first)} as in `{name}`")
