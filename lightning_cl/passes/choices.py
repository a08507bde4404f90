"""Log-likelihoods of given continuations: which of several answers a language model finds the most probable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cl.data.text.tokenizer import pad_token_id, start_tokens
from lightning_cl.passes.heads import SplitHead, evaluated


def choice_tokens(tokenizer: Any, context: str, choices: Sequence[str], special: bool = True) -> list[list[list[int]]]:
    """Splits each text ``context + choice`` into the tokens before the choice and those of the choice.

    The whole text is tokenised, so that its tokens are those of ordinary text. All choices are split at the same
    position: the end of what the tokens of the context and of all texts have in common.

    Args:
        tokenizer: the model's tokenizer.
        context: the text before the choice. Where it is empty, a start token (else an end token) is before the choice.
        choices: the texts to score; none is empty.
        special: put the tokenizer's start tokens before the text; False for a text that a chat template has made.

    Returns:
        for each choice the two lists of token ids, neither of them empty.
    """
    front = start_tokens(tokenizer) if special else []
    ids = [
        list(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (context, *(context + c for c in choices))
    ]
    split = next((at for at, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1), min(map(len, ids)))
    split = min(split, *(len(row) - 1 for row in ids[1:]))
    if not front and split == 0:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, pad_token_id(tokenizer))
        front = [next(token for token in known if token is not None)]
    return [[front + row[:split], row[split:]] for row in ids[1:]]


@torch.no_grad()
def log_likelihoods(
    model: Any, rows: Sequence[Sequence[Sequence[int]]], pad_id: int = 0, batch_size: int = 16
) -> list[float]:
    """Sums of the log-probabilities of continuations, each after its context, in nats.

    The model is in evaluation mode during this. Rows of about the same length are computed together, padded on the
    right, and logits exist only at the positions of the continuations (where the head can be taken apart). What is
    longer than the model's positions loses the beginning of its context.

    Args:
        model: a causal model of ``transformers``.
        rows: pairs of token ids: context and continuation, neither of them empty.
        pad_id: the token to pad with.
        batch_size: number of rows that are computed together.

    Returns:
        one number for each row; NaN or infinite where the logits are.
    """
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    cut = [_cut(row[0], row[1], longest) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(cut[index][0]) + len(cut[index][1]))
    scores = [0.0] * len(rows)
    with evaluated(model):
        head = SplitHead(model, quiet=True)
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            for index, score in zip(some, sums_of_batch(model, head, [cut[i] for i in some], pad_id), strict=True):
                scores[index] = score
    return scores


def _cut(context: Sequence[int], continuation: Sequence[int], longest: int | None) -> tuple[list[int], list[int]]:
    """The end of a context that fits before its continuation; a continuation that is too long keeps its beginning."""
    if not isinstance(longest, int) or len(context) + len(continuation) <= longest:
        return list(context), list(continuation)
    kept = list(continuation)[: longest - 1]
    return list(context)[-(longest - len(kept)) :], kept


@torch.no_grad()
def sums_of_batch(
    model: Any, head: SplitHead, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0
) -> list[float]:
    """Sums of the log-probabilities of one batch's continuations, in nats; an empty continuation's is 0.

    Args:
        model: a causal model of ``transformers``, in evaluation mode.
        head: the same model in two steps.
        rows: pairs of token ids: a context, which is not empty, and its continuation.
        pad_id: the token to pad with.
    """
    device = next(model.parameters()).device
    lengths = [len(context) + len(continuation) for context, continuation in rows]
    longest = max(lengths)
    ids = torch.tensor([[*row[0], *row[1], *[pad_id] * (longest - n)] for row, n in zip(rows, lengths, strict=True)])
    mask = torch.tensor([[1] * n + [0] * (longest - n) for n in lengths])
    scored = torch.zeros(len(rows), longest - 1, dtype=torch.bool)  # the positions that predict a scored token
    for place, ((context, _), n) in enumerate(zip(rows, lengths, strict=True)):
        scored[place, len(context) - 1 : n - 1] = True
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    scored = scored.to(device)
    if head.exact:
        logits: Tensor = head.logits(head.hidden_states(inputs)[:, :-1][scored])
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1][scored]
    targets = inputs["input_ids"][:, 1:][scored]
    each = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].double().cpu()
    return [float(part.sum()) for part in each.split([len(continuation) for _, continuation in rows])]
