"""Pairs of low-rank factors among a module's parameters: what is merged is their product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_cl.functional.low_rank import Factors, low_rank_product, low_rank_sum, to_low_rank
from lightning_cl.functional.merge import Method, combine

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


def merge_products(
    sets: Sequence[Factors], method: Method, scale: float, density: float, seed: int, name: str
) -> Factors:
    """Returns factors of the merge ``P_0 + scale · m(P_1 − P_0, …, P_T − P_0)`` of products ``P = B A``.

    They have the rank, and the types, of the first pair. For ``mean`` and ``arithmetic`` they are the best of that rank
    for the exact sum, without any matrix ``[out, in]``. For the others such matrices are made, one for each task.

    Args:
        sets: ``(A, B)`` before the first task, and after each.
        method: see :func:`~lightning_cl.functional.merge.merge`.
        scale: see there.
        density: see there.
        seed: see there.
        name: of the parameter, from which ``dare`` draws.
    """
    start, *ends = sets
    rank, kinds = start[0].shape[0], (start[0].dtype, start[1].dtype)
    wide = [(a.float(), b.float()) for a, b in sets]
    if method in ("mean", "arithmetic"):
        weight = scale / len(ends) if method == "mean" else scale
        a, b = low_rank_sum(wide, [1.0 - weight * len(ends), *[weight] * len(ends)], rank=rank)
    else:
        before = low_rank_product(*wide[0])
        vectors = [low_rank_product(*pair) - before for pair in wide[1:]]
        a, b = to_low_rank(before + scale * combine(vectors, method, density, seed, name), rank)
    return a.to(kinds[0]), b.to(kinds[1])
