"""Base of callbacks that ask the model the same questions before training and after every task."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.callbacks.monitoring.boundary_questions import BoundaryQuestions
from lightning_cl.core.checks import refuse_sharded
from lightning_cl.core.deployment import deployed
from lightning_cl.data.module import TaskDataModule
from lightning_cl.evaluation.probe_table import probe_report, probe_sentences
from lightning_cl.passes.passes import forward_context, leaving_no_trace

Row = dict[str, dict[str, list[float]]]
"""For each column the ``values`` of its items, and perhaps their ``margins``."""


class BoundaryProbe(BoundaryQuestions):
    """Measures a language model at the boundaries between tasks, in the view that its user gets, and leaves no trace.

    Subclasses answer :meth:`check` and :meth:`measure`, and set `definition` and `better`.

    Attributes:
        rows: number of trained tasks (0: before training) to what was measured: for each column the ``values`` of its
            items, the same on all ranks (those of rank 0).
        fingerprint: a hash of what was asked; None before the first row.
        seconds: the time that it took.
    """

    definition = ""
    """Of the scores, in words."""

    prefix = "probe"
    """Of the names in loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, Row] = {}
        self.fingerprint: str | None = None
        self.seconds = 0.0

    # ------------------------------------------------------------------ questions to a subclass

    def check(self) -> None:
        """Raises an error, before anything is measured, if something is missing."""

    def measure(self, trainer: L.Trainer, model: Any, tokenizer: Any) -> tuple[Row, str]:
        """Asks a model; returns a row and a hash of what was asked.

        Args:
            trainer: the Trainer.
            model: the ``transformers`` model, in evaluation mode and in the view that is deployed.
            tokenizer: its tokenizer.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ when

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_sharded(trainer, f"{type(self).__name__}: single ranks cannot ask a model with")
        self.check()

    @override
    def on_sequence_start(self) -> None:
        self.rows, self.fingerprint, self.seconds = {}, None, 0.0

    @override
    def known(self) -> Mapping[int, Row]:
        return self.rows

    @override
    def on_task_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.run.data is None:
            name = type(self).__name__
            rank_zero_warn(f"{name} measures between tasks, under lightning_cl.fit_tasks only: this is a plain fit")
        super().on_task_start(trainer, pl_module)

    @override
    def ask(self, trainer: L.Trainer, pl_module: L.LightningModule, data: TaskDataModule, trained: int) -> None:
        name, start = type(self).__name__, time.monotonic()
        model = self.model_of(
            pl_module, data, "is a causal language model of transformers, which it asks; leave it out"
        )
        device = next(model.parameters()).device
        pl_module.to(trainer.strategy.root_device)
        with leaving_no_trace(pl_module), deployed(trainer, pl_module), forward_context(trainer), torch.no_grad():
            row, asked = self.measure(trainer, model, data.tokenizer)
        pl_module.to(device)
        row, asked = trainer.strategy.broadcast((row, asked))
        if self.rows and asked != self.fingerprint:
            rank_zero_warn(
                f"{name}: other questions are asked than in the run before (other items, another chat template or"
                " another version); the earlier rows are left out, since nothing can be compared with them"
            )
            self.rows = {}
        self.rows[trained], self.fingerprint = row, asked
        self.seconds += time.monotonic() - start
        self._log(trainer, trained)

    def _log(self, trainer: L.Trainer, trained: int) -> None:
        table = probe_report({trained: self.rows[trained]}, self.columns)
        named = [
            (f"continual/{self.prefix}", table["rows"][0]),
            (f"continual/{self.prefix}_margin", table["margins"][0]),
        ]
        metrics = {
            f"{place}/{column}": value
            for place, values in named
            for column, value in zip(self.columns, values, strict=True)
            if math.isfinite(value)
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    # ------------------------------------------------------------------ results

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self.rows[max(self.rows)]) if self.rows else []

    def table(self) -> dict[str, Any]:
        """Returns scores, standard errors and changes (:func:`~lightning_cl.evaluation.probe_table.probe_report`)."""
        return probe_report(self.rows, self.columns)

    @override
    def report(self) -> dict[str, Any]:
        if not self.rows:
            return {}
        table = self.table()
        told = {"definition": self.definition, "measured_on": self.fingerprint, "seconds": self.seconds}
        return {"sentences": probe_sentences(table), "probe": {**table, **told}}

    # ------------------------------------------------------------------ state

    @override
    def continual_state(self) -> dict[str, Any]:
        rows = {
            trained: {column: {what: list(values) for what, values in each.items()} for column, each in row.items()}
            for trained, row in self.rows.items()
        }
        return {"rows": rows, "fingerprint": self.fingerprint, "seconds": self.seconds}

    @override
    def load_continual_state(self, state: dict[str, Any]) -> None:
        self.rows = {int(trained): row for trained, row in state["rows"].items()}
        self.fingerprint, self.seconds = state["fingerprint"], state["seconds"]

    @override
    def state_bytes(self) -> int:
        return 8 * sum(len(values) for row in self.rows.values() for each in row.values() for values in each.values())
