"""Distance of the model from the base, measured on the data of each new task."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.core.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import tensor_bytes
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.passes.divergence import Divergence
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.passes import leaving_no_trace
from lightning_cl.passes.starting_weights import StartingWeights
from lightning_cl.passes.task_samples import single_samples


class KLToBase(ContinualCallback):
    """Measures ``KL(base ‖ now)`` on each new task's data, which predicts forgetting (RL's Razor, arXiv:2509.04259).

    The measure is the KL divergence, in nats, from the predictions of the base (the model before the first task) to
    those of the present model. It is the mean over the tokens that bear loss; for a classifier, over samples. It is
    taken after each task on sequences of that task's validation data (with several validation loaders, the first).
    Without validation data, and in a plain fit, training data is used. Training itself stays the same, bit for bit.

    Under LoRA the base is the model with its adapter switched off, if the adapter changes nothing at the start.
    Otherwise the trainable parameters and the running statistics of norms are copied at the start of the first task.
    For the base's predictions they are swapped in.

    Memory: none for LoRA. Otherwise the trainable parameters in their own type, on the CPU and in each checkpoint, and
    once more on the device during the measurement. Compute per task: two forward passes over `samples` single
    sequences.

    Args:
        samples: number of sequences of a task to measure on; all sequences if the task has fewer.
        seed: seed for the choice of sequences.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.

    Attributes:
        kl: task name to nats per token (per sample), the same on all ranks; NaN if nothing bears loss.
        base: the base's weights (:class:`~lightning_cl.passes.starting_weights.StartingWeights`); None
            before the first task.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import KLToBase
        >>> probe = KLToBase(samples=16)
        >>> trainer = L.Trainer(callbacks=[probe], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> probe.samples
        16
    """

    def __init__(self, samples: int = 64, seed: int = 0, outputs: OutputsFunction | None = None) -> None:
        super().__init__()
        check_integer("samples", samples, 1)
        check_integer("seed", seed)
        self.samples, self.seed, self.outputs = samples, seed, outputs
        self.kl: dict[str, float] = {}
        self.base: StartingWeights | None = None
        self._measured: dict[str, str] = {}  # for each task: the unit and the data, in words

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: the base's weights cannot be swapped in for")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, type(self).__name__)

    @override
    def on_sequence_start(self) -> None:
        self.kl, self.base, self._measured = {}, None, {}

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.base is None:
            self.base = StartingWeights(pl_module)
            self._check_logits(trainer, pl_module)
        self.base.add_trainable(pl_module)

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.base is not None:
            self.base.find_in(pl_module)  # a changed model raises an error before the task is trained

    @override
    @torch.no_grad()
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        assert self.base is not None
        with leaving_no_trace(pl_module):
            loader, source = self._data(trainer)
            divergence = Divergence(trainer, pl_module, self.outputs, type(self).__name__)
            count = 1 if trainer.fast_dev_run else self.samples  # type: ignore[attr-defined]
            samples = single_samples(trainer, count, self.seed, f"KLToBase: {self.task}", loader)
            sums = divergence.sums(self.base.bring_to(pl_module), (batch for _, batch in samples))
        total, positions, sequences, spoilt = sums.tolist()
        left_out = f"; {spoilt:.0f} samples are left out, where it is NaN or infinite" if spoilt else ""
        if spoilt:
            rank_zero_warn(f"{type(self).__name__}: {self.task}: the divergence from the base is measured{left_out}")
        name, unit = self.task.name, "token" if sequences else "sample"
        self.kl[name] = total / positions if positions else float("nan")
        self._measured[name] = f"nats per {unit} from the model before training (KL, on its {source} data){left_out}"
        for logger in trainer.loggers if positions else []:
            logger.log_metrics({f"continual/kl_to_base/{name}": self.kl[name]}, step=trainer.global_step)

    # ------------------------------------------------------------------ data and logits

    def _data(self, trainer: L.Trainer) -> tuple[Any, str]:
        """Returns the loader of the data to measure on, and the name of this data."""
        data = self.run.data
        if data is not None:
            loader = data.val_loader(data.current)
            if isinstance(loader, (dict, list, tuple)):  # the first of several loaders
                loader = next(iter(loader.values() if isinstance(loader, dict) else loader), None)
            if loader is not None:
                return loader, "training" if data.validated_on_training_data(data.current) else "validation"
        return trainer.train_dataloader, "training"

    def _check_logits(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises an error before training, if the logits cannot be found."""
        with leaving_no_trace(pl_module), torch.no_grad():
            loader, _ = self._data(trainer)
            if why_not_plannable(loader) is None:  # a stream cannot be rewound
                divergence = Divergence(trainer, pl_module, self.outputs, type(self).__name__)
                for _, batch in single_samples(trainer, trainer.world_size, self.seed, "KLToBase: logits", loader):
                    divergence.logits(batch)

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "kl": dict(self.kl),
            "measured": dict(self._measured),
            "base": self.base.state() if self.base is not None else None,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.kl, self._measured = dict(state["kl"]), dict(state["measured"])
        self.base = StartingWeights.load(state["base"]) if state["base"] is not None else None

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.base.copies) if self.base is not None else 0

    @override
    def report(self) -> dict[str, Any]:
        told = {name: value for name, value in self.kl.items() if value == value or "left out" in self._measured[name]}
        sentences = [f"{name}: {value:.3g} {self._measured[name]}" for name, value in told.items()]
        return {"samples": self.samples, "kl": dict(self.kl), "sentences": sentences}
