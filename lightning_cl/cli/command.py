"""The command line: ``lightning-cl fit|validate|test|predict|preview|compare|export|runs``, on LightningCLI."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

# Imported for their names: `--trainer.callbacks+=EWC` finds classes that are loaded.
from lightning_cl import callbacks, data, models
from lightning_cl.callbacks import TaskProgress
from lightning_cl.cli.compare import run_compare
from lightning_cl.cli.earlier_run import EarlierRun, expand_run
from lightning_cl.cli.export import Loaded, run_export
from lightning_cl.cli.first_help import first_help, wants_all
from lightning_cl.cli.gate import run_gate
from lightning_cl.cli.messages import own_error, quiet
from lightning_cl.cli.overlays import merged_overlays
from lightning_cl.cli.parser import EarlyOption, HelpFormatter, HelpfulParser, take_option
from lightning_cl.cli.processes import asked_trial, tell_folder
from lightning_cl.cli.run_list import run_list
from lightning_cl.cli.seeds import PERMUTE, run_seeds
from lightning_cl.cli.strengths import keep_first, run_search, set_strength
from lightning_cl.cli.task_order import set_order
from lightning_cl.cli.threads import SensibleThreads
from lightning_cl.cli.yaml_files import check_files
from lightning_cl.core.loops import plan_limits
from lightning_cl.data import TaskDataModule
from lightning_cl.data.preview import printable, wants_colour
from lightning_cl.export.callback import Export
from lightning_cl.lightning_internals import has_no_version_yet
from lightning_cl.models.decoder_columns import has_columns
from lightning_cl.sequence.evaluate import evaluate_tasks
from lightning_cl.sequence.fit import fit_tasks, run_folder
from lightning_cl.sequence.predict import predict_tasks
from lightning_cl.sequence.run_files import first_missing, forget_start
from lightning_cl.stopping import INTERRUPTED

__all__ = ["ContinualCLI", "Export", "callbacks", "data", "main", "models"]

_DESCRIPTION = """Continual learning for language models: trains a model on one task after another and shows what it
forgot.

  lightning-cl fit --config configs/quickstart.yaml
  lightning-cl fit --config configs/quickstart.yaml --config configs/methods/ewc_replay.yaml
  lightning-cl fit --config configs/quickstart.yaml --ckpt_path last     resume where a run was stopped
  lightning-cl fit --run runs/quickstart/version_0                       the same for one run, with its settings
  lightning-cl fit --run runs/quickstart/version_0 --add mails=data/mails.jsonl       one more task after a run's
  lightning-cl fit --config configs/quickstart.yaml --seeds 3            mean and 95 % interval over three seeds
  lightning-cl fit --config configs/quickstart.yaml --config configs/methods/ewc.yaml --strengths 0.001,0.01,0.1
  lightning-cl compare --config configs/quickstart.yaml --methods configs/methods/replay.yaml,configs/methods/ewc.yaml
  lightning-cl preview --config configs/quickstart.yaml                  a sample of each task, with what bears loss
  lightning-cl fit --config configs/quickstart.yaml --print_config       all settings, none hidden
  lightning-cl runs runs                                                 what is in each run, and which others it needs
  lightning-cl gate --run RUN --budget 0.9                               was too much forgotten? exit code 0, 2 or 3
  lightning-cl export RUN --to gguf,ollama --type q8_0                   for llama.cpp and Ollama; also mlx and hf
  lightning-cl fit --help                                                what is set first; --help all: everything
