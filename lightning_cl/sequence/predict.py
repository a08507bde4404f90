"""``lightning-cl predict``: writes a model's answers to each sample of each task into one file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_cl.core.checkpoint_io import resolve_checkpoint
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.data import TaskDataModule
from lightning_cl.files import replace_file
from lightning_cl.sequence.fit import run_folder

_SHOWN = 3  # predictions of each task, on the terminal


def predict_tasks(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: TaskDataModule,
    ckpt_path: str | Path | None = None,
    return_predictions: bool | None = None,
    folder: Path | None = None,
) -> Path | None:
    """Runs ``trainer.predict`` for each task.

    If ``predict_step`` gives a dictionary with ``prompt`` and ``generated`` for each sample, or lists of them, they are
    written to ``predictions.jsonl`` in the run's folder, with the task's name as ``task``. A few are printed. The
    outputs of other modules are left to callbacks, as in Lightning.

    Args:
        trainer: any Trainer.
        module: the module.
        data: the tasks.
        ckpt_path: the checkpoint to load the weights from; ``"last"`` for the newest complete one.
        return_predictions: Lightning's argument; with False no predictions are kept, so no file is written.
        folder: the folder for the file; None: the run's folder.

    Returns:
        the file, or None if there is none.
    """
    weights = resolve_checkpoint(ckpt_path, trainer.default_root_dir)
    found: dict[str, list[dict[str, Any]] | None] = {}
    for task in data.tasks:
        with data.showing(task):
            outputs = trainer.predict(
                module,
                datamodule=data,
                ckpt_path=str(weights) if weights is not None else None,
                return_predictions=return_predictions,
            )
        weights = None  # the module has them now
        found[task.name] = _records(outputs, task.name)
    folder = folder or run_folder(trainer)  # this needs a call on all ranks
    found = _of_all_ranks(found)
    if any(records is None for records in found.values()) or not any(found.values()):
        return None
    path = folder / "predictions.jsonl"
    if trainer.is_global_zero:
        records = [record for of_task in found.values() for record in of_task or []]
        lines = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        replace_file(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
        for name, of_task in found.items():
            print("\n".join(_shown(name, of_task or [])))
        print(f"\n  {path}: all {len(records)} predictions\n")
    return path


def _records(outputs: Any, task: str) -> list[dict[str, Any]] | None:
    """One dictionary for each sample; None if a module's outputs are something else."""
    samples = list(_flat(outputs))
    if not all(isinstance(sample, Mapping) and {"prompt", "generated"} <= sample.keys() for sample in samples):
        return None
    return [{**sample, "task": task} for sample in samples]


def _flat(outputs: Any) -> Iterator[Any]:
    """Gives the samples of batches one after another; with several loaders, batches are in lists."""
    if isinstance(outputs, (list, tuple)):
        for output in outputs:
            yield from _flat(output)
    elif outputs is not None:
        yield outputs


def _of_all_ranks(found: dict[str, Any]) -> dict[str, Any]:
    """Joins the predictions of all ranks, since each has predicted its share of the samples."""
    parts = from_all_ranks(found)
    return {
        name: None if any(part[name] is None for part in parts) else [record for part in parts for record in part[name]]
        for name in found
    }


def _shown(task: str, records: list[dict[str, Any]]) -> list[str]:
    lines = ["", f"  {task}"]
    for record in records[:_SHOWN]:
        lines.append(f"    {_short(record['prompt'])!r} …")
        lines += [f"      {key:>9} | {_short(record[key])}" for key in ("generated", "reference") if record.get(key)]
    return lines if records else [*lines, "    no predictions"]


def _short(text: Any) -> str:
    words = " ".join(str(text).split())
    return words if len(words) <= 100 else f"{words[:99]}…"
