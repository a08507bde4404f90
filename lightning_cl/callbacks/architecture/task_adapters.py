"""One adapter for each task around a base that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Need, Trait
from lightning_cl.models.adapter_names import RESERVED
from lightning_cl.models.adapters import (
    Init,
    Train,
    adapter_bytes,
    adapter_parameters,
    allocate_adapter,
    find_peft_model,
    list_adapters,
    remove_adapter,
    train_adapter,
    use_adapter,
    using_adapter,
)
from lightning_cl.tasks import TaskPosition

_INITS, _TRAINS = ("fresh", "previous", "mean"), ("AB", "B")


class TaskAdapters(ContinualCallback):
    """Trains a LoRA adapter of its own for each task, around a base that stays frozen; nothing is forgotten.

    ::

        y = W x + s · B_k A_k x        k: the task

    Task t trains ``A_t`` and ``B_t`` alone, and the earlier ones rest. So the outputs of an earlier task stay the same
    to the last bit, whatever comes later (progressive networks without laterals: Rusu et al. 2016, arXiv:1606.04671;
    LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3). Its price is in what a task learns: a low-rank change of a frozen
    base learns less than full tuning does. It works on any LightningModule that contains one ``PeftModel`` with LoRA,
    also around a base in 4 or 8 bits. ``CausalLM(lora={"r": 8})`` is one. The adapter that the module comes with is the
    template of all others, and is deleted when the first task has its own.

    Outside of a fit the model computes with the adapter of the task that it is asked about: in the columns of the
    matrix, ``evaluate_tasks`` and ``predict_tasks``. A task that is not trained yet gets what `unseen` says, and before
    any training that is the base. At the end of a sequence the last task's adapter is in use;
    ``CausalLM.use_task(name)`` changes that, and ``CausalLM.save_pretrained(folder, task=…)`` saves one, all, or their
    mean as one model.

    Everything outside of the adapters is frozen, a head too: tasks that need a head of their own have it by
    ``modules_to_save`` of the LoRA configuration.

    Memory: for each task rank · Σ (inputs + outputs) parameters of the adapted layers, in checkpoints too; gradients
    and optimizer states for those of one task. Compute: that of LoRA.

    Args:
        rank: of the adapters; None: that of the template.
        init: of a new task's adapter: ``fresh`` starts from the base, ``previous`` from a copy of the last task's
            adapter, ``mean`` from the mean of all earlier products ``B A``, at the same rank.
        unseen: for a task without an adapter: ``latest``, the adapter of the last trained task, or ``base``, none.
        train: ``AB`` trains both factors, ``B`` leaves the random one as it is (half of the trained parameters).
        seed: of the random factors, which depend on the task's name too; None: that of the run's random state.

    Attributes:
        parameters: task name to the number of its adapter's parameters.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import TaskAdapters
        >>> method = TaskAdapters(rank=8, init="previous")
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["init"]
        'previous'
    """

    owns = "the trainable parameters"
    takes_away: Mapping[Trait, str] = MappingProxyType(
        {
            "shared parameters": "each task trains an adapter of its own, and no later task changes it; nothing is left"
            " to hold. Leave one of the two out",
            "earlier outputs": "an earlier task's outputs come from its own adapter, which no later task changes; there"
            " is nothing to hold. Leave one of the two out",
            "earlier samples": "samples of earlier tasks would train the new task's adapter, and theirs rest. Leave one"
            " of the two out; GeneralReplay, with data of no task, goes together with it",
        }
    )

    def __init__(
        self,
        rank: int | None = None,
        init: Init = "fresh",
        unseen: Literal["latest", "base"] = "latest",
        train: Train = "AB",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if rank is not None:
            check_integer("rank", rank, 1, "a positive integer, or None for the template's")
        if seed is not None:
            check_integer("seed", seed)
        self.rank, self.seed = rank, seed
        self.init: Init = check_choice("init", init, _INITS)  # type: ignore[assignment]
        self.unseen = check_choice("unseen", unseen, ("latest", "base"))
        self.train_factors: Train = check_choice("train", train, _TRAINS)  # type: ignore[assignment]
        self.parameters: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._drawn_from: int | None = seed
        self._told = False  # that a part of the module is frozen

    # ------------------------------------------------------------------ structure

    @override
    def check_loader(self, loader: Any, task: str) -> None:
        if task in RESERVED:
            raise MisconfigurationException(
                f"{type(self).__name__}: task {task!r}: this name means something else where an adapter is named"
                f" ({', '.join(RESERVED)} do); give the task another one"
            )

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        if self._drawn_from is None:
            self._drawn_from = torch.initial_seed()
        others = [task for task in list_adapters(pl_module) if task not in tasks]
        if others and not self.run.loading:
            raise MisconfigurationException(
                f"{type(self).__name__}: the module has adapters of {others} already, which this run has not trained;"
                " start with a new module, or resume with ckpt_path"
            )
        for task in tasks:
            # What is about to be loaded needs no start.
            init: Init = "fresh" if self.run.loading else self.init
            allocate_adapter(pl_module, task, init, self.rank, self._drawn_from)
        for task in others if tasks else ():
            remove_adapter(pl_module, task)

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        if not self._told:
            self._told = True
            inside = {id(parameter) for parameter in find_peft_model(pl_module).parameters()}
            outside = [n for n, p in pl_module.named_parameters() if p.requires_grad and id(p) not in inside]
            if outside:
                rank_zero_warn(
                    f"{type(self).__name__}: {outside[0]!r} (and {len(outside) - 1} more) is outside of the adapters:"
                    " all tasks share it, and it is frozen from now on; modules_to_save of the LoRA configuration gives"
                    " each task a copy of a layer"
                )
        train_adapter(pl_module, task.name, self.train_factors)

    # ------------------------------------------------------------------ the model is asked

    @override
    def deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None
    ) -> AbstractContextManager[None]:
        """Returns a context in which the module computes with the adapter of a task.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            task: the task's name; None, or a task without an adapter: what `unseen` says.
        """
        known = list_adapters(pl_module)
        if task not in known:
            task = known[-1] if known and self.unseen == "latest" else None
        return using_adapter(pl_module, task)

    @override
    def on_sequence_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        known = list_adapters(pl_module)
        if known:
            use_adapter(pl_module, known[-1])

    # ------------------------------------------------------------------ state and report

    @override
    def on_sequence_start(self) -> None:
        self.parameters, self._bytes, self._drawn_from = {}, {}, self.seed

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        name = self.task.name
        self.parameters[name] = sum(p.numel() for p in adapter_parameters(pl_module, name).values())
        self._bytes[name] = adapter_bytes(pl_module, name)

    @override
    def continual_state(self) -> dict[str, Any]:
        return {"parameters": dict(self.parameters), "bytes": dict(self._bytes), "seed": self._drawn_from}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.parameters, self._bytes = dict(state["parameters"]), dict(state["bytes"])
        self._drawn_from = state["seed"]

    @override
    def state_bytes(self) -> int:
        return sum(self._bytes.values())

    @override
    def report(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "init": self.init,
            "unseen": self.unseen,
            "train": self.train_factors,
            "parameters": dict(self.parameters),
            "bytes": dict(self._bytes),
            "sentences": [
                f"{type(self).__name__}, {name}: an adapter of {count:,} parameters, {self._bytes[name] / 1e6:.3g} MB"
                for name, count in self.parameters.items()
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need != "learn":
            return None
        rank = "a higher rank" if self.rank is None else f"a higher rank, {self.rank} now"
        return f"{rank}, in {type(self).__name__}(rank=…)" + (", or init='previous'" if self.init == "fresh" else "")
