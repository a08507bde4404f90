"""The samples of one task: new ones, replayed ones behind them, what each weighs, and in what order they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.mixing import MixMode, balanced_order, seed_of


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


class NewThenReplayed(Dataset):
    """New samples under their index, replayed ones behind them; under a tuple of indices, the samples of a block."""

    def __init__(self, new: Any, replayed: Sequence[Any]) -> None:
        self.new, self.replayed, self.start = new, replayed, len(new)

    def __getitem__(self, index: int | tuple[int, ...]) -> Any:
        if isinstance(index, tuple):
            return [self[i] for i in index]
        return self.new[index] if index < self.start else self.replayed[index - self.start]


class Samples:
    """New and replayed samples by index, and the draws of the latter.

    Args:
        new: the task's data set, map-style.
        mix: what is mixed in, if anything.

    Attributes:
        replayed: the buffer's samples as they are now: it takes in this task's samples at its end.
        weights: loss-bearing tokens of all samples; None where shares are of samples, not of tokens.
    """

    def __init__(self, new: Any, mix: Mix | None = None) -> None:
        self.new, self.mix = new, mix
        self.replayed: list[Any] = [] if mix is None else list(mix.buffer.items)
        self.weights = None if mix is None else self._weights()

    def _weights(self) -> list[int] | None:
        # Shares are of tokens where both sides have tokens, else of samples.
        replayed = [loss_tokens(sample) for sample in self.replayed]
        if any(count is None for count in replayed) or sum(replayed) == 0 or len(self.new) == 0:  # type: ignore[arg-type]
            return None
        count_of = getattr(self.new, "loss_tokens", None)
        if count_of is None and loss_tokens(self.new[0]) is not None:

            def count_of(index: int) -> int:
                return loss_tokens(self.new[index]) or 0

        if count_of is None:
            return None
        return [*(count_of(i) for i in range(len(self.new))), *replayed]

    @property
    def replayed_indices(self) -> Sequence[int]:
        """The indices of the replayed samples."""
        return range(len(self.new), len(self.new) + len(self.replayed))

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss-bearing tokens of the new samples are known."""
        return hasattr(self.new, "loss_tokens") or self.weights is not None

    def weight(self, index: int) -> int:
        """Loss-bearing tokens of a sample; 1 where shares are of samples."""
        return 1 if self.weights is None else self.weights[index]

    def mean_weight(self, indices: Sequence[int]) -> float:
        """The mean of :meth:`weight`, above 0."""
        if self.weights is None:
            return 1.0
        return max(sum(self.weights[i] for i in indices) / max(len(indices), 1), 1e-9)

    def tokens(self, index: int) -> int:
        """Loss-bearing tokens of a sample, wherever they can be counted."""
        if self.weights is not None:
            return self.weights[index]
        if index < len(self.new):
            return self.new.loss_tokens(index)
        return loss_tokens(self.replayed[index - len(self.new)]) or 0

    @cached_property
    def lengths_of_new(self) -> list[int]:
        """Tokens of the new samples, of a data set with ``length``."""
        return [self.new.length(i) for i in range(len(self.new))]

    @cached_property
    def lengths(self) -> list[int] | None:
        """Tokens of all samples; None without the data set's ``length``, or if a replayed sample has no tokens."""
        if not hasattr(self.new, "length"):
            return None
        replayed = [_length(sample) for sample in self.replayed]
        known = [length for length in replayed if length is not None]
        return [*self.lengths_of_new, *known] if len(known) == len(replayed) else None

    def draws(self, epoch: int, balance: Callable[[int], float] | None = None) -> Iterator[int]:
        """Replayed samples, behind the new ones in index: pass after pass over the buffer, from a random start.

        Args:
            epoch: of this task.
            balance: every stretch of the draws has nearly the mean of this; by default, of :meth:`weight`.
        """
        assert self.mix is not None
        count = len(self.replayed)
        generator = torch.Generator().manual_seed(seed_of(self.mix.seed, epoch))
        shuffled = (len(self.new) + torch.randperm(count, generator=generator)).tolist()
        cycle = balanced_order(shuffled, balance or self.weight)
        start = int(torch.randint(count, (), generator=generator))
        while True:
            yield from cycle[start:]
            yield from cycle[:start]


def _length(sample: Any) -> int | None:
    known = isinstance(sample, dict) and "input_ids" in sample and loss_tokens(sample) is not None
    return len(sample["input_ids"]) if known else None
