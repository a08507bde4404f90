"""Progressive networks: a column of blocks for each task, which reads all earlier ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_cl.arguments import check_choice, check_integer
from lightning_cl.core.method import ContinualCallback
from lightning_cl.core.questions import Need, Trait
from lightning_cl.models.block_lists import decoder_blocks, decoder_config
from lightning_cl.models.decoder_columns import (
    add_column,
    column_parameters,
    columns_of,
    drop_columns,
    use_column,
    using_column,
)
from lightning_cl.models.expansion import find_language_model
from lightning_cl.tasks import TaskPosition


class ProgressiveNetwork(ContinualCallback):
    """Training of a new column of decoder blocks for each task (Rusu et al. 2016, arXiv:1606.04671, eq. 2).

    ::

        h_k ← f_k(h_k) + Σ_{j<k} U_j relu(α_j V_j h_j)

    Column 0 is the model as it came, column k that of the k-th task. ``f_k`` is a block, and ``h_j`` the residual
    stream of column j after the block of the same depth. Earlier columns are frozen, and so are embeddings, final norm
    and head, which all columns share. ``U`` starts at 0, so that a new column starts from its initialisation, to the
    bit. Outputs of earlier tasks stay the same to the last bit.

    It is here for small models and for teaching. Its cost grows with the tasks: see below, and the message that is
    printed before training. :class:`~lightning_cl.ProgressiveAdapters` is the affordable form. Columns cannot be merged
    into one model, and generation has no key-value cache, since each column would need its own.

    An evaluation of a task uses its column; a task without one gets the model as it came. The module is a
    :class:`~lightning_cl.CausalLM` without LoRA, or any module that contains one causal language model of
    ``transformers``. A ``CausalLM`` from disk leaves the frozen base out of its checkpoints.

    Memory: for task k all blocks once more, and ``k · blocks · (2 · width · hidden size + 1)`` parameters, so in total
    quadratic in the tasks. Compute: task k runs k + 1 columns, in training and in inference.

    Args:
        width: rows of ``V``, the width of the bottlenecks.
        init: of a new column's blocks: copies of the model's (``base``), or ``random``. The latter learns worse from a
            pretrained model.
        seed: of the random numbers; None: that of the run's random state.

    Attributes:
        parameters: task name to the number of parameters of its column.

    Raises:
        ValueError: if an argument is out of its range; before training, if the model cannot have columns: adapters,
            gradient checkpointing, blocks of another kind.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import ProgressiveNetwork
        >>> method = ProgressiveNetwork(width=8)
        >>> trainer = L.Trainer(callbacks=[method], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> method.report()["width"]
        8
    """

    owns = "the trainable parameters"
    takes_away: Mapping[Trait, str] = MappingProxyType(
        {
            "shared parameters": "each task trains a column of its own, and no later task changes it; nothing is left"
            " to hold. Leave one of the two out",
            "earlier outputs": "an earlier task's outputs come from its own column, which no later task changes; there"
            " is nothing to hold. Leave one of the two out",
            "earlier samples": "samples of earlier tasks would train the new task's column, and theirs are frozen."
            " Leave one of the two out",
        }
    )

    def __init__(self, width: int = 16, init: Literal["base", "random"] = "base", seed: int | None = None) -> None:
        super().__init__()
        self.width = check_integer("width", width, 1)
        self.init: Literal["base", "random"] = check_choice("init", init, ("base", "random"))  # type: ignore[assignment]
        if seed is not None:
            check_integer("seed", seed)
        self.seed = self._drawn_from = seed
        self.parameters: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self._told = False

    @override
    def on_sequence_start(self) -> None:
        self.parameters, self._bytes, self._drawn_from, self._told = {}, {}, self.seed, False

    # ------------------------------------------------------------------ structure

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Now: the checksum is of the weights as they are loaded, before a Trainer's precision changes them.
        leave_base_out = getattr(pl_module, "leave_base_out", None)
        if callable(leave_base_out):
            leave_base_out()

    @override
    def build(self, trainer: L.Trainer, pl_module: L.LightningModule, tasks: Sequence[str]) -> None:
        model = find_language_model(pl_module)
        if self._drawn_from is None:
            self._drawn_from = torch.initial_seed()
        there = columns_of(model)
        if there != list(tasks)[: len(there)]:
            if not self.run.loading:
                raise MisconfigurationException(
                    f"{type(self).__name__}: the module has columns of {there} already, and this run trains"
                    f" {list(tasks)}; start with a new module, or resume with ckpt_path"
                )
            drop_columns(model, len(tasks) if there[: len(tasks)] == list(tasks) else 0)
        if not self._told and tasks and not self.run.loading:
            self._told = True
            self._tell_cost(model, max(len(self.run.names), len(tasks)))
        for task in tasks:
            add_column(model, task, self.width, self.init, self._drawn_from)

    def _tell_cost(self, model: Any, tasks: int) -> None:
        """Tells before training what all tasks will cost."""
        blocks = decoder_blocks(model)
        whole = sum(p.numel() for p in model.parameters())
        ours = sum(p.numel() for name, p in blocks.named_parameters() if ".task_" not in f".{name}")
        lateral = len(blocks) * (2 * self.width * int(decoder_config(model).hidden_size) + 1)
        total = tasks * ours + tasks * (tasks + 1) // 2 * lateral
        rank_zero_info(
            f"{type(self).__name__}: {tasks} task{'s' if tasks > 1 else ''} add {total:,} parameters to the model's"
            f" {whole:,} ({(whole + total) / whole:.1f} times its size); the last task runs {tasks + 1} columns of"
            " blocks, in training and in inference"
        )

    @override
    def choose_trainable(self, pl_module: L.LightningModule, task: TaskPosition) -> None:
        model = find_language_model(pl_module)
        pl_module.requires_grad_(False)
        for parameter in column_parameters(model, task.name).values():
            parameter.requires_grad_(True)
        use_column(model, task.name)

    # ------------------------------------------------------------------ the model is asked

    @override
    def deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, task: str | None
    ) -> AbstractContextManager[None]:
        """Returns a context in which the module computes with the column of a task.

        Args:
            trainer: the Trainer.
            pl_module: its module.
            task: the task's name; a task without a column gets the model as it came, None the newest column.
        """
        model = find_language_model(pl_module)
        names = columns_of(model)
        if task is None and names:
            task = names[-1]
        return using_column(model, task if task in names else None)

    def use_task(self, pl_module: L.LightningModule, task: str | None) -> None:
        """Lets the module compute with the column of a task from now on; None: the model as it came.

        Raises:
            ValueError: if the task has no column.
        """
        use_column(find_language_model(pl_module), task)

    # ------------------------------------------------------------------ state and report

    @override
    def on_task_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.task is not None
        ours = column_parameters(find_language_model(pl_module), self.task.name).values()
        self.parameters[self.task.name] = sum(p.numel() for p in ours)
        self._bytes[self.task.name] = sum(p.numel() * p.element_size() for p in ours)

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
            "width": self.width,
            "init": self.init,
            "parameters": dict(self.parameters),
            "bytes": dict(self._bytes),
            "sentences": [
                f"{type(self).__name__}, {name}: a column of {count:,} parameters, {self._bytes[name] / 1e6:.3g} MB;"
                f" asked about this task, the model runs {k + 2} columns"
                for k, (name, count) in enumerate(self.parameters.items())
            ],
        }

    @override
    def advice(self, need: Need) -> str | None:
        if need != "learn" or self.init == "base":
            return None
        return f"{type(self).__name__}(init='base')"
