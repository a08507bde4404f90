"""Where things that were computed once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$LIGHTNING_CL_CACHE``, or ``~/.cache/lightning_cl``."""
    return Path(os.environ.get("LIGHTNING_CL_CACHE") or Path.home() / ".cache" / "lightning_cl")
