"""The steps of an export, each of which adds a format to a folder and a row to its table."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_cl.export.adapters import MLX, serving_lines, write_adapters
from lightning_cl.export.formats import TORCH, Exported, Format
from lightning_cl.export.gguf import export_gguf, load_gguf_weights
from lightning_cl.export.gguf_tokenizer import live_tokenizer
from lightning_cl.export.llama_cpp import LlamaCpp, is_installed
from lightning_cl.export.losses import llama_loss, mlx_loss, torch_loss
from lightning_cl.export.mlx import export_mlx, is_quick
from lightning_cl.export.modelfile import write_modelfile, write_task_modelfiles
from lightning_cl.export.sequences import HeldOut
from lightning_cl.export.serving import ollama_name
from lightning_cl.files import sha256
from lightning_cl.models.adapters import find_peft_model, keep_switches, use_adapter, use_adapters
from lightning_cl.models.causal_lm import CausalLM
from lightning_cl.models.loading import load_pretrained
from lightning_cl.models.saving import write_cards
from lightning_cl.passes.passes import leaving_no_trace

_SAVED = "hf"


class Making:
    """An export that is being made.

    Args:
        folder: the folder, empty.
        stem: how the files' names begin.
        module: the model.
        task: the adapter's task, ``mean``, ``sum``, ``all`` or None.
        adapted: the tasks that have an adapter of their own.
        sequences: of each task, to measure losses on.
        wanted: the formats that are asked for.
        report: of the run, or None.
        on_training_data: tasks without validation data, whose sequences are of the training data.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        module: CausalLM,
        task: str | None,
        adapted: Sequence[str],
        sequences: Mapping[str, Sequence[HeldOut]],
        wanted: Collection[str],
        report: Mapping[str, Any] | None,
        on_training_data: Sequence[str] = (),
    ) -> None:
        self.folder, self.stem, self.module, self.task, self.report = folder, stem, module, task, report
        self.adapted, self.sequences, self.on_training_data = list(adapted), sequences, tuple(on_training_data)
        self.wanted, self.saved = wanted, folder / _SAVED
        self.formats: list[Format] = []

    @cached_property
    def adapter_folders(self) -> dict[str, Path]:
        """The peft folder of each task's adapter, where they are kept apart; a GGUF file is next to each if wanted."""
        if self.task != "all":
            return {}
        gguf, mlx = "gguf" in self.wanted, "mlx" in self.wanted
        written = write_adapters(self.module, self.folder, self.report, gguf, mlx)
        return {task: path.with_suffix("") if gguf else path for task, path in written.items()}

    @property
    def adapter_files(self) -> dict[str, Path]:
        """The GGUF file of each task's adapter."""
        return {task: folder.with_name(f"{folder.name}.gguf") for task, folder in self.adapter_folders.items()}

    def measure_trained(self) -> None:
        """Measures the model in memory, as the files will have it; for a mean, each task with its own adapter."""
        if not self.sequences:
            return
        with leaving_no_trace(self.module):
            losses = self._measured(TORCH, lambda: self._loss_in_memory)
        self.formats.append(Format(self._name_in_memory() or TORCH, losses=losses, measured="torch"))

    def _name_in_memory(self) -> str | None:
        """The row of the model in memory where the files hold another one; else None."""
        if self.task == "mean":
            return "own adapters"
        quantization = self.module.quantization  # of the base, which the files have in 16 or 32 bits
        return None if quantization is None else f"in training ({quantization})"

    def _loss_in_memory(self, task: str) -> float:
        with self._view(task):
            return torch_loss(self.module.lm, self.sequences[task])

    @contextmanager
    def _view(self, task: str) -> Iterator[None]:
        """The adapters that a task's data is measured with."""
        if not self.adapted:
            yield
            return
        with keep_switches(find_peft_model(self.module)):
            if self.task == "sum":
                use_adapters(self.module, self.adapted)
            elif self.task in ("all", "mean"):
                use_adapter(self.module, task if task in self.adapted else None)
            else:
                use_adapter(self.module, self.task or self.adapted[0])
            yield

    def _measured(self, name: str, prepare: Callable[[], Callable[[str], float]]) -> dict[str, float]:
        """The loss of each task; where it cannot be measured, a warning has the reason, and the files stay.

        Args:
            name: of the format.
            prepare: loads what is measured, and returns the function that measures a task.
        """
        try:
            loss = prepare()
            return {task: loss(task) for task in self.sequences}
        except Exception as error:
            rank_zero_warn(f"{name}: its losses could not be measured: {error}")
            return {}

    def save(self) -> None:
        """Writes the model for ``transformers``; an adapter is merged, or all of them are written next to the base."""
        if self.task != "all":
            self.module.save_pretrained(self.saved, self.task, merge=self.module.lora is not None, card=self.report)
        else:
            self._save_base()
        if self.sequences and self._name_in_memory() is not None:
            self.formats.append(Format(TORCH, losses=self._saved_losses, measured="torch"))

    def _save_base(self) -> None:
        base = load_pretrained(str(self.module.source), self.module.precision, settings=self.module.model_kwargs)
        base.save_pretrained(self.saved)
        if self.module.tokenizer is not None:
            self.module.tokenizer.save_pretrained(self.saved)

    def gguf(self, type: str) -> None:
        """Writes the model as a GGUF file of one type."""
        path = export_gguf(self.saved, self._gguf_path(type), type, name=self.stem)
        files = {self._name(each): each.stat().st_size for each in (path, *self.adapter_files.values())}
        losses, how = self._gguf_losses(f"gguf {type}", path) if self.sequences else ({}, "")
        self._add(Format(f"gguf {type}", tuple(files), sum(files.values()), losses, how))

    def _gguf_path(self, type: str) -> Path:
        return self.folder / f"{self.stem}-{type}.gguf"

    def _gguf_losses(self, name: str, path: Path) -> tuple[dict[str, float], str]:
        if not is_installed():

            def unpacked() -> Callable[[str], float]:
                model = load_gguf_weights(load_pretrained(str(self.saved), "float32"), path).eval()
                return lambda task: self._loss_of(model, task)

            return self._measured(name, unpacked), "torch, unpacked"
        longest = max((len(each.ids) for rows in self.sequences.values() for each in rows), default=1)
        adapters = self.adapter_files

        def asked() -> Callable[[str], float]:
            llama = LlamaCpp(path, longest + 1, torch.get_num_threads(), list(adapters.values()))
            return lambda task: llama_loss(llama, self.sequences[task], [float(task == each) for each in adapters])

        return self._measured(name, asked), "llama.cpp"

    @cached_property
    def _saved_losses(self) -> dict[str, float]:
        """Losses of the folder that was saved, read back."""

        def loaded() -> Callable[[str], float]:
            model = load_pretrained(str(self.saved)).eval()
            return lambda task: self._loss_of(model, task)

        return self._measured(_SAVED, loaded)

    def _loss_of(self, model: Any, task: str) -> float:
        """The loss of a task with a model that was read from the folder, and with the task's adapter, if it has one."""
        folder = self.adapter_folders.get(task)
        if folder is None:
            return torch_loss(model, self.sequences[task])
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(model, folder).eval()
        try:
            return torch_loss(adapted, self.sequences[task])
        finally:
            adapted.unload()

    def ollama(self, type: str, system: str | None, num_ctx: int | None) -> None:
        """Writes a Modelfile, or one per adapter."""
        arguments: dict[str, Any] = {"system": system, "num_ctx": num_ctx, "tokenizer": live_tokenizer(self.saved)}
        gguf = self._gguf_path(type)
        if self.task == "all":
            paths = list(write_task_modelfiles(self.saved, gguf, self.adapter_files, **arguments).values())
        else:
            paths = [write_modelfile(self.saved, gguf, **arguments)]
        self._add(Format("ollama", tuple(map(self._name, paths)), measured=f"as gguf {type}"))

    def mlx(self) -> None:
        """Writes a folder for mlx-lm; adapters that are kept apart are next to it."""
        out = export_mlx(self.saved, self.folder / "mlx", link=_SAVED not in self.wanted)  # else nothing is left of it
        adapters = {task: self.folder / MLX / folder.name for task, folder in self.adapter_folders.items()}
        losses, how = {}, ""
        if self.sequences and is_quick(out):
            losses = self._measured("mlx", lambda: lambda task: mlx_loss(out, self.sequences[task], adapters.get(task)))
            how = "MLX"
        self._add(Format("mlx", *self._content(out, *adapters.values()), losses, how))

    def finish(self) -> None:
        """Writes the card and the index; the folder for ``transformers`` stays if it was asked for."""
        if _SAVED in self.wanted:
            losses = self._saved_losses if self.sequences else {}
            content = self._content(self.saved, *self.adapter_folders.values())
            self._add(Format(_SAVED, *content, losses, "torch" if losses else ""))
        else:
            shutil.rmtree(self.saved)
        in_nats = self.report is not None and self.report.get("monitor") == "val_loss"
        forgetting = self.report["forgetting"] if in_nats and self.report is not None else math.nan
        tokens = {task: sum(len(each.places) for each in rows) for task, rows in self.sequences.items()}
        cost = forgetting if math.isfinite(forgetting) else None
        exported = Exported(self.folder, tuple(self.formats), tokens, cost, self.on_training_data)
        if any(each.name.startswith("gguf") for each in self.formats):
            self._write_card(exported)
        replace(exported, checksums=self._checksums()).write(self.folder)

    def _write_card(self, exported: Exported) -> None:
        """Writes the card of the GGUF files."""
        serving = ""
        if self.adapter_folders:
            first = next(each.files[0] for each in self.formats if each.name.startswith("gguf"))
            serving = serving_lines(self.folder, self.folder / first)
        elif (self.folder / "Modelfile").is_file():
            serving = f"ollama create {ollama_name(self.stem)} -f Modelfile"
        base, settings = self.module.described_base(), self.module.settings_in_card()
        task = None if self.task == "all" else self.task
        shown: dict[str, Any] = {"formats": exported.rows(), "notes": exported.sentences(), "serving": serving}
        write_cards({self.folder: task}, base, "quantized", self.report, settings, **shown)

    def _add(self, row: Format) -> None:
        self.formats.append(row)
        rank_zero_info(f"  {row.name}: {', '.join(row.files[:3])}{' …' if len(row.files) > 3 else ''}")

    def _content(self, *folders: Path) -> tuple[tuple[str, ...], int]:
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return tuple(f"{self._name(folder)}/" for folder in folders), sum(path.stat().st_size for path in files)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _checksums(self) -> dict[str, str]:
        return {self._name(path): sha256(path) for path in sorted(self.folder.rglob("*")) if path.is_file()}
