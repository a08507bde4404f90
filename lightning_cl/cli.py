"""The command line: ``lightning-cl fit|validate|test|predict``, on LightningCLI."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from typing_extensions import override

# Imported for their names: `--trainer.callbacks+=EWC` finds classes that are loaded.
from lightning_cl import callbacks, data, models
from lightning_cl.callbacks import TaskProgress
from lightning_cl.cli_help import HelpFormatter, HelpfulParser
from lightning_cl.data import TaskDataModule
from lightning_cl.evaluation.tasks import evaluate_tasks
from lightning_cl.sequence import fit_tasks, run_folder

__all__ = ["ContinualCLI", "callbacks", "data", "main", "models"]

_DESCRIPTION = """Continual learning for language models: trains a model on one task after another and shows what it
forgot.

  lightning-cl fit --config configs/quickstart.yaml
  lightning-cl fit --config configs/quickstart.yaml --config configs/methods/ewc_replay.yaml
  lightning-cl fit --config configs/quickstart.yaml --ckpt_path last     go on where a run was stopped
  lightning-cl fit --config configs/quickstart.yaml --print_config       all settings, none hidden
  lightning-cl fit --help                                                all arguments
"""

_SUBCOMMANDS = {
    "fit": "Trains the model on the tasks of the data, one after another. max_epochs and max_steps are per task.",
    "validate": "Shows the validation metrics of each task.",
    "test": "Shows the test metrics of each task that has test data.",
    "predict": "Runs the model's predict_step.",
}


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` goes through a sequence of tasks.

    The subcommands call :func:`~lightning_cl.fit_tasks` and evaluate task by task; everything else is Lightning's:
    several ``--config`` files, later ones winning, ``callbacks+:`` to add to a list, ``--print_config``.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        HelpfulParser.arguments = sys.argv[1:] if args is None else args
        super().__init__(
            model_class=L.LightningModule,
            datamodule_class=TaskDataModule,
            subclass_mode_model=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            # An optimizer that the command line builds once would carry its momentum from task to task; models get a
            # callable instead.
            auto_configure_optimizers=False,
            parser_class=HelpfulParser,
            parser_kwargs={
                "parser_mode": "omegaconf",
                "prog": "lightning-cl",
                "description": _DESCRIPTION,
                "formatter_class": HelpFormatter,
            }
            | {
                name: {"parser_mode": "omegaconf", "prog": f"lightning-cl {name}", "description": text}
                for name, text in _SUBCOMMANDS.items()
            },
            args=args,
        )

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        for action in parser._actions:
            for choice in getattr(action, "_choices_actions", ()):
                choice.help = _SUBCOMMANDS.get(choice.dest, choice.help)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning lets hyper-parameters from the checkpoint win over the command line, silently.
        return

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
        if bars and type(bars[0]).__module__.startswith("lightning."):
            trainer.callbacks[trainer.callbacks.index(bars[0])] = TaskProgress()  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: L.LightningModule, datamodule: TaskDataModule, ckpt_path: str | None = None, **_: Any) -> None:
        """All tasks, one after another; the trained model as a Hugging Face folder at the end."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                # Before the first evaluation, which runs without loggers and so without a run folder.
                callback.setup(self.trainer, model, "fit")
        fit_tasks(self.trainer, model, datamodule, ckpt_path)
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and isinstance(model, models.CausalLM):  # type: ignore[attr-defined]
            model.save_pretrained(folder / "model")
            print(f"  {folder / 'model'}: the model, for AutoModelForCausalLM.from_pretrained\n")

    def validate(
        self, model: L.LightningModule, datamodule: TaskDataModule, ckpt_path: str | None = None, **_: Any
    ) -> None:
        """The validation metrics of each task."""
        evaluate_tasks(self.trainer, model, datamodule, "validate", ckpt_path)

    def test(
        self, model: L.LightningModule, datamodule: TaskDataModule, ckpt_path: str | None = None, **_: Any
    ) -> None:
        """The test metrics of each task that has test data."""
        evaluate_tasks(self.trainer, model, datamodule, "test", ckpt_path)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-cl``.

    Args:
        args: command line arguments; default: those of the process.
    """
    # Denormal numbers, which Adam's moments are full of, cost up to half of the time on a CPU.
    torch.set_flush_denormal(True)
    _quiet()
    try:
        ContinualCLI(args)
    except Exception as error:
        ours = _ours(error)
        if ours is None:
            raise
        print(f"lightning-cl: error: {ours}", file=sys.stderr)
        sys.exit(1)


def _quiet() -> None:
    """Leaves out what Lightning says that is no news, or wrong, in a sequence of tasks."""
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # our own config.yaml is in it
    warnings.filterwarnings("ignore", message=".*isinstance.treespec")
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a folder per task
    noise = ("💡 Tip", "`Trainer.fit` stopped: `max_steps")  # the loop counts the steps of all tasks
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith(noise))


def _ours(error: BaseException | None) -> BaseException | None:
    """The error of the chain that this library raised itself: its message says it all, a traceback would hide it."""
    package = str(Path(__file__).parent) + os.sep
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(package) and (frames[-1].line or "").startswith("raise "):
            return error
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
