"""The step from token samples, or blocks of samples, to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TokenCollator:
    """Joins token samples to a batch with Hugging Face's keys, padded on the right.

    Samples give ``{"input_ids", "attention_mask", "labels"}``, each int64 ``[batch, longest]``; labels are −100 where
    there is no loss. They come from the loss mask and never from ``ids != pad``, since many models pad with their end
    token.

    Blocks (lists of samples that share a row) give ``{"input_ids", "position_ids", "labels"}``, each int64
    ``[batch, longest block]``, and ``"use_cache": False``. Position numbers restart at 0 at each document, and at the
    padding. A document's first token has no loss, since it would be predicted from the document before.

    Blocks have no attention mask, and the cache is off. Hugging Face's models separate documents by ``position_ids``
    alone, and only if ``attention_mask`` is None and ``use_cache`` is False. With the cache (their default) or a mask
    of ones, each document silently attends to those before it. So ``self.model(**batch)`` is right. Measured with
    transformers 5.23, Llama, Qwen, Mistral, Gemma, Phi, OLMo, GPT-2, GPT-NeoX and others then give the same results as
    for single documents, up to rounding. OPT, BLOOM and Falcon do not separate documents, and neither do models with
    convolutions or states (Mamba, Jamba, Falcon-H1, LFM2, Qwen3-Next; measured without their special kernels). These
    cannot be trained on packed batches. With flash attention, documents are separate only in batches of one block.

    Args:
        pad_id: the token to pad with.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """A batch from samples of :class:`~lightning_cl.data.text.tokens.TokenDataset`, or from lists of them."""
        if isinstance(samples[0], dict):
            return self._padded(samples)
        return self._packed(samples)

    def _padded(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
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

    def _packed(self, blocks: Sequence[Sequence[dict[str, Tensor]]]) -> dict[str, Any]:
        shape = (len(blocks), max(sum(len(sample["input_ids"]) for sample in block) for block in blocks))
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, -100, dtype=torch.int64)
        for row, block in enumerate(blocks):
            start = 0
            for sample in block:
                end = start + len(sample["input_ids"])
                ids = sample["input_ids"].long()
                input_ids[row, start:end] = ids
                position_ids[row, start:end] = torch.arange(end - start)
                labels[row, start + 1 : end] = ids.masked_fill(~sample["loss_mask"], -100)[1:]
                start = end
            position_ids[row, start:] = torch.arange(shape[1] - start)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels, "use_cache": False}
