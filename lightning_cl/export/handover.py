"""A trained model as one folder that a person can hand on: GGUF, Modelfile, MLX, Hugging Face, and what each costs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_cl.arguments import check_integer
from lightning_cl.data.module import TaskDataModule
from lightning_cl.export.folders import replace_folder
from lightning_cl.export.formats import INDEX, Exported
from lightning_cl.export.gguf_types import file_type
from lightning_cl.export.making import Making
from lightning_cl.export.sequences import held_out_sequences
from lightning_cl.export.view import adapted_tasks, adds_up
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

    With `data`, the mean loss of every task is measured on `tokens` tokens of its validation data: of the model in
    torch and of each format. If that fails, a warning says why, and the files stay. A GGUF file is measured through
    llama.cpp where the package ``xllamacpp`` is installed; else its weights are unpacked into the model. An MLX folder
    is measured through mlx-lm where installed.

    Call it in one process, on a model that is whole: it is not for sharded parameters. The model is measured on its own
    device. Memory: the model once more in its own precision, on the CPU, and twice while an adapter is merged; where
    ``xllamacpp`` is not installed, once more in fp32. Disk: the model once more, while it is written.

    Args:
        module: the model, with its weights.
        folder: where to. An earlier export there is replaced at the end, if all of its formats are written again.
        to: the formats, of ``gguf``, ``ollama``, ``mlx``, ``hf``; with ``ollama`` there is a GGUF file too.
        type: of the numbers in the GGUF file (:func:`~lightning_cl.export.gguf.export_gguf`), or several types.
        task: with an adapter for each task: a task's name merges its adapter; ``mean`` merges the mean of all;
            ``all`` keeps them apart, on one base, in files that a server switches between. None: the only adapter, or
            the sum of all in a model that adds them up (``OrthogonalLoRA``, ``InfLoRA``).
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
    folder = Path(folder).absolute()
    formats = check_formats(to)
    types = check_types(type) if "gguf" in formats else []
    check_integer("tokens", tokens, 1)
    if module.lm is None:
        raise RuntimeError("export_model: the module has no model yet; train or validate first")
    adapted = adapted_tasks(module)
    task = _check_task(task, adapted, adds_up(module))
    report = report if report is not None else module.run_report
    longest = getattr(module.lm.config.get_text_config(), "max_position_embeddings", None)
    measured = [] if data is None else data.tasks
    sequences = {each.name: held_out_sequences(data, each, tokens, longest) for each in measured if data is not None}
    seen = [each.name for each in measured if data is not None and data.validated_on_training_data(each)]
    _check_nothing_lost(folder, formats, types)
    stem = re.sub(r"[^\w.-]+", "-", name or folder.name).strip("-.") or "model"

    def write(work: Path) -> None:
        made = Making(work, stem, module, task, adapted, sequences, formats, report, seen)
        made.measure_trained()
        made.save()
        for each in types:
            made.gguf(each)
        if "ollama" in formats:
            made.ollama(types[0], system, num_ctx)
        if "mlx" in formats:
            made.mlx()
        made.finish()

    return Exported.read(replace_folder(folder, write, INDEX))


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
    return [file_type(each).name for each in types]


def _check_nothing_lost(folder: Path, formats: set[str], types: Sequence[str]) -> None:
    """Refuses to replace an earlier export by one with fewer formats."""
    if not (folder / INDEX).is_file():
        return
    new = (formats - {"gguf"}) | {f"gguf {type}" for type in types}
    lost = [each.name for each in Exported.read(folder).formats if each.files and each.name not in new]
    if lost:
        raise ValueError(
            f"folder={str(folder)!r}: has {', '.join(lost)} of an earlier export, which would be replaced; ask for all"
            " formats at once, or give another folder (--out)"
        )


def _check_task(task: str | None, adapted: Sequence[str], summed: bool) -> str | None:
    """Checks which adapters are exported; where a model adds all of them up, it is their sum."""
    if not adapted and task is not None:
        raise ValueError(f"task={task!r}: the model has no adapter for each task; leave `task` out")
    if summed:
        if task not in (None, "sum"):
            raise ValueError(
                f"task={task!r}: this model adds the adapters of all tasks up, and no other model was trained; leave"
                " `task` out"
            )
        return "sum"
    if task is None and len(adapted) > 1:
        raise ValueError(
            f"task=None: there is an adapter for each of {list(adapted)}; give one of them, 'mean' for one model of all"
            " of them, or 'all' for one base with an adapter for each"
        )
    if task is not None and task not in (*adapted, "mean", "all"):
        raise ValueError(f"task={task!r}: it has no adapter; expected one of {list(adapted)}, 'mean' or 'all'")
    return task
