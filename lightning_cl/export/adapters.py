"""Adapters of all tasks in one folder that servers switch between: peft folders, GGUF files, and an index of them."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_cl.evaluation.model_card import Base
from lightning_cl.evaluation.sentences import row_names
from lightning_cl.export.gguf_adapter import export_adapter_gguf
from lightning_cl.export.mlx_adapter import WEIGHTS as MLX_WEIGHTS
from lightning_cl.export.mlx_adapter import export_adapter_mlx
from lightning_cl.export.serving import MLX, Served, commands
from lightning_cl.files import replace_file, sha256
from lightning_cl.models.adapters import list_adapters
from lightning_cl.models.causal_lm import CausalLM
from lightning_cl.models.saving import check_card, write_cards

INDEX = "adapters.json"
"""The file that says which adapters there are."""

FOLDER = "adapters"
"""The folder that they are in."""

_FORMAT = "lightning_cl adapters 1"
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a folder."""

    task: str | None
    """Its task; None: it is the only adapter, and has learnt all tasks."""
    folder: str
    """The peft folder, in the folder of the index; its last part is the adapter's name for servers."""
    rank: int
    """The largest of its layers."""
    alpha: float
    """Its strength: peft multiplies its product by alpha / rank, or by alpha / √rank under rsLoRA."""
    target_modules: tuple[str, ...] | str
    """Names of the adapted layers, their last parts, or a regular expression."""
    loss_when_learnt: float | None = None
    """Validation loss of the task after it was trained; None: unknown."""
    loss_at_the_end: float | None = None
    """Validation loss of the task after the last task; None: unknown."""
    gguf: str | None = None
    """The GGUF file of the same adapter."""
    mlx: str | None = None
    """The folder of the same adapter for mlx-lm."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Checksum of each file that decides what the adapter computes."""

    @property
    def name(self) -> str:
        """Returns its name for servers."""
        return PurePosixPath(self.folder).name


@dataclass(frozen=True)
class AdapterIndex:
    """Content of :data:`INDEX`."""

    base: Base
    """The model that all of them belong to."""
    adapters: tuple[Adapter, ...]
    """In the order in which they were learnt; servers number them so."""


def write_adapters(
    module: CausalLM,
    folder: str | Path,
    report: Mapping[str, Any] | str | Path | None = None,
    gguf: bool = True,
    mlx: bool = False,
) -> dict[str, Path]:
    """Writes every LoRA adapter of a model into ``adapters/<task>/``, with an index of them in ``adapters.json``.

    Each is a folder that peft, transformers and vLLM load; the GGUF file next to it, ``adapters/<task>.gguf``, is what
    llama.cpp and Ollama load. Weights are read back and compared, and their checksums are in the index. No file has a
    local path: where the base is on the hub, its name is there, and else peft is given the base
    (``PeftModel.from_pretrained(base, folder)``). :func:`serving_lines` tells how to serve them.

    Adapters of an earlier call are replaced at the end. Disk: all adapters once more while they are written.

    Args:
        module: the model, under LoRA, with an adapter for each task or one for all.
        folder: where to; made if it is not there.
        report: the run's report, or the path of its ``report.json``, for losses and cards; None: that of the run that
            has just ended.
        gguf: write GGUF files too.
        mlx: write ``mlx-adapters/<task>/`` too, as mlx-lm loads them.

    Returns:
        for each task its GGUF file; without GGUF files its folder. The only adapter of all tasks is ``default``.

    Raises:
        ValueError: if there is no adapter, or llama.cpp cannot compute one; the message has the way round.
        RuntimeError: if there is no model yet, or what was written is not what is in memory.
        ImportError: if the package ``gguf`` is missing, with the extra that installs it.
    """
    if module.lm is None:
        raise RuntimeError("write_adapters: the module has no model yet; train or validate first")
    if module.lora is None:
        raise ValueError("module: it has no adapter (lora=None); save_pretrained or export_model writes a whole model")
    check_card(report)
    told = json.loads(Path(report).read_text(encoding="utf-8")) if isinstance(report, (str, Path)) else report
    told = told if told is not None else module.run_report
    folder, base = Path(folder), module.described_base()
    folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=f".{FOLDER}-"))
    try:
        saved = _save(module, work / "saved", told, base)
        made = work / FOLDER
        made.mkdir()
        adapters = []
        for place, task in saved.items():
            place.rename(made / place.name)
            adapters.append(_finish(made / place.name, task, told, work / "base", gguf, mlx))
        index = AdapterIndex(base, tuple(adapters))
        for each in adapters:
            _write_card(work, each, index, module, told)
        for name in (FOLDER, *([MLX] if mlx else [])):
            _replace(work / name, folder / name)
        replace_file(folder / INDEX, partial(_write_index, index))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    read_index(folder)
    return {
        "default" if each.task is None else each.task: folder / (each.folder if each.gguf is None else each.gguf)
        for each in index.adapters
    }


