"""A trained model as one folder that a person can hand on: GGUF, Modelfile, MLX, Hugging Face, and what each costs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_cl.arguments import check_integer
from lightning_cl.data.module import TaskDataModule
from lightning_cl.export.formats import INDEX, Exported
from lightning_cl.export.gguf_types import file_type
from lightning_cl.export.making import Making
from lightning_cl.export.sequences import held_out_sequences
from lightning_cl.models.adapters import list_adapters
from lightning_cl.models.causal_lm import CausalLM

To = Literal["gguf", "ollama", "mlx", "hf"]


def export_model(
    module: CausalLM,
    folder: str | Path,
    to: Sequence[To] = ("gguf", "ollama"),
    type: str | Sequence[str] = "q8_0",
    task: str | None = None,
    data: TaskDataModule | None = None,
    report: Mapping[str, Any] | None = None,
    name: str | None = None,
    system: str | None = None,
    num_ctx: int | None = None,
    tokens: int = 512,
) -> Exported:
    """Writes a trained model for other programs, into one folder, and measures what each format costs.

    Every file is read back and compared before the folder gets its name. ``gguf``: one file per type for llama.cpp.
    ``ollama``: a Modelfile on the first of them. ``mlx``: a folder for mlx-lm. ``hf``: the model for ``transformers``.
    An adapter is merged into its base. Nothing in the folder says where it was made.

    With `data`, the mean loss of every task is measured on the first `tokens` tokens of its validation data: of the
    model in memory and of each format. A GGUF file is measured through llama.cpp where the package ``xllamacpp`` is
    installed; else its weights are unpacked into the model. An MLX folder is measured through mlx-lm where installed.

    Memory: the model once more in fp32. Disk: the model once more in its own precision, while it is written.

    Args:
        module: the model, with its weights.
        folder: where to. A folder of an earlier export is replaced at the end.
        to: the formats, of ``gguf``, ``ollama``, ``mlx``, ``hf``; with ``ollama`` there is a GGUF file too.
        type: of the numbers in the GGUF file (:func:`~lightning_cl.export.gguf.export_gguf`), or several types.
        task: with an adapter for each task: a task's name merges its adapter; ``mean`` merges the mean of all;
            ``all`` keeps them apart, on one base, in files that a server switches between. None: the only adapter.
        data: the tasks, set up (as after ``fit_tasks``); None: no loss is measured.
        report: the run's report, for the model card; None: that of the run that has just ended, if it was measured.
        name: of the files; default: the folder's name.
        system: text that Ollama begins each conversation with.
        num_ctx: positions of a conversation in Ollama; default: the model's, at most 8,192.
        tokens: of each task that losses are measured on.

    Returns:
        what was written; ``str()`` of it is the table.

    Raises:
        ValueError: if an argument is wrong, the folder holds something else, or a format cannot hold the model.
        RuntimeError: if a file does not read back, or there is no model yet.
        ImportError: if a format needs a package, with the extra that installs it.
    """
    folder = Path(folder)
    formats = check_formats(to)
    types = check_types(type) if "gguf" in formats else []
    check_integer("tokens", tokens, 1)
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / INDEX).is_file())):
        raise ValueError(
            f"folder={str(folder)!r}: there is something else than an earlier export; give a folder that is not there"
        )
    if module.lm is None:
        raise RuntimeError("export_model: the module has no model yet; train or validate first")
    adapted = list_adapters(module) if module.lora is not None else []
    _check_task(task, adapted)
    report = report if report is not None else module.run_report
    sequences = {} if data is None else {each.name: held_out_sequences(data, each, tokens) for each in data.tasks}
    stem = re.sub(r"[^\w.-]+", "-", name or folder.absolute().name).strip("-.") or "model"
    work = folder.absolute().with_name(f".{folder.absolute().name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)  # of an export that was killed
    work.mkdir(parents=True)
    try:
        made = Making(work, stem, module, task, adapted, sequences, report)
        made.measure_trained()
        made.save()
        for each in types:
            made.gguf(each)
        if "ollama" in formats:
            made.ollama(types[0], system, num_ctx)
        if "mlx" in formats:
            made.mlx()
        made.finish(keep_saved="hf" in formats)
        _replace(work, folder.absolute())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Exported.read(folder)


def check_formats(to: Sequence[str]) -> set[str]:
    """Checks the names of formats; ``ollama`` brings ``gguf`` with it.

    Raises:
        ValueError: if one is unknown, or there is none.
    """
    known = get_args(To)
    if isinstance(to, str) or not to or not set(to) <= set(known):
        raise ValueError(f"to={to!r}: expected some of {list(known)}")
    return set(to) | ({"gguf"} if "ollama" in to else set())


def check_types(type: str | Sequence[str]) -> list[str]:
    """Checks the types of GGUF files.

    Raises:
        ValueError: if one is unknown, or there is none.
        ImportError: if one needs a package that is not installed.
    """
    types = [type] if isinstance(type, str) else list(dict.fromkeys(type))
    if not types:
        raise ValueError("type=[]: expected at least one, as in 'q8_0'")
    for each in types:
        file_type(each)
    return [each.lower() for each in types]


def _check_task(task: str | None, adapted: Sequence[str]) -> None:
    if not adapted and task is not None:
        raise ValueError(f"task={task!r}: the model has no adapter for each task; leave `task` out")
    if task is None and len(adapted) > 1:
        raise ValueError(
            f"task=None: there is an adapter for each of {list(adapted)}; give one of them, 'mean' for one model of all"
            " of them, or 'all' for one base with an adapter for each"
        )
    if task is not None and task not in (*adapted, "mean", "all"):
        raise ValueError(f"task={task!r}: it has no adapter; expected one of {list(adapted)}, 'mean' or 'all'")


def _replace(work: Path, folder: Path) -> None:
    """Gives a finished folder its name, in the place of an earlier export."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
