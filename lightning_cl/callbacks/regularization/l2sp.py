"""L2-SP: the same pull on every weight, towards its value before."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice
from lightning_cl.callbacks.regularization.quadratic import Apply, QuadraticPenalty, StateDevice, StateDtype, Strength
from lightning_cl.core.placement import full_cpu, tensor_bytes, trainable_parameters


class L2SP(QuadraticPenalty):
    """L2-SP (Li, Grandvalet & Davoine 2018, ICML, eq. 2): ``strength / 2 · ‖θ − θ*‖²``.

    Nothing is measured: every trainable weight is equally important. So L2-SP is a baseline that a measured importance
    must surpass. With ``apply="proximal"`` it is decoupled weight decay towards ``θ*``. The paper's α is the strength.
    Under LoRA the trained weights are the adapter's.

    Memory: 4 bytes per trainable parameter for the anchor (the importance is one number per tensor). Compute: one pass
    over parameters and anchor per step.

    Args:
        strength: the factor, ``auto``, or a ``KLBudget``.
        anchor: ``previous``: the weights at the end of the previous task; in the first task there is no penalty.
            ``start``: the weights at the start of the sequence (a pretrained model's), also during the first task.
        apply: ``gradient`` or ``proximal``, see
            :class:`~lightning_cl.callbacks.regularization.quadratic.QuadraticPenalty`.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate.
        state_dtype: type of the importance, which is one number for all weights of a tensor.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in
            RAM, and each step copies them to the parameters one tensor at a time.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import L2SP
        >>> penalty = L2SP(strength=0.01, anchor="start")
        >>> trainer = L.Trainer(callbacks=[penalty], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> penalty.report()["anchor"]
        'start'
    """

    def __init__(
        self,
        strength: Strength = "auto",
        anchor: Literal["previous", "start"] = "previous",
        apply: Apply = "gradient",
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__(strength, apply, share, state_dtype, state_device)
        self.anchored_to = check_choice("anchor", anchor, ("previous", "start"))
        if self.anchored_to == "start":
            self.relies_on = frozenset()  # whatever a task trains is held where it started

    @override
    def on_sequence_start(self) -> None:
        if self.anchored_to == "start":
            self.anchor, self.importance = {}, {}

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.anchored_to == "start":
            # Weights that become trainable later have not moved yet.
            self._hold(pl_module, [name for name in trainable_parameters(pl_module) if name not in self.anchor])
        super().on_task_start(trainer, pl_module)

    @override
    @torch.no_grad()
    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.anchored_to == "previous":
            self._hold(pl_module, list(trainable_parameters(pl_module)))
        self.diagnose(self.importance, "There is no trainable parameter.")

    def _hold(self, pl_module: L.LightningModule, names: list[str]) -> None:
        self.set_anchor(pl_module, dict.fromkeys(names))
        self.importance.update({name: _ones_like(self.anchor[name]) for name in names})

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = {name: anchor.shape for name, anchor in self.anchor.items()}
        kept = {name: t for name, t in self.importance.items() if not _is_one_number(t)}
        self.importance = kept
        super().place(trainer, pl_module)
        for name, anchor in self.anchor.items():
            if anchor.shape != before[name]:
                # A head has grown: its new rows have no earlier values, and no importance.
                old = torch.zeros_like(anchor, dtype=torch.float32)
                old[tuple(slice(0, size) for size in before[name])] = 1.0
                self.importance[name] = old
            elif name not in kept:
                self.importance[name] = _ones_like(anchor)

    @override
    def continual_state(self) -> dict[str, Any]:
        grown = {name: full_cpu(t) for name, t in self.importance.items() if not _is_one_number(t)}
        return super().continual_state() | {"importance": grown}

    @override
    def state_bytes(self) -> int:
        return super().state_bytes() - tensor_bytes(self.importance)

    @override
    def report(self) -> dict[str, Any]:
        return super().report() | {"anchor": self.anchored_to}


def _is_one_number(importance: Tensor) -> bool:
    return not hasattr(importance, "device_mesh") and not any(importance.stride()) and importance.numel() != 1


def _ones_like(anchor: Tensor) -> Tensor:
    """Returns one number, expanded to the anchor's shape without a copy."""
    if hasattr(anchor, "device_mesh"):
        return torch.ones_like(anchor)  # a sharded tensor cannot be expanded like this
    return torch.ones((), device=anchor.device).expand(anchor.shape)
