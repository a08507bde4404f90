"""Memory Aware Synapses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.callbacks.regularization.sampled_importance import SampledImportance
from lightning_cl.core.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.core.placement import trainable_parameters
from lightning_cl.functional import normalize_importance
from lightning_cl.functional.cross_entropy import CHUNK_BYTES
from lightning_cl.passes.fisher_losses import select
from lightning_cl.passes.logits import LogitsReader, OutputsFunction
from lightning_cl.passes.sample_sums import LossesOf, look_at_one, sum_over_samples


class MAS(SampledImportance):
    """Memory Aware Synapses (Aljundi et al. 2018, ECCV, eqs. 2 and 4, and section 4.1 for outputs of several values).

    ::

        Ω_i = 1/N · Σ_x | ∂ ‖f(x)‖² / ∂θ_i |        penalty: strength / 2 · Σ_i Ω_i (θ_i − θ*_i)²

    The importance says how much the output changes when a weight changes; it needs no labels. ``f(x)`` are the logits,
    and ``‖·‖²`` is the sum of their squares. For language models a sequence is a sample, ``‖f(x)‖² = Σ_t ‖f_t(x)‖²``
    over the positions that bear loss, and N is the number of those positions. The absolute value is taken of each
    sample's gradient. Ω is summed over the tasks. The paper's λ is strength / 2.

    Memory: 8 bytes per trainable parameter. During the measurement one more fp32 tensor per parameter, and the logits
    of a whole batch (``batch_size=1`` helps where they are large). Compute per step: one pass over parameters,
    importance and anchor. Per task: one forward and backward pass over `samples` samples, in batches.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        samples: number of samples of a task to measure on; all samples if the task has fewer.
        normalize: divide each task's Ω by its mean before it is added, so that strengths have one order of magnitude
            for different models. False keeps the units of the paper.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        batch_size: samples measured at once; default: the training loader's. It does not change the result.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        last_task: True measures the last task of a sequence too. False saves that pass. If tasks are added later, the
            pass is made when the first of them starts, on the last task's data, with the same result.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import MAS
        >>> penalty = MAS(strength=0.01, samples=64)
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["samples"]
        64
    """

    def __init__(
        self,
        strength: Strength = "auto",
        samples: int = 512,
        normalize: bool = True,
        outputs: OutputsFunction | None = None,
        batch_size: int | None = None,
        apply: Apply = "gradient",
        last_task: bool = True,
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__(strength, samples, batch_size, last_task, apply, share, state_dtype, state_device)
        self.normalize, self.outputs = normalize, outputs

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: gradients of single samples cannot be taken from")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, type(self).__name__)

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_start(trainer, pl_module)
        if self.tasks_done == 0:
            look_at_one(trainer, pl_module, self._norms(trainer, pl_module))

    def _norms(self, trainer: L.Trainer, pl_module: L.LightningModule) -> LossesOf:
        read_logits, owner = LogitsReader(trainer, pl_module, self.outputs), type(self).__name__

        def norms(batch: Any, numbers: list[int]) -> tuple[Iterable[Tensor], int]:
            logits = read_logits(batch)
            if logits is None:
                raise MisconfigurationException(
                    f"{owner}: nothing that {type(pl_module).__name__} calls returns an object with `.logits`; give"
                    f" {owner}(outputs=lambda module, batch: logits)"
                )
            selected, _, _ = select(batch, logits, read_logits.shifted)
            rows = max(1, CHUNK_BYTES // (4 * selected.shape[-1]))
            parts = [checkpoint(_squares, part, use_reentrant=False) for part in selected.split(rows)]
            return [torch.stack(parts).sum()] if parts else [], len(selected)

        return norms

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        samples = self.task_samples(trainer, f"{type(self).__name__}: {self.task}")
        parameters = trainable_parameters(pl_module)
        norms = self._norms(trainer, pl_module)
        sums = sum_over_samples(trainer, pl_module, parameters, samples, norms, Tensor.abs_)
        new = sums.total
        for value in new.values():
            value.div_(max(sums.positions, 1))
        new = self.without_non_finite(new)
        mean = normalize_importance(new) if self.normalize else None
        note = "The output does not depend on any weight that is trained."
        self.diagnose(new, note, normalized_by=mean, left_out=sums.left_out)
        self.add_importance(new)
        self.set_anchor(pl_module)

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"samples": self.samples, "normalize": self.normalize}


def _squares(logits: Tensor) -> Tensor:
    return logits.float().square().sum()
