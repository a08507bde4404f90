"""Elastic Weight Consolidation."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.callbacks.regularization.fisher_importance import FisherImportance
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.core.placement import trainable_parameters
from lightning_cl.functional import merge_quadratics, normalize_importance
from lightning_cl.passes.fisher_losses import Estimator
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.sample_sums import squared_batch_gradients, sum_over_samples


class EWC(FisherImportance):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, eq. 3; online: Schwarz et al. 2018, section 3.2).

    ::

        L(θ) + strength / 2 · Σ_i F_i (θ_i − θ*_i)²

    with the diagonal Fisher information ``F`` of earlier tasks, from gradients of single samples at the end of each
    task, on its own data, in evaluation mode (:mod:`lightning_cl.functional.ewc` has the definition). For language
    models a sequence is a sample and ``F = Σ_seq (∇ Σ_t log p)² / number of loss tokens``, so that with
    ``normalize=False`` the strength is the λ of a Laplace approximation for a loss that is a mean over tokens. Modules
    without token counts: the mean over samples. ``empirical`` takes the loss of ``training_step`` for a mean over the
    tokens that bear loss (over samples, where there are none), without further terms; ``sample`` and ``exact`` need
    nothing of the loss, and take the logits for those of a softmax.

    Memory: 8 bytes per trainable parameter, for any number of tasks in both modes. Compute: one pass over parameters,
    importance and anchor per step; per task one forward and backward pass over `samples` samples, in batches
    (:class:`~lightning_cl.functional.SampleGradients`), with one more fp32 tensor per parameter and the logits of a
    whole batch while it runs (``batch_size=1`` where they are many).

    Args:
        strength: the factor λ, or ``auto``. Sane on the quickstart (three tasks, AdamW at 2e-3, ``normalize=True``):
            0.001 to 0.01 for ``apply="gradient"``, 1 to 10 for ``apply="proximal"``.
        estimator: where the labels of the Fisher come from. ``sample``: one draw per position from the model's own
            softmax. ``empirical``: the data. ``exact``: the expectation over all labels (small outputs). ``auto``:
            where the logits can be reached, ``exact`` for outputs that are not those of tokens with at most 32
            positions times classes (one backward pass each), and ``sample`` for all others; else ``empirical``.
        samples: number of samples of a task that the Fisher is measured on; all, if there are fewer.
        mode: ``online``: ``F ← decay · (F + F_new)``, the anchor is the latest task's weights. ``separate``: one
            penalty per task, which add up to one quadratic with importance ``Σ F_t`` and anchor ``Σ F_t θ_t / Σ F_t``.
        decay: γ of the online mode; ``importance`` is what the penalty multiplies, γ included.
        normalize: divide each task's F by its mean before it is added, so that strengths are of one order of magnitude
            for different models and losses. It weighs the tasks alike, and with several tasks the sum grows with their
            number; False keeps the units of the papers.
        outputs: ``outputs(module, batch)`` gives the logits, for modules in which no submodule returns something with
            ``.logits``.
        batch_size: samples that the Fisher is measured on at once; default: the training loader's. It changes memory
            and speed, and the result only of ``batched``.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        last_task: whether the last task of a sequence is measured too. False saves that pass; if tasks are added later,
            it is made up for on the last task's data when the first of them starts, with the same result.
        share: with ``strength="auto"``, the norm of the penalty's gradient relative to that of the task's gradient
            (``proximal``: of the weights' move relative to the optimizer's step, both per learning rate).
        state_dtype: type of the importance; ``bfloat16`` halves its memory, to a relative rounding of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in the
            memory of the machine, and each step brings them to the parameters one tensor at a time.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import EWC
        >>> penalty = EWC(strength=0.01, samples=64, mode="separate")
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["mode"]
        'separate'
    """

    def __init__(
        self,
        strength: Strength = "auto",
        estimator: Estimator = "auto",
        samples: int = 512,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        normalize: bool = True,
        outputs: OutputsFunction | None = None,
        batch_size: int | None = None,
        apply: Apply = "gradient",
        last_task: bool = True,
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__(
            strength,
            estimator,
            samples,
            decay,
            normalize,
            outputs,
            batch_size,
            apply,
            last_task,
            share,
            state_dtype,
            state_device,
        )
        self.mode = check_choice("mode", mode, ("online", "separate"))

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fisher, estimator, left_out = self._fisher(trainer, pl_module)
        mean = normalize_importance(fisher) if self.normalize else None
        self.diagnose(
            fisher,
            "The loss has no gradient here: is it constant, or the fit perfect (estimator='empirical')?",
            estimator=estimator,
            normalized_by=mean,
            left_out=left_out,
        )
        if self.mode == "online":
            self.add_importance(fisher, self.decay)
            self.set_anchor(pl_module)
            return
        weights = {name: p.detach().float() for name, p in trainable_parameters(pl_module).items()}
        old_importance, old_anchor = (
            {name: t.float().to(weights[name].device) if name in weights else t for name, t in kept.items()}
            for kept in (self.importance, self.anchor)
        )
        importance, anchor, constant = merge_quadratics(old_importance, old_anchor, fisher, weights)
        self.importance = {name: self._kept(t, self.state_dtype) for name, t in importance.items()}
        self.anchor = {name: self._kept(t, t.dtype) for name, t in anchor.items()}
        self.constant += constant

    def _fisher(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, Tensor], str, int]:
        """This task's Fisher diagonal, the estimator that was used, and the number of samples left out."""
        assert self.task is not None
        parameters = trainable_parameters(pl_module)
        samples = self.task_samples(trainer, f"{type(self).__name__}: Fisher of {self.task}")
        losses = self.losses(trainer, pl_module)
        measure = squared_batch_gradients if self.estimator == "batched" else sum_over_samples
        sums = measure(trainer, pl_module, parameters, samples, losses)
        for value in sums.total.values():
            value.div_(max(sums.positions, 1))
        return self.without_non_finite(sums.total), "/".join(sorted(losses.used)), sums.left_out

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"mode": self.mode}
