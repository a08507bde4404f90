"""Second moments of what linear layers read, from forward passes over samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_cl.core.precision import passes_in_step
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.functional.input_space import add_second_moment_
from lightning_cl.passes.passes import leaving_no_trace, training_loss
from lightning_cl.passes.task_samples import TaskSamples

Look = Callable[[str, Tensor], None]


def find_shared_inputs(
    trainer: L.Trainer, pl_module: L.LightningModule, layers: Mapping[str, nn.Module], batch: Any
) -> dict[str, str]:
    """For each layer the first one that reads the very same tensor: query, key and value projections share one.

    Args:
        trainer: inside ``fit``.
        pl_module: the module.
        layers: name to layer.
        batch: on the device, the same on all ranks.
    """
    leaders = {name: name for name in layers}
    last: list[tuple[str, Tensor]] = []

    def look(name: str, inputs: Tensor) -> None:
        if last and last[0][1] is inputs:
            leaders[name] = last[0][0]
        else:
            last[:] = [(leaders[name], inputs)]

    with leaving_no_trace(pl_module), torch.no_grad(), _looking(layers, look):
        training_loss(trainer, pl_module, batch)
    return leaders


def input_moments(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    layers: Mapping[str, nn.Module],
    widths: Mapping[str, int],
    samples: TaskSamples,
    normalize: bool,
) -> dict[str, Tensor]:
    """``Σ x xᵀ`` over all positions of a task's samples that are no padding, and over all ranks.

    Memory: ``4 · in²`` bytes per layer. Compute: a forward pass, and ``2 · in²`` operations per position and layer.

    Args:
        trainer: inside ``fit``.
        pl_module: the module, in evaluation mode inside.
        layers: name to layer.
        widths: name to the number of inputs.
        samples: this rank's.
        normalize: whether each position is scaled to length 1 first.

    Returns:
        name to ``[in, in]``, in fp32 on the device; zeros for a layer that was not called.
    """
    device = trainer.strategy.root_device
    totals = {name: torch.zeros(widths[name], widths[name], device=device) for name in layers}
    mask: Tensor | None = None
    counts = True

    def look(name: str, inputs: Tensor) -> None:
        if not counts:
            return
        fits = mask
        if mask is not None and inputs.shape[:-1] != mask.shape:
            # Rows may have been laid one after the other. Others, as an expert's, have no place in the batch.
            fits = mask.reshape(-1) if inputs.shape[:-1] == (mask.numel(),) else None
        add_second_moment_(totals[name], inputs, fits, normalize)

    with leaving_no_trace(pl_module), torch.no_grad(), _looking(layers, look):
        for batch, counts in _batches(pl_module, samples):  # noqa: B007 (`look` reads it)
            mask = real_positions(batch)
            training_loss(trainer, pl_module, batch)
    return {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in totals.items()}


def real_positions(batch: Any) -> Tensor | None:
    """The positions of a batch of tokens that are no padding, ``[batch, length]``; None where nobody says.

    In a batch with ``attention_mask`` these are where it is not zero. In a packed one, positions begin at 0 again at
    each document and at the padding: a row's last piece is padding if it bears no loss.
    """
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    positions, labels = batch.get("position_ids"), batch.get("labels")
    if not isinstance(positions, Tensor) or not isinstance(labels, Tensor) or positions.shape != labels.shape:
        return None
    places = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    start = torch.where(positions == 0, places, 0).amax(1, keepdim=True)
    last = places >= start
    bears_loss = ((labels != -100) & last).any(1, keepdim=True)
    return bears_loss | ~last


def _batches(pl_module: L.LightningModule, samples: TaskSamples) -> Iterator[tuple[Any, bool]]:
    """Gives batches, and whether they count: where all ranks pass in step, one that is done repeats a sample."""
    if not passes_in_step(pl_module):
        yield from ((batch, True) for _, batch in samples.batches())
        return
    own = samples.batches()
    while any(from_all_ranks((item := next(own, None)) is not None)):
        yield (item[1], True) if item is not None else (samples.one(), False)


@contextmanager
def _looking(layers: Mapping[str, nn.Module], look: Look) -> Iterator[None]:
    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(_hook(name, look), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(name: str, look: Look) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(name, args[0] if args else next(iter(kwargs.values())))

    return hook
