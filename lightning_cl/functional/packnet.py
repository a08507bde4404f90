"""Packing of several tasks into one set of weights: each entry of a weight belongs to at most one task.

Mallya & Lazebnik 2018 (PackNet, CVPR, arXiv:1711.05769) train all free weights, keep a share of them for the task by
magnitude, set the others to zero, and train the kept ones again. Zeros would destroy a pretrained model, so that here
*changes* are packed: an entry that no task owns has the value of the base. A task t proceeds in two phases::

    1. train the entries that nobody owns
       claim   owner ← t at the share of the largest |θ − θ_base| among them, tensor by tensor
       reset   θ ← θ_base where nobody is the owner
    2. train the entries that t owns

The view of task j has the entries owned by the tasks 1 … j, and the base elsewhere. Later tasks do not touch them, so
that it is the same for ever, bit for bit. The view of task 0 is the base.

Owners are tensors of type uint8: 0 for nobody, t for task t, counted from 1 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cl.functional.tensors import check_fits, check_share, count_of, largest, wide

Tensors = Mapping[str, Tensor]


def no_owners(parameters: Tensors) -> dict[str, Tensor]:
    """Owners before the first task: zeros of type uint8, 1 byte for each entry.

    Args:
        parameters: name to weight.
    """
    return {name: torch.zeros_like(p, dtype=torch.uint8) for name, p in parameters.items()}


@torch.no_grad()
def claim(base: Tensors, now: Tensors, owner: Tensors, task: int, share: float) -> dict[str, Tensor]:
    """Gives a task the entries that it changed most, among those that nobody owns.

    Each tensor gives ``share`` of its free entries, rounded to the nearest and at least one while there are any. Of
    equal changes the lower index is taken. A share of ``1 / (T − t + 1)`` gives T tasks equal parts.

    Memory: the new owners, and about 30 bytes for each entry of the largest tensor. Compute: one partial sort of each.

    Args:
        base: name to weight before the first task; more names than in `now` may be there.
        now: name to weight after phase 1 of the task.
        owner: name to owners; not changed.
        task: the task's number, from 1 to 255, that owns nothing yet.
        share: of the free entries of each tensor, above 0 and up to 1.

    Returns:
        name to new owners, for each name of `now`.

    Raises:
        ValueError: if an argument is out of range, if names, shapes or types do not fit, if the task owns entries
            already, or if a weight is NaN or sharded over processes.
    """
    _check_task(task, least=1)
    check_share("share", share)
    owners = {}
    for name, weight in now.items():
        start, owned = _get("base", base, name), _get_owner(owner, name, weight)
        check_fits(f"base[{name}]", start, weight, of="`now`")
        if bool((owned == task).any()):
            raise ValueError(f"task: {task} owns entries of {name!r} already, expected a new task's number")
        free = owned == 0
        number = count_of(share, int(free.sum()))
        change = (wide(weight) - wide(start).to(weight.device)).abs()
        owners[name] = owned.masked_fill(largest(change, number, among=free), task)
    return owners


@torch.no_grad()
def task_view(base: Tensors, now: Tensors, owner: Tensors, task: int) -> dict[str, Tensor]:
    """The weights of a task: those owned by tasks 1 … `task` as they are now, and the base elsewhere, bit for bit.

    Args:
        base: name to weight before the first task.
        now: name to weight now.
        owner: name to owners.
        task: a task's number; 0 gives the base, and 255 all that is owned.

    Returns:
        name to weight, new tensors in the type of `now`.

    Raises:
        ValueError: if the task's number is out of range, or if names, shapes or types do not fit.

    Example:
        >>> import torch
        >>> owner = {"w": torch.tensor([1, 2, 0], dtype=torch.uint8)}
        >>> task_view({"w": torch.zeros(3)}, {"w": torch.tensor([5.0, 6.0, 7.0])}, owner, task=1)
        {'w': tensor([5., 0., 0.])}
    """
    _check_task(task, least=0)
    result = {}
    for name, weight in now.items():
        start, owned = _get("base", base, name), _get_owner(owner, name, weight)
        check_fits(f"base[{name}]", start, weight, of="`now`")
        mine = (owned > 0) & (owned <= task)
        result[name] = torch.where(mine, weight, start.to(weight.device, weight.dtype))
    return result


def movable(owner: Tensors, task: int | None = None) -> dict[str, Tensor]:
    """Masks of the entries that may change: those of nobody in phase 1, and those of the task in phase 2.

    Args:
        owner: name to owners.
        task: the task's number in phase 2; None in phase 1.

    Returns:
        name to boolean tensor.

    Raises:
        ValueError: if the task's number is out of range.
    """
    if task is not None:
        _check_task(task, least=1)
    return {name: owned == (0 if task is None else task) for name, owned in owner.items()}


@torch.no_grad()
def hold_(parameters: Tensors, kept: Tensors, may_move: Tensors) -> None:
    """``θ ← kept`` in place, wherever an entry may not change.

    It belongs after the optimizer's step: momentum and weight decay move entries whose gradient is zero.

    Memory: one mask of the largest tensor. Compute: one pass.

    Args:
        parameters: name to weight.
        kept: name to weight at the start of the phase.
        may_move: name to mask, True where an entry may change.

    Raises:
        ValueError: if names, shapes or types do not fit.
    """
    for name, weight in parameters.items():
        old, may = _get("kept", kept, name), _get("may_move", may_move, name)
        check_fits(f"kept[{name}]", old, weight, of="`parameters`")
        if may.dtype != torch.bool or may.shape != weight.shape:
            raise ValueError(
                f"may_move[{name}]: {may.dtype} of shape {list(may.shape)}, expected bool of shape {list(weight.shape)}"
            )
        weight.copy_(torch.where(may, weight, old.to(weight.device, weight.dtype)))


def free_share(owner: Tensors) -> float:
    """The share of all entries that nobody owns; 0.0 where there are no entries.

    Args:
        owner: name to owners.
    """
    total = sum(owned.numel() for owned in owner.values())
    return sum(int((owned == 0).sum()) for owned in owner.values()) / total if total else 0.0


def _get(argument: str, tensors: Tensors, name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"{argument}: no tensor {name!r}, expected one for each weight")
    return tensors[name]


def _get_owner(owner: Tensors, name: str, weight: Tensor) -> Tensor:
    owned = _get("owner", owner, name)
    if owned.dtype != torch.uint8 or owned.shape != weight.shape:
        raise ValueError(
            f"owner[{name}]: {owned.dtype} of shape {list(owned.shape)}, expected uint8 of shape {list(weight.shape)}"
        )
    return owned.to(weight.device)


def _check_task(task: int, least: int) -> None:
    if not least <= task <= 255:
        raise ValueError(f"task: {task}, expected a number from {least} to 255")
