"""Two worker processes share two cores: one thread each, the longest files first, and nothing waited for in vain."""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from pictures import nobody_looks

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
# The longest first: a long file that starts last runs next to an idle core.
LONGEST_FILES = [
    "tests/test_notebooks.py",
    "tests/distributed/test_ddp.py",
    "tests/distributed/test_third_family_on_ranks.py",
    "tests/test_style.py",
    "tests/test_gpu_script.py",
    "tests/test_resume.py",
]
# What the pictures show, and what has reached the disk, is tested here.
TESTS_OF_PICTURES = ("test_figure.py", "test_report.py", "test_report_page.py", "test_readme.py")
TESTS_OF_DISKS = ("test_disk.py", "test_storage_on_disk.py")


def pytest_collection_modifyitems(items):
    """Moves the longest files to the front; every other file and the tests of a file keep their order."""
    rank = {ROOT / name: position for position, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def pictures_are_composed_once_and_not_rendered(request):
    """They take more time than the training of a tiny model: elsewhere a picture's file holds one pixel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in TESTS_OF_PICTURES:
            nobody_looks(patch.setattr)
        yield


@pytest.fixture(scope="session", autouse=True)
def installed_packages_are_searched_once():
    """Each Trainer searches them all for callbacks of others."""
    from lightning.pytorch.trainer.connectors import callback_connector

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            callback_connector, "_load_external_callbacks", cache(callback_connector._load_external_callbacks)
        )
        yield


@pytest.fixture(scope="session", autouse=True)
def logged_metrics_are_moved_where_they_are_not():
    """Each call of ``log`` moves all that Lightning knows of the metric to the device of the value."""
    from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric

    move = _ResultMetric.to

    def to(self, *place, **how):
        held = [value.device for value in self.__dict__.values() if isinstance(value, torch.Tensor)]
        there = self.is_tensor and not how and all((device,) == place for device in held)
        return self if there else move(self, *place, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ResultMetric, "to", to)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_file_waits_for_the_disk(request):
    """Only a crash of the whole machine could tell."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in TESTS_OF_DISKS:
            patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def pytest_configure(config):
    """Nothing is garbage while tests are collected."""
    gc.disable()


def pytest_collection_finish(session):
    """Thousands of tests and the imported packages stay to the end: the collector need not look at them each time."""
    gc.freeze()
    gc.enable()
