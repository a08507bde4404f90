"""Real text in three dissimilar domains that is on every machine with Python and torch: nothing to download.

* ``prose``: English, from ``pydoc_data.topics`` (the language reference that ``help()`` shows).
* ``python``: the standard library's own source files.
* ``cpp``: the C++ headers that torch ships.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

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


SAMPLES: dict[str, Callable[[], list[str]]] = {"prose": prose, "python": python, "cpp": cpp}


def _read(paths: Iterable[Path]) -> list[str]:
    """Files in order until the budget of characters is reached, so that each domain is of similar size."""
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
