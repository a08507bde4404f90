"""Messages of a command: without those of Lightning that are no news, and with our own errors on one line."""

from __future__ import annotations

import logging
import os
import traceback
import warnings
from pathlib import Path


def quiet() -> None:
    """Leaves out what Lightning says that is no news, or wrong, in a sequence of tasks."""
    warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # our own config.yaml is in it
    warnings.filterwarnings("ignore", message=".*isinstance.treespec")
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # a folder per task
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not record.getMessage().startswith("💡 Tip"))


def own_error(error: BaseException | None) -> BaseException | None:
    """The error of the chain that this library raised itself: its message says it all, a traceback would hide it."""
    package = str(Path(__file__).parents[1]) + os.sep
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if frames and frames[-1].filename.startswith(package) and (frames[-1].line or "").startswith("raise "):
            return error
        error = error.__cause__ or error.__context__
    return None
