"""``lightning-cl export``: a run's model for llama.cpp, Ollama, MLX and transformers, and what each format costs."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L

from lightning_cl.cli.earlier_run import last_boundary
from lightning_cl.core.checkpoint_io import check_checkpoint, read_checkpoint
from lightning_cl.core.task_files import BEFORE_END
from lightning_cl.data import TaskDataModule
from lightning_cl.export.adapters import INDEX, serving_lines
from lightning_cl.export.formats import Exported
from lightning_cl.export.handover import check_formats, check_types, export_model
from lightning_cl.export.jsonl import write_jsonl
from lightning_cl.export.memory import list_memories, read_index, save_memory
from lightning_cl.export.push import check_repo_id, push_folder
from lightning_cl.export.serving import ollama_name
from lightning_cl.export.view import check_module, exported_view
from lightning_cl.models.adapter_names import task_name
from lightning_cl.tasks import Task

_DESCRIPTION = """Writes a run's model into one folder that can be handed on, reads every file back, and shows the loss
of every task in each format. All other options are those of `validate`, as --data.batch_size 1."""
_EXAMPLE = """
  lightning-cl export runs/quickstart/version_0 --to gguf,ollama --type q8_0
  lightning-cl export runs/quickstart/version_0 --to gguf --type f16,q8_0,q4_k    several types, one table
  lightning-cl export RUN --to gguf,ollama --task all                             adapters: one base, one per task"""


# One batch of validation loads the weights; the last options win.
_ONE_PROCESS = [
    f"--trainer.{option}" for option in ("devices=1", "num_nodes=1", "strategy=auto", "limit_val_batches=1")
]


class Loaded(NamedTuple):
    """A run that was made again, without its weights."""

    trainer: L.Trainer
    module: L.LightningModule
    data: TaskDataModule


Load = Callable[[Sequence[str]], Loaded]


def run_export(arguments: Sequence[str], load: Load) -> int | None:
    """Exports a run's model.

    Args:
        arguments: the command line.
        load: makes the run of a ``validate`` command line again.

    Returns:
        the exit code; None if the command is another one.

    Raises:
        ValueError, FileNotFoundError, RuntimeError, ImportError: if an argument is wrong, a format cannot hold the
            model, a file does not read back, or a package is missing.
    """
    if list(arguments[:1]) != ["export"]:
        return None
    given, rest = _parser().parse_known_args(list(arguments[1:]))
    if rest and not rest[0].startswith("-"):
        raise ValueError(f"export: {rest[0]!r}: expected one run's folder, and options")
    to, types = ([name.strip() for name in names.split(",")] for names in (given.to, given.type))
    if "gguf" in check_formats(to):
        check_types(types)
    if given.push is not None:
        check_repo_id(given.push)
    elif given.public:
        raise ValueError("--public: of the repository that --push names; give both, or neither")
    run: Path = given.run
    last = last_boundary(run)
    stem = given.name or (run.absolute().parent.name if run.name.startswith("version_") else run.absolute().name)
    place = "final" if given.task is None else re.sub(r"[^\w.-]+", "-", given.task)
    folder = given.out or run / "export" / place
    memories = _check_memory(given.memory, last, folder)
    loaded = load(["validate", "--run", str(run), *rest, *_ONE_PROCESS])
    module = check_module(loaded.module)
    checkpoint, task = _checkpoint(run, last, given.task, loaded.data.trained_tasks)
    _load_weights(loaded, checkpoint)
    memory = [_write_memory(checkpoint, name, place, loaded.data.tokenizer) for name, place in memories.items()]
    report = _report(run, checkpoint)
    with exported_view(loaded.trainer, module, given.task):
        done = export_model(
            module,
            folder,
            to,
            types,
            task,
            loaded.data,
            report,
            name=stem,
            system=given.system,
            num_ctx=given.num_ctx,
            tokens=given.tokens,
        )
    sys.stdout.write(f"\n{folder}\n{done}\n\n{_next_lines(done, stem)}\n{''.join(memory)}")
    if given.push is not None:
        url = push_folder(folder, given.push, private=not given.public)
        sys.stdout.write(f"\n{url}: {'public' if given.public else 'private'}\n")
    return 0


def _check_memory(folder: Path | None, checkpoint: Path, out: Path) -> dict[str, Path]:
    """For each callback with a buffer the folder for its samples; several have a folder each in the one given.

    Raises:
        ValueError: if the run keeps no samples, or the folder is in that of the model.
    """
    if folder is None:
        return {}
    names = list_memories(checkpoint)
    if not names:
        raise ValueError(f"--memory={folder}: no callback of the run keeps samples")
    if out.absolute() in (folder.absolute(), *folder.absolute().parents):
        raise ValueError(f"--memory={folder}: is in the model's folder {out}, which is handed on; give another")
    return {name: folder / name if len(names) > 1 else folder for name in names}


def _write_memory(checkpoint: Path, callback: str, folder: Path, tokenizer: Any) -> str:
    """Writes what a buffer holds, for programs that train on, and says what is in it."""
    save_memory(checkpoint, folder, callback)
    count = read_index(folder)["samples"]
    written = write_jsonl(folder, tokenizer, folder)
    lines = [
        f"\n{folder}: {count} samples of the buffer of {callback}, which are training data, word for word.",
        f"  train.jsonl has {written.train} of them and valid.jsonl {written.valid}, as texts:"
        f" mlx_lm.lora --data {shlex.quote(str(folder))}",
    ]
    if written.changed or written.unmasked:
        lines.append(
            f"  As texts, {written.changed} samples are read as other tokens, and {written.unmasked} tokens that bore"
            " no loss (prompts) are learnt; lightning_cl.export.mlx_loop reads them as they were."
        )
    return "\n".join(lines) + "\n"


def _next_lines(done: Exported, stem: str) -> str:
    """The command lines that use what was written."""
    folder = done.folder
    file = next((folder / each.files[0] for each in done.formats if each.name.startswith("gguf")), None)
    lines = []
    if (folder / INDEX).is_file():
        lines = [serving_lines(folder, file)]
    elif file is not None:
        lines = [f"llama-server -m {shlex.quote(str(file))}"]
    if (folder / "Modelfile").is_file():
        name, place = ollama_name(stem), shlex.quote(str(folder / "Modelfile"))
        lines.append(f"ollama create {name} -f {place} && ollama run {name}")
    if (folder / "mlx").is_dir():
        place = shlex.quote(str(folder / "mlx"))
        lines.append(f"mlx_lm.chat --model {place}   # for 4 bits, first: mlx_lm.convert --hf-path {place} -q")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "lightning-cl export",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--to", default="gguf,ollama", help="formats: gguf, ollama, mlx, hf, joined by commas; default: gguf,ollama"
    )
    parser.add_argument(
        "--type",
        default="q8_0",
        help="type of the numbers in the GGUF file: f32, f16, bf16, q8_0, q6_k, q4_k …, or several, joined by commas;"
        " default: q8_0",
    )
    parser.add_argument(
        "--task",
        help="with an adapter for each task: a task's name merges its adapter, mean merges the mean of all, all writes"
        " one file per adapter. Without adapters: the model as it was after that task",
    )
    parser.add_argument("--out", type=Path, help="the folder; default: RUN/export/final, or RUN/export/TASK")
    parser.add_argument(
        "--memory",
        type=Path,
        metavar="FOLDER",
        help="write what the run's buffer holds (training data, word for word) into a folder of its own: samples for"
        " lightning_cl.export.mlx_loop, train.jsonl and valid.jsonl for mlx_lm.lora",
    )
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload the folder to this repository of the hub, which is made private"
    )
    parser.add_argument("--public", action="store_true", help="make the repository of --push public")
    parser.add_argument("--name", help="start of the file names; default: the run's name")
    parser.add_argument("--system", help="text that Ollama begins each conversation with")
    parser.add_argument(
        "--num_ctx", type=int, help="longest conversation in Ollama, in tokens; default: the model's, at most 8192"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=512,
        help="validation tokens of each task that losses are measured on; default: 512",
    )
    return parser


def _checkpoint(run: Path, last: Path, task: str | None, tasks: Sequence[Task]) -> tuple[Path, str | None]:
    """The checkpoint to export, and the adapter's task: without adapters, a task's name is that of a checkpoint.

    Raises:
        ValueError: if the run has no such task.
        FileNotFoundError: if the task's checkpoint was not kept.
    """
    adapted = _adapted(last)
    if task is None or task in adapted or (adapted and task in ("mean", "sum", "all")):
        return last, task
    index = next((index for index, each in enumerate(tasks) if each.name == task), None)
    if index is None or adapted:
        known = adapted or [each.name for each in tasks]
        raise ValueError(f"--task={task}: expected one of {', '.join([*known, 'mean', 'all'] if adapted else known)}")
    path = run / "tasks" / f"{index}-{tasks[index].slug}.ckpt"
    if not path.is_file():
        kept = ", ".join(sorted(p.stem for p in path.parent.glob("*.ckpt") if not p.name.endswith(BEFORE_END)))
        raise FileNotFoundError(
            f"--task={task}: its checkpoint was not kept; there are {kept}. Train with --keep_checkpoints all"
        )
    check_checkpoint(path)
    return path, None


def _adapted(checkpoint: Path) -> list[str]:
    """The tasks with an adapter of their own in a checkpoint, by the names of its weights."""
    parts = (part for name in read_checkpoint(checkpoint)["state_dict"] for part in name.split("."))
    return list(dict.fromkeys(task for task in map(task_name, parts) if task is not None))


def _load_weights(loaded: Loaded, checkpoint: Path) -> None:
    """Loads the weights as an evaluation does, which also builds what methods have added to the model."""
    data = loaded.data
    with data.showing(data.tasks[0]):
        loaded.trainer.validate(loaded.module, datamodule=data, ckpt_path=str(checkpoint), verbose=False)


def _report(run: Path, checkpoint: Path) -> Any:
    """The run's report, if it is of the time of the checkpoint."""
    path = run / "report.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    index = int(checkpoint.name.split("-")[0])
    return report if report is not None and len(report["matrix"]) == index + 2 else None
