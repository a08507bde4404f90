"""Base of EWC, SI and similar penalties: an anchor, an importance, and two ways to apply them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_strength
from lightning_cl.callbacks.regularization.auto_strength import AutoStrength
from lightning_cl.callbacks.regularization.chosen_strength import FIRST_CHOICE, ChosenStrength
from lightning_cl.callbacks.regularization.diagnosis import (
    advice_of,
    compare_with_earlier,
    describe_importance,
    sentences_of,
    warning_of,
)
from lightning_cl.callbacks.regularization.kl_budget import KLBudget, KLStrength
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import (
    Streamed,
    clean_name,
    fit_to,
    full_cpu,
    pinned,
    tensor_bytes,
    trainable_parameters,
    whole,
)
from lightning_cl.core.questions import Need, Trait
from lightning_cl.functional import add_penalty_gradient_, proximal_step_, zero_non_finite_

Apply = Literal["gradient", "proximal"]
Strength = float | Literal["auto"] | KLBudget
StateDtype = Literal["float32", "bfloat16"]
StateDevice = Literal["model", "cpu"]
_MEASURED_STEPS = (4, 16, 64, 256)


class QuadraticPenalty(ContinualCallback):
    """``strength / 2 · Σ importance · (θ − anchor)²``; a subclass computes importance and anchor.

    ``apply="gradient"`` adds the penalty's gradient in closed form, once per optimizer step. It is added after
    unscaling and the reduction over ranks, and before clipping. ``apply="proximal"`` leaves the gradients unchanged and
    moves the weights after the step. This implicit step is stable for every strength, and neither clipping nor Adam's
    second moment rescales it. Under plain SGD both modes have the same optimum. Under Adam the strength of the proximal
    mode is in units of Adam's normalised step and not of the loss: it does not change when the loss is scaled, and its
    useful range differs.

    Memory: 8 bytes per trainable parameter (importance and anchor in fp32), and one temporary of the largest parameter.
    Compute per step: one pass over parameters, importance and anchor.

    Args:
        strength: the factor; 0 applies nothing and still measures the importance. ``auto``: it is chosen in every task,
            in both modes, so that the penalty has the stated `share`
            (:class:`~lightning_cl.callbacks.regularization.auto_strength.AutoStrength`). A
            :class:`~lightning_cl.KLBudget`: the model's predictions move by a stated divergence. The report has the
            chosen values.
        apply: ``gradient`` or ``proximal``.
        share: with ``strength="auto"``, the norm of the penalty's gradient divided by that of the task's gradient. In
            ``proximal`` mode, its move of the weights divided by the optimizer's step, both per learning rate. It rises
            when a task saturates.
        state_dtype: type of the importance. ``bfloat16`` halves its memory, with a relative rounding error of 0.4 %.
            The anchor keeps the parameters' type, so that it is exact.
        state_device: ``model``: importance and anchor are on the device of the parameters. ``cpu``: they are in RAM,
            and each step copies them to the parameters one tensor at a time.

    Attributes:
        importance: parameter name to the importance of each weight.
        anchor: parameter name to the weights at which the penalty is zero.
        constant: the part of the penalty that no weight can change, if several tasks have different anchors.

    Raises:
        ValueError: if an argument is out of its range.
    """

    relies_on: frozenset[Trait] = frozenset({"shared parameters"})

    def __init__(
        self,
        strength: Strength = "auto",
        apply: Apply = "gradient",
        share: float = 0.1,
        state_dtype: StateDtype = "float32",
        state_device: StateDevice = "model",
    ) -> None:
        super().__init__()
        if isinstance(strength, str) and strength != "auto":
            raise ValueError(f"strength={strength!r}: expected a number of at least 0, 'auto', or a KLBudget")
        chosen = isinstance(strength, (str, KLBudget))
        self.strength: Strength = strength if chosen else check_strength(strength)  # type: ignore[arg-type]
        self.apply = check_choice("apply", apply, ("gradient", "proximal"))
        self.share = check_strength(share, "share")
        if self.share == 0:
            raise ValueError("share=0: expected a number above 0, as 0.1; strength=0 switches the penalty off")
        self.auto: ChosenStrength | None = AutoStrength(self.share) if strength == "auto" else None
        if isinstance(strength, KLBudget):
            self.auto = KLStrength(strength, type(self).__name__)
        self.state_dtype = getattr(torch, check_choice("state_dtype", state_dtype, ("float32", "bfloat16")))
        self.state_device = check_choice("state_device", state_device, ("model", "cpu"))
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}
        self.constant = 0.0
        self._diagnosis: list[dict[str, Any]] = []
        self._not_finite = 0  # number of weights whose last measured importance was not finite
        self._largest_share: float | None = None  # the penalty's largest measured share of this task's pull
        self._task_pull = 0.0  # the largest measured pull of this task itself so far
        self._excess = 0.0  # the penalty's largest pull, in units of the task's largest until then
        self._before: dict[str, Tensor] = {}  # weights before a step in which the pull is measured
        self._due = False  # True if a strength is chosen at this step

    @property
    def factor(self) -> float:
        """Returns the present strength: the given one, or the last chosen one."""
        return self.auto.value if self.auto is not None else float(self.strength)  # type: ignore[arg-type]

    @property
    def is_active(self) -> bool:
        """True if there is anything to apply."""
        return (self.auto is not None or self.factor > 0) and bool(self.anchor)

    # ------------------------------------------------------------------ answers

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.auto is not None:
            self.auto.set_up(trainer, getattr(self, "outputs", None))

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        super().on_run_start(trainer)
        if self.auto is not None:
            self.auto.begin_sequence()

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._largest_share, self._task_pull, self._excess = None, 0.0, 0.0
        if self.auto is not None:
            self.auto.begin_task()
            self.auto.keep_reference(pl_module, self.run.position.index, self.is_active or self.tasks_done > 0)

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        everything = {clean_name(name): p for name, p in pl_module.named_parameters()}
        missing = sorted(self.anchor.keys() - everything.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has learnt the importance of {missing[0]!r} (and {len(missing) - 1} more),"
                f" which {type(pl_module).__name__} does not have; was the model changed since the checkpoint?"
            )
        on_cpu = self.state_device == "cpu"
        for name in self.anchor:
            parameter = everything[name]
            self.anchor[name] = fit_to(self.anchor[name], parameter, parameter.detach(), on_cpu)
            if name in self.importance:
                self.importance[name] = fit_to(self.importance[name], parameter, None, on_cpu)
        if self.auto is not None:
            self.auto.place(trainer, pl_module, self.run)

    @override
    @torch.no_grad()
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        self._before = {}
        if not self.is_active:
            return
        parameters = self._parameters(pl_module)
        if self._steps(trainer) == 0 and self.apply == "gradient":  # the penalty pulls later, and the task never harder
            self._task_pull = _norm(p.grad for p in parameters.values() if p.grad is not None) / scale
        # A few steps are always measured, since a task may be shorter than the logging interval.
        if self.is_log_step(trainer) or self._steps(trainer) in _MEASURED_STEPS:
            self._measure(parameters, scale, self.is_log_step(trainer))
        self._due = self.auto is not None and self.auto.is_due(self._steps(trainer))
        if self._due and self.auto is not None:
            for name, value in self.auto.observe(trainer, pl_module).items():
                self.log_scalar(name, value)
        if self.apply == "proximal" and (self._due or self._steps(trainer) in (0, *_MEASURED_STEPS)):
            self._before = {name: p.detach().clone() for name, p in parameters.items()}
        if self.apply == "proximal" or not self._due:
            return
        wanted = _norm(p.grad for p in parameters.values() if p.grad is not None) / scale
        pull = _norm(force for _, _, force in self.forces(parameters))
        self._choose(trainer, wanted, pull)
        self._note_share(self.factor * pull, wanted)

    @override
    def edit_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        if not self.is_active:
            return
        if self.apply == "gradient" and self.factor > 0:
            self.add_gradients(self._parameters(pl_module), self.factor, scale)

    @override
    @torch.no_grad()
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if not self.is_active or self.apply != "proximal":
            return
        proximal = [m for m in self.run.methods if isinstance(m, QuadraticPenalty) and m.apply == "proximal"]
        applied = self.run.applied if len(proximal) > 1 else None
        groups = self._stepped(pl_module, optimizer)
        if self._before:
            before, self._before = self._before, {}
            # Both are divided by the learning rate, so a schedule that ends near zero does not change the strength.
            largest = max((rate for own, rate in groups if own), default=0.0)
            if largest > 0:
                wanted = _norm(p - before[name] for own, _ in groups for name, p in own.items()) / largest
                pull = _norm(force * (rate / largest) for own, rate in groups for _, _, force in self.forces(own))
                if self._due:
                    self._choose(trainer, wanted, pull)
                self._note_share(self.factor * pull, wanted)
        if self.factor > 0:
            for own, rate in groups:
                self.move_weights(own, self.factor, rate, applied)

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held = self._describe_hold(trainer, pl_module)
        if self.auto is not None:
            self.auto.end_task(trainer, pl_module, self.run.position.name)
        self.update_importance(trainer, pl_module)
        if self._diagnosis:
            self._diagnosis[-1].update(held)

    # ------------------------------------------------------------------ what a subclass answers

    def update_importance(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures the importance of the task that ends, and sets the anchor."""
        raise NotImplementedError

    def add_gradients(self, parameters: Mapping[str, Tensor], strength: float, scale: float) -> None:
        """Adds the penalty's gradient to ``.grad``, which carries the factor `scale`."""
        importance, anchor = self._for(parameters)
        add_penalty_gradient_(parameters, anchor, importance, strength, scale)

    def move_weights(
        self, parameters: Mapping[str, Tensor], strength: float, rate: float, applied: dict[str, Tensor] | None
    ) -> None:
        """Makes the proximal step at learning rate `rate`; `applied` has what other penalties applied in this step."""
        importance, anchor = self._for(parameters)
        proximal_step_(parameters, anchor, importance, strength, rate, applied)

    def forces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields for each parameter its name, ``θ − anchor``, and the penalty's gradient at strength 1."""
        importance, anchor = self._for(parameters)
        for name, parameter in parameters.items():
            gap = parameter.detach().float() - anchor[name]
            yield name, gap, gap * importance[name]

    def other_value(self, parameters: Mapping[str, Tensor]) -> float:
        """``Σ importance · gap²`` of what :meth:`forces` gives no gap for."""
        return 0.0

    # ------------------------------------------------------------------ for subclasses

    def without_non_finite(self, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replaces values that are not finite by 0, with a warning; call it before `new` is used."""
        count = self._not_finite = zero_non_finite_(new)
        if count:
            rank_zero_warn(
                f"{type(self).__name__}: after {self.task} the importance of {count} weights is not finite (a sample"
                " whose loss, or its gradient, is NaN or infinite); they are left unprotected"
            )
        return new

    def diagnose(self, new: dict[str, Tensor], note: str, **more: Any) -> None:
        """Keeps numbers on this task's importance, and warns if the penalty can do nothing."""
        diagnosis = describe_importance(new) | more | compare_with_earlier(more.get("normalized_by"), self._diagnosis)
        diagnosis["not_finite"], self._not_finite = self._not_finite, 0
        if "faint" in diagnosis:
            rank_zero_warn(f"{type(self).__name__}: after {self.task} {diagnosis['faint']['words']}")
        self._diagnosis.append({"task": self.task.name if self.task is not None else None, **diagnosis})
        if diagnosis["total"] == 0.0:
            rank_zero_warn(
                f"{type(self).__name__}: the importance of all {diagnosis['parameters']} parameters is zero after"
                f" {self.task}: the penalty can do nothing. {note}"
            )

    def add_importance(self, new: Mapping[str, Tensor], decay: float = 1.0) -> None:
        """Computes ``importance ← decay · (importance + new)`` in fp32; keeps it in `state_dtype` on `state_device`."""
        for name, tensor in new.items():
            old = self.importance.get(name)
            total = tensor.float() if old is None else tensor.float() + old.to(tensor.device)
            self.importance[name] = self._kept(total.mul_(decay), self.state_dtype)
        for name in self.importance.keys() - new.keys():
            self.importance[name].mul_(decay)

    def set_anchor(self, pl_module: L.LightningModule, names: Mapping[str, Any] | None = None) -> None:
        """Sets the anchor to the present trainable parameters."""
        for name, parameter in trainable_parameters(pl_module).items():
            if names is None or name in names:
                self.anchor[name] = self._kept(parameter.detach().clone(), parameter.dtype)

    def penalty(self, pl_module: L.LightningModule) -> float:
        """Returns the penalty's value at the module's present weights, including the constant."""
        value = sum(
            float(whole((gap * force).sum(dtype=torch.float64)))
            for _, gap, force in self.forces(self._parameters(pl_module))
        )
        value += self.other_value(self._parameters(pl_module))
        return self.factor * (0.5 * value + self.constant)

    def _kept(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return pinned(tensor.to("cpu", dtype)) if self.state_device == "cpu" else tensor.to(dtype)

    def _parameters(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        return {name: p for name, p in trainable_parameters(pl_module).items() if name in self.anchor}

    def _for(self, parameters: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        return Streamed(self.importance, parameters), Streamed(self.anchor, parameters)

    def _stepped(
        self, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> list[tuple[dict[str, Tensor], float]]:
        """Returns each group's parameters with a gradient, which the optimizer moved, and their learning rate."""
        parameters, groups = self._parameters(pl_module), []
        for group in optimizer.param_groups:
            members = {id(p) for p in group["params"]}
            own = {name: p for name, p in parameters.items() if id(p) in members and p.grad is not None}
            groups.append((own, float(group["lr"])))
        return groups

    # ------------------------------------------------------------------ strength and diagnosis

    def _steps(self, trainer: L.Trainer) -> int:
        return trainer.global_step - self.run.first_step

    def _choose(self, trainer: L.Trainer, wanted: float, pull: float) -> None:
        assert self.auto is not None
        assert self.task is not None
        self.auto.choose(wanted, pull, self.task.name, self._steps(trainer))
        self.log_scalar("strength", self.auto.value)

    @torch.no_grad()
    def _measure(self, parameters: dict[str, Tensor], scale: float, log: bool) -> None:
        """Measures the penalty, and its share of the task's gradient before any method has edited it."""
        value, pull = 0.0, 0.0
        for _, gap, force in self.forces(parameters):
            value += float(whole((gap * force).sum()))
            pull += float(whole(force.square().sum()))
        value += self.other_value(parameters) if log else 0.0
        if log:
            self.log_scalar("penalty", self.factor * (0.5 * value + self.constant))
        gradient = _norm(p.grad for p in parameters.values() if p.grad is not None)
        if gradient > 0:
            share = self.factor * pull**0.5 * scale / gradient
            if self.apply == "gradient":
                self._note_share(self.factor * pull**0.5, gradient / scale)
            if log:
                self.log_scalar("penalty_to_gradient_norm", share)

    def _note_share(self, pull: float, wanted: float) -> None:
        """Notes how hard the penalty pulls; it is too strong above the task's largest pull so far.

        A task that is learnt pulls ever less, and where the two balance they pull alike: that is no fault.
        """
        if not wanted > 0 or self.factor == 0:
            return  # `auto` has not chosen yet
        self._largest_share = max(pull / wanted, self._largest_share or 0.0)
        largest = self.auto.largest if self.auto is not None else 0.0
        self._task_pull = max(self._task_pull, wanted, largest)
        self._excess = max(self._excess, pull / self._task_pull)

    @torch.no_grad()
    def _describe_hold(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Describes the effect of the penalty in the task that ends; warns where it did nothing."""
        if not self.is_active:
            return {}
        entry = {
            "penalty": self.penalty(pl_module),
            "strength": self.factor,
            "largest_share": self._largest_share,
            "too_strong": self._excess > 1.0,
            "excess": self._excess,
        }
        steps = self._steps(trainer)
        if self.factor == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"{type(self).__name__}: in {self.task} strength={self.strength!r} has chosen nothing in {steps} steps"
                f" (its first choice comes after {FIRST_CHOICE}), so nothing was protected; give a number as strength"
            )
        if self.factor > 0 and (words := warning_of(entry, self.apply, self.auto is not None)):
            rank_zero_warn(f"{type(self).__name__}: in {self.task} {words}")
        return entry

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "importance": {name: full_cpu(t) for name, t in self.importance.items()},
            "anchor": {name: full_cpu(t) for name, t in self.anchor.items()},
            "constant": self.constant,
            "diagnosis": list(self._diagnosis),
            "largest_share": self._largest_share,
            "task_pull": self._task_pull,
            "excess": self._excess,
            "auto": self.auto.state() if self.auto is not None else None,
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.importance = {name: t.to(self.state_dtype) for name, t in state["importance"].items()}
        self.anchor = dict(state["anchor"])
        self.constant = state["constant"]
        self._diagnosis = list(state["diagnosis"])
        self._largest_share = state["largest_share"]
        # Older checkpoints do not have these.
        self._task_pull, self._excess = state.get("task_pull", 0.0), state.get("excess", 0.0)
        if self.auto is not None and state["auto"] is not None:
            self.auto.load(state["auto"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.importance, self.anchor) + (self.auto.state_bytes() if self.auto is not None else 0)

    @override
    def report(self) -> dict[str, Any]:
        chosen = self.auto.report() if self.auto is not None else {}
        held = [words for entry in self._diagnosis for words in sentences_of(type(self).__name__, entry, self.apply)]
        held += self.auto.sentences() if self.auto is not None else []
        importance = list(self._diagnosis)
        strength = repr(self.strength) if isinstance(self.strength, KLBudget) else self.strength
        return {"strength": strength, "apply": self.apply, "importance": importance, **chosen, "sentences": held}

    @override
    def advice(self, need: Need) -> str | None:
        if self.auto is not None:
            return self.auto.advice(type(self).__name__, need, self._diagnosis)
        return advice_of(type(self).__name__, need, self._diagnosis, "strength", self.factor)


def _norm(tensors: Iterator[Tensor | None] | Any) -> float:
    result: float = sum(float(whole(t.detach().float().square().sum())) for t in tensors if t is not None) ** 0.5
    return result
