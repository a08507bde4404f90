"""Masks on the rows of gradients, by the magnitude of a linear layer's outputs.

Du et al. 2024 (MIGU, EMNLP Findings, arXiv:2406.17245): tasks differ in which outputs of a linear layer are
large, so that updates of the large ones alone disturb other tasks less. For the outputs ``h_t`` of the layer at the
positions t of a step::

    n_i = Σ_t |h_ti| / ‖h_t‖₁,   gradient of row i ← 0  for the share `masked` of rows with the smallest n_i

The rows are those of the weight ``[out, in]``, of the bias, and of ``B`` of a low-rank adapter. The authors mask from
the second task on, with 0.7. An optimizer with momentum still moves masked rows; after AdamW's step the effect is
weaker than the formula says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.tensors import check_share, count_of, largest, wide


@torch.no_grad()
def output_magnitudes(outputs: Tensor, counted: Tensor | None = None) -> Tensor:
    """``n_i = Σ_t |h_ti| / ‖h_t‖₁`` of one batch: the part of each output in the size of all.

    Every position has weight 1, so that single positions of a huge norm do not rule. The sums of micro-batches and
    of processes add up to the sum of the step. Positions where all outputs are zero have no part.

    Memory: two fp32 copies of the outputs. Compute: three passes over them.

    Args:
        outputs: of the layer, ``[..., out]``.
        counted: a mask ``[...]``, True at positions that count; it leaves out padding. None: all.

    Returns:
        ``[out]`` in fp32, or in fp64 for fp64 outputs; the sum is the number of positions that count.

    Raises:
        ValueError: if `counted` does not fit.
    """
    sizes = wide(outputs.detach()).abs()
    if counted is not None:
        if counted.shape != outputs.shape[:-1]:
            raise ValueError(f"counted: shape {list(counted.shape)}, expected {list(outputs.shape[:-1])}")
        sizes = sizes[counted.to(outputs.device, torch.bool)]
    sizes = sizes.reshape(-1, outputs.shape[-1])
    norms = sizes.sum(-1, keepdim=True)
    return (sizes / norms.masked_fill(norms == 0, 1.0)).sum(0)


def row_mask(magnitudes: Tensor, masked: float = 0.7) -> Tensor:
    """A mask that is True for the rows that are updated: those of the largest magnitudes.

    The number of masked rows is ``masked · out``, rounded to the nearest; at least one row is updated. Of equal
    magnitudes the lower row is updated.

    Args:
        magnitudes: ``[out]``, sums of :func:`output_magnitudes`.
        masked: the share of rows that are not updated, from 0 to below 1.

    Returns:
        ``[out]``, boolean.

    Raises:
        ValueError: if the share is out of range, if `magnitudes` has another shape, or if one is NaN.

    Example:
        >>> import torch
        >>> row_mask(torch.tensor([0.1, 0.6, 0.0, 0.3]), masked=0.5)
        tensor([False,  True, False,  True])
    """
    check_share("masked", masked, zero=True)
    if masked == 1.0:
        raise ValueError("masked: 1.0, expected below 1, since no row would be updated")
    if magnitudes.dim() != 1:
        raise ValueError(f"magnitudes: shape {list(magnitudes.shape)}, expected [out]")
    rows = len(magnitudes)
    hidden = min(count_of(masked, rows), rows - 1) if masked > 0 else 0
    return largest(magnitudes, rows - hidden)


@torch.no_grad()
def mask_rows_(gradient: Tensor, updated: Tensor) -> None:
    """Sets the rows of a gradient to 0 in place that are not updated; the others keep every bit.

    Args:
        gradient: of a weight ``[out, in]``, of a bias ``[out]``, or of a low-rank ``B``, ``[out, r]``.
        updated: ``[out]``, boolean: :func:`row_mask`.

    Raises:
        ValueError: if the rows do not fit.
    """
    if gradient.dim() == 0 or updated.shape != gradient.shape[:1]:
        raise ValueError(f"updated: shape {list(updated.shape)}, expected {list(gradient.shape[:1])}: one for each row")
    # Not a product: 0 times infinity is not 0.
    rows = (~updated).to(gradient.device).reshape(-1, *[1] * (gradient.dim() - 1))
    gradient.masked_fill_(rows, 0.0)
