"""The loader of one task: it takes any map-style data set, mixes replay in, and can resume at any batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_cl.data.batch_source import TaskBatches, TaskLength, no_counts
from lightning_cl.data.foreign_loader import taken_over, task_indices
from lightning_cl.data.mixing.contents import Kinds, Trained, kinds_of
from lightning_cl.data.mixing.epoch_plan import EpochPlan
from lightning_cl.data.mixing.packing import fill
from lightning_cl.data.mixing.plan import share_of_rank
from lightning_cl.data.mixing.raised import Raised
from lightning_cl.data.mixing.replayed import Mix as Mix
from lightning_cl.data.mixing.replayed import NewThenReplayed, Samples
from lightning_cl.data.mixing.replayed import loss_tokens as loss_tokens


class TaskLoader(TaskBatches):
    """Batches of one task for the Trainer.

    A plain ``DataLoader`` silently gives the wrong batches after a resume in the middle of an epoch, and it cannot
    change the share of new samples from batch to batch. This loader plans each epoch as lists of indices, from seeds
    alone or from the user's own sampler. A ``DataLoader`` then fetches and collates them. The loader's position is two
    numbers and a random state. The loader divides batches among the ranks itself: all ranks together see the batches
    that one process would see.

    Args:
        dataset: a map-style data set.
        batch_size: samples in a batch, on one rank.
        collate_fn: joins samples to a batch.
        shuffle: True gives each epoch a random order (from `seed`).
        seed: seed of the order.
        sampler: a user's sampler that gives the order instead; its random state is kept for a resume.
        drop_last: leave out a last batch that is not full.
        rank: number of this process.
        world_size: number of processes.
        broadcast: sends rank 0's order to all ranks (only for `sampler` with several ranks).
        settings: further arguments of ``DataLoader`` (workers, pinning).
        like: the user's ``DataLoader`` that this one replaces. Random numbers are drawn at the same moments, and from
            the same generator, as there.
        block_length: pack samples into rows of at most this many tokens (:class:`BlockPlan` explains it, also with
            replay). `batch_size` then counts blocks, and `collate_fn` gets lists of samples, one for each block. The
            data set must give the number of tokens of a sample by ``length(index)``.
        length_buckets: put samples of similar length into a batch (:func:`bucketed_order`), for less padding. It has no
            effect with packing, without shuffling, with a `sampler`, or for data sets without ``length(index)``.

    Raises:
        TypeError: if samples are to be packed and their length is not known.
        ValueError: if a sample is longer than a block, or a `sampler`'s order is to be packed.
    """

    is_stream = False

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
        like: DataLoader[Any] | None = None,
        block_length: int | None = None,
        length_buckets: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate_fn = collate_fn or torch.utils.data.default_collate
        self.shuffle, self._seed, self.drop_last = shuffle, seed, drop_last
        self.order_sampler = sampler
        # A DistributedSampler gives each rank its own part already.
        self.rank, self.world_size = (0, 1) if isinstance(sampler, DistributedSampler) else (rank, world_size)
        self._broadcast = broadcast
        self._settings = settings or {}
        self._epoch = 0
        self._position = 0
        self._epoch_rng: dict[str, torch.Tensor] | None = None
        self._resume: dict[str, Any] | None = None
        self._on_resumed: Callable[[], None] | None = None
        self.counts = no_counts()
        self._raised = Raised()
        # For each batch given out and not yet begun: its replayed parts, and the new samples of all ranks.
        self.given: deque[tuple[Kinds | None, Trained]] = deque()
        self._draws_random = like is not None or sampler is not None
        self._generator = like.generator if like is not None else None
        if block_length is not None and sampler is not None:
            raise ValueError(
                f"block_length={block_length}: packing makes its own order, and would not keep the sampler's; give"
                " shuffle=True or False instead of a sampler"
            )
        self.block_length = block_length
        own_order = shuffle and sampler is None and block_length is None
        self._buckets = length_buckets and own_order and hasattr(dataset, "length")
        self._samples = Samples(dataset)
        self._plan = self._plan_epochs()

    @classmethod
    def from_dataloader(cls, loader: DataLoader[Any], *, for_training: bool = True, **placement: Any) -> TaskLoader:
        """The same batches as a user's ``DataLoader``, in the same order.

        Args:
            loader: a loader over a map-style data set, with automatic batching.
            for_training: False switches shuffling off, since it would draw from the random states of training.
            placement: ``rank``, ``world_size``, ``broadcast``, ``seed``, and ``batch_size`` to override the loader's.

        Raises:
            TypeError: if the loader's batches cannot be planned by index; the message says why.
        """
        return cls(**taken_over(loader, for_training, placement))

    @property
    def seed(self) -> int:
        """The seed of the order; another one plans the epochs anew."""
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = seed
        self._plan = self._plan_epochs()

    @property
    @override
    def num_workers(self) -> int:
        return int(self._settings.get("num_workers", 0))

    @override
    def mix_in(self, mix: Mix, length: TaskLength | None = None) -> None:
        length = length or TaskLength()
        if not mix.curve.is_constant and math.isinf(length.epochs) and length.batches is None:
            raise ValueError(
                "ratio: a share that changes over a task needs to know its length; set max_epochs or max_steps"
            )
        if len(mix.buffer.held) > 0 and mix.curve.largest > 0:
            mixes = [*self._samples.mixes, mix]
            self._samples = Samples(self.dataset, mixes)
            self._plan = self._plan_epochs()
            planned = len(self)
            if not self._samples.is_constant and planned > 0:
                # Only now is the length of an epoch known, replayed samples included.
                limit = length.limit
                shown = min(limit, planned) if isinstance(limit, int) else int(planned * limit)
                total = min(length.epochs * shown, math.inf if length.batches is None else length.batches)
                self._samples.epochs, self._samples.shown = max(total, 1.0) / planned, shown / planned
                self._plan = self._plan_epochs()

    @property
    def stores(self) -> bool:
        """True if there are samples to replay."""
        return self._samples.replays and self._samples.end > len(self.dataset)

    @property
    def replayed_share(self) -> float:
        """The share of replayed samples that is planned, the largest where it changes over the task."""
        return sum(mix.curve.largest for mix in self._samples.mixes)

    def replay_more(self, share: float) -> None:
        """Replaces a share of the planned new samples by stored ones, from the next batch on (:class:`Raised`).

        Batches that worker processes were asked for already stay as they are.

        Args:
            share: of the new samples, from 0 to 1; it replaces an earlier one.

        Raises:
            ValueError: if there is nothing to replay, or rows are packed.
        """
        if not self.stores or self.block_length is not None:
            raise ValueError("replay_more: expected stored samples in a loader that does not pack")
        ahead = self.num_workers * int(self._settings.get("prefetch_factor") or 2)
        self._raised.steps.append([self._epoch, self._position + ahead, float(share)])

    def padding_share(self) -> float | None:
        """The share of padding tokens among all positions of the epoch's batches, in [0, 1).

        It counts this rank's batches as they are planned now, mixed-in replay included. With packing, every block
        counts with its full length. The result is None if lengths are not known, or if a sampler gives the order.
        """
        lengths = self._samples.lengths
        if lengths is None or self.order_sampler is not None:
            return None
        own = (share_of_rank(batch, self.rank, self.world_size) for batch in self._batches())
        return 1.0 - fill(own, lengths, self.block_length)

    @override
    def set_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._position, self._epoch_rng = 0, None
        self._epoch = epoch

    def __len__(self) -> int:
        return self._plan.length(lambda: task_indices(self))

    def __iter__(self) -> Iterator[Any]:
        # This is a generator, so nothing happens before the first batch is asked for. That is needed: Lightning makes
        # the iterator before it restores a state and before it sets the epoch.
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
            # DataLoader's own iterator draws this number; all later random numbers are then those of the user's loader.
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        plan = self._batches()[start:]
        self._finish_resume()
        self._position = start
        self.given.clear()
        asked: deque[list[Any]] = deque()
        fetched = DataLoader(
            NewThenReplayed(self.dataset, self._samples.parts),
            batch_sampler=_Asked(plan, start, self._asked_for, asked),
            collate_fn=self.collate_fn,
            generator=generator,
            **self._settings,
        )
        for batch in fetched:
            everywhere = asked.popleft()
            rows = share_of_rank(everywhere, self.rank, self.world_size)
            self._position += 1
            self._count(rows)
            if batch is not None:  # Lightning skips a batch that is None
                kinds = kinds_of(rows, self._samples) if self._samples.replays else None
                self.given.append((kinds, self._trained(everywhere)))
            yield batch

    def _asked_for(self, rows: list[Any], number: int, asked: deque[list[Any]]) -> list[Any]:
        """Gives this rank's rows of a planned batch just before they are fetched, and remembers all ranks' rows."""
        if self._raised.steps:
            rows = self._raised.replace(rows, self._samples, self._epoch, number, self._seed)
        chosen = [self._samples.chosen(row) for row in rows] if self._samples.chooses else rows
        asked.append(chosen)
        return share_of_rank(chosen, self.rank, self.world_size)

    def _trained(self, rows: Iterable[Any]) -> Trained:
        indices = [index for row in rows for index in (row if isinstance(row, tuple) else (row,))]
        new = [index for index in indices if index < len(self.dataset)]
        return Trained(self._epoch, self._position, new, self.dataset.__getitem__)

    @override
    def begin(self) -> tuple[Kinds | None, Trained | None]:
        return self.given.popleft() if self.given else (None, None)

    @override
    def position(self, in_flight: int = 0) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": max(self._position - in_flight, 0),
            "epoch_rng": self._epoch_rng,
            "counts": dict(self.counts),
            "raised": [list(step) for step in self._raised.steps],
        }

    @override
    def resume_from(self, position: dict[str, Any], on_resumed: Callable[[], None] | None = None) -> None:
        self._resume, self._on_resumed = position, on_resumed
        self._epoch, self._position, self._epoch_rng = (position[name] for name in ("epoch", "position", "epoch_rng"))
        self.counts = dict(position["counts"])
        self._raised.steps = [list(step) for step in position.get("raised", [])]  # earlier checkpoints have none

    # Lightning saves and restores a loader by these names; the coordinator then restores its own, exact position.
    state_dict, load_state_dict = position, resume_from

    def _finish_resume(self) -> None:
        on_resumed, self._on_resumed = self._on_resumed, None
        if on_resumed is not None:
            on_resumed()

    def _plan_epochs(self) -> EpochPlan:
        return EpochPlan(
            self._samples,
            self.batch_size * self.world_size,
            shuffle=self.shuffle,
            seed=self._seed,
            sampler=self.order_sampler,
            drop_last=self.drop_last,
            block_length=self.block_length,
            buckets=self._buckets,
            world_size=self.world_size,
            broadcast=self._broadcast,
        )

    def _batches(self) -> list[list[Any]]:
        """The epoch's batches on all ranks together: lists of indices, or of blocks (tuples of indices)."""
        return self._plan.batches(self._epoch, lambda: task_indices(self))

    def _count(self, rows: Iterable[Any]) -> None:
        for row in rows:
            for index in row if isinstance(row, tuple) else (row,):
                kind = "new" if index < len(self.dataset) else "replayed"
                self.counts[f"{kind}_samples"] += 1
                if self._samples.counts_tokens:
                    self.counts[f"{kind}_tokens"] += self._samples.tokens(index)

    def _rng_states(self) -> dict[str, torch.Tensor] | None:
        """The random states at the start of an epoch of the user's loader."""
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


class _Asked:
    """A batch sampler that calls a function for each batch when the batch is asked for."""

    def __init__(self, plan: list[list[Any]], start: int, ask: Callable[..., list[Any]], asked: Any) -> None:
        self._plan, self._start, self._ask, self._asked = plan, start, ask, asked

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[list[Any]]:
        for number, rows in enumerate(self._plan, self._start):
            yield self._ask(rows, number, self._asked)
