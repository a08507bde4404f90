"""Means of token embeddings: a prompt as the router sees it (:mod:`lightning_cl.functional.routing`)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.routing_limit import row_keys


def prompt_means(embeddings: Tensor, mask: Tensor, tokens: int | None = 64) -> Tensor:
    """Mean of the embeddings of each prompt's first tokens; padding on either side does not count.

    Args:
        embeddings: token embeddings of shape ``[batch, length, width]``, in any floating-point type.
        mask: ``[batch, length]``, True or non-zero at the tokens of the prompt.
        tokens: how many tokens of a prompt count at most; None: all.

    Returns:
        fp32 ``[batch, width]``.

    Raises:
        ValueError: if the shapes do not fit, or a row has no token.

    Example:
        >>> import torch
        >>> from lightning_cl.functional.prompt_means import prompt_means
        >>> prompt_means(torch.tensor([[[9.0], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]]))
        tensor([[2.]])
    """
    return _means(embeddings, _counted(embeddings, mask, tokens))


def prompt_beginnings(embeddings: Tensor, mask: Tensor, tokens: int | None = 64) -> tuple[Tensor, Tensor]:
    """Mean of a beginning of each prompt: one token of it, or two, four, eight and so on, but not all that count.

    They show how far from their task shorter prompts are. Each length is equally likely; a single token is kept whole.
    The draw depends on the prompt alone, so it is the same in any order.

    Args:
        embeddings: as for :func:`prompt_means`.
        mask: as for :func:`prompt_means`.
        tokens: as for :func:`prompt_means`.

    Returns:
        The means, fp32 ``[batch, width]``, and how many tokens each is of, int64 ``[batch]``.

    Raises:
        ValueError: as :func:`prompt_means`.
    """
    counted = _counted(embeddings, mask, tokens)
    counts = counted.sum(1)
    powers = 2 ** torch.arange(63, device=counts.device)
    choices = (powers < counts[:, None]).sum(1).clamp(min=1)
    lengths = powers[row_keys(_means(embeddings, counted)) % choices]
    return _means(embeddings, counted & (counted.cumsum(1) <= lengths[:, None])), lengths


def _counted(embeddings: Tensor, mask: Tensor, tokens: int | None) -> Tensor:
    """The first tokens of each prompt, as a mask."""
    if embeddings.ndim != 3 or mask.shape != embeddings.shape[:2]:
        raise ValueError(
            f"mask of shape {list(mask.shape)}, embeddings of shape {list(embeddings.shape)}: expected [batch, length]"
            " and [batch, length, width]"
        )
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens}: expected a positive integer, or None for all tokens")
    chosen = mask != 0
    if tokens is not None:
        chosen = chosen & (chosen.cumsum(1) <= tokens)
    counts = chosen.sum(1)
    if bool((counts == 0).any()):
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"mask: rows {empty[:3]} have no token; each row needs at least one")
    return chosen


def _means(embeddings: Tensor, chosen: Tensor) -> Tensor:
    kept = embeddings.float().masked_fill(~chosen[..., None], 0.0)  # what stands in padding may be NaN
    return kept.sum(1) / chosen.sum(1, keepdim=True)
