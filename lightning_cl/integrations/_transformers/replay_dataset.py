"""A data set that plans new and replayed samples in one order, for Trainers that read samples one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from lightning_cl.arguments import check_integer
from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.mixing.drawing import Draw
from lightning_cl.data.mixing.epoch_plan import EpochPlan
from lightning_cl.data.mixing.ratio import RatioLike, check_ratio, curve_of
from lightning_cl.data.mixing.replayed import Mix, NewThenReplayed, Samples


class ReplayDataset(Dataset[Any]):
    """New samples and replayed ones, in an order that keeps the replayed share in every stretch of it.

    The plan is a list of (source, index). It is made by error diffusion on loss tokens, as that of
    :class:`~lightning_cl.Replay`, with the same samples in the same order for the same seeds. The share is of loss
    tokens where the samples have ``labels``, and of samples otherwise. It is exact over any consecutive samples to
    about one sample. So it holds in every batch, and for every number of accumulated batches.

    The order is random already: read it from beginning to end, with
    ``TrainingArguments(train_sampling_strategy="sequential")``. A shuffled order would keep the share over an epoch and
    not in a batch. A Trainer calls :meth:`set_epoch` before each epoch, which makes the plan of that epoch.

    Memory: 12 bytes for each sample of the plan; replayed samples stay in the buffer. Compute: one look at every sample
    of `new` to count its tokens.

    Args:
        new: the task's samples, by index.
        buffer: the samples of earlier tasks; an empty one replays nothing.
        ratio: the share of the replayed tokens, in [0, 1), or pairs of progress and share (see
            :class:`~lightning_cl.Replay`), for which `epochs` is the length of the task.
        seed: seed of the order of the new samples.
        draw_seed: seed of the draws from the buffer; default: `seed`.
        draw: how often each stored sample is replayed: ``uniform``, ``task``, ``proportional`` or ``recency``.
        batch_size: samples of an optimizer step. An epoch is as long as it makes whole batches.
        epochs: number of epochs of the task.
        shuffle: True gives each epoch a random order.
        task_number: number of the task, from 1, for ``ratio="1/t"``.

    Attributes:
        plan: pairs of source and index, in the order of the epoch: ``("new", i)`` is ``new[i]``, and
            ``("replay", n)`` is the buffer's record n.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> from lightning_cl.buffers import ReplayBuffer
        >>> buffer = ReplayBuffer(100)
        >>> for i in range(4):
        ...     _ = buffer.add({"input_ids": [i, i], "labels": [i, i]}, "earlier")
        >>> new = [{"input_ids": [9, 9], "labels": [9, 9]}] * 6
        >>> mixed = ReplayDataset(new, buffer, ratio=0.25)
        >>> [source for source, _ in mixed.plan].count("replay"), len(mixed)
        (2, 8)
    """

    def __init__(
        self,
        new: Any,
        buffer: ReplayBuffer,
        ratio: RatioLike = 0.05,
        seed: int = 0,
        *,
        draw_seed: int | None = None,
        draw: Draw = "uniform",
        batch_size: int = 1,
        epochs: int = 1,
        shuffle: bool = True,
        task_number: int = 2,
    ) -> None:
        if not hasattr(new, "__len__") or not hasattr(new, "__getitem__"):
            raise ValueError(f"new: a {type(new).__name__}, expected a data set with a length and samples by index")
        if draw == "interfered":
            raise ValueError("draw='interfered': it looks at the model while it trains; expected another draw")
        check_integer("batch_size", batch_size, 1)
        check_integer("epochs", epochs, 1)
        curve = curve_of(check_ratio(ratio), task_number)
        mixes = []
        if len(buffer.held) > 0 and curve.largest > 0:
            draw_seed = seed if draw_seed is None else draw_seed
            mixes = [Mix(buffer, curve, "replace", seed=draw_seed, draw=draw)]
        self.new, self.epochs = new, epochs
        self._samples = Samples(new, mixes)
        self._samples.epochs = float(epochs)
        self._rows = NewThenReplayed(new, self._samples.parts)
        self._planner = EpochPlan(
            self._samples,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            sampler=None,
            drop_last=False,
            block_length=None,
            buckets=False,
            world_size=1,
            broadcast=None,
        )
        self._epoch = self._length = 0
        self._order = self._planned(0)

    def _planned(self, epoch: int) -> list[int]:
        batches = self._planner.batches(epoch, lambda: range(len(self.new)))
        order = [index for batch in batches for index in batch]
        # A Trainer counts its steps before the first epoch: all epochs must be as long as that one.
        length = self._length = self._length or len(order)
        replayed = [position for position, index in enumerate(order) if index >= len(self.new)]
        for position in reversed(replayed[len(replayed) - max(len(order) - length, 0) :]):
            del order[position]
        return order + [order[position] for position in replayed[: length - len(order)]]

    def set_epoch(self, epoch: int) -> None:
        """Makes the plan of another epoch, from 0; Trainers call it."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._planned(epoch)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> Any:
        return self._rows[self._order[position]]

    @property
    def plan(self) -> list[tuple[str, int]]:
        """Returns the pairs of source and index of the present epoch."""
        return [self._of(index) for index in self._order]

    def _of(self, index: int) -> tuple[str, int]:
        found = self._samples.record_of(index)
        return ("new", index) if index < len(self.new) or found is None else ("replay", found[1])

    def loss_tokens(self, position: int) -> int:
        """Returns the loss tokens at a position of the plan; 1 where samples have no tokens."""
        return self._samples.weight(self._order[position])

    def replayed_share(self) -> float:
        """Returns the replayed share of the epoch's loss tokens (of its samples, where they have no tokens)."""
        weights = [self._samples.weight(index) for index in self._order]
        replayed = sum(w for w, index in zip(weights, self._order, strict=True) if index >= len(self.new))
        return replayed / max(sum(weights), 1)

    def counts(self, samples: int) -> dict[str, float]:
        """Counts what a Trainer has seen after some samples, from the first epoch on.

        Args:
            samples: number of samples.

        Returns:
            ``new_samples``, ``replayed_samples`` and, where samples have tokens, ``new_tokens`` and
            ``replayed_tokens``.
        """
        found = dict.fromkeys(("new_samples", "replayed_samples", "new_tokens", "replayed_tokens"), 0.0)
        for epoch in range(-(-samples // max(len(self), 1))):
            for index in self._planned(epoch)[: samples - epoch * len(self)]:
                kind = "new" if index < len(self.new) else "replayed"
                found[f"{kind}_samples"] += 1
                found[f"{kind}_tokens"] += self._samples.tokens(index) if self._samples.counts_tokens else 0
        return found if self._samples.counts_tokens else {k: v for k, v in found.items() if k.endswith("samples")}

    def fingerprint(self) -> str:
        """Returns a hash of the first epoch's plan: a resumed run must have the same."""
        return self._first_plan

    @cached_property
    def _first_plan(self) -> str:
        named = repr([self._of(index) for index in self._planned(0)])
        return hashlib.sha256(named.encode()).hexdigest()[:16]

    def to_datasets(self) -> Any:
        """Returns all epochs of the plan, one after another, as a ``datasets.Dataset``.

        Trainers that take no other kind, as TRL's ``SFTTrainer``, train it for one epoch, without shuffling and without
        packing: ``num_train_epochs=1``, ``train_sampling_strategy="sequential"``, ``packing=False``,
        ``dataset_kwargs={"skip_prepare_dataset": True}``. It is written to the package's cache or kept in memory, with
        the replayed samples as copies.

        Raises:
            ValueError: if the samples are no dictionaries of one-dimensional columns, or have different columns.
        """
        from datasets import Dataset as Table

        def rows() -> Iterator[dict[str, Any]]:
            for epoch in range(self.epochs):
                for index in self._planned(epoch):
                    sample = self._rows[index]
                    if not isinstance(sample, dict):
                        raise ValueError(
                            f"new: samples of type {type(sample).__name__}, expected dictionaries, as a"
                            " datasets.Dataset has them"
                        )
                    yield {key: _plain(value) for key, value in sample.items()}

        found = list(rows())
        if any(row.keys() != found[0].keys() for row in found):
            raise ValueError(
                "new: new and replayed samples have different columns; expected the same, as input_ids and labels"
            )
        return Table.from_list(found)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) or hasattr(value, "tolist") else value
