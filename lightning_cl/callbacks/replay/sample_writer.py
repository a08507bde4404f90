"""Writing of texts after many prompts: in batches, shared among ranks; a killed run is resumed."""

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
"""Version of the files and of the drawing of texts; part of the files' names."""


@dataclass(frozen=True)
class WritingSettings:
    """Settings for the writing of texts.

    Args:
        max_new_tokens: the most tokens of a text.
        max_length: the most tokens of prompt and text together; None: no limit.
        temperature: the number that logits are divided by.
        top_p: the total probability of the tokens that are drawn from.
        batch_size: the number of prompts at a time.
    """

    max_new_tokens: int
    max_length: int | None
    temperature: float
    top_p: float
    batch_size: int


class SampleWriter:
    """Lets a model, with its present weights, write after prompts.

    Each prompt has its own random numbers, so batches, ranks and interruptions do not change the texts. Each finished
    batch is a file in ``<cache>/rehearsal/<key>/``. The key depends on everything that decides on the text: weights,
    prompts, settings and seeds.

    Args:
        trainer: the Trainer.
        model: the model with ``generate``, on its device.
        pad_id: the token for padding.
        settings: settings for the texts.

    Attributes:
        tokens: the number of written tokens over all ranks, including those of a killed run that is resumed.
    """

    def __init__(self, trainer: L.Trainer, model: Any, pad_id: int, settings: WritingSettings) -> None:
        self._trainer, self._model, self._pad_id, self._settings = trainer, model, pad_id, settings
        self._weights = checksum(model, frozenset(model.state_dict()))
        self.tokens = 0

    def write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], end_ids: Sequence[int], label: str
    ) -> list[Written]:
        """Lets the model write after each prompt; all ranks get all texts.

        Args:
            prompts: token ids.
            seeds: one seed for each prompt.
            end_ids: tokens that end a text, in addition to those of the model's own ``generation_config``.
            label: text of the progress display.
        """
        folder = self._folder(prompts, seeds, end_ids)
        # Prompts of similar length are in one batch, which needs less padding.
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
            # Learned positions end there; this also limits the padding after a finished text.
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
            # A model with another scale of its adapter is another model.
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
    """Sorts sets, whose order differs between processes."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _read(file: Path, rows: int) -> list[Written] | None:
    """Reads a batch that was written before; None if there is no valid file."""
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
