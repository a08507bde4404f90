"""Elastic Weight Consolidation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.base import check_choice, trainable_parameters
from lightning_cl.callbacks.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.callbacks.passes import (
    LogitsReader,
    OutputsFunction,
    leaving_no_trace,
    loss_positions,
    single_samples,
    training_loss,
)
from lightning_cl.callbacks.quadratic import Apply, QuadraticPenalty
from lightning_cl.functional import (
    expected_label_losses,
    fisher_diagonal,
    merge_quadratics,
    normalize_importance,
    sampled_label_loss,
)
from lightning_cl.functional.fisher import WeightedLosses

Estimator = Literal["auto", "sample", "empirical", "exact"]
_EXACT_LIMIT = 4096


class EWC(QuadraticPenalty):
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, eq. 3; online: Schwarz et al. 2018, section 3.2).

    ::

        L(θ) + strength / 2 · Σ_i F_i (θ_i − θ*_i)²

    with the diagonal Fisher information ``F`` of earlier tasks, from gradients of single samples at the end of each
    task, on its own data, in evaluation mode (:mod:`lightning_cl.functional.fisher` has the definition). For language
    models a sequence is a sample and ``F = Σ_seq (∇ Σ_t log p)² / number of loss tokens``, so that with
    ``normalize=False`` the strength is the λ of a Laplace approximation for a loss that is a mean over tokens. Modules
    without token counts: the mean over samples. ``empirical`` takes the loss of ``training_step`` for a mean over the
    tokens that bear loss (over samples, where there are none), without further terms; ``sample`` and ``exact`` need
    nothing of the loss, and take the logits for those of a softmax.

    Memory: 8 bytes per trainable parameter, for any number of tasks in both modes. Compute: one pass over parameters,
    importance and anchor per step; per task `samples` forward and backward passes of single samples.

    Args:
        strength: the factor λ. Sane on the quickstart (three tasks, AdamW at 2e-3, ``normalize=True``): 0.001 to 0.01
            for ``apply="gradient"``, 1 to 10 for ``apply="proximal"``.
        estimator: where the labels of the Fisher come from. ``sample``: one draw per position from the model's own
            softmax. ``empirical``: the data. ``exact``: the expectation over all labels (small outputs). ``auto``:
            ``sample`` where the logits can be reached, else ``empirical``.
        samples: how many samples of a task the Fisher is measured on; all, if there are fewer.
        mode: ``online``: ``F ← decay · (F + F_new)``, the anchor is the latest task's weights. ``separate``: one
            penalty per task, which add up to one quadratic with importance ``Σ F_t`` and anchor ``Σ F_t θ_t / Σ F_t``.
        decay: γ of the online mode; ``importance`` is what the penalty multiplies, γ included.
        normalize: divide each task's F by its mean before it is added, so that strengths are of one order of magnitude
            for different models and losses. It weighs the tasks alike, and with several tasks the sum grows with their
            number; False keeps the units of the papers.
        apply: ``gradient`` or ``proximal``, see :class:`~lightning_cl.callbacks.quadratic.QuadraticPenalty`.
        outputs: ``outputs(module, batch)`` gives the logits, for modules in which no submodule returns something with
            ``.logits``.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        strength: float = 0.01,
        estimator: Estimator = "auto",
        samples: int = 512,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        normalize: bool = True,
        apply: Apply = "gradient",
        outputs: OutputsFunction | None = None,
    ) -> None:
        super().__init__(strength, apply)
        self.estimator = check_choice("estimator", estimator, ("auto", "sample", "empirical", "exact"))
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples={samples!r}: expected a positive integer")
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay!r}: expected a number above 0 and at most 1 (1 forgets nothing)")
        self.mode = check_choice("mode", mode, ("online", "separate"))
        self.samples, self.decay, self.normalize, self.outputs = samples, decay, normalize, outputs

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, "EWC: gradients of single samples cannot be taken from")

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, "EWC")

    @override
    @torch.no_grad()
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fisher, estimator = self._fisher(trainer, pl_module)
        mean = normalize_importance(fisher) if self.normalize else None
        self.diagnose(
            fisher,
            "The loss has no gradient here: is it constant, or the fit perfect (estimator='empirical')?",
            estimator=estimator,
            normalized_by=mean,
        )
        weights = {name: p.detach().float().clone() for name, p in trainable_parameters(pl_module).items()}
        if self.mode == "separate":
            self.importance, self.anchor, constant = merge_quadratics(self.importance, self.anchor, fisher, weights)
            self.constant += constant
        else:
            for name, new in fisher.items():
                self.importance[name] = new if name not in self.importance else new.add_(self.importance[name])
            for importance in self.importance.values():
                importance.mul_(self.decay)
            self.anchor.update(weights)

    def _fisher(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, Tensor], str]:
        """This task's Fisher diagonal, and the estimator that was used."""
        assert self.task is not None
        index = self.task.index
        parameters = trainable_parameters(pl_module)
        count = 1 if trainer.fast_dev_run else self.samples  # type: ignore[attr-defined]
        label = f"{type(self).__name__}: Fisher of {self.task}"
        used = {self.estimator}

        def losses() -> Iterator[tuple[WeightedLosses, int]]:
            read_logits = LogitsReader(trainer, pl_module, self.outputs)
            for number, batch in single_samples(trainer, count, seed=index, label=label):
                # One generator per sample: the labels do not depend on which rank draws them.
                generator = torch.Generator().manual_seed(1 + index * 1_000_003 + number)
                estimator, terms = self._losses_of(trainer, pl_module, batch, read_logits, generator)
                used.add(estimator)
                yield terms

        with leaving_no_trace(pl_module), torch.enable_grad():
            total, positions = fisher_diagonal(losses(), parameters)
        positions_of_all = torch.tensor(positions, dtype=torch.float64, device=trainer.strategy.root_device)
        positions = int(trainer.strategy.reduce(positions_of_all, reduce_op="sum"))
        for name, value in total.items():
            total[name] = trainer.strategy.reduce(value, reduce_op="sum").div_(max(positions, 1))
        used.discard("auto")
        return total, "/".join(sorted(used))

    def _losses_of(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        read_logits: LogitsReader,
        generator: torch.Generator,
    ) -> tuple[str, tuple[WeightedLosses, int]]:
        """The losses of one sample whose squared gradients make its Fisher, and its number of positions."""
        logits = read_logits(batch) if self.estimator != "empirical" else None
        if logits is None:
            if self.estimator in ("sample", "exact"):
                raise MisconfigurationException(
                    f"EWC(estimator={self.estimator!r}): nothing that {type(pl_module).__name__} calls returns an"
                    " object with `.logits`; give EWC(outputs=lambda module, batch: logits), or estimator='empirical'"
                )
            loss = training_loss(trainer, pl_module, batch)
            if loss is None:
                return "empirical", ([], 0)
            mask = loss_positions(batch)
            tokens = int(mask.sum()) if mask is not None else 1
            # A mean over tokens times their number is the sum of the definition.
            return "empirical", ([(1.0, loss * tokens)], tokens)
        shifted = read_logits.shifted
        mask = loss_positions(batch, logits, shifted)
        if mask is None:
            selected = logits.flatten(0, -2)
        else:
            selected = (logits[:, :-1] if shifted else logits)[mask]
        if self.estimator == "exact":
            if selected.numel() > _EXACT_LIMIT:
                raise MisconfigurationException(
                    f"EWC(estimator='exact'): a sample has {selected.shape[0]} positions with {selected.shape[1]}"
                    f" classes, one backward pass each, more than {_EXACT_LIMIT}; use estimator='sample'"
                )
            return "exact", (expected_label_losses(selected), len(selected))
        return "sample", ([(1.0, sampled_label_loss(selected, generator))], len(selected))

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"mode": self.mode, "normalize": self.normalize, "samples": self.samples}
