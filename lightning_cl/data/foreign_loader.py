"""Settings of a user's ``DataLoader`` that a :class:`~lightning_cl.data.loader.TaskLoader` takes over."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, SubsetRandomSampler

from lightning_cl.data.plannable import why_not_plannable

_KEPT_SETTINGS = ("num_workers", "pin_memory", "worker_init_fn", "prefetch_factor", "timeout")


def taken_over(loader: DataLoader[Any], for_training: bool, placement: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``TaskLoader`` that gives the same batches as a user's loader, in the same order.

    Args:
        loader: over a map-style data set, with automatic batching.
        for_training: False: without shuffling, which would draw from the random states of training.
        placement: further arguments of ``TaskLoader``; a ``batch_size`` overrides the loader's.

    Raises:
        TypeError: if the loader's batches cannot be planned by index; the message says why.
    """
    reason = why_not_plannable(loader)
    if reason is not None:
        raise TypeError(reason)
    batches: Any = loader.batch_sampler  # its sampler, not the loader's: they differ if the user gave it
    sampler = batches.sampler
    shuffle = isinstance(sampler, RandomSampler)
    if isinstance(sampler, SubsetRandomSampler) and not for_training:
        sampler = sorted(int(index) for index in sampler.indices)
    # Shuffling on several ranks needs one order for all: drawn from the seed.
    own_order = isinstance(sampler, SequentialSampler) or (shuffle and not for_training)
    own_order = own_order or (
        placement.get("world_size", 1) > 1
        and shuffle
        and not sampler.replacement
        and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    settings = {name: getattr(loader, name) for name in _KEPT_SETTINGS}
    if settings["num_workers"]:
        settings["multiprocessing_context"] = loader.multiprocessing_context
    else:
        settings.pop("prefetch_factor")
    return {
        **placement,
        "dataset": loader.dataset,
        "batch_size": placement.get("batch_size") or batches.batch_size,
        "collate_fn": loader.collate_fn,
        "shuffle": shuffle and for_training,
        "sampler": None if own_order else sampler,
        "drop_last": batches.drop_last,
        "settings": settings,
        "like": loader if for_training else None,
    }
