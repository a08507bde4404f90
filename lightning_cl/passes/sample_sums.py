"""A pass over a task's samples that sums transformed single-sample gradients, such as squares for the Fisher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_cl.functional.layer_rules import Transform
from lightning_cl.functional.sample_gradients import SampleGradients, UseSink, add_one_by_one_, only_trainable
from lightning_cl.passes.passes import leaving_no_trace, non_reentrant_checkpoints
from lightning_cl.passes.task_samples import TaskSamples, rows_of

LossesOf = Callable[[Any, list[int]], tuple[Iterable[Tensor], int]]
"""``losses_of(batch, numbers)`` gives scalars (sums over the batch's samples) and the number of loss positions."""

_PROBE = 3


class SampleSums(NamedTuple):
    """Sums of a pass over a task's samples, over all ranks."""

    total: dict[str, Tensor]
    positions: int
    loose: frozenset[str]
    """Parameters that were measured one sample at a time."""
    left_out: int
    """Samples whose loss is NaN or infinite; they are in none of the sums."""


def sum_over_samples(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    parameters: Mapping[str, Tensor],
    samples: TaskSamples,
    losses_of: LossesOf,
    transform: Transform = Tensor.square_,
    sink: UseSink | None = None,
) -> SampleSums:
    """``Σ_x transform(∂L_x/∂θ)`` over a task's samples and all ranks, and the number of positions that bear loss.

    :class:`~lightning_cl.functional.sample_gradients.SampleGradients` measures a batch at a time. First, it is compared
    with plain autograd on three samples. Parameters whose results differ, or that no rule covers, are measured by
    autograd in a second pass, one sample at a time.

    Args:
        trainer: the Trainer inside ``fit``.
        pl_module: the module.
        parameters: name to parameter.
        samples: this rank's samples.
        losses_of: gives the loss to differentiate.
        transform: applied in place to each sample's gradient.
        sink: see :class:`~lightning_cl.functional.sample_gradients.SampleGradients`.
    """
    positions = left_out = 0
    with leaving_no_trace(pl_module), non_reentrant_checkpoints(), torch.enable_grad():
        engine = SampleGradients(pl_module, parameters, transform)
        probe = samples.probe(_PROBE)
        if probe is not None:
            numbers, batch, singles = probe
            rows = [rows_of(batch, slice(row, row + 1)) for row in range(len(numbers))]
            # Randomly augmented samples differ each time they are read. Then the rows of the batch are compared.
            for alone in (singles, rows):
                engine.loose.intersection_update(engine.never)
                bound = [_bound(losses_of, one, [number]) for number, one in zip(numbers, alone, strict=True)]
                try:
                    engine.check(len(numbers), lambda: losses_of(batch, numbers)[0], bound)
                except (RuntimeError, ValueError, TypeError, IndexError):
                    if alone is singles:
                        raise
                    engine.loose.update(parameters)  # the batch cannot be divided into rows
                if not engine.loose:
                    break
        engine.sink = sink
        engine.loose = _of_all_ranks(trainer, engine.loose, list(parameters))
        if len(engine.loose) < len(parameters):
            for numbers, batch in samples.batches():
                counts = [_add(engine, losses_of, batch, numbers)]
                if counts == [None] and len(numbers) > 1:
                    rows = [rows_of(batch, slice(row, row + 1)) for row in range(len(numbers))]
                    counts = [_add(engine, losses_of, r, [number]) for r, number in zip(rows, numbers, strict=True)]
                positions += sum(count for count in counts if count is not None)
                left_out += counts.count(None)
            engine.loose = _of_all_ranks(trainer, engine.loose, list(parameters))
        loose = {name: parameters[name] for name in parameters if name in engine.loose}
        if loose:
            counted = spoilt = 0
            for name in loose:
                engine.total[name].zero_()
            some = ", ".join(list(loose)[:3]) + (" …" if len(loose) > 3 else "")
            rank_zero_info(f"{samples.label}: {len(loose)} of {len(parameters)} tensors one sample at a time: {some}")
            with only_trainable(pl_module, loose.values()):
                for number, single in samples.singles():
                    terms, count = losses_of(single, [number])
                    if add_one_by_one_(engine.total, terms, loose, transform):
                        counted += count
                    else:
                        spoilt += 1
            if len(loose) == len(parameters):
                positions, left_out = counted, spoilt
    return _over_ranks(trainer, samples, engine.total, positions, frozenset(engine.loose), left_out)


def look_at_one(trainer: L.Trainer, pl_module: L.LightningModule, losses_of: LossesOf) -> None:
    """Computes the loss of one sample, so that an error is found before a task is trained, and not after it."""
    with leaving_no_trace(pl_module), torch.no_grad():
        batch = TaskSamples(trainer, 1, 0, "").one()
        if batch is not None:
            losses_of(batch, [0])


def squared_batch_gradients(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    parameters: Mapping[str, Tensor],
    samples: TaskSamples,
    losses_of: LossesOf,
) -> SampleSums:
    """Computes ``Σ_m (∂ Σ_{x in batch m} L_x / ∂θ)²``, which is often used instead of the Fisher but differs from it.

    Args:
        trainer: the Trainer inside ``fit``.
        pl_module: the module.
        parameters: name to parameter.
        samples: this rank's samples.
        losses_of: gives the loss of a batch.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    positions = left_out = 0
    with leaving_no_trace(pl_module), non_reentrant_checkpoints(), torch.enable_grad():
        for numbers, batch in samples.batches(like_length=False):
            terms, count = losses_of(batch, numbers)
            if add_one_by_one_(total, terms, parameters, Tensor.square_):
                positions += count
            else:
                left_out += len(numbers)
    return _over_ranks(trainer, samples, total, positions, frozenset(), left_out)


def _add(engine: SampleGradients, losses_of: LossesOf, batch: Any, numbers: list[int]) -> int | None:
    """Adds a batch; returns its number of loss positions, or None if the loss is not finite and nothing was added."""
    positions = 0

    def losses() -> Iterable[Tensor]:
        nonlocal positions
        terms, positions = losses_of(batch, numbers)
        return terms

    return positions if engine.add(len(numbers), losses) else None


def _over_ranks(
    trainer: L.Trainer,
    samples: TaskSamples,
    total: Mapping[str, Tensor],
    positions: int,
    loose: frozenset[str],
    left_out: int,
) -> SampleSums:
    """The sums of all ranks; warns of samples that were left out."""
    summed = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in total.items()}
    counts = torch.tensor([positions, left_out], dtype=torch.float64, device=trainer.strategy.root_device)
    everywhere, spoilt = map(int, trainer.strategy.reduce(counts, reduce_op="sum").tolist())
    if spoilt:
        rank_zero_warn(f"{samples.label}: the loss of {spoilt} samples is NaN or infinite; they are left out")
    return SampleSums(summed, everywhere, loose, spoilt)


def _bound(losses_of: LossesOf, batch: Any, numbers: list[int]) -> Callable[[], Iterable[Tensor]]:
    return lambda: losses_of(batch, numbers)[0]


def _of_all_ranks(trainer: L.Trainer, loose: set[str], names: list[str]) -> set[str]:
    """The parameters that are loose on any rank; they have to be loose on all ranks."""
    if trainer.world_size == 1:
        return loose
    flags = torch.tensor([float(name in loose) for name in names], device=trainer.strategy.root_device)
    flags = trainer.strategy.reduce(flags, reduce_op="sum")
    return {name for name, flag in zip(names, flags.tolist(), strict=True) if flag > 0}
