"""Pairs of low-rank factors among a module's parameters: what is merged is their product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from lightning_cl.functional.low_rank import low_rank_sum

_SIDES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


class Pair(NamedTuple):
    """Names of the two factors of one product ``B A``."""

    down: str
    up: str


def pairs_in(names: Iterable[str]) -> list[Pair]:
    """Returns the pairs of low-rank factors among parameter names, as peft names them."""
    known = set(names)
    found = []
    for down, up in _SIDES:
        for name in sorted(known):
            parts = name.split(".")
            if down in parts:
                other = ".".join(up if part == down else part for part in parts)
                if other in known:
                    found.append(Pair(name, other))
    return found


def merge_pair(pair: Pair, sets: Iterable[Mapping[str, Tensor]], weights: Iterable[float]) -> dict[str, Tensor]:
    """Returns factors of ``Σ weight · B A``, brought back to the rank of the first pair.

    Args:
        pair: names of the factors.
        sets: parameters by name, each with both factors.
        weights: one for each of them.
    """
    factors = [(values[pair.down].float(), values[pair.up].float()) for values in sets]
    first = factors[0]
    a, b = low_rank_sum(factors, list(weights), rank=first[0].shape[0])
    return {pair.down: a, pair.up: b}
