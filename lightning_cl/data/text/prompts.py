"""Prompts for generation, cut out of token samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from lightning_cl.data.text.dataset import TokenDataset

_BEGINNING = 32  # tokens of a text that has no prompt


class PromptDataset(Dataset[Any]):
    """Splits each token sample into a prompt and its answer: ``{"prompt": [ids], "reference": [ids]}``.

    The answer is the last run of tokens that bear loss; all before it is the prompt. A sample without a prompt, such as
    plain text, is cut after its first tokens: at most 32, and at most half of it.

    Args:
        samples: token samples.
    """

    def __init__(self, samples: TokenDataset) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        sample = self.samples[index]
        ids, (start, end) = sample["input_ids"].tolist(), answer_in(sample["loss_mask"].tolist())
        return {"prompt": ids[:start], "reference": ids[start:end]}


def answer_in(mask: Sequence[bool]) -> tuple[int, int]:
    """Returns the positions at which the last answer of a sample starts and ends; all before it is the prompt.

    Args:
        mask: True for the tokens that bear loss. Where all do, the answer starts after a few.
    """
    end = max((i + 1 for i, learnt in enumerate(mask) if learnt), default=len(mask))
    start = next((i + 1 for i in reversed(range(end)) if not mask[i]), 0)
    return (start, end) if start > 0 else (min(_BEGINNING, max(1, end // 2)), end)


def join_prompts(samples: Sequence[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
    """Joins prompts to a batch of lists; they are not padded, since generation pads them on the left itself."""
    return {key: [sample[key] for sample in samples] for key in ("prompt", "reference")}
