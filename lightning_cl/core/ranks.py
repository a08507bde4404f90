"""Values that all processes of a run gather from each other."""

from __future__ import annotations

from typing import Any

import torch


def from_all_ranks(value: Any) -> list[Any]:
    """One value per rank, on all of them; the value alone where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
