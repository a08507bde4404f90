"""Maximally interfered retrieval: replay of the stored samples that the last steps have hurt most."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.data.mixing.replayed import Samples
from lightning_cl.passes.passes import leaving_no_trace, to_device, training_loss
from lightning_cl.random_state import seed_of

CANDIDATES = 16
EVERY = 10


class Interference:
    """Measures some stored samples before and after an optimizer step, and replays those whose loss rises.

    MIR (Aljundi et al. 2019, eq. 2) scores a sample by ``l(f_{θ − α∇L}; x) − l(f_θ; x)``, with a virtual step. Here θ
    is taken before and after a real step of training. So no gradient is computed twice, and with Adam the measured step
    is the real one. The replayed samples are those that the previous step has hurt.

    Every tenth step 16 candidates are drawn. Those whose loss rises are replayed next, the worst first, in the plan's
    positions for replayed samples. The total weight of replayed samples stays within one sample of the plan's.

    Compute: 32 forward passes over single samples in every tenth step. The ranks share them.

    Args:
        buffer: the samples to replay.
        seed: seed for the choice of candidates.
    """

    def __init__(self, buffer: ReplayBuffer, seed: int) -> None:
        self.buffer, self.seed = buffer, seed
        self._steps = 0
        self._candidates: list[int] = []
        self._before: dict[int, float] = {}
        self._worst: list[int] = []  # record numbers, the worst last
        self._surplus = 0.0  # replayed weight above the plan's
        self._positions: dict[int, int] = {}

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures some samples, in every tenth step."""
        self._candidates = []
        if self._steps % EVERY == 0 and len(self.buffer) > 0:
            drawn = (self.buffer.pick(seed_of(self.seed, self._steps, i)) for i in range(CANDIDATES))
            self._candidates = list(dict.fromkeys(number for number in drawn if number is not None))
            self._before = self._losses(trainer, pl_module)
        self._steps += 1

    def after_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
        """Measures the same samples again.

        Returns:
            the largest rise of a loss in this step; None if nothing was measured.
        """
        if not self._candidates:
            return None
        after = self._losses(trainer, pl_module)
        rises = {number: after[number] - self._before[number] for number in after if number in self._before}
        self._worst = sorted((n for n in rises if rises[n] > 0), key=lambda n: (rises[n], n))
        self._candidates = []
        return max(rises.values(), default=None)

    def attach(self, samples: Samples, place: int) -> None:
        """Stores the positions of the buffer's samples in a loader."""
        start = samples.starts[place]
        self._positions = {number: start + i for i, number in enumerate(samples.parts[place][1])}

    def choose(self, samples: Samples, index: int, most_tokens: int | None) -> int:
        """Returns the sample to replay instead of a planned one.

        Args:
            samples: the loader's samples.
            index: the planned sample.
            most_tokens: the most tokens that fit; None without packing.
        """
        planned = samples.weight(index)
        for position in range(len(self._worst) - 1, -1, -1):
            other = self._positions.get(self._worst[position])
            if other is None or (most_tokens is not None and samples.lengths and samples.lengths[other] > most_tokens):
                continue
            surplus = self._surplus + samples.weight(other) - planned
            if abs(surplus) <= max(planned, abs(self._surplus)):
                self._surplus = surplus
                del self._worst[position]
                return other
        return index

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that must survive a crash."""
        return {"steps": self._steps, "worst": list(self._worst), "surplus": self._surplus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._steps, self._worst, self._surplus = state["steps"], list(state["worst"]), state["surplus"]

    @torch.no_grad()
    def _losses(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[int, float]:
        loader: Any = trainer.train_dataloader
        own: dict[int, float] = {}
        with leaving_no_trace(pl_module):
            for number in self._candidates[trainer.global_rank :: trainer.world_size]:
                if self.buffer.store.is_erased(number):
                    continue
                sample = self.buffer.get(number)
                row = [sample] if loader.block_length is None else [[sample]]
                loss = training_loss(trainer, pl_module, to_device(trainer, loader.collate_fn(row)))
                if loss is not None and bool(loss.isfinite()):
                    own[number] = float(loss)
        return {number: loss for part in from_all_ranks(own) for number, loss in part.items()}
