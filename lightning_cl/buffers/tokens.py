"""Token counts and the class of a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def loss_tokens(sample: Any) -> int | None:
    """Counts the tokens of a sample that bear loss in next-token prediction; None for no token sequence.

    Known are the records of this library (``loss_mask``) and Hugging Face's (``labels`` with −100 where there is no
    loss), both as dictionaries with one-dimensional fields. The first token is predicted by nothing.
    """
    if not isinstance(sample, dict):
        return None
    for key, bears_loss in (("loss_mask", lambda t: t != 0), ("labels", lambda t: t != -100)):
        if key in sample and "input_ids" in sample:
            values = torch.as_tensor(sample[key])
            if values.ndim == 1 and not values.is_floating_point():
                return int(bears_loss(values[1:]).sum())
    return None


def token_count(sample: Any) -> int:
    """Tokens of a sample; 0 for one that is no token sequence."""
    return len(sample["input_ids"]) if loss_tokens(sample) is not None else 0


def label_of(sample: Any) -> int | None:
    """The class of ``(input, class)`` or of a dictionary with ``label`` or ``labels``; None where there is none."""
    if isinstance(sample, dict):
        value = sample.get("label", sample.get("labels"))
    elif isinstance(sample, (tuple, list)) and len(sample) == 2:
        value = sample[1]
    else:
        return None
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if tuple(value.shape) not in ((), (1,)):
            return None
        value = value.item()
    return int(value) if isinstance(value, int) else None
