"""Two worker processes share two cores: one thread each, and the longest files first."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
# The longest first: a long file that starts last runs next to an idle core.
LONGEST_FILES = [
    "tests/test_notebooks.py",
    "tests/distributed/test_ddp.py",
    "tests/test_readme.py",
    "tests/test_resume.py",
]


def pytest_collection_modifyitems(items):
    """Moves the longest files to the front; every other file and the tests of a file keep their order."""
    rank = {ROOT / name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
