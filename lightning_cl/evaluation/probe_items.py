"""Items of a probe: a prompt, the right continuation and wrong ones, in categories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

CATEGORIES = ("knowledge", "language", "arithmetic", "instructions", "refusals", "answers")
"""The categories that come with the library, each a file in ``evaluation/probe``."""


class ProbeItem(NamedTuple):
    """One question of a probe."""

    prompt: str
    """The text before the choices; empty where whole sentences are compared."""
    right: str
    wrong: tuple[str, ...]
    chat: bool = False
    """True if the prompt is what a user says, and the choices are answers."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The right choice, and then the wrong ones."""
        return (self.right, *self.wrong)

    @property
    def chance(self) -> float:
        """The share of right answers of who guesses."""
        return 1 / (1 + len(self.wrong))


def bundled_items(categories: Sequence[str]) -> dict[str, list[ProbeItem]]:
    """Reads categories that come with the library.

    Args:
        categories: some of :data:`CATEGORIES`.
    """
    folder = files("lightning_cl.evaluation") / "probe"
    return {name: _parse((folder / f"{name}.jsonl").read_text(encoding="utf-8"), name) for name in categories}


def items_of_file(path: str | Path) -> list[ProbeItem]:
    """Reads items from a JSONL file: each line has ``prompt``, ``right``, ``wrong`` (a list) and perhaps ``chat``.

    Raises:
        ValueError: if there is no such file, or a line is no item.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"items: {str(path)!r}: there is no such file; expected a JSONL file of items")
    return _parse(file.read_text(encoding="utf-8"), str(path))


def fingerprint_of(texts: Sequence[Any]) -> str:
    """A hash of what was measured on, as plain containers."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()[:16]


def _parse(text: str, name: str) -> list[ProbeItem]:
    items = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            item = ProbeItem(record["prompt"], record["right"], tuple(record["wrong"]), bool(record.get("chat", False)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"items: {name}, line {number}: expected prompt, right and wrong ({error!r})") from None
        texts = [item.prompt, *item.choices]
        if not item.wrong or not all(isinstance(one, str) for one in texts) or not all(item.choices):
            raise ValueError(f"items: {name}, line {number}: expected texts, and at least one wrong choice")
        if item.right in item.wrong:
            raise ValueError(f"items: {name}, line {number}: the right choice {item.right!r} is among the wrong ones")
        items.append(item)
    if not items:
        raise ValueError(f"items: {name}: it has no items")
    return items
