"""Token sequences: how texts become samples, and samples a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenDataset(Dataset):
    """Blocks of tokens, kept as one flat tensor.

    A sample is ``{"input_ids": int32 [length], "loss_mask": bool [length]}``.

    Args:
        blocks: token ids of each sample.

    Attributes:
        dropped: how many blocks had no token to predict and were left out.
    """

    def __init__(self, blocks: Sequence[Sequence[int]]) -> None:
        kept = [torch.tensor(block, dtype=torch.int32) for block in blocks if len(block) > 1]
        self.dropped = len(blocks) - len(kept)
        self.ids = torch.cat(kept) if kept else torch.empty(0, dtype=torch.int32)
        self.ends = torch.tensor([len(block) for block in kept], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start, end = self._bounds(index)
        ids = self.ids[start:end]
        return {"input_ids": ids, "loss_mask": torch.ones(len(ids), dtype=torch.bool)}

    def loss_tokens(self, index: int) -> int:
        """Tokens of a sample that bear loss: all but the first, which nothing predicts."""
        start, end = self._bounds(index)
        return end - start - 1

    def _bounds(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return (int(self.ends[index - 1]) if index else 0), int(self.ends[index])


class TokenCollator:
    """Joins token samples to a batch in Hugging Face's terms, padded on the right.

    ``{"input_ids", "attention_mask", "labels"}``, each int64 ``[batch, longest]``; labels are −100 where there is no
    loss. They come from the loss mask and never from ``ids != pad``: many models pad with their end token.

    Args:
        pad_id: the token to pad with.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch from samples of :class:`TokenDataset`."""
        shape = (len(samples), max(len(sample["input_ids"]) for sample in samples))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            ids = sample["input_ids"].long()
            input_ids[row, :length] = ids
            attention_mask[row, :length] = 1
            labels[row, :length] = ids.masked_fill(~sample["loss_mask"], -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def tokenize(texts: Sequence[str], tokenizer: Any, max_length: int) -> list[list[int]]:
    """Documents as blocks of at most `max_length` tokens; no block crosses documents, nothing is cut off.

    Each document gets the tokenizer's start token (if it has one) once, in front, and the end token at its end.
    """
    blocks = []
    # verbose=False: documents longer than the model's context are split right below.
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    # Models without a start token of their own often repeat the end token under that name: no need for it in front.
    start = [] if start == [tokenizer.eos_token_id] else start
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for ids in encoded:
        document = start + list(ids) + end
        blocks += [document[i : i + max_length] for i in range(0, len(document), max_length)]
    return blocks


def split_documents(texts: Sequence[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Holds out whole documents with about `fraction` of all characters; a single document gives its end.

    The choice depends on seed and texts alone.
    """
    if len(texts) == 1:
        cut = max(1, int(len(texts[0]) * (1 - fraction)))
        return [texts[0][:cut]], [texts[0][cut:]]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, taken, held_out = fraction * sum(map(len, texts)), 0, set()
    for index in order[:-1]:
        # A document that overshoots by more than it helps is left in training.
        if abs(taken + len(texts[index]) - wanted) > abs(taken - wanted):
            continue
        held_out.add(index)
        taken += len(texts[index])
        if taken >= wanted:
            break
    if not held_out:
        held_out.add(min(range(len(texts)), key=lambda index: len(texts[index])))
    return (
        [text for i, text in enumerate(texts) if i not in held_out],
        [text for i, text in enumerate(texts) if i in held_out],
    )
