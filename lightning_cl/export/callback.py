"""Exports at the end of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_cl.arguments import check_integer
from lightning_cl.core.checkpoint_io import run_folder
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.method import ContinualCallback
from lightning_cl.data.module import TaskDataModule
from lightning_cl.export.handover import To, check_formats, check_types, export_model
from lightning_cl.export.view import adapted_tasks, adds_up, check_module, exported_view
from lightning_cl.models.causal_lm import CausalLM
from lightning_cl.random_state import untouched_random_state


class Export(ContinualCallback):
    """Writes the model for other programs after every task, into ``export/<index>-<task>`` in the run's folder.

    Each folder is what :func:`~lightning_cl.export.handover.export_model` writes, with its table of formats and
    losses. Needs :func:`~lightning_cl.fit_tasks` and a :class:`~lightning_cl.CausalLM`. Training stays the same, bit
    for bit. If an export fails, a warning says why and the run is continued, so that nothing learnt is lost.

    Memory and time after each task: those of ``export_model``; nothing for each step. Under DDP the first process
    exports and the others wait, for as long as the process group's timeout lets them. Sharded parameters are refused.

    Args:
        to: the formats, of ``gguf``, ``ollama``, ``mlx``, ``hf``.
        type: of the numbers in the GGUF file, or several types.
        task: with an adapter for each task: ``all`` keeps them apart (default), ``mean`` merges the mean of all. Where
            the model adds them up, it is their sum.
        tokens: of each task that losses are measured on.

    Attributes:
        written: for each task that was exported the folder.

    Raises:
        ValueError: if a format or type is unknown.
        ImportError: if one needs a package that is not installed.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import Export
        >>> trainer = L.Trainer(callbacks=[Export(["hf"])], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    boundary_order = 100  # after the matrix, whose report is in the card
    ends_long = True  # a checkpoint is written before

    def __init__(
        self,
        to: Sequence[To] = ("gguf", "ollama"),
        type: str | Sequence[str] = "q8_0",
        task: str | None = None,
        tokens: int = 512,
    ) -> None:
        super().__init__()
        if "gguf" in check_formats(to):
            check_types(type)
        if task not in (None, "all", "mean"):
            raise ValueError(f"task={task!r}: expected 'all', 'mean' or None")
        check_integer("tokens", tokens, 1)
        self.to, self.type, self.of_adapters, self.tokens = list(to), type, task, tokens
        self.written: dict[str, Path] = {}
        self._asked: tuple[CausalLM, TaskDataModule] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, "Export: one process cannot save")
        check_module(pl_module)

    @override
    def on_sequence_start(self) -> None:
        self.written = {}

    @override
    def at_boundary(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        data: TaskDataModule,
        trained: int,
        ckpt_path: str | None = None,
    ) -> None:
        wanted = trained > 0 and ckpt_path is None and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self._asked = (pl_module, data) if wanted and isinstance(pl_module, CausalLM) else None

    @override
    def after_boundary(self, trainer: L.Trainer, trained: int, final: bool) -> None:
        if self._asked is None:
            return
        module, data = self._asked
        task = data.trained_tasks[trained - 1]
        folder = run_folder(trainer) / "export" / f"{trained - 1}-{task.slug}"  # asked on all ranks
        with untouched_random_state(), exported_view(trainer, module):
            if trainer.is_global_zero:
                self._export(module, data, folder, task.name)
        trainer.strategy.barrier()

    def _export(self, module: CausalLM, data: TaskDataModule, folder: Path, task: str) -> None:
        report = next((m.last_report for m in self.run.methods if getattr(m, "last_report", None) is not None), None)
        apart = adapted_tasks(module) and not adds_up(module)
        wanted = self.of_adapters or "all" if apart else None
        name = f"{folder.parents[2].name}-{task}" if folder.parents[1].name.startswith("version_") else task
        try:
            done = export_model(module, folder, self.to, self.type, wanted, data, report, name=name, tokens=self.tokens)
        except Exception as error:  # the task's checkpoint is written after this
            rank_zero_warn(f"Export: {folder} was not written ({error}); the run is continued")
            return
        self.written[task] = folder
        rank_zero_info(f"{folder}:\n{done}")