def read_index(folder: str | Path) -> AdapterIndex:
    """Reads the index of a folder, and compares the checksum of each file.

    Args:
        folder: as :func:`write_adapters` wrote it.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: naming the file that is missing, damaged or another one.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write_adapters writes it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {_FORMAT!r}")
        index = AdapterIndex(Base(**content["base"]), tuple(map(_read_adapter, content["adapters"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no readable index of adapters ({error}); write the adapters again") from error
    for adapter in index.adapters:
        for name, checksum in adapter.sha256.items():
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: is missing; the index has it. Write the adapters again")
            if sha256(folder / name) != checksum:
                raise ValueError(f"{folder / name}: is damaged or another one: its SHA-256 is not that of the index")
    return index


def serving_lines(folder: str | Path, model_gguf: str | Path | None = None) -> str:
    """Returns the command lines that serve the adapters of a folder in vLLM, llama.cpp's server, Ollama and mlx-lm.

    They are for a shell in the folder; names are quoted where a shell needs it, and lines that begin with ``#`` say
    what to know. A program that cannot serve these adapters has a line with the reason instead.

    Args:
        folder: as :func:`write_adapters` wrote it.
        model_gguf: the base as a GGUF file; default: the first GGUF file in the folder, else ``BASE.gguf`` stands for
            it.

    Raises:
        FileNotFoundError: if the folder has no index.
        ValueError: naming a damaged file.
    """
    folder = Path(folder)
    index = read_index(folder)
    found = sorted(folder.glob("*.gguf"))
    if model_gguf is None and found:
        model_gguf = found[0]
    return "\n".join(commands(folder, index.base, _served(folder, index), model_gguf))


# ---------------------------------------------------------------------- one adapter


def _save(module: CausalLM, work: Path, report: Mapping[str, Any] | None, base: Base) -> dict[Path, str | None]:
    """Saves all adapters with their tokenizer, and the base's configuration next to them, without local paths."""
    configs = module.lm.peft_config
    before = {name: config.base_model_name_or_path for name, config in configs.items()}
    try:
        written = module.save_pretrained(work, task="all", card=report)
    finally:  # saving an adapter of a GGUF file's model has set it to a folder that is deleted
        for name, config in configs.items():
            config.base_model_name_or_path = before[name]
    module.lm.get_base_model().config.save_pretrained(work.parent / "base")
    for place in written:
        path = place / _CONFIG
        settings = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base.name}
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(written) == 1:  # it may be that of the first task
        return dict(zip(written, [*list_adapters(module), None], strict=False))
    return written


def _finish(
    place: Path, task: str | None, report: Mapping[str, Any] | None, base: Path, gguf: bool, mlx: bool
) -> Adapter:
    """Writes an adapter in other formats, and describes it; `base` has the base's configuration."""
    work, name = place.parents[1], place.name
    files = [place / _CONFIG, place / _WEIGHTS]
    if gguf:
        files.append(export_adapter_gguf(place, place.with_name(f"{name}.gguf"), base, name=name))
    if mlx:
        out = export_adapter_mlx(place, work / MLX / name, base)
        files += [out / _CONFIG, out / MLX_WEIGHTS]
    settings = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
    targets = settings["target_modules"]
    learnt, end = _losses(report, task)
    return Adapter(
        task,
        f"{FOLDER}/{name}",
        max([settings["r"], *(settings.get("rank_pattern") or {}).values()]),
        settings["lora_alpha"],
        targets if isinstance(targets, str) else tuple(sorted({name.rpartition(".")[2] for name in targets})),
        learnt,
        end,
        f"{FOLDER}/{name}.gguf" if gguf else None,
        f"{MLX}/{name}" if mlx else None,
        {file.relative_to(work).as_posix(): sha256(file) for file in files},
    )


def _losses(report: Mapping[str, Any] | None, task: str | None) -> tuple[float | None, float | None]:
    """A task's loss when it was learnt and at the end, by the retention matrix."""
    if report is None or "loss" not in report["monitor"]:
        return None, None
    rows = row_names(dict(report))
    if task is None and len(rows) == 2:
        task = rows[1]
    if task not in rows[1:] or task not in report["tasks"]:
        return None, None
    learnt, column = rows.index(task, 1), report["tasks"].index(task)
    changes = [change["row"] for change in report.get("data_changes", ()) if change["task"] == task]
    when = None if any(row > learnt for row in changes) else report["matrix"][learnt][column]
    return _known(when), _known(report["matrix"][-1][column])


def _known(loss: float | None) -> float | None:
    return None if loss is None or not math.isfinite(loss) else float(loss)


def _write_card(
    work: Path, adapter: Adapter, index: AdapterIndex, module: CausalLM, report: Mapping[str, Any] | None
) -> None:
    served = _served(work, AdapterIndex(index.base, (adapter,)))
    serving = "\n".join(commands(work, index.base, served, None, alone=True))
    write_cards(
        {work / adapter.folder: adapter.task},
        index.base,
        "adapter",
        report,
        module.settings_in_card(),
        serving=serving,
        names_no_base=True,
    )


def _served(folder: Path, index: AdapterIndex) -> Sequence[Served]:
    """The adapters as servers see them."""
    served = []
    for each in index.adapters:
        settings = json.loads((folder / each.folder / _CONFIG).read_text(encoding="utf-8"))
        served.append(Served(each.name, each.task, each.folder, each.gguf, each.rank, settings))
    return served


# ---------------------------------------------------------------------- the index


def _write_index(index: AdapterIndex, path: Path) -> None:
    adapters = [{"name": each.name, **vars(each)} for each in index.adapters]
    content = {"format": _FORMAT, "base": index.base._asdict(), "adapters": adapters}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_adapter(entry: Mapping[str, Any]) -> Adapter:
    given = {name: value for name, value in entry.items() if name != "name"}
    if isinstance(given["target_modules"], list):
        given["target_modules"] = tuple(given["target_modules"])
    adapter = Adapter(**given)
    for name in (adapter.folder, adapter.gguf or "", adapter.mlx or "", *adapter.sha256):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name!r} is outside the folder")
    return adapter


def _replace(made: Path, target: Path) -> None:
    """Gives a finished folder its name, in the place of an earlier one."""
    old = made.with_name(f"old-{made.name}")
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if old.exists():  # the folder that it is in is about to be deleted
            old.rename(target)
        raise
