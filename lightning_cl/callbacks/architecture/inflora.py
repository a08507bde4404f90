"""One LoRA adapter for each task, which reads nothing of what earlier tasks gave its layer to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.arguments import check_integer, check_positive, check_share
from lightning_cl.callbacks.architecture.input_bases import InputBases, samples_for
from lightning_cl.callbacks.architecture.projected import on_one_rank_each
from lightning_cl.callbacks.architecture.summed_adapters import SummedAdapters, adapted_layers, down_projections
from lightning_cl.core.questions import EndCost, Need
from lightning_cl.functional.inflora import SCALE, design_down_projection
from lightning_cl.functional.subspace import protected_share
from lightning_cl.models.adapters import Train, list_adapters
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.tasks import TaskPosition

_PER_SAMPLE = 0.4  # a forward pass and the moments take so many training passes over the same samples


class InfLoRA(SummedAdapters):
    """A LoRA adapter for each task, outside of the inputs of earlier tasks (InfLoRA, Liang & Li 2024, CVPR, 3.2).

    ::

        y = W x + s · Σ_{i ≤ t} B_i A_i x,   only B_t trains
        A_t = scale · leading eigenvectors of (I − M Mᵀ) C (I − M Mᵀ),   C = Σ x xᵀ of the new task

    Before a task one forward pass over its data finds, in each layer, the directions in which its inputs have the most
    energy outside of ``M``. They become the rows of ``A_t``, which stay. After the task ``M`` grows until it holds the
    share ``threshold`` of the energy of its inputs (GPM). So ``B_t A_t x = 0`` for each ``x`` in the span of ``M``,
    whatever ``B_t`` learns. The share ``1 − threshold`` of earlier inputs is not protected: for real tasks it is
    where most of the forgetting comes from, and :class:`~lightning_cl.InputFreeze` forgets less at full tuning.

    The module contains one ``PeftModel`` with LoRA, as ``CausalLM(lora={"r": 8})``; its adapter is the template of all
    others, and is deleted when the first task has its own. Everything else is frozen. Padding is left out.

    Memory: for each task rank · Σ (inputs + outputs) parameters, in checkpoints too; ``4 · in · directions`` bytes for
    ``M`` in each group of layers that read the same input; ``4 in²`` while a task starts or ends. Compute: a forward
    pass through all adapters; per task two forward passes over `batches` batches and two decompositions, ``10 · in³``
    operations each.

    Args:
        threshold: the share of the inputs' energy that ``M`` holds of each task, above 0 and at most 1.
        batches: so many batches' worth of a task's samples are measured.
        scale: the length of the rows of ``A``; None: 1/√3, as in the authors' code.
        rank: of the adapters; None: that of the template.
        normalize: scale each position's input to length 1 before it is counted, as in
            :class:`~lightning_cl.InputFreeze`.
        seed: of what the factors are drawn from before they are designed; None: that of the run's random state.
        rises_to: what the threshold has risen to after `over_tasks` tasks, in equal steps, and stays at; None: it does
            not rise. The authors' code lets it rise to 1. A late task then leaves the next ones little to read.
        over_tasks: so many tasks does the rise take. The authors' code has the planned number of tasks here.

    Attributes:
        inputs: the bases ``M``, and which layers read the same input.
        history: for each task the parameters and bytes of its adapter, and the directions in ``M`` after it.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import InfLoRA
        >>> method = InfLoRA(threshold=0.95, batches=50)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["batches"]
        50
    """

    trains: Train = "B"
    ends_long = True

    def __init__(
        self,
        threshold: float = 0.95,
        batches: int = 100,
        scale: float | None = None,
        rank: int | None = None,
        normalize: bool = True,
        seed: int | None = None,
        rises_to: float | None = None,
        over_tasks: int = 10,
    ) -> None:
        super().__init__(rank, seed)
        self.threshold = check_positive("threshold", threshold, "a share above 0 and at most 1", most=1)
        self.rises_to = self.threshold if rises_to is None else check_share("rises_to", rises_to)
        if self.rises_to < self.threshold:
            raise ValueError(f"rises_to={rises_to}: expected a share from threshold={self.threshold:g} to 1, or None")
        self.over_tasks = check_integer("over_tasks", over_tasks, 1)
        self.batches = check_integer("batches", batches, 1)
        self.scale = SCALE if scale is None else check_positive("scale", scale)
        if not isinstance(normalize, bool):
            raise ValueError(f"normalize={normalize!r}: expected True or False")
        self.inputs = InputBases(normalize)
        self._left = 0.0  # the largest share of a row of A that lies in the protected directions

    def threshold_of(self, index: int) -> float:
        """Returns the threshold of a task, counted from 0: ``threshold + (rises_to − threshold) · index / over_tasks``.

        Args:
            index: of the task.
        """
        return self.threshold + (self.rises_to - self.threshold) * min(index / self.over_tasks, 1.0)

    @override
    def check_room(self, pl_module: nn.Module, tasks: int) -> None:
        for path, down in down_projections(pl_module, list_adapters(pl_module)[-1]).items():
            rank, width = down.shape
            if rank * tasks > width:
                raise MisconfigurationException(
                    f"{type(self).__name__}: {tasks} tasks of rank {rank} are more than the {width} inputs of {path}:"
                    f" no directions are left for the last one; expected a rank of at most {width // tasks}"
                )

    # ------------------------------------------------------------------ a task starts

    @override
    def on_sequence_start(self) -> None:
        super().on_sequence_start()
        self.inputs = InputBases(self.inputs.normalize)

    @override
    @torch.no_grad()
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        downs = down_projections(pl_module, self.task.name)
        moments = self._measure(trainer, pl_module, downs, self._samples(trainer, trainer.train_dataloader))
        ranks: dict[str, int] = {}
        for path, down in downs.items():
            leader = self.inputs.leaders[path]
            ranks[leader] = max(ranks.get(leader, 0), len(down))

        def design(path: str, moment: Tensor) -> Tensor:
            basis = self.inputs.of(path)
            basis = None if basis is None else basis.to(moment.device)
            return design_down_projection(moment, ranks[path], basis, self.scale).cpu()

        designed = on_one_rank_each(trainer, moments, design, f"{type(self).__name__}: adapters of {self.task}")
        self._left = 0.0
        for path, down in downs.items():
            down.copy_(designed[self.inputs.leaders[path]][: len(down)])
            basis = self.inputs.of(path)
            if basis is not None and basis.shape[1]:
                self._left = max(self._left, float(protected_share(down, right=basis.to(down.device))))

    def _samples(self, trainer: L.Trainer, loader: Any) -> TaskSamples:
        assert self.task is not None
        return samples_for(trainer, loader, self.batches, self.task.index, type(self).__name__, str(self.task))

    def _measure(
        self, trainer: L.Trainer, pl_module: L.LightningModule, downs: Mapping[str, Tensor], samples: TaskSamples
    ) -> dict[str, Tensor]:
        layers = adapted_layers(pl_module)
        widths = {path: down.shape[1] for path, down in downs.items()}
        return self.inputs.measure(trainer, pl_module, {path: layers[path] for path in downs}, widths, samples)

    # ------------------------------------------------------------------ a task ends

    @override
    @torch.no_grad()
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_end(trainer, pl_module)
        assert self.task is not None
        downs = down_projections(pl_module, self.task.name)
        moments = self._measure(trainer, pl_module, downs, self._samples(trainer, trainer.train_dataloader))
        rooms: dict[str, int] = {}  # a next task needs as many directions as its rank
        for path, down in downs.items():
            leader, room = self.inputs.leaders[path], down.shape[1] - len(down)
            rooms[leader] = min(rooms.get(leader, room), room)
        label = f"{type(self).__name__}: directions of {self.task}"
        threshold = self.threshold_of(self.task.index)
        self.inputs.grow(trainer, moments, threshold, label, rooms)
        bases = [basis for path in downs if (basis := self.inputs.of(path)) is not None]
        self.history[self.task.name] |= {
            "threshold": threshold,
            "directions": sum(basis.shape[1] for basis in bases),
            "of": sum(len(basis) for basis in bases),
            "protected_share": self._left,
        }

    @override
    def end_cost(self, trainer: L.Trainer, loader: Any, task: TaskPosition) -> EndCost | None:
        samples = samples_for(trainer, loader, self.batches, task.index, type(self).__name__, str(task))
        return EndCost("inputs", samples.count_samples(), samples.count_batches(), _PER_SAMPLE)

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return super().continual_state() | {**self.inputs.state(), "left": self._left}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.inputs.load(state)
        self._left = state["left"]

    @override
    def state_bytes(self) -> int:
        return self.inputs.bytes()

    @override
    def report(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "rises_to": self.rises_to,
            "over_tasks": self.over_tasks,
            "batches": self.batches,
            "scale": self.scale,
            "tasks": {task: dict(entry) for task, entry in self.history.items()},
            "sentences": [f"{type(self).__name__}, {task}: {_describe(e)}" for task, e in self.history.items()],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need == "begin":
            return None
        word = "larger" if need == "keep" else "smaller"
        return f"a {word} {type(self).__name__}(threshold=…), {self.threshold:g} now"


def _describe(entry: Mapping[str, Any]) -> str:
    return (
        f"an adapter of {entry['parameters']:,} parameters ({entry['bytes'] / 2**20:,.1f} MB), of which at most"
        f" {entry['protected_share']:.1e} reads what earlier tasks gave; from now on {entry['directions']:,} of"
        f" {entry['of']:,} input directions are protected"
    )
