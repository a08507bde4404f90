"""Merging of tasks as arithmetic on their task vectors.

A task vector is what a task did to the weights, ``τ_t = θ_t − θ_0``. The merged weights are ``θ_0 + scale · m``::

    mean        m = Σ_t τ_t / T
    arithmetic  m = Σ_t τ_t                     Ilharco et al. 2023 (arXiv:2212.04089)
    ties        trim each τ_t to its largest entries; elect the sign of Σ_t τ_t for each entry;
                m = mean of the τ_t that are not zero and have that sign
                                                Yadav et al. 2023 (TIES, arXiv:2306.01708), algorithm 1
    dare        drop entries of each τ_t at random, keep each with probability p and divide it by p; m = mean
                                                Yu et al. 2024 (DARE, arXiv:2311.03099)
    magmax      m = the τ_t of the largest magnitude, entry by entry
                                                Marczak et al. 2024 (MagMax, arXiv:2407.06322)

All tasks have the same weight. The vectors come from one of two kinds of training, and the algebra is the same:

* sequential: each task starts from the weights of the task before, and ``τ_t`` still counts from ``θ_0``. The merge is
  deployed, and training continues from ``θ_t``. MagMax is made for this kind.
* independent: each task starts from ``θ_0``.

Low-rank adapters are merged as products: see :mod:`lightning_cl.functional.low_rank`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_cl.functional.tensors import check_fits, check_share, check_whole, count_of, largest, wide

Method: TypeAlias = Literal["mean", "arithmetic", "ties", "dare", "magmax"]
"""A way to merge task vectors."""

METHODS: tuple[str, ...] = get_args(Method)


@torch.no_grad()
def task_vector(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``τ = end − start`` in fp32 (fp64 for fp64 weights), for each name of `end`.

    Memory: one fp32 copy of `end`. Compute: one pass.

    Args:
        start: name to weights before the first task, ``θ_0``; more names than in `end` may be there.
        end: name to weights after the task.

    Raises:
        ValueError: if a name is missing in `start`, or if shapes or types do not fit.
    """
    vector = {}
    for name, tensor in end.items():
        if name not in start:
            raise ValueError(f"start: no tensor {name!r}, expected all names of `end`")
        check_fits(f"end[{name}]", tensor, start[name], of="`start`")
        vector[name] = wide(tensor) - wide(start[name]).to(tensor.device)
    return vector