"""

_SUBCOMMANDS = {
    "fit": "Trains the model on the tasks of the data, one after another. max_epochs and max_steps are per task.",
    "validate": "Shows the validation metrics of each task.",
    "test": "Shows the test metrics of each task that has test data.",
    "predict": "Shows what the model answers to each task's prompts; all answers go to predictions.jsonl.",
}

_PREVIEW = "Shows one sample of each task as text, with what bears loss marked, and what was left out. Loads no model."
_RUN = "Folder of an earlier run: its saved configuration, which the other options override, and its {}. {}"
_TRUST = (
    "With --run, without being asked: import what the run's configuration names from other packages than lightning_cl,"
    " torch, lightning and transformers, and run a model's own Python files where it says trust_remote_code."
)
_EARLY_OPTIONS = {
    "--run": (
        "RUN",
        _RUN.format("last checkpoint; with --add, the one after its last task", "The new run has its own folder."),
    ),
    "--add": (
        "NAME=PATH",
        "With --run: a new task after those of the run, as in mails=data/mails.jsonl. May be repeated.",
    ),
    "--seeds": (
        "N|S,S,…",
        "Runs the command for the seeds 0 to N - 1, or for those given, and reports mean and confidence interval over"
        " them. Sets --seed_everything and --data.seed of each run.",
    ),
    PERMUTE: (None, "With --seeds: each seed has an order of the tasks of its own, which is printed first."),
    "--strengths": (
        "S,S,…|CALLBACK=S,S,…",
        "Tries each strength of a callback on the first tasks alone, then trains all tasks with the best.",
    ),
    "--first": ("N", "With --strengths: on how many tasks they are tried; default: 2."),
    "--against": (
        "SEEDS_JSON",
        "With --seeds: what another method's --seeds wrote; the differences are taken seed by seed.",
    ),
}


_KEEP = (
    "all, last, none or a number: of how many tasks, the latest, the boundary checkpoint stays, and with it what"
    " ModelCheckpoint wrote inside the task."
)
_LOAD_BEST = "Each task ends with the weights of its best checkpoint; needs a ModelCheckpoint with a monitor."


class ContinualCLI(LightningCLI):
    """LightningCLI whose ``fit`` goes through a sequence of tasks.

    The subcommands call :func:`~lightning_cl.fit_tasks` and evaluate task by task; everything else is Lightning's:
    several ``--config`` files, later ones winning, ``callbacks+:`` to add to a list, ``--print_config``.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        HelpfulParser.arguments = sys.argv[1:] if args is None else args
        self.earlier: EarlierRun | None = None
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

        # Not one of the Trainer's methods, and nothing but the data is made for it.
        preview = self.init_parser(parser_mode="omegaconf", prog="lightning-cl preview", description=_PREVIEW)
        self._add_arguments(preview)
        self._subcommand_parsers["preview"], self._subcommand_method_arguments["preview"] = preview, []
        subcommands = next(action for action in parser._actions if hasattr(action, "add_subcommand"))
        subcommands.add_subcommand("preview", preview, help=_PREVIEW)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        options = (
            _EARLY_OPTIONS
            if subcommand == "fit"
            else {"--run": ("RUN", _RUN.format("checkpoint of its last task", "Predictions are written there."))}
        )
        for option, (metavar, text) in options.items():
            form: dict[str, Any] = {"metavar": metavar} if metavar is not None else {"nargs": 0}
            parser.add_argument(option, action=EarlyOption, help=text, **form)
        # The other subcommands read them in the configuration of a run, and have no use for them.
        best, keep = (_LOAD_BEST, _KEEP) if subcommand == "fit" else (argparse.SUPPRESS, argparse.SUPPRESS)
        parser.add_argument("--load_best", type=bool, default=False, help=best)
        parser.add_argument("--keep_checkpoints", type=int | str, default="all", help=keep)
        parser.add_argument("--trust", action=EarlyOption, nargs=0, help=_TRUST)
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_files(HelpfulParser.arguments)
        self._show_first_help()
        if "preview" in HelpfulParser.arguments[:1] and (asked := take_option(HelpfulParser.arguments, "--run RUN")[0]):
            raise ValueError(f"--run: a preview needs no run, but its settings: --config {asked[0]}/config.yaml")
        arguments, self.earlier = expand_run(HelpfulParser.arguments, tuple(_SUBCOMMANDS))
        with tempfile.TemporaryDirectory() as folder:
            self.config = parser.parse_args(merged_overlays(arguments, Path(folder)))
        trial = asked_trial()
        if trial is not None and "strength" in trial:
            set_strength(self.config.fit.trainer.callbacks, trial)
        if trial is not None and "order" in trial:
            set_order(self.config.fit.data, trial["order"])

    def _show_first_help(self) -> None:
        """Ends with the short help of a subcommand where it is asked for; ``--help all`` is left to the parser."""
        name, *rest = HelpfulParser.arguments or [""]
        if name not in _SUBCOMMANDS or not {"--help", "-h"} & set(rest):
            return
        if wants_all(rest):
            HelpfulParser.arguments = [name, "--help"]
            return
        sys.stdout.write(first_help(self._parser(name), name, _SUBCOMMANDS[name]))
        sys.exit(0)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning lets hyper-parameters from the checkpoint win over the command line, silently.
        return

    @override
    def instantiate_classes(self) -> None:
        if self.subcommand != "preview":
            super().instantiate_classes()
            return
        asked = {key: value for key, value in self.config.preview.items() if key.split(".")[0] == "data"}
        self.datamodule = self._parser("preview").instantiate_classes(Namespace(asked)).data

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "preview":
            super()._run_subcommand(subcommand)
            return
        print(printable(self.datamodule.preview(colour=wants_colour(sys.stdout)), sys.stdout))

    @override
    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if self.earlier is not None and self.subcommand != "fit":
            # An evaluation of an earlier run is no run: it gets no folder.
            trainer.loggers = []
            trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SaveConfigCallback)]  # type: ignore[attr-defined]
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            given = self._get(self.config_init, "trainer")
            plan_limits(trainer, given["max_epochs"], given["max_steps"])
        trainer.callbacks.append(SensibleThreads())  # type: ignore[attr-defined]
        bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
        if bars and type(bars[0]).__module__.startswith("lightning."):
            trainer.callbacks[trainer.callbacks.index(bars[0])] = TaskProgress()  # type: ignore[attr-defined]
        return trainer

    def fit(self, model: L.LightningModule, datamodule: TaskDataModule, ckpt_path: str | None = None, **_: Any) -> None:
        """All tasks, one after another; the trained model as a Hugging Face folder at the end."""
        trial = asked_trial()
        keep_first(datamodule, trial.get("first") if trial is not None else None)
        own = _has_own_folder(self.trainer)
        folder = run_folder(self.trainer)
        if self.earlier is not None:
            self.earlier.check(folder, [task.name for task in datamodule.tasks])
            new = f"; new: {', '.join(self.earlier.added)}" if self.earlier.added else ""
            rank_zero_info(f"Goes on from {self.earlier.checkpoint}{new}")
        if self.trainer.is_global_zero:
            tell_folder(folder, own, ckpt_path)
        made = first_missing(folder)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                # Before the first evaluation, which runs without loggers and so without a run folder.
                callback.setup(self.trainer, model, "fit")
                # On all ranks: one that came back to it later would wait for the others for ever.
                callback.already_saved = True
        options = {name: self._get(self.config_init, name) for name in ("load_best", "keep_checkpoints")}
        steps = self.trainer.global_step
        try:
            fit_tasks(self.trainer, model, datamodule, ckpt_path, **options)
        except BaseException:
            if made is not None and self.trainer.is_global_zero and self.trainer.global_step == steps:
                forget_start(made, folder)
            raise
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run and isinstance(model, models.CausalLM):  # type: ignore[attr-defined]
            if model.lora is not None and isinstance(model.source, dict):
                return  # an adapter whose base exists nowhere else: the checkpoints have both
            if has_columns(model):
                return  # no single model: the checkpoints have the columns
            model.save_pretrained(folder / "model")
            what, loader = ("model", "transformers.AutoModelForCausalLM")
            if model.lora is not None:
                what, loader = ("adapter", "peft.AutoPeftModelForCausalLM")
            places = sorted(path.parent for path in (folder / "model").glob("*/adapter_config.json"))
            for place in places or [folder / "model"]:  # one adapter for each task, or one for all
                print(f"  {place}: the {what}, for {loader}.from_pretrained")
            print()

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

    def predict(
        self,
        model: L.LightningModule,
        datamodule: TaskDataModule,
        ckpt_path: str | None = None,
        return_predictions: bool | None = None,
        **_: Any,
    ) -> None:
        """The model's answers to each task's prompts."""
        folder = self.earlier.folder if self.earlier is not None else None
        predict_tasks(self.trainer, model, datamodule, ckpt_path, return_predictions, folder)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-cl``.

    Args:
        args: command line arguments; default: those of the process.
    """
    # Denormal numbers, which Adam's moments are full of, cost up to half of the time on a CPU.
    torch.set_flush_denormal(True)
    quiet()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # own classes, as `class_path: my_methods.MyCallback`, next to the configuration
    try:
        arguments = sys.argv[1:] if args is None else args
        code = run_list(arguments)
        if code is None:
            code = run_compare(arguments, settings_of)
        if code is None:
            code = run_gate(arguments)
        if code is None:
            code = run_export(arguments, loaded_run)
        if code is None:
            code = run_search(arguments)
        if code is None:
            code = run_seeds(arguments, settings_of)
        if code is None:
            ContinualCLI(args)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        ours = own_error(error)
        if ours is None:
            raise
        print(f"lightning-cl: error: {ours}", file=sys.stderr)
        sys.exit(1)
    if code:
        sys.exit(code)


class _Made(ContinualCLI):
    """A command whose parts are made, and that does nothing with them."""

    @override
    def validate(
        self, model: L.LightningModule, datamodule: TaskDataModule, ckpt_path: str | None = None, **_: Any
    ) -> None:
        self.parts = Loaded(self.trainer, model, datamodule)


def loaded_run(arguments: Sequence[str]) -> Loaded:
    """Makes Trainer, module and data of a ``validate`` command line, without their weights."""
    return _Made(list(arguments)).parts


def settings_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The settings of a ``fit`` command line as ``--print_config`` shows them; nothing is built.

    Raises:
        SystemExit: if the command line is wrong; the message is on stderr.
    """
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            ContinualCLI([*arguments, "--print_config"])
    except SystemExit as ended:
        if ended.code:
            raise
    result: dict[str, Any] = yaml.safe_load(out.getvalue())
    return result


def _has_own_folder(trainer: L.Trainer) -> bool:
    """Returns True if the logger chooses a folder that no run has yet; to be asked before it has chosen."""
    return isinstance(trainer.logger, (CSVLogger, TensorBoardLogger)) and has_no_version_yet(trainer.logger)
