"""A model's number of positions: do the samples fit?"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn


def check_positions(model: Any, needed: int, max_length: int) -> None:
    """Finds samples that are longer than what a model was made for.

    Learned positions end where their table ends. Others (rotary ones, ALiBi) continue, but what comes after
    ``max_position_embeddings`` the model has not learnt.

    Args:
        model: a ``transformers`` model.
        needed: positions in the longest row of a batch.
        max_length: of the DataModule.

    Raises:
        MisconfigurationException: if the model has learned positions, and not as many.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or needed <= limit:
        return
    found = f"max_length={max_length}: there are samples of {needed} tokens, and the model"
    if _has_table(model, limit):
        raise MisconfigurationException(
            f"{found} has {limit} positions (n_positions, max_position_embeddings): give a max_length of at most"
            f" {limit}"
        )
    rank_zero_warn(
        f"{found} was made for {limit} positions (max_position_embeddings): it has not learnt those behind them; give a"
        f" max_length of at most {limit}, unless it is to learn longer texts"
    )


def _has_table(model: Any, limit: int) -> bool:
    """Returns True if there is an embedding with a row for each position, apart from that of the tokens."""
    tokens = model.get_input_embeddings().weight
    # OPT's and BART's have two rows more.
    return any(
        isinstance(module, nn.Embedding) and limit <= module.num_embeddings <= limit + 2
        for module in model.modules()
        if getattr(module, "weight", None) is not tokens
    )
