"""Real text from different domains that every machine with Python and torch has, so nothing is downloaded.

* ``prose``: English, from ``pydoc_data.topics`` (the language reference that ``help()`` shows).
* ``chat``: conversations about the same topics. A user asks about a topic, an assistant answers with its paragraphs.
* ``python``: the standard library's own source files.
* ``cpp``: the C++ headers that torch ships.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_MAX_CHARACTERS = 600_000


def prose() -> list[str]:
    """English reference prose, one document per topic."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics)]


def python() -> list[str]:
    """Python source, one document per module of the standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return _read(sorted(folder.glob("*.py")))


def cpp() -> list[str]:
    """C++ source, one document per header of torch's own libraries (not the thousands of generated ones)."""
    import torch

    folder = Path(torch.__file__).parent / "include"
    return _read(sorted([*folder.glob("c10/**/*.h"), *folder.glob("torch/csrc/**/*.h")]))


def chat() -> list[dict[str, Any]]:
    """Conversations of two questions and answers, as ``{"messages": […]}``."""
    from pydoc_data.topics import topics

    conversations = []
    for name in sorted(topics):
        heading, *paragraphs = re.split(r"\n\s*\n", topics[name].strip())
        title = " ".join(heading.splitlines()[0].split())
        answers = [" ".join(paragraph.split()) for paragraph in paragraphs if _is_prose(paragraph)]
        for part, (first, second) in enumerate(zip(answers[::2], answers[1::2], strict=False), 1):
            turns = (f"Explain the Python topic {title!r} to me, part {part}.", first, "Please go on.", second)
            roles = ("user", "assistant", "user", "assistant")
            conversations.append(
                {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}
            )
    return conversations


def _is_prose(paragraph: str) -> bool:
    """Tells if a paragraph is neither code (which is indented) nor grammar nor an underlined heading."""
    text = paragraph.strip()
    return (
        len(text) >= 80
        and not paragraph.startswith("   ")
        and not text.startswith((">>>", "..."))
        and "::=" not in text
        and text[:4] not in _RULES
    )


_RULES = ("****", "====", "----", "~~~~", "^^^^")

SAMPLES: dict[str, Callable[[], list[Any]]] = {"prose": prose, "chat": chat, "python": python, "cpp": cpp}


def _read(paths: Iterable[Path]) -> list[str]:
    """Reads files in order until a number of characters is reached, so that domains have similar sizes."""
    texts, characters = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if len(text) < 200 or len(text) > _MAX_CHARACTERS // 6:
            continue
        texts.append(text)
        characters += len(text)
        if characters >= _MAX_CHARACTERS:
            break
    return texts
