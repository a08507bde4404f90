"""A model writes after many prompts: in batches, shared among ranks, and going on where a killed run stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.core.ranks import from_all_ranks
from lightning_cl.files import cache_folder, replace_file
from lightning_cl.models.frozen_base import checksum
from lightning_cl.passes.generation import Written, sample_tokens
from lightning_cl.passes.passes import forward_context, progress
from lightning_cl.random_state import untouched_random_state

FORMAT = 1
"""Of the files, and of how texts are drawn; part of their names."""


@dataclass(frozen=True)
class WritingSettings:
    """Settings for the writing of texts.

    Args:
        max_new_tokens: the longest text.
        max_length: the most tokens of prompt and text together; None: as many as there are.
        temperature: what logits are divided by.
        top_p: the probability of what is drawn from.
        batch_size: prompts at a time.
    """

    max_new_tokens: int
    max_length: int | None
    temperature: float
    top_p: float
    batch_size: int


class SampleWriter:
    """Lets a model write behind prompts, as it is now.

    Each prompt has random numbers of its own, so that batches, ranks and stops make no difference to what is drawn.
    Each batch that is done is a file in ``<cache>/rehearsal/<key>/``; the key holds everything that decides about the
    text: weights, prompts, settings and seeds.

    Args:
        trainer: the Trainer.
        model: with ``generate``, where it computes.
        pad_id: what to pad with.
        settings: how.

    Attributes:
        tokens: how many tokens were written, over all ranks, by this run or by the one before it that was killed.
    """

    def __init__(self, trainer: L.Trainer, model: Any, pad_id: int, settings: WritingSettings) -> None:
        self._trainer, self._model, self._pad_id, self._settings = trainer, model, pad_id, settings
        self._weights = checksum(model, frozenset(model.state_dict()))
        self.tokens = 0

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end_ids: Sequence[int], label: str
    ) -> list[Written]:
        """Lets the model write after each prompt; the same on all ranks.

        Args:
            prompts: token ids.
            seeds: one for each prompt.
            end_ids: tokens that end a text, next to those of the model's own ``generation_config``.
            label: what the progress display says.
        """
        folder = self._folder(prompts, seeds, end_ids)
        # Prompts of like length next to each other: less padding.
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        size = self._settings.batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        rank, ranks = self._trainer.global_rank, self._trainer.world_size
        ours = range(rank, len(batches), ranks)
        texts: dict[int, Written] = {}
        with untouched_random_state():
            for number in progress(self._trainer, ours, label, len(ours)):
                rows = batches[number]
                file = folder / f"{number}.json"
                done = _read(file, len(rows))
                if done is None:
                    done = self._batch([prompts[row] for row in rows], [seeds[row] for row in rows], end_ids)
                    _write(file, done)
                texts.update(zip(rows, done, strict=True))
        for part in from_all_ranks(texts):
            texts.update(part)
        self.tokens += sum(len(text.ids) for text in texts.values())
        return [texts[row] for row in range(len(prompts))]

    def _batch(self, prompts: list[Sequence[int]], seeds: list[int], end_ids: Sequence[int]) -> list[Written]:
        settings = self._settings
        room = settings.max_new_tokens
        if settings.max_length is not None:
            # Learned positions end there, also for the padding after a text that has ended.
            room = min(room, settings.max_length - max(len(prompt) for prompt in prompts))
        with forward_context(self._trainer):
            return sample_tokens(
                self._model, prompts, room, self._pad_id, seeds, settings.temperature, settings.top_p, end_ids
            )

    def _folder(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end_ids: Sequence[int]) -> Path:
        adapters = getattr(self._model, "peft_config", None) or {}
        key = {
            "format": FORMAT,
            "weights": self._weights,
            # With another scale of its adapter it is another model.
            "model": [config.to_dict() for config in (self._model.config, *adapters.values())],
            "precision": str(self._trainer.precision),
            "prompts": [list(prompt) for prompt in prompts],
            "seeds": list(seeds),
            "ends": sorted(end_ids),
            **asdict(self._settings),
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=_plain).encode()).hexdigest()
        return cache_folder() / "rehearsal" / digest[:32]


def _plain(value: Any) -> Any:
    """Sets have another order in each process."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _read(file: Path, rows: int) -> list[Written] | None:
    """A batch that was written before, if its file is there and whole."""
    try:
        if not file.exists():
            return None
        texts = [Written(**text) for text in json.loads(file.read_text(encoding="utf-8"))]
        if len(texts) != rows or not all(text.ids and all(type(i) is int for i in text.ids) for text in texts):
            raise ValueError(f"expected {rows} texts")
        return texts
    except (OSError, ValueError, TypeError) as error:
        rank_zero_warn(f"{file}: a damaged file in the cache of rehearsal samples ({error}); it is made again")
        return None


def _write(file: Path, texts: list[Written]) -> None:
    content = json.dumps([asdict(text) for text in texts])
    try:
        replace_file(file, lambda path: path.write_text(content, encoding="utf-8"))
    except OSError as error:
        rank_zero_warn(f"{file}: rehearsal samples cannot be kept there ({error}); a run that is killed starts anew")
