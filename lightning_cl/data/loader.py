"""The loader of one task: any map-style data set, mixed with replay, sharded over ranks, resumable at any batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.mixing import (
    MixMode,
    balanced_order,
    mixed_length,
    plan_batches,
    plan_mixed_batches,
    share_of_rank,
)
from lightning_cl.data.plannable import task_indices, why_not_plannable

_KEPT_SETTINGS = ("num_workers", "pin_memory", "worker_init_fn", "prefetch_factor", "timeout")


def loss_tokens(sample: Any) -> int | None:
    """How many tokens of a sample bear loss under next-token prediction; None for a sample that is no token sequence.

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


@dataclass
class Mix:
    """What is mixed into a task's batches.

    Args:
        buffer: the samples of earlier tasks.
        ratio: their share of the loss-bearing tokens (of the samples, where there are no tokens).
        mode: ``replace`` keeps the batch size, ``add`` puts them on top.
        seed: seed of the draws.
    """

    buffer: ReplayBuffer
    ratio: float
    mode: MixMode
    seed: int


class _NewThenReplayed(Dataset):
    """New samples under their index, replayed ones behind them."""

    def __init__(self, new: Any, replayed: Sequence[Any]) -> None:
        self.new, self.replayed, self.start = new, replayed, len(new)

    def __getitem__(self, index: int) -> Any:
        return self.new[index] if index < self.start else self.replayed[index - self.start]


