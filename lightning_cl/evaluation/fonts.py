"""Names of any script in a picture: installed fonts that have their letters, and a readable stand-in where none has."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_OWN = "DejaVu Sans"  # comes with matplotlib
_SHAPED_SINCE = (3, 11)  # earlier ones write Arabic letters apart and in the wrong direction
_JOINED = ((0x0590, 0x08FF), (0x0900, 0x0DFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0xFB1D, 0xFEFC))


def readable(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Makes names that can be drawn.

    A sign that no installed font has is written by its Unicode name (``[rocket]``); a name with letters that no font
    has becomes ``task 2``, by its position in the list.

    Args:
        names: of the tasks, no two alike.

    Returns:
        the names as they are to be drawn, no two alike, and the font families to draw them with.
    """
    plain = [_plain(name) for name in names]
    wanted = frozenset(character for name in plain for character in name)
    families, lacking = _families(wanted)
    shown: list[str] = []
    for number, name in enumerate(plain, start=1):
        label = _drawable(name, lacking) or f"task {number}"
        while label in shown or (label != name and label in plain):
            label += f" ({number})"
        shown.append(label)
    return shown, list(families)


def _plain(name: str) -> str:
    """One line, without signs that only control others."""
    kept = (c if unicodedata.category(c) not in ("Cf", "Cc", "Cs", "Co", "Cn") else " " * c.isspace() for c in name)
    return " ".join("".join(kept).split()) or "?"


def _drawable(name: str, lacking: frozenset[str]) -> str | None:
    """A name with the Unicode names of signs that no font has; None if letters are among them."""
    if not _shapes() and any(low <= ord(c) <= high for c in name for low, high in _JOINED):
        return None
    pieces = []
    for character in name:
        kind = unicodedata.category(character)
        if character not in lacking:
            pieces.append(character)
        elif kind in ("Mn", "Me", "Sk"):
            continue  # a variant of the sign before
        elif kind[0] in "SP":
            pieces.append(f"[{unicodedata.name(character).lower()}]")
        else:
            return None
    return "".join(pieces).strip() or None


@lru_cache(maxsize=1)
def _shapes() -> bool:
    import matplotlib

    return tuple(int(part) for part in matplotlib.__version__.split(".")[:2]) >= _SHAPED_SINCE


@lru_cache(maxsize=8)
def _families(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Font families, matplotlib's own first, that together have as many characters as possible; what none has."""
    from matplotlib.font_manager import fontManager

    families, lacking = [], characters
    # Upright fonts without serifs first, as the rest of the picture.
    fonts = sorted(
        fontManager.ttflist, key=lambda e: (e.name != _OWN, e.style != "normal", "Sans" not in e.name, e.name)
    )
    seen = set()
    for entry in fonts:
        if not lacking:
            break
        if entry.name in seen or "Last Resort" in entry.name:  # which has a box for every character
            continue
        seen.add(entry.name)
        found = _has(entry, lacking)
        if found or entry.name == _OWN:
            families.append(entry.name)
            lacking -= found
    return tuple(families) or (_OWN,), lacking


def _has(entry: Any, characters: frozenset[str]) -> frozenset[str]:
    """Returns the characters that an installed font has as outlines; a font of coloured bitmaps cannot be drawn."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(entry.fname)
        if not font.scalable:
            return frozenset()
        return frozenset(c for c in characters if font.get_char_index(ord(c)))
    except (OSError, RuntimeError, ValueError):
        return frozenset()
