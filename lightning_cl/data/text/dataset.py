"""Token samples, kept as three flat tensors."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cl.data.text.record_counts import Tally


class TokenDataset(Dataset[Any]):
    """Samples of tokens with their loss masks, kept as three flat tensors.

    A sample is ``{"input_ids": int32 [length], "loss_mask": bool [length]}``.

    Args:
        blocks: token ids of each sample; all of them are learnt. See :meth:`from_samples` and :meth:`from_tensors` for
            others.

    Attributes:
        ids: the tokens of all samples, int32 ``[tokens]``.
        loss_mask: True for each token that is learnt, bool ``[tokens]``.
        ends: the end of each sample in `ids`, int64 ``[samples]``.
        tally: counts of the samples and records that were left out, dropped or cut off.
    """

    def __init__(self, blocks: Sequence[Sequence[int]] = ()) -> None:
        kept = [torch.tensor(block, dtype=torch.int32) for block in blocks if len(block) > 1]
        ids = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int32)
        ends = torch.tensor([len(block) for block in kept], dtype=torch.int64).cumsum(0)
        self._keep(ids, torch.ones(len(ids), dtype=torch.bool), ends, Tally(dropped=len(blocks) - len(kept)))

    @classmethod
    def from_samples(cls, samples: Iterable[tuple[Tensor, Tensor]], tally: Tally | None = None) -> TokenDataset:
        """A data set from the samples of :func:`~lightning_cl.data.text.tokens.encode`.

        Args:
            samples: ids and loss mask of each sample.
            tally: counts of what was left out; read after the last sample.
        """
        ids, mask, ends = bytearray(), bytearray(), array("q")
        for sample_ids, sample_mask in samples:
            # They go into flat buffers, since a million small tensors would take far more RAM than their tokens.
            ids += sample_ids.to(torch.int32).numpy().tobytes()
            mask += sample_mask.to(torch.bool).numpy().tobytes()
            ends.append(len(mask))
        if not ends:
            empty = cls()
            return cls.from_tensors(empty.ids, empty.loss_mask, empty.ends, tally)
        return cls.from_tensors(
            torch.frombuffer(ids, dtype=torch.int32),
            torch.frombuffer(mask, dtype=torch.bool),
            torch.frombuffer(ends, dtype=torch.int64),
            tally,
        )

    @classmethod
    def from_tensors(cls, ids: Tensor, loss_mask: Tensor, ends: Tensor, tally: Tally | None = None) -> TokenDataset:
        """A data set from the three tensors that :attr:`tensors` gives.

        Args:
            ids: int32 ``[tokens]``.
            loss_mask: bool ``[tokens]``.
            ends: int64 ``[samples]``, increasing; the last one is the number of tokens.
            tally: counts of what was left out.

        Raises:
            ValueError: if they do not fit each other.
        """
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        total = int(ends[-1]) if len(ends) else 0
        types = (ids.dtype, loss_mask.dtype, ends.dtype) == (torch.int32, torch.bool, torch.int64)
        if not types or len(ids) != total or len(loss_mask) != total or bool((sizes < 1).any()):
            raise ValueError(
                f"ids {ids.dtype} {list(ids.shape)}, loss_mask {loss_mask.dtype} {list(loss_mask.shape)}, ends"
                f" {ends.dtype} {list(ends.shape)}: expected int32 and bool of one length, and where in them each"
                " sample ends, as increasing int64"
            )
        dataset = cls.__new__(cls)
        dataset._keep(ids, loss_mask, ends, tally or Tally())
        return dataset

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that has to be stored: ``ids``, ``loss_mask`` and ``ends``."""
        return {"ids": self.ids, "loss_mask": self.loss_mask, "ends": self.ends}

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self._bounds(index)
        return {"input_ids": self.ids[start:end], "loss_mask": self.loss_mask[start:end]}

    def length(self, index: int) -> int:
        """Tokens of a sample."""
        start, end = self._bounds(index)
        return end - start

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 0 without samples."""
        return int(torch.diff(self.ends, prepend=self.ends.new_zeros(1)).max()) if len(self) else 0

    def loss_tokens(self, index: int) -> int:
        """Tokens of a sample that bear loss. The first token never counts, since nothing predicts it."""
        self._bounds(index)
        result: int = self._loss[index]
        return result

    def _keep(self, ids: Tensor, loss_mask: Tensor, ends: Tensor, tally: Tally) -> None:
        self.ids, self.loss_mask, self.ends = ids, loss_mask, ends
        self.tally = replace(tally, reasons=list(tally.reasons), left_out=dict(tally.left_out))
        starts = torch.cat([ends.new_zeros(1), ends[:-1]]) if len(ends) else ends
        # Cumulative sums with a 0 in front. A sample's sum, from its second token to its end, is a difference of two.
        sums = torch.cat([ends.new_zeros(1), loss_mask.cumsum(0)])
        # Reading an item of an array takes a tenth of the time that it takes from a tensor.
        self._ends = array("q", ends.tolist())
        self._loss = array("q", (sums[ends] - sums[starts + 1]).tolist())

    def _bounds(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"sample {index} of {len(self)}")
        return (self._ends[index - 1] if index else 0), self._ends[index]