class TaskLoader:
    """Batches of one task for the Trainer.

    A plain ``DataLoader`` silently feeds the wrong batches after a resume in the middle of an epoch, and cannot change
    the share of new samples from batch to batch. This loader plans each epoch as lists of indices, from seeds alone or
    from the user's own sampler, and lets a ``DataLoader`` fetch and collate them. Where it stands is two numbers and a
    random state. Lightning takes it as it is; sharding over ranks happens here, so that all ranks together see the
    batches that one process would see.

    Args:
        dataset: map-style.
        batch_size: samples in a batch, on one rank.
        collate_fn: joins samples to a batch.
        shuffle: whether each epoch has a random order (from `seed`).
        seed: seed of the order.
        sampler: an order of the user's making instead; its random state is kept for a resume.
        drop_last: leave out a last batch that is not full.
        rank: this process.
        world_size: number of processes.
        broadcast: sends rank 0's order to all ranks (only for `sampler` with several ranks).
        settings: further arguments of ``DataLoader`` (workers, pinning).
        like: the user's ``DataLoader`` that this one stands in for: random numbers are drawn when, and from where, it
            would draw them.
    """

    batch_sampler = None  # Lightning looks for it beside `sampler`

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
        sampler: Any = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        broadcast: Callable[[Any], Any] | None = None,
        settings: dict[str, Any] | None = None,
        like: DataLoader | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn or torch.utils.data.default_collate
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.order_sampler = sampler
        # A DistributedSampler gives each rank its own part already.
        self.rank, self.world_size = (0, 1) if isinstance(sampler, DistributedSampler) else (rank, world_size)
        self._broadcast = broadcast
        self._settings = settings or {}
        self._mix: Mix | None = None
        self._epoch = 0
        self._position = 0
        self._epoch_rng: dict[str, torch.Tensor] | None = None
        self._resume: dict[str, Any] | None = None
        self._on_resumed: Callable[[], None] | None = None
        self.counts = {"new_samples": 0, "replayed_samples": 0, "new_tokens": 0, "replayed_tokens": 0}
        self._draws_random = like is not None or sampler is not None
        self._generator = like.generator if like is not None else None
        self._replayed: list[Any] = []
        self._weights: list[int] | None = None  # tokens of the new samples, where there are tokens

    @property
    def _counts_tokens(self) -> bool:
        return hasattr(self.dataset, "loss_tokens") or self._weights is not None

    @classmethod
    def from_dataloader(cls, loader: DataLoader, *, for_training: bool = True, **placement: Any) -> TaskLoader:
        """The same batches as a user's ``DataLoader``, in the same order.

        Args:
            loader: over a map-style data set, with automatic batching.
            for_training: False: without shuffling, which would draw from the random states of training.
            placement: ``rank``, ``world_size``, ``broadcast``, ``seed``, and ``batch_size`` to override the loader's.

        Raises:
            TypeError: if the loader's batches cannot be planned by index; the message says why.
        """
        reason = why_not_plannable(loader)
        if reason is not None:
            raise TypeError(reason)
        batches: Any = loader.batch_sampler  # its sampler, not the loader's: they differ if the user gave it
        batch_size = placement.pop("batch_size", None) or batches.batch_size
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
        return cls(
            loader.dataset,
            batch_size,
            loader.collate_fn,
            shuffle=shuffle and for_training,
            sampler=None if own_order else sampler,
            drop_last=batches.drop_last,
            settings=settings,
            like=loader if for_training else None,
            **placement,
        )

    def mix_in(self, mix: Mix) -> None:
        """Lets the samples of a buffer take part in the batches from now on."""
        self._mix = mix if len(mix.buffer) > 0 and mix.ratio > 0 else None
        # The buffer will take in this task's samples at its end; what is replayed during the task stays as it is now.
        self._replayed = list(mix.buffer.items) if self._mix is not None else []
        self._weights = None
        if self._mix is None:
            return
        # Shares are of tokens where both sides have tokens, else of samples.
        replayed = [loss_tokens(sample) for sample in self._replayed]
        if any(count is None for count in replayed) or sum(replayed) == 0 or len(self.dataset) == 0:  # type: ignore[arg-type]
            return
        count_of = getattr(self.dataset, "loss_tokens", None)
        if count_of is None and loss_tokens(self.dataset[0]) is not None:

            def count_of(index: int) -> int:
                return loss_tokens(self.dataset[index]) or 0

        if count_of is not None:
            self._weights = [*(count_of(i) for i in range(len(self.dataset))), *replayed]  # type: ignore[list-item]

    @property
    def sampler(self) -> TaskLoader:
        """Lightning calls ``set_epoch`` on a loader's sampler: here, the loader itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self._epoch:
            self._position, self._epoch_rng = 0, None
        self._epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        samples = len(self.order_sampler) if self.order_sampler is not None else len(self.dataset)
        if self._mix is not None and self._mix.mode == "replace":
            # What a sampler leaves out or repeats is not known here: the mean weight, then.
            weight = samples * self._mean_weight(task_indices(self))
            replayed = self._mean_weight(self._replayed_indices())
            return mixed_length(samples, weight, replayed, self._mix.ratio, size, self.drop_last)
        return samples // size if self.drop_last else math.ceil(samples / size)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing happens before the first batch is asked for. Lightning makes the iterator before it
        # restores a state and before it sets the epoch.
        resume, self._resume = self._resume, None
        start = 0
        if resume is not None and resume["epoch"] == self._epoch and resume["position"] > 0:
            self._restore_epoch_rng(resume["epoch_rng"])
            start = resume["position"]
        else:
            self._finish_resume()
        self._epoch_rng = self._rng_states()
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state() if self._generator is None else self._generator.get_state())
        if self._draws_random:
            # What DataLoader's own iterator draws, so that everything after it is what the user's loader would give.
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        batches = self._plan(self._epoch)
        self._finish_resume()
        self._position = start
        fetched = DataLoader(
            _NewThenReplayed(self.dataset, self._replayed),
            batch_sampler=batches[start:],
            collate_fn=self.collate_fn,
            generator=generator,
            **self._settings,
        )
        for indices, batch in zip(batches[start:], fetched, strict=True):
            self._position += 1
            self._count(indices)
            yield batch

    def state_dict(self, in_flight: int = 0) -> dict[str, Any]:
        """Where the loader stands, and what it has given out in this task.

        Args:
            in_flight: how many of the batches that were given out last have not been trained on.
        """
        return {
            "epoch": self._epoch,
            "position": max(self._position - in_flight, 0),
            "epoch_rng": self._epoch_rng,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any], on_resumed: Callable[[], None] | None = None) -> None:
        """The next iterator goes on from :meth:`state_dict`.

        Args:
            state: of :meth:`state_dict`.
            on_resumed: called when the order of an epoch that was under way is laid out again, before the first sample
                is fetched: the place to restore random states, since the order may have drawn from them.
        """
        self._resume, self._on_resumed = state, on_resumed
        self._epoch, self._position, self._epoch_rng = state["epoch"], state["position"], state["epoch_rng"]
        self.counts = dict(state["counts"])

    def _finish_resume(self) -> None:
        on_resumed, self._on_resumed = self._on_resumed, None
        if on_resumed is not None:
            on_resumed()

    def _plan(self, epoch: int) -> list[list[int]]:
        size = self.batch_size * self.world_size
        order = self._order(epoch)
        if self._mix is None:
            batches = plan_batches(order, size, self.drop_last)
        else:
            batches = plan_mixed_batches(
                order,
                self._draws(epoch),
                self._weight,
                self._mean_weight(self._replayed_indices()),
                self._mix.ratio,
                size,
                self._mix.mode,
                epoch,
                self.drop_last,
                length=len(self) if self._mix.mode == "replace" else None,
                multiple=self.world_size,
            )
        return [share_of_rank(batch, self.rank, self.world_size) for batch in batches]

    def _order(self, epoch: int) -> list[int]:
        if self.order_sampler is not None:
            if hasattr(self.order_sampler, "set_epoch"):
                self.order_sampler.set_epoch(epoch)
            order = list(self.order_sampler)
            return self._broadcast(order) if self._broadcast is not None and self.world_size > 1 else order
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(_mix_seed(self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def _draws(self, epoch: int) -> Iterator[int]:
        """Replayed samples, behind the new ones in index: pass after pass over the buffer, from a random start."""
        assert self._mix is not None
        count = len(self._replayed)
        generator = torch.Generator().manual_seed(_mix_seed(self._mix.seed, epoch))
        shuffled = (len(self.dataset) + torch.randperm(count, generator=generator)).tolist()
        cycle = balanced_order(shuffled, self._weight)
        start = int(torch.randint(count, (), generator=generator))
        while True:
            yield from cycle[start:]
            yield from cycle[:start]

    def _weight(self, index: int) -> int:
        return 1 if self._weights is None else self._weights[index]

    def _replayed_indices(self) -> Sequence[int]:
        return range(len(self.dataset), len(self.dataset) + len(self._replayed))

    def _mean_weight(self, indices: Sequence[int]) -> float:
        if self._weights is None:
            return 1.0
        return max(sum(self._weights[i] for i in indices) / max(len(indices), 1), 1e-9)

    def _tokens(self, index: int) -> int:
        if self._weights is not None:
            return self._weights[index]
        if index < len(self.dataset):
            return self.dataset.loss_tokens(index)
        return loss_tokens(self._replayed[index - len(self.dataset)]) or 0

    def _count(self, indices: list[int]) -> None:
        for index in indices:
            kind = "new" if index < len(self.dataset) else "replayed"
            self.counts[f"{kind}_samples"] += 1
            if self._counts_tokens:
                self.counts[f"{kind}_tokens"] += self._tokens(index)

    def _rng_states(self) -> dict[str, torch.Tensor] | None:
        """The random states that an epoch of the user's loader starts from."""
        if not self._draws_random:
            return None
        generators = {"loader": self._generator, "sampler": getattr(self.order_sampler, "generator", None)}
        states = {name: generator.get_state() for name, generator in generators.items() if generator is not None}
        return states | {"global": torch.get_rng_state()}

    def _restore_epoch_rng(self, states: dict[str, torch.Tensor] | None) -> None:
        if states is None:
            return
        torch.set_rng_state(states["global"])
        if "loader" in states and self._generator is not None:
            self._generator.set_state(states["loader"])
        if "sampler" in states:
            self.order_sampler.generator.set_state(states["sampler"])


def _mix_seed(*parts: int) -> int:
    """One seed from several numbers, without the collisions of a sum."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = (seed ^ (part + 0x9E3779B9)) * 0xBF58476D1CE4E5B9 % 2**64
        seed ^= seed >> 31
    return seed % 2**63