@torch.no_grad()
def merge(
    base: Mapping[str, Tensor],
    task_vectors: Sequence[Mapping[str, Tensor]],
    method: Method = "mean",
    scale: float = 1.0,
    density: float = 0.5,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The merged weights ``base + scale · m``, with `m` from this module's table.

    The order of names never matters. The order of tasks matters for ``dare`` alone, whose draws depend on the position
    of a task. Sums are taken in fp32 (fp64 for fp64), and the result is rounded once to the type of `base`.

    Memory: the result, and fp32 copies of one tensor: two for ``mean``, ``arithmetic`` and ``magmax``, one for each
    task and six more for ``ties``, four for ``dare``. The vectors may be mappings that read a tensor from disk when it
    is asked for. Compute: a few passes over all vectors; ``ties`` adds a partial sort of each tensor.

    Args:
        base: name to ``θ_0``; names without a task vector are left out of the result.
        task_vectors: for each task, name to ``τ_t``; all with the same names, which are in `base`.
        method: ``mean``, ``arithmetic``, ``ties``, ``dare`` or ``magmax``.
        scale: the factor λ of the merged vector. For ``arithmetic`` values near ``1 / T`` are right; 1 adds up
            everything, which ruins models from T = 3 on.
        density: the share of entries of each tensor that ``ties`` keeps, or the probability to be kept of ``dare``;
            above 0 and up to 1. The other methods do not use it.
        seed: of the draws of ``dare``. Each tensor of each task has a generator of its own on the CPU.

    Returns:
        name to merged weights, in the type and on the device of `base`.

    Raises:
        ValueError: if there are no task vectors, if names, shapes or types do not fit, or if an argument is out of
            range. ``ties`` refuses NaN. ``ties`` and ``dare`` refuse tensors that are sharded over processes.

    Example:
        >>> import torch
        >>> base = {"w": torch.zeros(3)}
        >>> vectors = [{"w": torch.tensor([1.0, -2.0, 0.0])}, {"w": torch.tensor([3.0, 1.0, 0.0])}]
        >>> merge(base, vectors, "magmax")
        {'w': tensor([ 3., -2.,  0.])}
    """
    if method not in METHODS:
        raise ValueError(f"method: {method!r}, expected one of {', '.join(METHODS)}")
    check_share("density", density)
    if not math.isfinite(scale):
        raise ValueError(f"scale: {scale}, expected a finite number")
    if not task_vectors:
        raise ValueError("task_vectors: empty, expected at least one")
    names = list(task_vectors[0])
    for position, vector in enumerate(task_vectors):
        if different := sorted(set(names) ^ set(vector)):
            raise ValueError(
                f"task_vectors[{position}]: {different[0]!r} is not in all task vectors, expected the same names in all"
            )
    merged = {}
    for name in names:
        if name not in base:
            raise ValueError(f"base: no tensor {name!r}, expected all names of `task_vectors`")
        weights = base[name]
        vectors = []
        for position, vector in enumerate(task_vectors):
            tensor = vector[name]
            check_fits(f"task_vectors[{position}][{name}]", tensor, weights, of="`base`")
            vectors.append(tensor.to(weights.device))
        combined = combine(vectors, method, density, seed, name)
        merged[name] = (wide(weights) + combined.mul_(scale)).to(weights.dtype)
    return merged


@torch.no_grad()
def combine(
    vectors: Sequence[Tensor], method: Method = "mean", density: float = 0.5, seed: int = 0, name: str = ""
) -> Tensor:
    """The merged vector of one parameter, before the scale.

    Args:
        vectors: that parameter's part of each task vector, of one shape; at least one.
        method: see :func:`merge`.
        density: see :func:`merge`.
        seed: see :func:`merge`.
        name: of the parameter, from which ``dare`` draws.

    Returns:
        A new tensor in fp32, or in fp64 if a vector is.
    """
    if method == "ties":
        return ties(vectors, density)
    if method == "magmax":
        return magmax(vectors)
    total = torch.zeros_like(wide(vectors[0]))
    for position, vector in enumerate(vectors):
        if method == "dare":
            total = total + dare(vector, density, generator_of(seed, position, name))
        else:
            total = total + wide(vector)
    return total if method == "arithmetic" else total.div_(len(vectors))


@torch.no_grad()
def accumulate(total: Mapping[str, Tensor] | None, vector: Mapping[str, Tensor], method: Method) -> dict[str, Tensor]:
    """Adds one task vector to a running merge, whose size does not grow with the number of tasks.

    The running merge of ``mean`` and ``arithmetic`` is the sum, and that of ``magmax`` is itself. It is used as a task
    vector: ``merge(base, [total], "arithmetic", scale=1 / T)`` is the mean of T tasks, and
    ``merge(base, [total], "magmax")`` is their MagMax.

    Memory: one fp32 copy of the weights.

    Args:
        total: the running merge, which is not changed; None before the first task.
        vector: the task vector to add, with the same names.
        method: ``mean``, ``arithmetic`` or ``magmax``.

    Raises:
        ValueError: if the method needs all vectors at once, or if names, shapes or types do not fit.
    """
    if method not in ("mean", "arithmetic", "magmax"):
        raise ValueError(
            f"method: {method!r} has no running form, expected mean, arithmetic or magmax; keep all task vectors"
        )
    if total is None:
        return {name: wide(tensor).clone() for name, tensor in vector.items()}
    if different := sorted(total.keys() ^ vector.keys()):
        where = "vector" if different[0] in total else "total"
        raise ValueError(f"{where}: no tensor {different[0]!r}, expected the same names in `total` and `vector`")
    result = {}
    for name, tensor in vector.items():
        check_fits(f"vector[{name}]", tensor, total[name], of="`total`")
        both = [total[name], tensor.to(total[name].device)]
        result[name] = magmax(both) if method == "magmax" else wide(both[0]) + wide(both[1])
    return result


@torch.no_grad()
def trim(vector: Tensor, density: float) -> Tensor:
    """The vector with all but its largest entries by magnitude set to 0.

    The number that stays is ``density · entries``, rounded to the nearest and at least 1. Of equal magnitudes the lower
    index stays.

    Args:
        vector: of any shape.
        density: the share that stays, above 0 and up to 1.

    Returns:
        A new tensor in fp32, or in fp64 if the vector is.

    Raises:
        ValueError: if an entry is NaN, or if the density is out of range.
    """
    check_share("density", density)
    vector = wide(vector)
    if density == 1.0:
        return vector.clone()
    return vector.masked_fill(~largest(vector.abs(), count_of(density, vector.numel())), 0.0)


@torch.no_grad()
def ties(vectors: Sequence[Tensor], density: float) -> Tensor:
    """TIES of one parameter: trim, elect signs, and the mean of those that agree (algorithm 1, without λ).

    A sum of exactly 0 elects the positive sign. An entry where no vector agrees is 0.

    Args:
        vectors: of one shape; at least one.
        density: the share of entries that each vector keeps, above 0 and up to 1.

    Returns:
        A new tensor in fp32, or in fp64 if a vector is.

    Raises:
        ValueError: if an entry is NaN, or if the density is out of range.
    """
    trimmed = [trim(vector, density) for vector in vectors]
    total = torch.zeros_like(trimmed[0])
    for vector in trimmed:
        total = total + vector
    positive = total >= 0
    agreeing, count = torch.zeros_like(total), torch.zeros_like(total)
    for vector in trimmed:
        agrees = torch.where(positive, vector > 0, vector < 0)
        agreeing.add_(torch.where(agrees, vector, 0.0))
        count.add_(agrees)
    return agreeing.div_(count.clamp_(min=1.0))


@torch.no_grad()
def dare(vector: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """DARE of one vector: each entry stays with probability `density`, divided by it, or is 0.

    The expectation over draws is the vector. The draws are made on the CPU, so that every device gets the same.

    Args:
        vector: of any shape.
        density: the probability to stay, above 0 and up to 1; 1 keeps every bit and draws nothing.
        generator: a CPU generator.

    Returns:
        A new tensor in fp32, or in fp64 if the vector is.

    Raises:
        ValueError: if the density is out of range, or if the vector is sharded over processes.
    """
    check_share("density", density)
    check_whole("vector", vector)
    vector = wide(vector)
    if density == 1.0:
        return vector.clone()
    stays = torch.rand(vector.shape, generator=generator) < density
    return vector.div(density).masked_fill_(~stays.to(vector.device), 0.0)


@torch.no_grad()
def magmax(vectors: Sequence[Tensor]) -> Tensor:
    """The entry of the largest magnitude, over vectors of one shape.

    Of two entries of the same magnitude the positive one is taken, so the order of the vectors does not matter. NaN
    stays NaN.

    Args:
        vectors: at least one.

    Returns:
        A new tensor in fp32, or in fp64 if a vector is.
    """
    highest = lowest = wide(vectors[0])
    for vector in vectors[1:]:
        vector = wide(vector)
        highest, lowest = torch.maximum(highest, vector), torch.minimum(lowest, vector)
    return torch.where(highest >= -lowest, highest, lowest)


def generator_of(seed: int, position: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter of one task: the same on every process, in every order of names.

    Args:
        seed: of the whole merge.
        position: of the task.
        name: of the parameter.
    """
    digest = hashlib.sha256(f"{seed}/{position}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
