"""The class of a sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


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
