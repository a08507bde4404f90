"""An adapter for each task that also uses the earlier ones: the affordable form of a progressive network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
from typing_extensions import override

from lightning_cl.callbacks.architecture.task_adapters import TaskAdapters
from lightning_cl.core.questions import Need
from lightning_cl.models.adapter_gates import add_gates, gates_of, remove_gates
from lightning_cl.models.adapters import adapter_of, find_peft_model, list_adapters


class ProgressiveAdapters(TaskAdapters):
    """Training of a LoRA adapter for each task, which learns how much of each earlier one to use.

    ::

        y = W x + s · B_t A_t x + Σ_{i<t} g_{t,i,l} · s · B_i A_i x

    Earlier adapters are frozen. In each layer l a task has one scalar gate for each task before it. The gates start at
    0, so that a task starts from the base, to the bit, and they are trained with ``A_t`` and ``B_t``. It is the linear
    form of the lateral connections of progressive networks (Rusu et al. 2016, arXiv:1606.04671, eq. 2). Outputs of
    earlier tasks stay the same to the last bit, as with :class:`~lightning_cl.TaskAdapters`, whose description of
    modules, evaluation and frozen parts holds here too.

    Because it is linear, a task's adapter and its gates are one adapter of rank t · r, exactly.
    ``CausalLM.save_pretrained(folder, task=…)`` saves that one, or merges it. The gain over independent adapters is
    small where tasks have little in common.

    Memory: that of ``TaskAdapters``, and t · (number of adapted layers) gates for task t. Compute: task t runs t + 1
    adapters, in training and in inference until they are folded.

    Args:
        rank: of each adapter; None: that of the template.
        unseen: for a task without an adapter: ``latest``, the adapter of the last trained task, or ``base``, none.
        seed: of the random factors, which depend on the task's name too; None: that of the run's random state.

    Attributes:
        parameters: task name to the number of its adapter's parameters, with its gates.
        gate_size: task name to the mean absolute value of its gates when it ended.

    Raises:
        ValueError: if an argument is out of its range; before training, if the adapters are no plain LoRA of linear
            layers.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import ProgressiveAdapters
        >>> method = ProgressiveAdapters(rank=8)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["gate_size"]
        {}
    """

    def __init__(
        self, rank: int | None = None, unseen: Literal["latest", "base"] = "latest", seed: int | None = None
    ) -> None:
        super().__init__(rank=rank, unseen=unseen, seed=seed)
        self.gate_size: dict[str, float] = {}

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        others = [task for task in list_adapters(pl_module) if task not in tasks]
        if others and tasks and self.run.loading:
            for task in others:
                remove_gates(find_peft_model(pl_module), adapter_of(pl_module, task))
        super().build(trainer, pl_module, tasks)
        for task in tasks:
            add_gates(find_peft_model(pl_module), adapter_of(pl_module, task))

    @override
    def on_sequence_start(self) -> None:
        super().on_sequence_start()
        self.gate_size = {}

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_task_end(trainer, pl_module)
        assert self.task is not None
        gates = gates_of(find_peft_model(pl_module), adapter_of(pl_module, self.task.name))
        if gates:
            self.gate_size[self.task.name] = sum(float(g.abs().mean()) for g in gates.values()) / len(gates)

    @override
    def continual_state(self) -> dict[str, Any]:
        return super().continual_state() | {"gate_size": dict(self.gate_size)}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        super().load_continual_state(state)
        self.gate_size = dict(state["gate_size"])

    @override
    def report(self) -> dict[str, Any]:
        report = super().report()
        sentences = [
            f"{type(self).__name__}, {name}: its gates to earlier adapters are {size:.3g} on average (0: not used)"
            for name, size in self.gate_size.items()
        ]
        return report | {"gate_size": dict(self.gate_size), "sentences": report["sentences"] + sentences}

    @override
    def advice(self, need: Need) -> str | None:
        if need != "learn":
            return None
        rank = "a higher rank" if self.rank is None else f"a higher rank, {self.rank} now"
        return f"{rank}, in {type(self).__name__}(rank=…)"
