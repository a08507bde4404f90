"""PackNet: several tasks in one set of weights, each entry of which belongs to one task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_cl.arguments import check_positive, check_share
from lightning_cl.callbacks.architecture.linear_layers import check_targets, find_linear_layers
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.loops import steps_of_current_task
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.placement import all_parameters, full_cpu, tensor_bytes, trainable_parameters
from lightning_cl.core.questions import Need, Trait
from lightning_cl.functional.packnet import claim, free_share, hold_, movable, no_owners, task_view
from lightning_cl.tasks import TaskPosition

_LITTLE = 0.1  # of all entries free: worth a warning
_MOST = 255  # tasks that a byte can tell apart


class PackNet(ContinualCallback):
    """PackNet (Mallya & Lazebnik 2018) on changes: a task owns entries of the weights, and nobody else changes them.

    ::

        phase 1   train the entries that no task owns
        claim     the task owns the `share` of them with the largest |θ − θ_base|, tensor by tensor
        reset     θ ← θ_base where nobody is the owner
        phase 2   train the entries that the task owns, for the last part `retrain` of its steps

    The paper sets what nobody owns to zero, which would destroy a pretrained model; here it has the value of the base.
    Asked about a task, the model has the entries of that task and of those before it, and the base elsewhere
    (:mod:`lightning_cl.functional.packnet`). Later tasks do not change that, to the last bit, and the base can always
    be had back. Asked about none of the trained tasks, it answers with all of them, which later tasks do change. So it
    needs to be told the task, and the room is used up: with a quarter, 10 % is left after 8 tasks.

    ``with method.deployed(trainer, module, "chat"): module.save_pretrained(folder)`` saves the model of one task.

    Only the entries of `targets` are trained, all else is frozen. The gradients and the optimizer are those of all
    entries; what may not move is put back after each step, since momentum and weight decay move it too. What the
    optimizer knows is kept from phase 1 to phase 2.

    Memory: two copies of the trained parameters in their own type and 1 byte for each entry; in checkpoints one copy
    and the bytes. Compute: one pass over them a step; one partial sort a task.

    Args:
        share: of the free entries of each tensor that a task gets. ``1 / (T − t + 1)`` would give T tasks equal parts.
        retrain: the last part of a task's steps, in which only its own entries are trained; 0 leaves phase 2 out.
        targets: ``linear``: the weights of all linear layers, but for the head of a language model and weights that two
            layers share. A list: those of the layers with such names, as ``["q_proj", "v_proj"]``. ``all``: every
            trainable parameter, also biases, norms, embeddings and the factors of an adapter.

    Attributes:
        base_weights: parameter name to its value before the first task.
        owner: parameter name to the owners of its entries: 0 for nobody, t for the task t, from 1.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import PackNet
        >>> method = PackNet(share=0.25)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["share"]
        0.25
    """

    owns = "the trainable parameters"
    edit_order = 3
    consolidate_order = 1
    takes_away: Mapping[Trait, str] = MappingProxyType(
        {
            "shared parameters": "each task trains entries of its own, and no later task changes them; nothing is left"
            " to hold. Leave one of the two out",
            "earlier outputs": "an earlier task's outputs come from its own entries, which no later task changes; there"
            " is nothing to hold. Leave one of the two out",
            "earlier samples": "samples of earlier tasks would train the new task's entries, and theirs rest. Leave one"
            " of the two out; GeneralReplay, with data of no task, goes together with it",
        }
    )

    def __init__(
        self, share: float = 0.25, retrain: float = 0.33, targets: Literal["linear", "all"] | list[str] = "linear"
    ) -> None:
        super().__init__()
        self.share = check_positive("share", share, "a share of the free entries above 0 and at most 1", most=1)
        self.retrain = check_share("retrain", retrain)
        if self.retrain == 1.0:
            raise ValueError("retrain=1.0: expected a share from 0 to below 1, as 0.33; phase 1 needs steps, too")
        self.targets = targets if targets == "all" else check_targets(targets)
        self.base_weights: dict[str, Tensor] = {}
        self.owner: dict[str, Tensor] = {}
        self._numbers: dict[str, int] = {}  # of the tasks that have ended
        self._kept: dict[str, Tensor] = {}  # the weights at the start of the phase
        self._may_move: dict[str, Tensor] = {}
        self._steps = self._claim_at = 0
        self._claimed = False
        self._free: list[float] = []  # after each task
        self._early: list[str] = []  # tasks that ended in phase 1

    # ------------------------------------------------------------------ before training

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__} looks for the largest changes of whole")
        if stage == "fit" and self.share == 1.0 and len(self.run.names) > 1:
            raise MisconfigurationException(
                f"{type(self).__name__}(share=1.0): the first of {len(self.run.names)} tasks would get all there is;"
                " expected less, as 0.25"
            )
        if stage == "fit" and len(self.run.names) > _MOST:
            raise MisconfigurationException(
                f"{type(self).__name__}: {len(self.run.names)} tasks, expected at most {_MOST}"
            )

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        integers = [name for name, p in all_parameters(pl_module).items() if not p.is_floating_point()]
        if integers:
            raise MisconfigurationException(
                f"{type(self).__name__}: {integers[0]!r} is quantised; entries of 4 or 8 bits cannot be trained. Load"
                " the model in 16 bits, or give each task an adapter (TaskAdapters)"
            )
        if self.targets == "all":
            return
        chosen = {id(layer.weight) for layer in find_linear_layers(pl_module, self.targets).values()}
        for parameter in trainable_parameters(pl_module).values():
            parameter.requires_grad_(id(parameter) in chosen)

    # ------------------------------------------------------------------ a task

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = trainable_parameters(pl_module)
        if not self.owner:
            self.base_weights = {name: full_cpu(p) for name, p in parameters.items()}
            self.owner = {name: tensor.cpu() for name, tensor in no_owners(parameters).items()}
        shapes, known = ({n: t.shape for n, t in group.items()} for group in (parameters, self.owner))
        if shapes != known:
            name = sorted(n for n in shapes.keys() | known.keys() if shapes.get(n) != known.get(n))[0]
            raise MisconfigurationException(
                f"{type(self).__name__}: {name!r} is not what was trained in the first task; expected the same"
                " parameters, of the same shapes, in all tasks"
            )
        if free_share(self.owner) == 0.0:
            raise MisconfigurationException(
                f"{type(self).__name__}: no entry is left for {self.task}; {len(self._free)} tasks own them all. Start"
                " again with a smaller share"
            )
        if self._number > _MOST:
            raise MisconfigurationException(f"{type(self).__name__}: it can tell {_MOST} tasks apart, no more")
        steps = self._steps_of_task(trainer)
        self._steps, self._claimed = 0, False
        self._claim_at = max(1, steps - round(self.retrain * steps))

    @property
    def _number(self) -> int:
        """The number of the task that is trained, as an owner; tasks that have ended count once each."""
        return len(self._free) + 1

    def _steps_of_task(self, trainer: L.Trainer) -> int:
        count = steps_of_current_task(trainer, self.run.limits)
        if count is None:
            raise MisconfigurationException(
                f"{type(self).__name__}(retrain={self.retrain}): nobody knows how many steps {self.task} has, and so"
                " when phase 2 begins; set max_steps"
            )
        return count

    @override
    def place(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = all_parameters(pl_module)
        missing = sorted(self.owner.keys() - parameters.keys())
        if missing:
            raise MisconfigurationException(
                f"{type(self).__name__}: it has owners of {missing[0]!r} (and {len(missing) - 1} more), which"
                f" {type(pl_module).__name__} does not have; was the model changed since the checkpoint?"
            )
        self.owner = {name: tensor.to(parameters[name].device) for name, tensor in self.owner.items()}
        self._begin_phase(parameters)

    def _begin_phase(self, parameters: Mapping[str, Tensor]) -> None:
        # What may not move is as it was when the phase began, also in the middle of it.
        self._kept = {name: parameters[name].detach().clone() for name in self.owner}
        self._may_move = movable(self.owner, self._number if self._claimed else None)

    @override
    def edit_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        parameters = self._parameters(pl_module)
        hold_(parameters, self._kept, self._may_move)
        self._steps += 1
        if self._steps >= self._claim_at and not self._claimed and self.retrain > 0:
            self._claim(parameters)

    def _parameters(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        parameters = all_parameters(pl_module)
        return {name: parameters[name] for name in self.owner}

    @torch.no_grad()
    def _claim(self, parameters: dict[str, Tensor]) -> None:
        """Ends phase 1: the task owns its share, and what is left is the base's again."""
        self.owner = claim(self.base_weights, parameters, self.owner, self._number, self.share)
        self._claimed = True
        self._reset(parameters)
        self._begin_phase(parameters)

    @torch.no_grad()
    def _reset(self, parameters: dict[str, Tensor]) -> None:
        for name, value in task_view(self.base_weights, parameters, self.owner, self._number).items():
            parameters[name].copy_(value)

    @override
    def consolidate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        parameters = self._parameters(pl_module)
        if not self._claimed:
            if self.retrain > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._early.append(self.task.name)
                rank_zero_warn(
                    f"{type(self).__name__}: {self.task} ended after {self._steps} steps, before phase 2: its entries"
                    " are not trained without the others. Stop it by max_steps and not earlier, or use retrain=0"
                )
            self._claim(parameters)
        self._reset(parameters)  # weights of another moment may have been loaded, or averaged
        self._kept, self._may_move = {}, {}

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        self._numbers[self.task.name] = self._number
        self._free.append(free_share(self.owner))
        if self._free[-1] < _LITTLE:
            rank_zero_warn(
                f"{type(self).__name__}: after {self.task} {self._free[-1]:.1%} of the entries are free; each further"
                " task gets less to learn with"
            )

    # ------------------------------------------------------------------ the model is asked

    @override
    @contextmanager
    def deployed(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None) -> Iterator[None]:
        number = self._numbers.get(task) if task is not None else None
        if number is None or not self.owner:
            yield
            return
        parameters = self._parameters(pl_module)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        try:
            with torch.no_grad():
                for name, value in task_view(self.base_weights, parameters, self.owner, number).items():
                    parameters[name].copy_(value)
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    # ------------------------------------------------------------------ state and report

    @override
    def continual_state(self) -> dict[str, Any]:
        return {
            "base": dict(self.base_weights),
            "owner": {name: full_cpu(tensor) for name, tensor in self.owner.items()},
            "numbers": dict(self._numbers),
            "steps": self._steps,
            "claim_at": self._claim_at,
            "claimed": self._claimed,
            "free": list(self._free),
            "early": list(self._early),
        }

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.base_weights, self.owner = dict(state["base"]), dict(state["owner"])
        self._numbers, self._free = dict(state["numbers"]), list(state["free"])
        self._steps, self._claim_at, self._claimed = state["steps"], state["claim_at"], state["claimed"]
        self._early = list(state["early"])

    @override
    def state_bytes(self) -> int:
        return tensor_bytes(self.base_weights, self.owner)

    def owned(self) -> dict[str, int]:
        """Task name to the number of entries that it owns."""
        return {
            name: sum(int((tensor == number).sum()) for tensor in self.owner.values())
            for name, number in self._numbers.items()
        }

    @override
    def report(self) -> dict[str, Any]:
        total = sum(tensor.numel() for tensor in self.owner.values())
        owned = self.owned()
        return {
            "share": self.share,
            "retrain": self.retrain,
            "targets": self.targets if isinstance(self.targets, str) else list(self.targets),
            "owned": owned,
            "free": list(self._free),
            "without_phase_2": list(self._early),
            "sentences": [
                f"{type(self).__name__}, {name}: it owns {count} of {total} entries ({count / total:.1%}),"
                f" {self._free[self._numbers[name] - 1]:.1%} were free after it"
                for name, count in owned.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need != "learn":
            return None
        return f"a larger {type(self).__name__}(share=…), {self.share:g} now"
