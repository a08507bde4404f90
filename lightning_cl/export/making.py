"""The steps of an export, each of which adds a format to a folder and a row to its table."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_cl.export.adapters import serving_lines, write_adapters
from lightning_cl.export.formats import TRAINED, Exported, Format
from lightning_cl.export.gguf import export_gguf, load_gguf_weights
from lightning_cl.export.gguf_tokenizer import live_tokenizer
from lightning_cl.export.llama_cpp import LlamaCpp, is_installed
from lightning_cl.export.losses import NOTHING, llama_loss, torch_loss
from lightning_cl.export.mlx import export_mlx, is_quick, mlx_losses
from lightning_cl.export.mlx_adapter import export_adapter_mlx
from lightning_cl.export.modelfile import write_modelfile, write_task_modelfiles
from lightning_cl.export.sequences import HeldOut
from lightning_cl.export.serving import ollama_name
from lightning_cl.files import sha256
from lightning_cl.models.adapters import using_adapter
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
        task: the adapter's task, ``mean``, ``all`` or None.
        adapted: the tasks that have an adapter of their own.
        sequences: of each task, to measure losses on.
        report: of the run, or None.
    """

    def __init__(
        self,
        folder: Path,
        stem: str,
        module: CausalLM,
        task: str | None,
        adapted: Sequence[str],
        sequences: Mapping[str, Sequence[HeldOut]],
        report: Mapping[str, Any] | None,
    ) -> None:
        self.folder, self.stem, self.module, self.task, self.report = folder, stem, module, task, report
        self.adapted, self.sequences = list(adapted), sequences
        self.saved = folder / _SAVED
        self.formats: list[Format] = []
        self.adapter_files: dict[str, Path] = {}
        self.adapter_folders: dict[str, Path] = {}

    def measure_trained(self) -> None:
        """Measures the model in memory."""
        if not self.sequences:
            return
        with leaving_no_trace(self.module):
            losses = {}
            for task, sequences in self.sequences.items():
                with self._adapter(task):
                    losses[task] = torch_loss(self.module.lm, sequences)
        self.formats.append(Format(TRAINED, losses=losses, measured="torch"))

    @contextmanager
    def _adapter(self, task: str) -> Iterator[None]:
        """The adapter that a task's data is measured with."""
        mine = task if self.task in ("all", "mean") else self.task
        if mine is None or mine not in self.adapted:
            yield
            return
        with using_adapter(self.module, mine):
            yield

    def save(self) -> None:
        """Writes the model for ``transformers``; an adapter is merged, or all of them are written next to the base."""
        if self.task != "all":
            self.module.save_pretrained(self.saved, self.task, merge=self.module.lora is not None, card=self.report)
            return
        base = load_pretrained(str(self.module.source), self.module.precision, settings=self.module.model_kwargs)
        base.save_pretrained(self.saved)
        if self.module.tokenizer is not None:
            self.module.tokenizer.save_pretrained(self.saved)

    def gguf(self, type: str) -> None:
        """Writes the model as a GGUF file of one type."""
        path = export_gguf(self.saved, self._gguf_path(type), type, name=self.stem)
        files = {self._name(path): path.stat().st_size}
        if self.task == "all":
            files |= {self._name(each): each.stat().st_size for each in self._adapter_files().values()}
        losses, how = self._gguf_losses(path) if self.sequences else ({}, "")
        self._add(Format(f"gguf {type}", tuple(files), sum(files.values()), losses, how))

    def _gguf_path(self, type: str) -> Path:
        return self.folder / f"{self.stem}-{type}.gguf"

    def _adapter_files(self) -> dict[str, Path]:
        """The GGUF file of each task's adapter; all are written at the first call."""
        if not self.adapter_files:
            self.adapter_files = write_adapters(self.module, self.folder, self.report)
        return self.adapter_files

    def _adapter_folders(self) -> dict[str, Path]:
        """The peft folder of each task's adapter; all are written at the first call."""
        if self.adapter_files:  # each next to its folder
            return {task: file.with_suffix("") for task, file in self.adapter_files.items()}
        if not self.adapter_folders:
            self.adapter_folders = write_adapters(self.module, self.folder, self.report, gguf=False)
        return self.adapter_folders

    def _gguf_losses(self, path: Path) -> tuple[dict[str, float], str]:
        if not is_installed():
            return self._unpacked_losses(path), "torch, unpacked"
        longest = max((len(each.ids) for rows in self.sequences.values() for each in rows), default=1)
        adapters = self.adapter_files
        llama = LlamaCpp(path, longest + 1, torch.get_num_threads(), list(adapters.values()))
        return {
            task: llama_loss(llama, sequences, [float(task == each) for each in adapters])
            for task, sequences in self.sequences.items()
        }, "llama.cpp"

    def _unpacked_losses(self, path: Path) -> dict[str, float]:
        model = load_gguf_weights(load_pretrained(str(self.saved), "float32"), path).eval()
        if self.task != "all":
            return {task: torch_loss(model, sequences) for task, sequences in self.sequences.items()}
        return {task: self._with_adapter(model, task) for task in self.sequences}

    def _with_adapter(self, model: Any, task: str) -> float:
        from peft import PeftModel

        if task not in self.adapter_files:
            return torch_loss(model, self.sequences[task])
        adapted = PeftModel.from_pretrained(model, self.adapter_files[task].with_suffix("")).eval()
        try:
            return torch_loss(adapted, self.sequences[task])
        finally:
            adapted.unload()

    def ollama(self, type: str, system: str | None, num_ctx: int | None) -> None:
        """Writes a Modelfile, or one per adapter."""
        arguments: dict[str, Any] = {"system": system, "num_ctx": num_ctx, "tokenizer": live_tokenizer(self.saved)}
        gguf = self._gguf_path(type)
        if self.task == "all":
            paths = list(write_task_modelfiles(self.saved, gguf, self._adapter_files(), **arguments).values())
        else:
            paths = [write_modelfile(self.saved, gguf, **arguments)]
        self._add(Format("ollama", tuple(map(self._name, paths)), sum(path.stat().st_size for path in paths)))

    def mlx(self) -> None:
        """Writes a folder for mlx-lm, and the adapters next to it if they are kept apart."""
        out = export_mlx(self.saved, self.folder / "mlx")
        adapters = {}
        if self.task == "all":
            for task, folder in self._adapter_folders().items():
                place = self.folder / "mlx-adapters" / folder.name
                adapters[task] = export_adapter_mlx(folder, place, self.saved)
        losses, how = {}, ""
        if self.sequences and is_quick(out):
            for task, sequences in self.sequences.items():
                found = mlx_losses(out, sequences, adapters.get(task))
                count = sum(number for _, number in found)
                losses[task] = sum(total for total, _ in found) / count if count else NOTHING
            how = "MLX"
        (files, size), more = self._content(out), self._content(self.folder / "mlx-adapters")
        self._add(Format("mlx", files + (more[0] if adapters else ()), size + more[1], losses, how))

    def finish(self, keep_saved: bool) -> None:
        """Writes the card and the index; the folder for ``transformers`` stays if it was asked for."""
        if keep_saved:
            losses, how = {}, ""
            if self.sequences and self.task != "all":
                model = load_pretrained(str(self.saved)).eval()
                losses = {task: torch_loss(model, sequences) for task, sequences in self.sequences.items()}
                how = "torch"
            self._add(Format("hf", *self._content(self.saved), losses, how))
        else:
            shutil.rmtree(self.saved)
        forgetting = None if self.report is None else self.report.get("forgetting")
        tokens = {
            task: sum(label != -100 for each in rows for label in each.labels) for task, rows in self.sequences.items()
        }
        exported = Exported(self.folder, tuple(self.formats), tokens, forgetting)
        if any(each.name.startswith("gguf") for each in self.formats):
            self._write_card(exported.rows())
        replace(exported, checksums=self._checksums()).write(self.folder)

    def _write_card(self, rows: Sequence[Sequence[str]]) -> None:
        """Writes the card of the GGUF files."""
        serving = ""
        if self.adapter_files:
            first = next(each.files[0] for each in self.formats if each.name.startswith("gguf"))
            serving = serving_lines(self.folder, self.folder / first)
        elif (self.folder / "Modelfile").is_file():
            serving = f"ollama create {ollama_name(self.stem)} -f Modelfile"
        base, settings = self.module.described_base(), self.module.settings_in_card()
        task = None if self.task == "all" else self.task
        write_cards({self.folder: task}, base, "quantized", self.report, settings, formats=rows, serving=serving)

    def _add(self, row: Format) -> None:
        self.formats.append(row)
        rank_zero_info(f"  {row.name}: {', '.join(row.files[:3])}{' …' if len(row.files) > 3 else ''}")

    def _content(self, folder: Path) -> tuple[tuple[str, ...], int]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return (f"{self._name(folder)}/",), sum(path.stat().st_size for path in files)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _checksums(self) -> dict[str, str]:
        return {self._name(path): sha256(path) for path in sorted(self.folder.rglob("*")) if path.is_file()}
