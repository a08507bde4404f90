"""Averaged gradient episodic memory: no step raises the loss of stored samples, to first order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.buffers.buffer import Unit
from lightning_cl.buffers.policies import PolicyName
from lightning_cl.callbacks.replay.base import Fill, MemoryCallback, Storage
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.placement import trainable_parameters
from lightning_cl.core.precision import amp_scale
from lightning_cl.core.questions import Need
from lightning_cl.functional.agem import Projection, project_
from lightning_cl.passes.passes import leaving_no_trace, non_reentrant_checkpoints, training_loss
from lightning_cl.random_state import seed_of


class AGEM(MemoryCallback):
    """Averaged gradient episodic memory (Chaudhry et al. 2019, ICLR, eq. 11).

    ::

        g ← g − (g · g_ref / g_ref · g_ref) g_ref    where g · g_ref < 0

    The projection is made once per optimizer step. ``g`` is the gradient that the optimizer would get: accumulated,
    unscaled, averaged over ranks, and with what penalties have added, but not yet clipped. ``g_ref`` is the gradient of
    the loss of some stored samples, which are drawn anew for every step. The model is not trained on them; add
    ``Replay`` for that.

    ``g_ref`` comes from the module's own ``training_step``, in the mode and precision of training (with dropout, and
    with the batch's own statistics in batch norm). It leaves no trace in random states, running statistics, metrics,
    logs, lists or ``.grad``; only counters that ``training_step`` itself increments do change. The projection covers
    the parameters that this step moves: those of the optimizer that have a gradient. If the gradient of the buffer's
    loss is missing or not finite, nothing is changed, and the report says so. While nothing is stored, as in the first
    task, training is bit for bit the same as without this callback.

    The inequality holds for steps along the gradient, as those of SGD. Adam's steps have another direction: its second
    moment scales up again what the projection removes.

    Memory: the samples, and during a step one more gradient (two with several ranks or several passes). Compute per
    optimizer step: one forward and backward pass of `batch_size` samples, from the second task on.

    Args:
        buffer_size: the largest number of samples kept, over all tasks.
        batch_size: number of samples that ``g_ref`` is the mean over, on all ranks together; default: the size of the
            task's batch. It is never more than the number of stored samples. More samples give less noise. They are
            computed in passes of at most one batch of the task, and each pass has the weight of its samples.
        policy: the choice of the samples that are kept, as in ``Replay``.
        unit: unit of `buffer_size`: ``samples``, ``tokens`` or ``bytes``.
        fill: ``task_end``: samples are stored at the end of each task; ``training``: when they are trained on.
        storage: ``disk`` or ``memory`` (RAM), as in ``Replay``.
        folder: folder for the files; default: the run's folder.
        buffer: the name of another callback of the Trainer, whose buffer is used. With ``buffer="Replay"`` the samples
            are those that ``Replay`` keeps.
        seed: seed for the choice of samples.

    Attributes:
        interference: task to its counts: ``steps`` with stored samples, ``projected`` steps, steps in which the
            buffer's gradient was ``zero`` or ``not_finite``, and the sum of the ``cosines`` of both gradients.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import AGEM
        >>> method = AGEM(buffer_size=500, batch_size=32)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["batch_size"]
        32
    """

    owns = "the projection of gradients"
    edit_order = 1

    def __init__(
        self,
        buffer_size: int = 10_000,
        batch_size: int | None = None,
        policy: PolicyName = "reservoir",
        *,
        unit: Unit = "samples",
        fill: Fill = "task_end",
        storage: Storage = "disk",
        folder: str | None = None,
        buffer: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            buffer_size, policy, unit=unit, fill=fill, storage=storage, folder=folder, buffer=buffer, seed=seed
        )
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1, "a positive number of samples, or None")
        self.batch_size = batch_size
        self.interference: dict[str, dict[str, Any]] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            refuse_sharded(trainer, f"{type(self).__name__}: the buffer's gradient cannot be taken of")
        elif trainer.strategy.distributed_sampler_kwargs["num_replicas"] != trainer.world_size:
            raise MisconfigurationException(
                f"{type(self).__name__}: with tensor_parallel_size > 1 several ranks would need the same"
                " samples of the buffer; use ModelParallelStrategy(tensor_parallel_size=1) or strategy='ddp'"
            )

    # ------------------------------------------------------------------ the projection

    @override
    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if len(self.buffer) == 0:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trainable = trainable_parameters(pl_module)
        moved = {name: p for name, p in trainable.items() if id(p) in stepped and p.grad is not None}
        if not moved:
            return
        reference = self._reference(trainer, pl_module, moved)
        # `scale` has no effect on the projection, which is linear in the scaled gradient.
        self._note(trainer, project_({name: p.grad for name, p in moved.items()}, reference))

    def _reference(
        self, trainer: L.Trainer, pl_module: L.LightningModule, parameters: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the gradient of the buffer's mean loss, times the loss scale of fp16; the same on all ranks."""
        rows: int = trainer.train_dataloader.batch_size * trainer.world_size  # type: ignore[union-attr]
        count = min(self.batch_size or rows, len(self.buffer))
        passes = math.ceil(count / rows)
        sizes = tuple(count // passes + (number < count % passes) for number in range(passes))
        batches = self.memory_batches(trainer, sizes, seed_of(self.seed, trainer.global_step))
        # Shards are gathered for a pass and are no part of its graph, so their gradients are only in `.grad`.
        sharded = any(hasattr(p, "device_mesh") for p in parameters.values())
        total: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(_in_training_mode(pl_module))
            stack.enter_context(non_reentrant_checkpoints())
            stack.enter_context(torch.enable_grad())
            if sharded:
                stack.enter_context(_gradients_put_aside(list(pl_module.parameters())))
            for size, batch in zip(sizes, batches, strict=False):
                # A pass has the weight of its samples on this rank; the mean over ranks is taken below.
                own = len(range(trainer.global_rank, size, trainer.world_size))
                weight = own * trainer.world_size / count
                # The pass uses the bare module. DDP's reducer would take it for a part of training: in buckets that may
                # contain the task's gradients themselves, in the marks of unused parameters, and in the state of
                # communication hooks.
                with trainer.precision_plugin.forward_context():
                    loss = training_loss(trainer, pl_module, batch)
                if loss is None or not loss.requires_grad:
                    continue
                loss = loss * (amp_scale(trainer) * weight)
                if sharded:
                    loss.backward()
                    total = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}
                    continue
                # `backward` would call DDP's hooks on the parameters.
                found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
                # The sum is not in place, since autograd may give one tensor for two parameters.
                total = {name: total[name] + g if total else g for name, g in zip(parameters, found, strict=True)}
        return total if sharded else _mean_over_ranks(total, parameters)

    # ------------------------------------------------------------------ statistics

    def _note(self, trainer: L.Trainer, found: Projection) -> None:
        assert self.task is not None
        finite = math.isfinite(found.reference_square)
        if finite and not math.isfinite(found.gradient_square):
            return  # the task's gradient overflows in fp16: no step is taken
        none = {"steps": 0, "projected": 0, "zero": 0, "not_finite": 0, "cosines": 0.0}
        counts = self.interference.setdefault(self.task.name, none)
        counts["steps"] += 1
        counts["projected"] += found.projected
        counts["zero"] += found.reference_square == 0
        counts["not_finite"] += not finite
        counts["cosines"] += found.cosine if math.isfinite(found.cosine) else 0.0
        if not finite and counts["not_finite"] == 1:
            rank_zero_warn(
                f"{type(self).__name__}: the gradient of samples in the buffer is not finite in step"
                f" {trainer.global_step} (a loss that is NaN or infinite, or an overflow); such steps"
                f" of {self.task} are not projected"
            )
        if self.is_log_step(trainer):
            self.log_scalar("interference", counts["projected"] / counts["steps"])
            self.log_scalar("cosine", found.cosine)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        counts = self.interference.get(self.task.name)
        quiet = trainer.fast_dev_run or counts is None or counts["not_finite"]  # type: ignore[attr-defined]
        if counts is not None and counts["projected"] == 0 and not quiet:
            if counts["zero"] == counts["steps"]:
                why = "the loss of the samples in the buffer has no gradient; is it constant, or fitted perfectly?"
            else:
                why = "the task's gradient never pointed against the buffer's, and training was as without it"
            rank_zero_warn(
                f"{type(self).__name__}: none of {counts['steps']} steps of {self.task} was projected: {why}"
            )
        super().on_task_end(trainer, pl_module)

    @override
    def continual_state(self) -> dict[str, Any]:
        interference = {task: dict(counts) for task, counts in self.interference.items()}
        return super().continual_state() | {"interference": interference}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.interference = {task: dict(counts) for task, counts in state["interference"].items()}

    @override
    def report(self) -> dict[str, Any]:
        shares = {task: counts["projected"] / counts["steps"] for task, counts in self.interference.items()}
        return super().report() | {
            "batch_size": self.batch_size,
            "interference": {task: counts | {"share": shares[task]} for task, counts in self.interference.items()},
            "sentences": [
                f"{type(self).__name__}, {task}: {_told(counts)}" for task, counts in self.interference.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        # It removes only the part of a step that would harm the buffer's samples.
        return "a larger AGEM(batch_size=…, buffer_size=…)" if need == "keep" else None


def _told(counts: dict[str, Any]) -> str:
    """Describes a task's steps in words."""
    steps, idle = counts["steps"], counts["zero"] + counts["not_finite"]
    told = f"{counts['projected']} of {steps} steps projected ({counts['projected'] / steps:.0%})"
    if idle < steps:
        told += f", cosine with the buffer's gradient {counts['cosines'] / (steps - idle):.2g} on average"
    for kind, name in (("zero", "zero"), ("not_finite", "not finite")):
        told += f"; in {counts[kind]} steps that gradient was {name}" if counts[kind] else ""
    return told


@contextmanager
def _in_training_mode(pl_module: L.LightningModule) -> Iterator[None]:
    """Opens a pass that leaves no trace, with each submodule in its mode of training."""
    modes = {module: module.training for module in pl_module.modules()}
    with leaving_no_trace(pl_module):
        for module, training in modes.items():
            module.training = training
        yield


@contextmanager
def _gradients_put_aside(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Removes all gradients inside the block, and restores them afterwards."""
    kept = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        yield
    finally:
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad = gradient


def _mean_over_ranks(gradients: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Takes the mean over ranks, as DDP does, so that all ranks project alike; no gradient counts as zero."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return gradients
    ranks = torch.distributed.get_world_size()
    gradients = gradients or {name: torch.zeros_like(p) for name, p in parameters.items()}
    shares = {name: (gradients.pop(name) / ranks).contiguous() for name in list(gradients)}
    for work in [torch.distributed.all_reduce(share, async_op=True) for share in shares.values()]:
        work.wait()
    return shares
