"""Bases of the directions that linear layers' inputs take, which grow from task to task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_cl.callbacks.architecture.projected import on_one_rank_each
from lightning_cl.core.placement import tensor_bytes
from lightning_cl.functional.input_space import grow_basis
from lightning_cl.passes.input_moments import find_shared_inputs, input_moments
from lightning_cl.passes.task_samples import TaskSamples


class InputBases:
    """One basis for each group of layers that read the same tensor, as query, key and value projections do.

    Args:
        normalize: whether each position's input is scaled to length 1 before it is counted.

    Attributes:
        bases: the first layer of a group to its basis, ``[in, directions]``, with orthonormal columns.
        leaders: layer to the first of its group.
    """

    def __init__(self, normalize: bool) -> None:
        self.normalize = normalize
        self.bases: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}

    def of(self, path: str) -> Tensor | None:
        """Returns a layer's basis; None where there is none yet."""
        return self.bases.get(self.leaders.get(path, path))

    def place(self, devices: Mapping[str, torch.device]) -> None:
        """Brings the bases of layers to their devices."""
        for path, device in devices.items():
            leader = self.leaders.get(path, path)
            if leader in self.bases:
                self.bases[leader] = self.bases[leader].to(device)

    def measure(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        parts: Mapping[str, nn.Module],
        widths: Mapping[str, int],
        samples: TaskSamples,
    ) -> dict[str, Tensor]:
        """Returns the second moments of the inputs, for the first layer of each group.

        Args:
            trainer: inside ``fit``.
            pl_module: the module.
            parts: path to layer.
            widths: path to the number of inputs.
            samples: this rank's.
        """
        new = {path: part for path, part in parts.items() if path not in self.leaders}
        if new:
            batch = samples.one()
            shared = find_shared_inputs(trainer, pl_module, new, batch) if batch is not None else {}
            self.leaders |= {path: shared.get(path, path) for path in new}
        leading = {path: part for path, part in parts.items() if self.leaders[path] == path}
        return input_moments(trainer, pl_module, leading, widths, samples, self.normalize)

    def grow(
        self,
        trainer: L.Trainer,
        moments: Mapping[str, Tensor],
        threshold: float,
        label: str,
        most: Mapping[str, int] | None = None,
    ) -> None:
        """Adds directions until each basis holds a share of the inputs' energy; on all ranks the same.

        Args:
            trainer: inside ``fit``.
            moments: from :meth:`measure`.
            threshold: the share.
            label: what the progress display says.
            most: path to the largest number of directions; None: as many as there are inputs.
        """

        def grown(path: str, moment: Tensor) -> Tensor:
            basis = self.bases.get(path)
            old = None if basis is None else basis.to(moment.device)
            limit = None if most is None else max(most[path], 0 if old is None else old.shape[1])
            return grow_basis(moment, threshold, old, limit).cpu()

        self.bases |= on_one_rank_each(trainer, moments, grown, label)

    def state(self) -> dict[str, Any]:
        """Returns bases and groups, on the CPU."""
        return {"bases": {path: basis.cpu() for path, basis in self.bases.items()}, "leaders": dict(self.leaders)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""
        self.bases, self.leaders = dict(state["bases"]), dict(state["leaders"])

    def bytes(self) -> int:
        """Returns the bytes of the bases."""
        return tensor_bytes(self.bases)


def samples_for(trainer: L.Trainer, loader: Any, batches: int, seed: int, owner: str, what: str) -> TaskSamples:
    """As many of a loader's samples as so many of its batches hold, those of all ranks together.

    Args:
        trainer: inside ``fit``.
        loader: the training data's.
        batches: how many batches' worth.
        seed: of the choice.
        owner: the method, for the progress display.
        what: whose inputs they are, for the progress display.
    """
    size = getattr(loader, "batch_size", None)
    count = batches * (size if isinstance(size, int) else 8) * trainer.world_size
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        count = 1
    return TaskSamples(trainer, count, seed, f"{owner}: inputs of {what}", loader=loader)
