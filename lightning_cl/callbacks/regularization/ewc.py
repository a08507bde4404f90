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

    ``F`` is the diagonal Fisher information of earlier tasks (:mod:`lightning_cl.functional.ewc` has the definition).
    At the end of each task it is measured on that task's data, in evaluation mode, from gradients of single samples.
    For language models a sequence is a sample and ``F = Σ_seq (∇ Σ_t log p)² / number of loss tokens``. So with
    ``normalize=False`` the strength is the λ of a Laplace approximation for a loss that is a mean over tokens. For
    modules without token counts F is the mean over samples. ``empirical`` assumes that the loss of ``training_step`` is
    a mean over the tokens that bear loss (over samples, if there are no tokens), without further terms. ``sample`` and
    ``exact`` do not use the loss, and assume that the logits go into a softmax.

    Memory: 8 bytes per trainable parameter, for any number of tasks in both modes. During the measurement one more fp32
    tensor per parameter, and the logits of a whole batch (``batch_size=1`` helps where they are large). Compute per
    step: one pass over parameters, importance and anchor. Per task: one forward and backward pass over `samples`
    samples, in batches (:class:`~lightning_cl.functional.SampleGradients`).

    Args:
        strength: the factor λ, or ``auto``. Good values on the quickstart (three tasks, AdamW at 2e-3,
            ``normalize=True``): 0.001 to 0.01 for ``apply="gradient"``, 1 to 10 for ``apply="proximal"``.
        estimator: source of the Fisher's labels. ``sample``: one draw per position from the model's own softmax.
            ``empirical``: the data. ``exact``: the expectation over all labels (small outputs). ``auto``: ``empirical``
            if the logits cannot be found; else ``exact`` for outputs that are not tokens and have at most 32 positions
            times classes (one backward pass each), and ``sample`` for all others.
        samples: number of samples of a task that the Fisher is measured on; all samples if the task has fewer.
        mode: ``online``: ``F ← decay · (F + F_new)``, and the anchor is the latest task's weights. ``separate``: one
            penalty per task; their sum is one quadratic with importance ``Σ F_t`` and anchor ``Σ F_t θ_t / Σ F_t``.
        decay: γ of the online mode; ``importance`` is what the penalty multiplies, γ included.
        normalize: divide each task's F by its mean before it is added. Strengths then have one order of magnitude for
            different models and losses, and all tasks have the same weight. The sum grows with the number of tasks.
            False keeps the units of the papers.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        batch_size: number of samples measured at once; default: the training loader's. It changes memory and speed. It
            changes the result only with ``batched``.
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
        """Returns this task's Fisher diagonal, the estimator that was used, and the number of samples left out."""
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
