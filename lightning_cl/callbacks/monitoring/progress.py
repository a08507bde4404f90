"""Progress over the whole run: a bar in a terminal, or a line at regular intervals in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_cl.core.loops import expected_steps, steps_of_current_task
from lightning_cl.core.run_state import RunState
from lightning_cl.random_state import untouched_random_state

_FIRST = 10.0  # seconds to the first line, which soon shows that the run has started


class TaskProgress(TQDMProgressBar):
    """A bar over the steps of all tasks, ``Task 2/3 'python' · epoch 0``, with the run's remaining time.

    Without a terminal (a log file, a batch system), a line at regular intervals replaces the bar: the time of day,
    task, step, the module's values for bars, tokens per second, and the remaining time. In a preflight there are no
    lines. Work of callbacks between tasks (Fisher passes) has its own bars, and is not in the remaining time.

    Args:
        refresh_rate: number of batches between two updates of the bar; 0 switches bar and lines off.
        every: seconds between two lines. The first line comes after at most 10 seconds.

    Raises:
        ValueError: if `every` is negative or not finite.

    Example:
        >>> import lightning as L
        >>> from lightning_cl import TaskProgress
        >>> progress = TaskProgress(every=30.0)
        >>> trainer = L.Trainer(callbacks=[progress], accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> progress.every
        30.0
    """

    def __init__(self, refresh_rate: int = 10, every: float = 60.0) -> None:
        super().__init__(refresh_rate=refresh_rate)
        if not (math.isfinite(every) and every >= 0):
            raise ValueError(f"every={every!r}: expected seconds, at least 0")
        self.every = every
        self.run = RunState()  # the coordinator replaces it by the run's state
        self._index = -1  # index of the task that was begun last
        self._base = 0  # the Trainer's steps when the run began
        self._begun = 0.0
        self._of_task: int | None = None
        self._later: list[int | None] = []
        self._fit_begun, self._fit_step = 0.0, 0
        self._tokens: float | Tensor = 0.0
        self._last: tuple[float, bool] = (0.0, False)  # time of the last line, and True if there was one

    @property
    @override
    def is_disabled(self) -> bool:
        """True if no bar is drawn; without a terminal, lines are printed instead."""
        return super().is_disabled or not is_terminal()

    # ------------------------------------------------------------------ what is to come

    @override
    def on_train_start(self, *arguments: Any) -> None:
        super().on_train_start(*arguments)
        self._fit_begun = 0.0

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self._fit_begun:
            self._begin_fit(trainer)
        bar = self.train_progress_bar
        bar.total = self._total()
        bar.start_t = self._begun if hasattr(bar, "start_t") else None
        bar.leave = self.run.position.index + 1 == self.run.position.count
        bar.n = trainer.global_step - self._base
        bar.set_description(f"{self.run.position.title} · epoch {trainer.current_epoch}")

    def _begin_fit(self, trainer: L.Trainer) -> None:
        position, now = self.run.position, time.time()
        if not self._begun or position.index <= self._index or not self.run.driven:  # another run
            self._base, self._begun, self._last = trainer.global_step, now, (now, False)
        self._index = position.index
        self._fit_begun, self._fit_step, self._tokens = now, trainer.global_step, 0.0
        self._of_task = steps_of_current_task(trainer, self.run.limits)
        self._later = list(_steps_of_later_tasks(trainer, self.run))

    def _total(self) -> int | None:
        """Returns the steps of the run since it began here; None if a task's steps are not known."""
        to_come = [self._of_task, *self._later]
        known = [count for count in to_come if count is not None]
        if len(known) < len(to_come):
            return None
        return self.run.first_step - self._base + sum(known)

    # ------------------------------------------------------------------ what is shown

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens = self._tokens + _tokens(batch) * trainer.world_size
        if not self.is_disabled:
            if self._should_update(batch_idx + 1, _finite(self.total_train_batches) or -1):
                bar = self.train_progress_bar
                bar.n = trainer.global_step - self._base
                bar.set_postfix(self.get_metrics(trainer, pl_module))
        elif self.is_enabled and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            now = time.time()
            last, spoken = self._last
            if now - last >= (self.every if spoken else min(self.every, _FIRST)):
                self._last = now, True
                rank_zero_info(self._line(trainer, pl_module, now))

    def _line(self, trainer: L.Trainer, pl_module: L.LightningModule, now: float) -> str:
        done, trained = trainer.global_step - self.run.first_step, trainer.global_step - self._fit_step
        seconds = max(now - self._fit_begun, 1e-9)
        of = f" of {self._of_task:,}" if self._of_task is not None else ""
        parts = [f"{time.strftime('%H:%M:%S', time.localtime(now))} {self.run.position.title}", f"step {done:,}{of}"]
        metrics = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        parts += [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
        ]
        tokens = float(self._tokens)
        parts += [f"{tokens / seconds:,.0f} tokens a second"] if tokens else []
        if trained and self._of_task is not None:
            left = max(self._of_task - done, 0)
            parts.append(f"{_duration(left * seconds / trained)} left of the task")
            total = self._total()
            if self._later and total is not None:
                left = total - (trainer.global_step - self._base)
                parts.append(f"about {_duration(left * seconds / trained)} of the run")
        return ", ".join(parts)

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Returns the module's values for bars; in a preflight nothing, since one batch gives no result."""
        return {} if trainer.fast_dev_run else super().get_metrics(trainer, pl_module)  # type: ignore[attr-defined]

    @override
    def init_sanity_tqdm(self) -> Tqdm:
        bar = super().init_sanity_tqdm()
        bar.set_description("Checking that validation works")
        return bar


def is_terminal() -> bool:
    """Returns True if output goes to a terminal or a notebook, where a bar can be redrawn."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    # An import of ipykernel is not enough: only a notebook's shell has a kernel.
    return hasattr(shell, "kernel") or bool(sys.stdout is not None and sys.stdout.isatty())


def _steps_of_later_tasks(trainer: L.Trainer, run: RunState) -> list[int | None]:
    data, limits = run.data, run.run_limits
    if data is None or limits is None:
        return []
    found: list[int | None] = []
    for task in data.trained_tasks[run.position.index + 1 :]:
        epochs, steps = limits.of_task(task)
        batches = None
        if epochs is not None and epochs > 0 and not isinstance(task.train, L.LightningDataModule):
            with untouched_random_state():
                loader = data.train_loader(task)
            batches = len(loader) if hasattr(loader, "__len__") else None
            limit = trainer.limit_train_batches
            if batches is not None:
                batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        found.append(expected_steps(trainer, epochs, steps, batches))
    return found


def _finite(count: float | None) -> int | None:
    return int(count) if count is not None and math.isfinite(count) else None


def _tokens(batch: Any) -> float | Tensor:
    """Counts a batch's tokens, without padding if there is a mask; on the device, so that the CPU does not wait."""
    if not isinstance(batch, Mapping):
        return 0.0
    if isinstance(batch.get("attention_mask"), Tensor):
        result: float | Tensor = batch["attention_mask"].sum()
        return result
    ids = batch.get("input_ids")
    return float(ids.numel()) if isinstance(ids, Tensor) else 0.0


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
