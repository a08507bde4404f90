"""Elastic Weight Consolidation with a Kronecker-factored Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.callbacks.regularization.fisher_importance import FisherImportance
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.core.placement import clean_name, full_cpu, trainable_parameters
from lightning_cl.functional.kfac import (
    FactorSums,
    Kronecker,
    Spectrum,
    kronecker_proximal_,
    nearest_kronecker,
    spectrum,
)
from lightning_cl.passes.fisher_losses import Estimator
from lightning_cl.passes.logits import OutputsFunction
from lightning_cl.passes.sample_sums import sum_over_samples


class KFACEWC(FisherImportance):
    """Structured Laplace: EWC with ``A ⊗ G`` for linear layers (Ritter, Botev & Barber 2018, NeurIPS, section 2.2).

    ::

        strength / 2 · Σ_layers tr(Δᵀ G Δ A) + strength / 2 · Σ_others F_i (θ_i − θ*_i)²

    The diagonal of EWC says how far each weight may move by itself. ``A ⊗ G`` also says which weights may move together
    without a change of the output. ``A`` and ``G`` are the second moments of a layer's inputs and of the gradients at
    its outputs (:mod:`lightning_cl.functional.kfac`). The Fisher is scaled as in EWC, so that a strength means the
    same. EWC's diagonal is used for embeddings, norms, biases, tied weights, layers wider than `largest`, and GPT-2's
    ``Conv1D``.

    For any number of tasks one pair of factors is kept per layer: the nearest to ``decay · (A ⊗ G + A_new ⊗ G_new)``.
    With two tasks the penalty is exact; with more it is an approximation. With ``apply="proximal"`` other proximal
    penalties act on these layers one after the other.

    Memory: ``4 (in² + out²)`` bytes per linear layer and its anchor, and 8 bytes per other parameter; ``proximal``
    keeps the eigenvectors too. Compute per step: two matrix products per layer with ``out · in · (in + out)``
    multiplications, about ``(in + out) / (3 · tokens)`` of the step itself. Compute per task: as EWC, and the moments.

    Args:
        strength: the factor λ, ``auto``, or a ``KLBudget``.
        estimator: source of the labels: ``sample``, ``empirical``, ``exact`` or ``auto``, as in
            :class:`~lightning_cl.EWC`.
        samples: number of samples of a task to measure on.
        decay: γ, the share of the importance that is kept from task to task.
        normalize: divide each task's Fisher by the mean of its diagonal before it is added.
        largest: layers with more inputs or outputs than this use the diagonal.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.
        batch_size: samples measured at once; default: the training loader's.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        last_task: True measures the last task of a sequence too, as in :class:`~lightning_cl.EWC`.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance of all parameters without factors, as in :class:`~lightning_cl.EWC`.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.
        mode: ``online``, the only mode: one pair of factors is kept for all tasks.

    Attributes:
        factors: parameter name to its :class:`~lightning_cl.functional.kfac.Kronecker`; all other parameters are in
            ``importance``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import KFACEWC
        >>> penalty = KFACEWC(strength=0.01, samples=64, largest=1024)
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["samples"]
        64
    """

    def __init__(
        self,
        strength: Strength = "auto",
        estimator: Estimator = "auto",
        samples: int = 512,
        decay: float = 1.0,
        normalize: bool = True,
        largest: int = 4096,
        outputs: OutputsFunction | None = None,
        batch_size: int | None = None,
        apply: Apply = "gradient",
        last_task: bool = True,
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
        mode: Literal["online"] = "online",
    ) -> None:
        if estimator == "batched":
            raise ValueError("estimator='batched': the factors are moments over single positions; use 'empirical'")
        check_integer("largest", largest, 1)
        check_choice("mode", mode, ("online",))
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
        self.mode = mode
        self.largest = largest
        self.factors: dict[str, Kronecker] = {}
        self._spectra: dict[str, Spectrum] = {}

    # ------------------------------------------------------------------ a task ends

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        parameters = trainable_parameters(pl_module)
        samples = self.task_samples(trainer, f"{type(self).__name__}: Fisher of {self.task}")
        losses, sink = self.losses(trainer, pl_module), FactorSums(self.largest)
        sums = sum_over_samples(trainer, pl_module, parameters, samples, losses, sink=sink)
        measured = {name: p for name, p in parameters.items() if name not in sums.loose}
        factors = self._moments(trainer, sink, measured, sums.total, sums.positions)
        diagonal = {n: v.div_(max(sums.positions, 1)) for n, v in sums.total.items() if n not in factors}
        diagonal = self.without_non_finite(diagonal)
        mean = None
        if self.normalize:
            # The mean comes from the traces: products of small factors would underflow in fp32.
            total_sum = sum(f.trace() for f in factors.values())
            total_sum += sum(float(value.sum(dtype=torch.float64)) for value in diagonal.values())
            mean = total_sum / max(sum(p.numel() for p in parameters.values()), 1)
            if mean > 0:
                diagonal = {name: value / mean for name, value in diagonal.items()}
                factors = {n: Kronecker(f.inputs / mean**0.5, f.outputs / mean**0.5) for n, f in factors.items()}
        whole = {name: factors[name].diagonal() if name in factors else diagonal[name] for name in parameters}
        self.diagnose(
            whole,
            "The loss has no gradient here.",
            estimator="/".join(sorted(losses.used)),
            normalized_by=mean,
            left_out=sums.left_out,
        )
        self.add_importance(diagonal, self.decay)
        for name, new in factors.items():
            terms = [new]
            if name in self.factors:
                terms.insert(0, Kronecker(*(side.to(new.inputs.device) for side in self.factors[name])))
            merged = nearest_kronecker(terms)
            self.factors[name] = self._kept_factors(Kronecker(merged.inputs, merged.outputs * self.decay))
        for name in self.factors.keys() - factors.keys():
            self.factors[name] = Kronecker(self.factors[name].inputs, self.factors[name].outputs * self.decay)
        self.set_anchor(pl_module)
        self._spectra = {}

    def _moments(
        self,
        trainer: L.Trainer,
        sink: FactorSums,
        parameters: Mapping[str, Tensor],
        total: Mapping[str, Tensor],
        positions: int,
    ) -> dict[str, Kronecker]:
        """Returns ``A``, a mean over a layer's positions, and ``G``, a mean over loss positions; over all ranks."""
        device = trainer.strategy.root_device
        # Some ranks or layers may have had no sample, so all ranks loop over the same names.
        seen = torch.tensor([float(sink.positions.get(name, 0)) for name in parameters], device=device)
        seen = trainer.strategy.reduce(seen, reduce_op="sum")
        moments = {}
        for (name, weight), count in zip(parameters.items(), seen.tolist(), strict=True):
            if count == 0:
                continue
            zeros = [torch.zeros(n, n, device=weight.device) for n in reversed(weight.shape)]
            sums = [trainer.strategy.reduce(t, reduce_op="sum") for t in sink.sums.get(name, zeros)]
            if all(bool(side.isfinite().all()) for side in sums):
                moments[name] = Kronecker(sums[0] / count, sums[1] / max(positions, 1))
            else:  # NaN in the diagonal: these weights are reported as unprotected
                total[name].fill_(torch.nan)
        return moments

    # ------------------------------------------------------------------ the penalty

    @override
    def add_gradients(self, parameters: Mapping[str, Tensor], strength: float, scale: float) -> None:
        super().add_gradients(self._diagonal(parameters), strength, scale)
        with torch.no_grad():
            for name, _, force in self._block_forces(parameters):
                gradient = parameters[name].grad
                if gradient is not None:
                    gradient.add_((force * (strength * scale)).to(gradient.dtype))

    @override
    def move_weights(
        self, parameters: Mapping[str, Tensor], strength: float, rate: float, applied: dict[str, Tensor] | None
    ) -> None:
        super().move_weights(self._diagonal(parameters), strength, rate, applied)
        for name, parameter in parameters.items():
            if name in self.factors:
                if name not in self._spectra:
                    self._spectra[name] = spectrum(self.factors[name])
                eigen = Spectrum(*(part.to(parameter.device) for part in self._spectra[name]))
                kronecker_proximal_(parameter, self.anchor[name].to(parameter.device), eigen, strength, rate)

    @override
    def forces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield from super().forces(self._diagonal(parameters))
        yield from self._block_forces(parameters)

    def _block_forces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        for name, parameter in parameters.items():
            if name in self.factors:
                gap = parameter.detach().float() - self.anchor[name].to(parameter.device)
                factors = Kronecker(*(side.to(parameter.device) for side in self.factors[name]))
                yield name, gap, factors.times(gap)

    def _diagonal(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # A layer can have a diagonal and factors if a later task uses it in another way.
        return {name: p for name, p in parameters.items() if name in self.importance}

    # ------------------------------------------------------------------ state

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().place(trainer, pl_module)
        parameters = {clean_name(name): p for name, p in pl_module.named_parameters()}
        for name, factors in self.factors.items():
            grown = _grown(name, factors, parameters[name])
            if grown is not factors:
                self._spectra.pop(name, None)
            device = torch.device("cpu") if self.state_device == "cpu" else parameters[name].device
            self.factors[name] = Kronecker(*(side.to(device) for side in grown))

    def _kept_factors(self, factors: Kronecker) -> Kronecker:
        return Kronecker(*(self._kept(side, side.dtype) for side in factors))

    @override
    def continual_state(self) -> dict[str, Any]:
        kept = {name: [full_cpu(side) for side in factors] for name, factors in self.factors.items()}
        return super().continual_state() | {"factors": kept}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.factors = {name: Kronecker(*sides) for name, sides in state["factors"].items()}
        self._spectra = {}

    @override
    def state_bytes(self) -> int:
        return super().state_bytes() + sum(4 * side.numel() for factors in self.factors.values() for side in factors)

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"mode": self.mode}


def _grown(name: str, factors: Kronecker, weight: Tensor) -> Kronecker:
    """Extends the factors of a layer that got more inputs or outputs; the new ones have no importance."""
    missing = [new - len(side) for new, side in zip((weight.shape[1], weight.shape[0]), factors, strict=True)]
    if missing == [0, 0]:
        return factors
    if min(missing) < 0:
        raise MisconfigurationException(
            f"KFACEWC: {name!r} has become {list(weight.shape)}, smaller than it was: what was learnt about its"
            " importance does not fit any more"
        )
    return Kronecker(*(torch.nn.functional.pad(side, (0, n, 0, n)) for side, n in zip(factors, missing, strict=True)))
