"""A progress bar that says which task of how many."""

from __future__ import annotations

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from typing_extensions import override

from lightning_cl.callbacks.coordinator import TaskCoordinator


class TaskProgress(TQDMProgressBar):
    """Lightning's bar with the task in front: ``Task 2/3 'python' · epoch 0``.

    What callbacks do between tasks (Fisher passes) has bars of its own.

    Args:
        refresh_rate: after how many batches the bar is drawn again; 0 switches it off.
    """

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @override
    def on_train_epoch_start(self, trainer, pl_module) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        super().on_train_epoch_start(trainer, pl_module)
        position = TaskCoordinator.of(trainer).position
        self.train_progress_bar.set_description(f"{position.title} · epoch {trainer.current_epoch}")

    @override
    def init_sanity_tqdm(self) -> Tqdm:
        bar = super().init_sanity_tqdm()
        bar.set_description("Checking that validation works")
        return bar
