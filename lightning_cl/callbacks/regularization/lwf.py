"""Learning without Forgetting: distillation from the model before the task, or before the first task."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer, check_strength
from lightning_cl.callbacks.regularization.kl_budget import KLBudget, KLStrength
from lightning_cl.core.checks import refuse_several_loaders, refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Need, Trait
from lightning_cl.data.mixing.contents import rows_mask
from lightning_cl.functional.lwf import head_kl_divergence
from lightning_cl.passes.logits import OutputsFunction, aligned, loss_positions
from lightning_cl.passes.passes import leaving_no_trace
from lightning_cl.passes.student import Call, Student
from lightning_cl.passes.task_samples import TaskSamples
from lightning_cl.passes.teacher import Teacher

_DTYPES = ("float32", "bfloat16", "float16")


class LwF(ContinualCallback):
    """Learning without Forgetting (Li & Hoiem 2016, ECCV, eqs. 2 and 3), and distillation from the base model.

    ::

        L(θ) + strength · T² · mean_t KL( softmax(z_teacher / T) ‖ softmax(z_student / T) )

    The mean is over the positions that bear loss (over samples, for a classifier). The gradient is that of the paper's
    cross-entropy; ``T²`` keeps its size when T changes (Hinton et al. 2015). The teacher is frozen and in evaluation
    mode. It is no part of the optimizer or of DDP. For a language model, the logits of both models exist for one chunk
    of tokens at a time. No earlier data is needed. Next to ``Replay``, the teacher can also be applied to the replayed
    samples alone.

    Memory: a copy of the trainable parameters, also in checkpoints (under LoRA: of the adapter). With ``teacher_dtype``
    or ``teacher_device`` it is a copy of all parameters. Compute per step: one forward pass of the teacher, or one
    ``training_step`` without gradients if trained parts compute the model's inputs, such as a projector or a soft
    prompt. With `outputs`, one more forward and backward pass of the student. If a head has grown since, only the
    classes that the teacher knows are compared.

    Args:
        strength: the factor; 0 keeps teachers and adds no loss. It is multiplied by ``T²``: with the default T = 2, a
            strength of 1 gives the divergence the weight 4. A :class:`~lightning_cl.KLBudget`: the strength follows the
            divergence of the model's predictions (at T = 1, on training samples of the task) to a stated value.
        temperature: T. It is 2 in the paper; 1 compares the unchanged predictions.
        teacher: ``previous``: the model at the end of the previous task; the first task has no teacher. ``base``: the
            model before the first task, for all tasks.
        where: samples that count: ``all``, ``new`` (as in the paper) or ``replayed`` ones.
        top_k: compare the teacher's k most probable tokens, and all others as one class; None: compare all tokens.
        teacher_dtype: type of the teacher; default: that of the parameters.
        teacher_device: device of the teacher, as ``cpu`` or ``cuda:1``; default: the module's device.
        outputs: a function ``outputs(module, batch)`` that gives the logits. It is needed where no submodule returns an
            object with ``.logits``.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import LwF
        >>> method = LwF(strength=1.0, temperature=2.0)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.temperature
        2.0
    """

    relies_on: frozenset[Trait] = frozenset({"earlier outputs"})

    def __init__(
        self,
        strength: float | KLBudget = 1.0,
        temperature: float = 2.0,
        teacher: Literal["previous", "base"] = "previous",
        where: Literal["all", "new", "replayed"] = "all",
        top_k: int | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        teacher_device: str | None = None,
        outputs: OutputsFunction | None = None,
    ) -> None:
        super().__init__()
        self.strength = strength if isinstance(strength, KLBudget) else check_strength(strength)
        self.budget = KLStrength(strength, "LwF", outputs, value=1.0) if isinstance(strength, KLBudget) else None
        self.temperature = check_strength(temperature, "temperature")
        if self.temperature == 0:
            raise ValueError("temperature=0: expected a number above 0, as 2 in the paper")
        self.teacher_is = check_choice("teacher", teacher, ("previous", "base"))
        self.where = check_choice("where", where, ("all", "new", "replayed"))
        if top_k is not None:
            check_integer("top_k", top_k, 1, "a positive number of tokens, or None for all")
        if teacher_dtype is not None:
            check_choice("teacher_dtype", teacher_dtype, _DTYPES)
        self.top_k, self.outputs = top_k, outputs
        self._dtype = getattr(torch, teacher_dtype) if teacher_dtype is not None else None
        try:
            self._device = torch.device(teacher_device) if teacher_device is not None else None
        except RuntimeError as error:
            raise ValueError(f"teacher_device={teacher_device!r}: {error}") from error
        self.teacher: Teacher | None = None
        self._student: Student | None = None
        self._divergences: dict[str, list[float]] = {}  # for each task: sum and number of logged values
        self._unknown: dict[str, int] = {}  # for each task: positions at which the teacher is not finite

    @property
    def factor(self) -> float:
        """Returns the present strength: the given one, or the one that the budget has led to."""
        return self.strength if isinstance(self.strength, float) else self._budget_value()

    def _budget_value(self) -> float:
        assert self.budget is not None
        return self.budget.value

    @property
    def is_active(self) -> bool:
        """True if there is anything to apply."""
        return self.factor > 0 and self.teacher is not None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: a teacher's weights cannot be put in the place of")
        if stage == "fit" and self.where == "replayed" and not any(m.replays for m in self.run.methods):
            raise MisconfigurationException(
                f"{type(self).__name__}(where='replayed'): nothing is replayed; add lightning_cl.Replay, or another"
                " callback that replays, to Trainer(callbacks=[…]), or give where='new'"
            )
        if self._device is not None:
            try:
                torch.empty(0, device=self._device)
            except (RuntimeError, AssertionError) as error:
                reason = str(error).splitlines()[0]
                raise MisconfigurationException(
                    f"{type(self).__name__}(teacher_device={str(self._device)!r}): {reason}"
                ) from error

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        refuse_several_loaders(loader, task, type(self).__name__)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._student is not None:
            self._student.release()
            self._student = None

    @override
    def on_run_start(self, trainer: L.Trainer) -> None:
        super().on_run_start(trainer)
        if self.budget is not None:
            self.budget.begin_sequence()

    @override
    def on_sequence_start(self) -> None:
        if self.teacher_is == "base":
            self.teacher = None

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.teacher_is == "base" and self.teacher is None:
            self.teacher = Teacher(pl_module, self._dtype, self._device)
        if self.budget is not None and self.task is not None:
            self.budget.begin_task()
            self.budget.keep_reference(pl_module, self.task.index, self.is_active)

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        self._student = Student(trainer, pl_module, self.outputs, type(self).__name__)
        with leaving_no_trace(pl_module), torch.no_grad():
            # This raises an error before training, and not after a task, if the logits cannot be found.
            batch = TaskSamples(trainer, 1, 0, f"{type(self).__name__}: logits").one()
            if batch is not None:
                self._student.find(batch)
        if self.teacher is not None:
            self.teacher.complete(pl_module)
            self.teacher.place(pl_module)
            self.teacher.bind(pl_module)
        if self.is_active:
            self._student.watch()
        if self.budget is not None:
            self.budget.place(trainer, pl_module, self.run)

    @override
    def observe_gradients(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer, scale: float
    ) -> None:
        steps = trainer.global_step - self.run.first_step
        if self.budget is None or not self.is_active or not self.budget.is_due(steps):
            return
        self.log_scalar("kl", self.budget.measure(trainer, pl_module))
        self.budget.choose(0.0, 0.0, self.run.position.name, steps)
        self.log_scalar("strength", self.budget.value)

    @override
    def extra_loss(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Tensor | None:
        if not self.is_active:
            return None
        assert self.teacher is not None
        assert self._student is not None
        self.teacher.complete(pl_module)  # parameters that were unfrozen inside the task
        with trainer.precision_plugin.forward_context():
            student, call = self._student.take(batch)
            teacher = self._teachers(call, pl_module, batch).to(student.device)
            shifted = self._student.shifted
            student, teacher = (aligned(batch, side, shifted) for side in (student, teacher))
            mask = self._mask(trainer, batch, student)
            ours, theirs = _rows(teacher, mask), _rows(student, mask)
            known = _is_known(ours, call.head is not None)
            if not bool(known.all()):
                self._tell_unknown(int((~known).sum()))
                ours, theirs = ours[known], theirs[known]
            if len(theirs) == 0:
                return None
            copies = self.teacher.tensors_of(call.head) if call.head is not None else {}
            total = head_kl_divergence(
                ours,
                theirs,
                call.head_with(copies),
                call.head_with({}),
                call.classes or theirs.shape[-1],
                self.temperature,
                self.top_k,
            )
        divergence = total / len(theirs)
        if self.is_log_step(trainer):
            self._note(float(divergence.detach()))
        return self.factor * self.temperature**2 * divergence

    def _teachers(self, call: Call, pl_module: L.LightningModule, batch: Any) -> Tensor:
        """Returns the teacher's result of the student's call."""
        assert self.teacher is not None
        assert self._student is not None
        if call.has_trained_inputs:
            with self.teacher.in_place_of(pl_module):
                return call.read(self._student.again(self.teacher.to_its_device(batch)))
        args, kwargs = self.teacher.to_its_device((call.args, call.kwargs))
        with self._student.unwatched(), self.teacher.in_place_of(call.part):
            return call.read(call.run(*args, **kwargs))

    def _mask(self, trainer: L.Trainer, batch: Any, student: Tensor) -> Tensor | None:
        """Marks the positions that count; None: all of them."""
        shifted = self._student.shifted if self._student is not None else True
        positions = loss_positions(batch, student, shifted)
        if self.where == "all":
            return positions
        length = student.shape[1] if student.ndim > 2 else 1
        replayed = rows_mask(self.run.kinds, len(student), length).to(student.device)
        wanted = replayed if self.where == "replayed" else ~replayed
        if positions is None:
            return wanted[:, 0]
        # Position t predicts token t + 1, and counts with that token's sample.
        return positions & (wanted[:, 1:] if shifted else wanted)

    def _tell_unknown(self, count: int) -> None:
        """Counts positions at which the teacher is not finite; they would make the whole loss NaN."""
        assert self.task is not None
        if self.task.name not in self._unknown:
            rank_zero_warn(
                f"{type(self).__name__}: in {self.task} the teacher's outputs are NaN or infinite at some positions"
                " (does it overflow in its teacher_dtype?); they are left out, and counted in the report"
            )
        self._unknown[self.task.name] = self._unknown.get(self.task.name, 0) + count

    def _note(self, divergence: float) -> None:
        self.log_scalar("divergence", divergence)
        assert self.task is not None
        if not math.isfinite(divergence):
            return  # it is logged for this step, but left out of the mean over training
        total = self._divergences.setdefault(self.task.name, [0.0, 0.0])
        total[0] += divergence
        total[1] += 1

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        if self.budget is not None:
            self.budget.end_task(trainer, pl_module, self.run.position.name)
        if self.teacher_is == "previous":
            self.teacher = Teacher(pl_module, self._dtype, self._device)

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        teacher = self.teacher.state() if self.teacher is not None else None
        divergences = {name: list(value) for name, value in self._divergences.items()}
        budget = {"budget": self.budget.state()} if self.budget is not None else {}
        return {"teacher": teacher, "divergences": divergences, "unknown": dict(self._unknown), **budget}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.teacher = None
        if state["teacher"] is not None:
            self.teacher = Teacher(None, self._dtype, self._device)
            self.teacher.load(state["teacher"])
        self._divergences = {name: list(value) for name, value in state["divergences"].items()}
        self._unknown = dict(state.get("unknown", {}))  # older checkpoints do not have it
        if self.budget is not None and "budget" in state:
            self.budget.load(state["budget"])

    @override
    def state_bytes(self) -> int:
        teacher = self.teacher.size_in_bytes() if self.teacher is not None else 0
        return teacher + (self.budget.state_bytes() if self.budget is not None else 0)

    @override
    def report(self) -> dict[str, Any]:
        means = {name: total / count for name, (total, count) in self._divergences.items()}
        unit = f"KL from its teacher ({'the task before' if self.teacher_is == 'previous' else 'the base'})"
        return {
            "strength": self.strength if self.budget is None else repr(self.strength),
            **(self.budget.report() if self.budget is not None else {}),
            "temperature": self.temperature,
            "teacher": self.teacher_is,
            "where": self.where,
            "divergence": means,
            "left_out": dict(self._unknown),
            "sentences": [
                *(f"LwF, {name}: {value:.3g} nats {unit}, mean over training" for name, value in means.items()),
                *(
                    f"LwF, {name}: the teacher was NaN or infinite at {count} positions, which are left out"
                    for name, count in self._unknown.items()
                ),
                *(self.budget.sentences() if self.budget is not None else ()),
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if self.budget is not None:
            return self.budget.advice("LwF", need, ())
        return f"a {'higher' if need == 'keep' else 'lower'} LwF(strength=…), {self.strength:g} now"


def _is_known(outputs: Tensor, is_hidden: bool) -> Tensor:
    """Returns ``[positions]``: True if a row gives a distribution; a logit of −∞ excludes its class."""
    if is_hidden:
        return outputs.isfinite().all(-1)
    return ~(outputs.isnan() | outputs.isposinf()).any(-1)


def _rows(side: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``[positions, width]`` of the positions that count."""
    if mask is None:
        return side.flatten(0, -2)
    return side[mask].flatten(0, -2) if mask.ndim == 1 else side[:, : mask.shape[1]][mask]
