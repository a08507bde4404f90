"""The quadratic core of EWC, SI and their relatives: an anchor, an importance, and two ways to apply them."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.base import (
    ContinualCallback,
    check_choice,
    check_strength,
    clean_name,
    tensor_bytes,
    trainable_parameters,
)
from lightning_cl.callbacks.coordinator import TaskCoordinator
from lightning_cl.functional import add_penalty_gradient_, proximal_step_

Apply = Literal["gradient", "proximal"]
_SAMPLED_VALUES = 1_000_000


class QuadraticPenalty(ContinualCallback):
    """``strength / 2 · Σ importance · (θ − anchor)²``; a subclass says where importance and anchor come from.

    ``apply="gradient"`` adds the penalty's gradient in closed form, once per optimizer step, after unscaling and the
    reduction over ranks and before clipping. ``apply="proximal"`` leaves the gradients alone and moves the weights
    after the step, by an implicit step that is stable for every strength and that neither clipping nor Adam's second
    moment rescales. Under plain SGD both have the same optimum. Under Adam the strength of the proximal mode is in
    units of Adam's normalised step and not of the loss: it does not change when the loss is scaled, and its sane range
    is another one.

    Memory: 8 bytes per trainable parameter (importance and anchor in fp32), and one temporary of the largest parameter.
    Compute per step: one pass over parameters, importance and anchor.

    Args:
        strength: the factor; 0 applies nothing and still measures the importance.
        apply: ``gradient`` or ``proximal``.

    Attributes:
        importance: parameter name to what the penalty multiplies.
        anchor: parameter name to where the penalty is zero.
        constant: the part of the penalty that no weight can change (several tasks with different anchors).

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(self, strength: float, apply: Apply = "gradient") -> None:
        super().__init__()
        self.strength = check_strength(strength)
        self.apply = check_choice("apply", apply, ("gradient", "proximal"))
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.constant = 0.0
        self._diagnosis: list[dict[str, Any]] = []

    @property
    def is_active(self) -> bool:
        """Whether there is anything to apply."""
        return self.strength > 0 and bool(self.importance)

    # ------------------------------------------------------------------ answers

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        everything = {clean_name(name): p for name, p in pl_module.named_parameters()}
        missing = sorted(self.anchor.keys() - everything.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has learnt the importance of {missing[0]!r} (and {len(missing) - 1} more),"
                f" which {type(pl_module).__name__} does not have; was the model changed since the checkpoint?"
            )
        for name in self.anchor:
            parameter = everything[name]
            self.anchor[name] = fit_to(self.anchor[name], parameter, fill=parameter.detach())
            self.importance[name] = fit_to(self.importance[name], parameter, fill=None)

    @override
    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if not self.is_active:
            return
        parameters = self._parameters(pl_module)
        if self.is_log_step(trainer):
            self._log(parameters, scale)
        if self.apply == "gradient":
            importance, anchor = self._for(parameters)
            add_penalty_gradient_(parameters, anchor, importance, self.strength, scale)

    @override
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not self.is_active or self.apply != "proximal":
            return
        parameters = self._parameters(pl_module)
        coordinator = TaskCoordinator.of(trainer)
        several = (
            sum(isinstance(m, QuadraticPenalty) and m.apply == "proximal" for m in coordinator.methods(trainer)) > 1
        )
        applied = coordinator.applied if several else None
        for group in optimizer.param_groups:
            members = {id(p) for p in group["params"]}
            # A parameter without a gradient was not stepped.
            own = {name: p for name, p in parameters.items() if id(p) in members and p.grad is not None}
            importance, anchor = self._for(own)
            proximal_step_(own, anchor, importance, self.strength, float(group["lr"]), applied)

    # ------------------------------------------------------------------ for subclasses

    def diagnose(self, new: dict[str, Tensor], note: str, **more: Any) -> None:
        """Keeps this task's importance in numbers, and warns of one that can do nothing."""
        diagnosis = describe_importance(new) | more
        self._diagnosis.append({"task": self.task.name if self.task is not None else None, **diagnosis})
        if diagnosis["total"] == 0.0:
            rank_zero_warn(
                f"{type(self).__name__}: the importance of all {diagnosis['parameters']} parameters is zero after"
                f" {self.task}: the penalty can do nothing. {note}"
            )

    def penalty(self, pl_module: L.LightningModule) -> float:
        """The penalty's value at the module's present weights, the constant included."""
        parameters = self._parameters(pl_module)
        value = 0.0
        for name, parameter in parameters.items():
            gap = parameter.detach().float() - self.anchor[name]
            value += float(_full(gap.square_().mul_(self.importance[name]).sum(dtype=torch.float64)))
        return self.strength * (0.5 * value + self.constant)

    def _parameters(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p for name, p in trainable_parameters(pl_module).items() if name in self.anchor}

    def _for(self, parameters: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {name: self.importance[name] for name in parameters}, {name: self.anchor[name] for name in parameters}

    @torch.no_grad()
    def _log(self, parameters: dict[str, Tensor], scale: float) -> None:
        value, pull, gradient = 0.0, 0.0, 0.0
        for name, parameter in parameters.items():
            gap = parameter.detach().float() - self.anchor[name]
            force = gap * self.importance[name]
            value += float(_full((gap * force).sum()))
            pull += float(_full(force.square_().sum()))
            if parameter.grad is not None:
                gradient += float(_full(parameter.grad.float().square().sum()))
        self.log_scalar("penalty", self.strength * (0.5 * value + self.constant))
        if gradient > 0:
            self.log_scalar("penalty_to_gradient_norm", self.strength * pull**0.5 * scale / gradient**0.5)

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "importance": {name: full_cpu(t) for name, t in self.importance.items()},
            "anchor": {name: full_cpu(t) for name, t in self.anchor.items()},
            "constant": self.constant,
            "diagnosis": list(self._diagnosis),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.importance, self.anchor = dict(state["importance"]), dict(state["anchor"])
        self.constant = state["constant"]
        self._diagnosis = list(state["diagnosis"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.importance, self.anchor)

    @override
    def report(self) -> dict[str, Any]:
        return {"strength": self.strength, "apply": self.apply, "importance": list(self._diagnosis)}


def fit_to(tensor: Tensor, parameter: Tensor, fill: Tensor | None) -> Tensor:
    """A stored tensor where its parameter is: on its device, sharded as it is, grown as it has grown.

    Args:
        tensor: as stored, of the parameter's shape or smaller along some axes (a head that got new classes).
        parameter: the parameter.
        fill: what new entries hold; None: zero.

    Raises:
        MisconfigurationException: if the parameter has become smaller.
    """
    if type(tensor) is type(parameter) and tensor.device == parameter.device and tensor.shape == parameter.shape:
        return tensor
    if tensor.shape != parameter.shape:
        if tensor.ndim != parameter.ndim or any(t > p for t, p in zip(tensor.shape, parameter.shape, strict=True)):
            raise MisconfigurationException(
                f"a parameter of shape {list(tensor.shape)} has become {list(parameter.shape)}: what was learnt about"
                " its importance does not fit any more"
            )
        grown = full_cpu(fill).float() if fill is not None else torch.zeros(parameter.shape)
        grown[tuple(slice(0, size) for size in tensor.shape)] = full_cpu(tensor)
        tensor = grown
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is not None and not hasattr(tensor, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), mesh, parameter.placements)  # type: ignore[attr-defined]
    return tensor.to(parameter.device)


def full_cpu(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU: a sharded tensor in a checkpoint would come back as rank 0's part on all ranks."""
    return _full(tensor.detach()).to("cpu", copy=True)


def _full(tensor: Tensor) -> Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)
    return full_tensor() if full_tensor is not None else tensor


@torch.no_grad()
def describe_importance(importance: dict[str, Tensor]) -> dict[str, Any]:
    """An importance in numbers: parameters, total, share of zeros, and quantiles (of at most a million values)."""
    count = sum(t.numel() for t in importance.values())
    if count == 0:
        return {"parameters": 0, "total": 0.0, "share_of_zeros": 1.0, "quantiles": {}}
    stride = max(1, count // _SAMPLED_VALUES)
    values = torch.cat([_full(t).flatten()[::stride].float().cpu() for t in importance.values()])
    values = values.sort().values
    quantiles = {str(q): float(values[min(int(q * len(values)), len(values) - 1)]) for q in (0.0, 0.5, 0.9, 0.99, 1.0)}
    return {
        "parameters": count,
        "total": sum(float(_full(t.sum(dtype=torch.float64))) for t in importance.values()),
        "share_of_zeros": float((values == 0).float().mean()),
        "quantiles": quantiles,
    }
