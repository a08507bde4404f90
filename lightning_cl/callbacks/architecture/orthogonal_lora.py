"""One LoRA adapter for each task, all of them in use, kept orthogonal to each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_strength
from lightning_cl.callbacks.architecture.projected import on_one_rank_each
from lightning_cl.callbacks.architecture.summed_adapters import SummedAdapters, down_projections
from lightning_cl.core.questions import Need
from lightning_cl.functional.orthogonal_lora import (
    down_overlap,
    orthogonality_gradient,
    overlap_gradient,
    overlap_penalty,
    project_down_,
)
from lightning_cl.functional.subspace import orthonormal_basis
from lightning_cl.models.adapters import fold_adapters, list_adapters


class OrthogonalLoRA(SummedAdapters):
    """A LoRA adapter for each task, orthogonal to the earlier ones (O-LoRA, Wang et al. 2023, arXiv:2310.14152, eq. 7).

    ::

        y = W x + s · Σ_{i ≤ t} B_i A_i x,   only A_t and B_t train
        L + strength · mean over layers of the overlap of A_t with A_1 … A_{t−1}

    The overlap is the mean over the rows of ``A_t`` of the share of their squared length that lies in the span of the
    earlier rows, in [0, 1]: it knows angles only, and a strength means the same for every rank, depth and width. The
    paper's penalty, ``Σ |A_i A_tᵀ|`` (``normalize=False``), grows with all of them. Its gradient is added once in each
    step of the optimizer, whatever the accumulation; published code adds the loss in each part of a batch.

    Independent adapters are nearly orthogonal anyway, and in small models orthogonality protects little: look at the
    overlap in the report. With ``strength=0`` it is one adapter for each task, all in use (IncLoRA). The module
    contains one ``PeftModel`` with LoRA, as ``CausalLM(lora={"r": 8})``, around a base in 32, 16, 8 or 4 bits; its
    adapter is the template of all others, and is deleted when the first task has its own. Everything else is frozen.

    Memory: for each task rank · Σ (inputs + outputs) parameters, in checkpoints too; gradients and optimizer states of
    one task; a basis of all earlier rows. Compute: a forward pass through all adapters, until they are folded;
    ``O(rank · in · Σ ranks)`` operations per layer and step.

    Args:
        strength: λ; 0 switches the penalty off.
        hard: instead of the penalty, take the earlier rows' span out of ``A_t`` after each step: the overlap is 0 up
            to rounding. `strength` has no effect then.
        normalize: penalise the overlap; False: the paper's sum, with λ = 0.5 there, and up to 5 in long sequences.
        fold: at the end of a sequence, replace the adapters by one of rank Σ r with the same ``ΔW``: as fast as one,
            and ready to be saved or merged. More tasks can then be added from a checkpoint only.
        rank: of the adapters; None: that of the template.
        seed: of the random factors; None: that of the run's random state.

    Attributes:
        history: for each task the parameters and bytes of its adapter, and its overlap with the earlier ones.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import OrthogonalLoRA
        >>> method = OrthogonalLoRA(hard=True, fold=True)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["hard"]
        True
    """

    edit_order = 0  # of the penalty's gradient; with `hard` 1, as other projections

    def __init__(
        self,
        strength: float = 0.5,
        hard: bool = False,
        normalize: bool = True,
        fold: bool = False,
        rank: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(rank, seed)
        self.strength = check_strength(strength)
        for name, value in (("hard", hard), ("normalize", normalize), ("fold", fold)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected True or False")
        self.hard, self.normalize, self.fold = hard, normalize, fold
        if hard:
            self.edit_order = 1
        self._down: dict[str, nn.Parameter] = {}
        self._bases: dict[str, Tensor] = {}  # of all earlier rows, [in, directions]
        self._rows: dict[str, Tensor] = {}  # all earlier rows, for the paper's penalty

    @override
    def check_room(self, pl_module: nn.Module, tasks: int) -> None:
        if self.strength == 0 and not self.hard:
            return
        task = list_adapters(pl_module)[-1]
        for path, down in down_projections(pl_module, task).items():
            rank, width = down.shape
            if rank * tasks > width:
                raise MisconfigurationException(
                    f"{type(self).__name__}: {tasks} tasks of rank {rank} are more than the {width} inputs of {path}:"
                    f" no orthogonal directions are left; expected a rank of at most {width // tasks}, or strength=0"
                )

    # ------------------------------------------------------------------ a task

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.place(trainer, pl_module)
        self._project()  # the up projection is zero: nothing changes

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        self._down = down_projections(pl_module, self.task.name)
        earlier: dict[str, list[Tensor]] = {}
        for task in list_adapters(pl_module):
            if task != self.task.name:
                for path, down in down_projections(pl_module, task).items():
                    earlier.setdefault(path, []).append(down.detach())
        self._rows = {path: torch.cat(earlier[path]) for path in self._down if path in earlier}
        label = f"{type(self).__name__}: directions of earlier tasks"
        bases = on_one_rank_each(trainer, self._rows, lambda _, rows: orthonormal_basis(rows.T).cpu(), label)
        self._bases = {path: basis.to(self._down[path].device) for path, basis in bases.items()}

    # ------------------------------------------------------------------ steps

    @override
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if self._bases and self.is_log_step(trainer):
            with torch.no_grad():
                overlaps = [overlap_penalty(self._down[path], basis) for path, basis in self._bases.items()]
            self.log_scalar("overlap", sum(map(float, overlaps)) / len(overlaps))

    @override
    @torch.no_grad()
    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if self.hard or self.strength == 0:
            return
        for path, basis in self._bases.items():
            down = self._down[path]
            if down.grad is None:
                continue
            if self.normalize:
                gradient, factor = overlap_gradient(down, basis), self.strength / len(self._bases)
            else:
                gradient, factor = orthogonality_gradient(down, self._rows[path]), self.strength
            down.grad.add_(gradient.to(down.grad.dtype), alpha=factor * scale)

    @override
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        if self.hard:
            for path, basis in self._bases.items():
                project_down_(self._down[path], basis)

    # ------------------------------------------------------------------ ends

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_end(trainer, pl_module)
        assert self.task is not None
        overlaps = [float(down_overlap(self._down[path].detach(), basis)) for path, basis in self._bases.items()]
        chance = [basis.shape[1] / len(basis) for basis in self._bases.values()]
        self.history[self.task.name] |= {
            "overlap": sum(overlaps) / len(overlaps) if overlaps else None,
            "overlap_by_chance": sum(chance) / len(chance) if chance else None,
        }
        self._down, self._bases, self._rows = {}, {}, {}

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tasks = list_adapters(pl_module)
        if self.fold and tasks:
            fold_adapters(pl_module, tasks)

    # ------------------------------------------------------------------ report

    @override
    def report(self) -> dict[str, Any]:
        return {
            "strength": self.strength,
            "hard": self.hard,
            "normalize": self.normalize,
            "tasks": {task: dict(entry) for task, entry in self.history.items()},
            "sentences": [f"{type(self).__name__}, {task}: {_describe(e)}" for task, e in self.history.items()],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "begin" or self.hard or (need == "learn" and self.strength == 0):
            return None
        return f"a {'larger' if need == 'keep' else 'smaller'} {type(self).__name__}(strength=…), {self.strength:g} now"


def _describe(entry: Mapping[str, Any]) -> str:
    text = f"an adapter of {entry['parameters']:,} parameters ({entry['bytes'] / 2**20:,.1f} MB)"
    if entry["overlap"] is None:
        return text
    chance = entry["overlap_by_chance"]
    return f"{text}, whose overlap with the earlier ones is {entry['overlap']:.2g} ({chance:.2g} by chance)"
