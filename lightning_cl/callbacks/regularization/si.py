"""Synaptic Intelligence."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.regularization.path_importance import PathImportance
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.core.placement import fit_to, full_cpu, tensor_bytes, trainable_parameters
from lightning_cl.functional import normalize_importance, path_importance, path_integral_step_, relative_damping


class SI(PathImportance):
    """Synaptic Intelligence (Zenke, Poole & Ganguli 2017, eqs. 3 to 5).

    During a task, ``ω_i += −g_i Δθ_i`` over the optimizer's steps. ``g`` is the gradient of the whole loss, without
    penalties that edit gradients, and ``Δθ`` is the step that was taken. At the task's end
    ``Ω_i += max(ω_i, 0) / (Δ_i² + ξ)``, with ``Δ_i`` the weight's change over the whole task. The penalty is
    ``strength / 2 · Σ Ω_i (θ_i − θ*_i)²``: the paper's c is strength / 2.

    SI needs no extra passes over the data. Decoupled weight decay is a part of the step that was taken, and so of ω.
    The clamp at zero is per task; the authors' code clamps the running sum over tasks. The anchor is the weights at the
    start of a task, so a head that was reset between tasks is kept at its new values. If a gradient is NaN or infinite,
    the step adds nothing to ω; the report counts such steps, with a warning.

    Memory: 8 bytes per trainable parameter (Ω, anchor). While a task is trained, 12 bytes more (ω, and the gradient and
    the weights before each step). Compute per step: two copies and one multiplication per parameter, and the penalty.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``. Good values on the quickstart (three tasks, AdamW at 2e-3,
            ``normalize=True``): 0.001 to 0.01 for ``apply="gradient"``, 1 to 10 for ``apply="proximal"``.
        damping: ξ. ``auto``: the mean of ``Δ²`` over all weights in this task, so that equation 5 does the same at
            every learning rate. A number is ξ itself, in units of a squared parameter change: 0.1 in the paper's
            experiments. If it is far above ``Δ²``, as 0.1 is at the learning rates of fine-tuning, Ω is just the path
            integral divided by ξ.
        normalize: divide each task's share of Ω by its mean before it is added, so that strengths have one order of
            magnitude for different models and learning rates. False keeps the units of the paper.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.

    Attributes:
        omega: parameter name to the path integral ω of the current task.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import SI
        >>> penalty = SI(strength=0.01, damping=0.1)
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["damping"]
        0.1
    """

    def __init__(
        self,
        strength: Strength = "auto",
        damping: float | Literal["auto"] = "auto",
        normalize: bool = True,
        apply: Apply = "gradient",
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__(strength, damping, normalize, apply, share, state_dtype, state_device)
        self.omega: dict[str, Tensor] = {}
        self._displacement: dict[str, Tensor] = {}  # at a task's end, where the weights are changed after training

    @override
    @torch.no_grad()
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_start(trainer, pl_module)
        # The weights at the start are those at the end of the previous task. They are the penalty's anchor and the
        # start of Δ.
        self.set_anchor(pl_module)
        parameters = trainable_parameters(pl_module)
        self.omega = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        new = {name: torch.zeros_like(p) for name, p in parameters.items() if name not in self.importance}
        self.importance.update({name: self._kept(zeros, self.state_dtype) for name, zeros in new.items()})

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().place(trainer, pl_module)
        parameters = trainable_parameters(pl_module)
        self.omega = {
            name: fit_to(omega, parameters[name], None) if name in parameters else omega
            for name, omega in self.omega.items()
        }

    @property
    @override
    def is_active(self) -> bool:
        return super().is_active and self.tasks_done > 0

    @override
    def followed(self) -> Collection[str]:
        return self.omega

    @override
    @torch.no_grad()
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        for name, gradient, step in self._watch.after(trainable_parameters(pl_module)):
            path_integral_step_(self.omega[name], gradient, step)

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        spoilt = self._watch.end(type(self).__name__, self.task)
        parameters = trainable_parameters(pl_module)
        omega = {name: omega for name, omega in self.omega.items() if name in parameters}
        displacement = self._displacement or self._moved(pl_module)
        displacement = {name: displacement[name].to(parameters[name].device) for name in omega}
        damping = self.damping
        if isinstance(damping, str):
            damping = relative_damping(moved.square() for moved in displacement.values())
        new = self.without_non_finite(path_importance(omega, displacement, damping))
        mean = normalize_importance(new) if self.normalize else None
        note = "No step lowered the loss: was anything trained?"
        self.diagnose(new, note, normalized_by=mean, damping=damping, spoilt_steps=spoilt)
        self.add_importance(new)
        self.set_anchor(pl_module, new)
        self.omega, self._displacement = {}, {}

    def _moved(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Returns the way of each weight since the task started."""
        parameters = trainable_parameters(pl_module)
        return {
            name: parameters[name].detach().float() - self.anchor[name].to(parameters[name].device)
            for name in self.omega
            if name in parameters
        }

    @override
    def close_path(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # ω is of this path. What changes the weights from here on is no step of it.
        self._displacement = self._moved(pl_module)

    @override
    def continual_state(self) -> dict[str, Any]:
        omega = {name: full_cpu(t) for name, t in self.omega.items()}
        moved = {name: full_cpu(t) for name, t in self._displacement.items()}
        return super().continual_state() | {"omega": omega} | ({"displacement": moved} if moved else {})

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.omega, self._displacement = dict(state["omega"]), dict(state.get("displacement", {}))

    @override
    def state_bytes(self) -> int:
        return super().state_bytes() + tensor_bytes(self.omega)
