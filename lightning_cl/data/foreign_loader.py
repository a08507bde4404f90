"""Users' own loaders: checks if they can be planned by index, and takes over their samples and settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_cl.data.batch_source import TaskBatches
from lightning_cl.random_state import untouched_random_state

_KEPT_SETTINGS = ("num_workers", "pin_memory", "worker_init_fn", "prefetch_factor", "timeout")


def taken_over(loader: DataLoader[Any], for_training: bool, placement: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a ``TaskLoader`` that gives the same batches as a user's loader, in the same order.

    Args:
        loader: a loader over a map-style data set, with automatic batching.
        for_training: False switches shuffling off, since it would draw from the random states of training.
        placement: further arguments of ``TaskLoader``; a ``batch_size`` overrides the loader's.

    Raises:
        TypeError: if the loader's batches cannot be planned by index; the message says why.
    """
    reason = why_not_plannable(loader)
    if reason is not None:
        raise TypeError(reason)
    batches: Any = loader.batch_sampler  # its sampler counts; the loader's differs if the user gave a batch sampler
    sampler = batches.sampler
    shuffle = isinstance(sampler, RandomSampler)
    if isinstance(sampler, SubsetRandomSampler) and not for_training:
        sampler = sorted(int(index) for index in sampler.indices)
    # Shuffling on several ranks needs one order for all, so it is drawn from the seed.
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


def task_indices(loader: Any) -> Sequence[int]:
    """Returns the indices of the samples that a loader can give; a sampler may leave some of the data set out.

    Args:
        loader: a :class:`TaskLoader` or a ``DataLoader`` whose batches can be planned by index.
    """
    batches: Any = loader.batch_sampler
    sampler = batches.sampler if isinstance(loader, DataLoader) else loader.order_sampler
    everything = range(len(loader.dataset))
    if sampler is None or isinstance(sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
        return everything
    if isinstance(sampler, SubsetRandomSampler):
        return sorted(int(index) for index in sampler.indices)
    if isinstance(sampler, WeightedRandomSampler):
        return [index for index, weight in enumerate(sampler.weights.tolist()) if weight > 0]
    generator = getattr(sampler, "generator", None)
    state = generator.get_state() if generator is not None else None
    with untouched_random_state():
        indices = sorted({int(index) for index in sampler})
    if generator is not None and state is not None:
        generator.set_state(state)
    return indices


def why_not_plannable(loader: Any) -> str | None:
    """Returns the reason why a loader's batches cannot be planned by index, in words; None if they can."""
    if isinstance(loader, TaskBatches) and not loader.is_stream:
        return None
    if isinstance(loader, TaskBatches):
        return "its data is a stream without length: it cannot be addressed by index"
    if not isinstance(loader, DataLoader):
        return f"it is a {type(loader).__name__} and no torch DataLoader"
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return "its data set is a stream without length: it cannot be addressed by index"
    if loader.batch_sampler is None:
        return "its batching is switched off (batch_size=None)"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return f"a {type(loader).__name__} makes its batches in its own way (__iter__)"
    if type(loader.batch_sampler) is not BatchSampler:
        return f"its batches are made by a custom batch sampler ({type(loader.batch_sampler).__name__})"
    if not hasattr(loader.batch_sampler.sampler, "__len__"):
        return "its sampler has no length"
    return None
