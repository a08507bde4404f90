"""Riemannian Walk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_integer, check_positive
from lightning_cl.callbacks.regularization.path_importance import PathImportance
from lightning_cl.callbacks.regularization.quadratic import Apply, StateDevice, StateDtype, Strength
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.placement import all_parameters, fit_to, full_cpu, tensor_bytes, trainable_parameters
from lightning_cl.functional import normalize_importance, path_integral_step_, relative_damping
from lightning_cl.functional.rwalk import (
    add_square_,
    path_length,
    path_score_,
    running_fisher_,
    to_unit_range,
)

_SUMS = ("fisher", "score", "_window_squares", "_window_drop", "_window_start", "_task_score")


class RWalk(PathImportance):
    """Riemannian Walk (Chaudhry et al. 2018, ECCV, arXiv:1801.10112, eqs. 6 to 8), which joins EWC++ and SI.

    While a task is trained, every `every` steps::

        F_i ← α · mean g_i² + (1 − α) · F_i                               (6)
        s_i += max(Σ −g_i Δθ_i, 0) / (½ F_i Δθ_i² + ε)                    (7)

    ``g`` is the gradient of the whole loss, and ``Δθ`` the change of the weights since the last update. At a task's end
    ``s ← (s_before + s_task) / 2``; the first task's score is used unchanged. The penalty is
    ``strength / 2 · Σ_i (F̄_i + s̄_i)(θ_i − θ*_i)²`` with both scaled to [0, 1] (8). The paper's λ is strength / 2.

    ``g²`` are squares of whole batches' gradients: this is no Fisher information, but the paper's online average needs
    it. F continues over the tasks. Its first average is used unchanged, and a task's last interval may be shorter. The
    authors' code leaves out the ½ and adds the averaged score to the old one; this class follows the paper. A step
    whose gradient is NaN or infinite is left out; the report counts such steps, with a warning.

    Memory: 16 bytes per trainable parameter (F, s, importance, anchor). While a task is trained, 24 bytes more (four
    sums, and the gradient and the weights before each step). Compute per step: as SI, and one more multiplication.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        rate: α, the weight of the newest squared gradients.
        every: Δt, the number of optimizer steps between two updates of F and s.
        damping: ε; the default is the authors'. It is far above ``½ F Δθ²`` at the learning rates of fine-tuning, where
            s is then proportional to the drop of the loss. ``auto``: the mean of ``½ F Δθ²`` over all weights since the
            last update, so that equation 7 does the same at every learning rate.
        normalize: divide the sum of both by its mean, so that strengths can be compared with those of other methods.
            False keeps the range [0, 2] of the paper.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.

    Attributes:
        fisher: parameter name to F.
        score: parameter name to s, averaged over the tasks so far.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import RWalk
        >>> penalty = RWalk(strength=0.01, every=5)
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["every"]
        5
    """

    def __init__(
        self,
        strength: Strength = "auto",
        rate: float = 0.9,
        every: int = 10,
        damping: float | Literal["auto"] = 1e-3,
        normalize: bool = True,
        apply: Apply = "gradient",
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__(strength, damping, normalize, apply, share, state_dtype, state_device)
        check_positive("rate", rate, "a number above 0 and at most 1", most=1)
        check_integer("every", every, 1, "a positive number of steps")
        self.rate, self.every = float(rate), every
        self.fisher: dict[str, Tensor] = {}
        self.score: dict[str, Tensor] = {}
        self._task_score: dict[str, Tensor] = {}
        self._window_squares: dict[str, Tensor] = {}  # since the last update: Σ g²
        self._window_drop: dict[str, Tensor] = {}  # Σ −g Δθ
        self._window_start: dict[str, Tensor] = {}  # θ at the last update
        self._window_steps = 0
        self._window_spoilt: dict[str, Tensor | int] = {}  # number of the window's steps without a finite gradient
        self._started: set[str] = set()  # names of the parameters that have an F

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: the range of its scores is not measured over")

    @override
    @torch.no_grad()
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_start(trainer, pl_module)
        parameters = trainable_parameters(pl_module)
        zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        for name, zero in zeros.items():
            self.fisher.setdefault(name, zero.clone())
        self._task_score = {name: zero.clone() for name, zero in zeros.items()}
        self._window_squares = {name: zero.clone() for name, zero in zeros.items()}
        self._window_drop = zeros
        self._window_start = {name: p.detach().float().clone() for name, p in parameters.items()}
        self._window_steps, self._window_spoilt = 0, {}

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().place(trainer, pl_module)
        parameters = all_parameters(pl_module)
        for name in _SUMS:
            kept: dict[str, Tensor] = getattr(self, name)
            placed = {n: fit_to(t, parameters[n], None) if n in parameters else t for n, t in kept.items()}
            setattr(self, name, placed)

    @override
    def followed(self) -> Collection[str]:
        return self._window_drop

    @override
    @torch.no_grad()
    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        parameters = trainable_parameters(pl_module)
        for name, gradient, step in self._watch.after(parameters):
            path_integral_step_(self._window_drop[name], gradient, step)
            added = add_square_(self._window_squares[name], gradient)
            self._window_spoilt[name] = self._window_spoilt.get(name, 0) + ~added
        self._window_steps += 1
        if self._window_steps == self.every:
            self._close_window(all_parameters(pl_module))

    def _close_window(self, parameters: dict[str, Tensor]) -> None:
        if self._window_steps == 0:
            return
        for name, squares in self._window_squares.items():
            steps = self._window_steps - int(self._window_spoilt.get(name, 0))
            if steps > 0:
                # The first average has no earlier one to be mixed with.
                rate = self.rate if name in self._started else 1.0
                running_fisher_(self.fisher[name], squares.div_(steps), rate)
                self._started.add(name)
            squares.zero_()
        damping = self.damping
        if isinstance(damping, str):
            damping = relative_damping(
                path_length(self.fisher[name], parameters[name].detach().float() - start)
                for name, start in self._window_start.items()
            )
        for name, start in self._window_start.items():
            drop, now = self._window_drop[name], parameters[name].detach().float()
            path_score_(self._task_score[name], drop, self.fisher[name], now - start, damping)
            start.copy_(now)
            drop.zero_()
        self._window_steps, self._window_spoilt = 0, {}

    @override
    @torch.no_grad()
    def close_path(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_window(all_parameters(pl_module))

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        spoilt = self._watch.end(type(self).__name__, self.task)
        self._close_window(all_parameters(pl_module))
        for name, new in self._task_score.items():
            self.score[name] = new if name not in self.score else self.score[name].add_(new).mul_(0.5)
        fisher, score = to_unit_range(self.fisher), to_unit_range(self.score)
        importance = self.without_non_finite({name: fisher[name] + score[name] for name in self._task_score})
        mean = normalize_importance(importance) if self.normalize else None
        note = "No step lowered the loss: was anything trained?"
        self.diagnose(importance, note, normalized_by=mean, spoilt_steps=spoilt)
        self.importance.update({name: self._kept(value, self.state_dtype) for name, value in importance.items()})
        self.set_anchor(pl_module, importance)
        self._task_score, self._window_squares, self._window_drop, self._window_start = {}, {}, {}, {}

    @override
    def continual_state(self) -> dict[str, Any]:
        sums = {name: {n: full_cpu(t) for n, t in getattr(self, name).items()} for name in _SUMS}
        return super().continual_state() | {
            "sums": sums,
            "window_steps": self._window_steps,
            "window_spoilt": {name: int(count) for name, count in self._window_spoilt.items()},
            "started": sorted(self._started),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        for name in _SUMS:
            setattr(self, name, dict(state["sums"][name]))
        # Older checkpoints have no spoilt steps.
        self._window_steps, self._started = state["window_steps"], set(state.get("started", state["sums"]["fisher"]))
        self._window_spoilt = dict(state.get("window_spoilt", {}))

    @override
    def state_bytes(self) -> int:
        return super().state_bytes() + tensor_bytes(*(getattr(self, name) for name in _SUMS))

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"rate": self.rate, "every": self.every}
