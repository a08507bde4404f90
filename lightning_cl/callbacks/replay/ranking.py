"""Losses of single samples, and rankings by their hidden states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.functional.selection import herding, k_center
from lightning_cl.passes.logits import loss_positions
from lightning_cl.passes.passes import leaving_no_trace, progress, to_device, training_loss

_MOST_CANDIDATES = 10_000
_RANKINGS: dict[str, Callable[[Tensor, int], list[int]]] = {"herding": herding, "k_center": k_center}


@torch.no_grad()
def losses_of(
    trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, indices: Sequence[int], label: str
) -> dict[int, float]:
    """Measures the loss of single samples in evaluation mode; for text, a mean over each sample's tokens.

    Compute: one forward pass over the samples, one at a time. The ranks share them.

    Args:
        trainer: inside ``fit``.
        pl_module: the module.
        loader: the loader of the samples.
        indices: the samples to measure.
        label: text of the progress display.

    Returns:
        index to loss, the same on all ranks; 0 if there is no loss, or it is not finite.
    """
    own: dict[int, float] = {}
    spoilt = 0
    mine = list(indices)[trainer.global_rank :: trainer.world_size]
    with leaving_no_trace(pl_module):
        for index in progress(trainer, mine, label):
            loss = training_loss(trainer, pl_module, to_device(trainer, loader.collate_fn([loader.dataset[index]])))
            value = 0.0 if loss is None else float(loss)
            spoilt += not math.isfinite(value)
            own[index] = max(value, 0.0) if math.isfinite(value) else 0.0
    parts = from_all_ranks((own, spoilt))
    _tell_spoilt(label, "loss", sum(count for _, count in parts), "taken for 0")
    return {index: value for part, _ in parts for index, value in part.items()}


@torch.no_grad()
def ranking_of(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    loader: Any,
    indices: Sequence[int],
    method: str,
    count: int,
    seed: int,
    label: str,
) -> dict[int, int]:
    """Ranks samples by their hidden states, in evaluation mode, and returns the best.

    A sample's features are the hidden states before the last layer that predicts. For text they are averaged over the
    positions that bear loss.

    Compute: one forward pass over at most 10,000 samples (drawn at random if there are more), one at a time, and the
    ranking itself. The ranks share the passes.

    Args:
        trainer: inside ``fit``.
        pl_module: the module.
        loader: the loader of the samples.
        indices: the samples to choose from.
        method: ``herding`` or ``k_center``.
        count: the number of samples to rank.
        seed: seed for the choice among more than 10,000 samples.
        label: text of the progress display.

    Returns:
        index to its rank from 0, the same on all ranks; samples with states that are not finite have no rank.
    """
    indices = list(indices)
    order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))[:_MOST_CANDIDATES]
    candidates = sorted(indices[position] for position in order.tolist())
    own: dict[int, Tensor] = {}
    with leaving_no_trace(pl_module), _hidden_states(pl_module) as found:
        for index in progress(trainer, candidates[trainer.global_rank :: trainer.world_size], label):
            batch = to_device(trainer, loader.collate_fn([loader.dataset[index]]))
            found.clear()
            training_loss(trainer, pl_module, batch)
            if not found:
                raise MisconfigurationException(
                    f"policy={method!r}: {type(pl_module).__name__}.training_step calls no linear layer whose inputs"
                    " could stand for a sample; give policy='reservoir'"
                )
            own[index] = _pooled(found[-1], batch).cpu()
    found_states = {index: state for part in from_all_ranks(own) for index, state in part.items()}
    states = {index: state for index, state in found_states.items() if bool(state.isfinite().all())}
    _tell_spoilt(label, "hidden state", len(found_states) - len(states), "left out")
    candidates = [index for index in candidates if index in states]
    if not states:
        return {}
    ranked = _RANKINGS[method](torch.stack([states[index] for index in candidates]), count)
    return {candidates[position]: rank for rank, position in enumerate(ranked)}


def _tell_spoilt(label: str, what: str, count: int, how: str) -> None:
    if count:
        rank_zero_warn(f"{label}: the {what} of {count} samples is NaN or infinite: {how}")


@contextmanager
def _hidden_states(pl_module: L.LightningModule) -> Iterator[list[Tensor]]:
    """Collects the outputs of a transformers model's decoder, or else the inputs of linear layers."""
    found: list[Tensor] = []
    models: list[Any] = [part for part in pl_module.modules() if hasattr(part, "get_decoder")]
    decoder = next((model.get_decoder() for model in models if model is not pl_module), None)
    if isinstance(decoder, nn.Module):

        def keep_output(module: nn.Module, args: Any, output: Any) -> None:
            state = getattr(output, "last_hidden_state", None)
            if isinstance(state, Tensor):
                found.append(state)

        handles = [decoder.register_forward_hook(keep_output)]
    else:

        def keep_input(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])

        layers = [part for part in pl_module.modules() if isinstance(part, nn.Linear)]
        handles = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _pooled(states: Tensor, batch: Any) -> Tensor:
    """Returns ``[width]``, the mean over positions that predict a token with loss, or over all positions."""
    positions = loss_positions(batch)
    rows = states.float().reshape(-1, states.shape[-1])
    if states.ndim == 3 and positions is not None and states.shape[1] == positions.shape[1] + 1 and positions.any():
        rows = states[:, :-1][positions].float()
    return rows.mean(0)
