"""What an importance is like, in numbers: the means to see that a penalty is not silently dead."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_cl.callbacks.placement import whole

_SAMPLED_VALUES = 1_000_000


@torch.no_grad()
def describe_importance(importance: Mapping[str, Tensor]) -> dict[str, Any]:
    """An importance in numbers: parameters, total, share of zeros, and quantiles (of at most a million values)."""
    count = sum(t.numel() for t in importance.values())
    if count == 0:
        return {"parameters": 0, "total": 0.0, "share_of_zeros": 1.0, "quantiles": {}, "layers": {}}
    stride = max(1, count // _SAMPLED_VALUES)
    values = torch.cat([whole(t).flatten()[::stride].float().cpu() for t in importance.values()])
    values = values.sort().values
    quantiles = {str(q): float(values[min(int(q * len(values)), len(values) - 1)]) for q in (0.0, 0.5, 0.9, 0.99, 1.0)}
    return {
        "parameters": count,
        "total": sum(float(whole(t.sum(dtype=torch.float64))) for t in importance.values()),
        "share_of_zeros": float((values == 0).float().mean()),
        "quantiles": quantiles,
        "layers": mean_by_layer(importance),
    }


@torch.no_grad()
def mean_by_layer(importance: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """The mean importance of each kind of tensor in each layer, for the picture.

    Returns:
        kind (a name with ``*`` for its layer's number, as ``model.layers.*.self_attn.q_proj.weight``) to layer (its
        number, or an empty text for what stands outside of the numbered layers) to mean.
    """
    sums: dict[str, dict[str, float]] = {}
    for name, tensor in importance.items():
        found = re.search(r"(^|\.)(\d+)\.", name)
        layer = found.group(2) if found else ""
        kind = f"{name[: found.start(2)]}*{name[found.end(2) :]}" if found else name
        sums.setdefault(kind, {})[layer] = float(whole(tensor.float().mean()))
    return sums
