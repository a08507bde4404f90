"""Losses of models on held-out sequences, in torch, llama.cpp and MLX, so that one can be compared with the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lightning_cl.export.llama_cpp import LlamaCpp
from lightning_cl.export.mlx import mlx_losses
from lightning_cl.export.sequences import HeldOut


@torch.no_grad()
def torch_loss(model: Any, sequences: Sequence[HeldOut]) -> float:
    """Returns the mean loss in nats over all tokens that bear loss; each sequence is computed by itself.

    Args:
        model: of ``transformers`` or peft, in evaluation mode.
        sequences: the sequences.
    """
    device = next(model.parameters()).device

    def total(sequence: HeldOut) -> float:
        ids, labels = (torch.tensor([row], device=device) for row in sequence)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return float(F.cross_entropy(logits, labels[0, 1:], reduction="sum"))

    return _mean(sequences, total)


def llama_loss(llama: LlamaCpp, sequences: Sequence[HeldOut], scales: Sequence[float] = ()) -> float:
    """Returns the mean loss in nats as llama.cpp computes it from a file.

    Args:
        llama: the file.
        sequences: the sequences; none is longer than the context of `llama`.
        scales: by how much each adapter is applied.
    """

    def total(sequence: HeldOut) -> float:
        return -float(llama.token_logprobs(sequence.ids, scales, sequence.places).double().sum())

    return _mean(sequences, total)


def mlx_loss(folder: Path, sequences: Sequence[HeldOut], adapter: Path | None = None) -> float:
    """Returns the mean loss in nats as MLX computes it.

    Args:
        folder: of the model.
        sequences: the sequences.
        adapter: the folder of an adapter, or None.
    """
    found = iter(mlx_losses(folder, sequences, adapter))
    return _mean(sequences, lambda _: next(found)[0])


def _mean(sequences: Sequence[HeldOut], total: Callable[[HeldOut], float]) -> float:
    """The sum over all sequences, per token that bears loss; NaN where there is none."""
    count = sum(len(sequence.places) for sequence in sequences)
    return sum(map(total, sequences)) / count if count else float("nan")
