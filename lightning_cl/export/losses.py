"""Losses of models on held-out sequences, in torch and in llama.cpp, so that one can be compared with the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lightning_cl.export.llama_cpp import LlamaCpp
from lightning_cl.export.sequences import HeldOut, label_tensors

NOTHING = float("nan")
"""The loss where there is nothing to measure it on."""


@torch.no_grad()
def torch_loss(model: Any, sequences: Sequence[HeldOut]) -> float:
    """Returns the mean loss in nats over all tokens that bear loss; each sequence is computed by itself.

    Args:
        model: of ``transformers`` or peft, in evaluation mode.
        sequences: the sequences.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for sequence in sequences:
        ids, labels = (tensor.to(device) for tensor in label_tensors(sequence))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, labels[0, 1:], reduction="sum"))
        count += _count(sequence)
    return total / count if count else NOTHING


def llama_loss(llama: LlamaCpp, sequences: Sequence[HeldOut], scales: Sequence[float] = ()) -> float:
    """Returns the mean loss in nats as llama.cpp computes it from a file.

    Args:
        llama: the file.
        sequences: the sequences; none is longer than the context of `llama`.
        scales: by how much each adapter is applied.
    """
    total, count = 0.0, 0
    for sequence in sequences:
        places = [place for place, label in enumerate(sequence.labels) if label != -100]
        total -= float(llama.token_logprobs(sequence.ids, scales, places).double().sum())
        count += len(places)
    return total / count if count else NOTHING


def _count(sequence: HeldOut) -> int:
    return sum(label != -100 for label in sequence.labels)
