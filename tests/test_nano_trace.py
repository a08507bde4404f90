"""nano-TRACE: its tasks are written in TRACE's layout, and the configuration reads them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_cl import TaskDataModule, TaskMatrix, TrainedBPE

ROOT = Path(__file__).parents[1]
SIZES = {"train": 20, "eval": 4, "test": 10}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Tasks that need neither Debian's lists nor a walk through the standard library."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import nano_trace_data

    sys.path.pop(0)
    folder = tmp_path_factory.mktemp("nano")
    only = ("capitals", "sums", "problems", "numbers", "names")
    nano_trace_data.write_data(folder, SIZES, only=only)
    return nano_trace_data, folder, only


def test_splits_have_their_sizes_and_share_no_prompt(made):
    _, folder, only = made
    for name in only:
        splits = {role: json.loads((folder / name / f"{role}.json").read_text()) for role in SIZES}
        assert {role: len(records) for role, records in splits.items()} == SIZES
        train = {record["prompt"] for record in splits["train"]}
        assert not train & {record["prompt"] for role in ("eval", "test") for record in splits[role]}
    facts = {record["answer"] for record in json.loads((folder / "capitals" / "train.json").read_text())}
    assert {record["answer"] for record in json.loads((folder / "capitals" / "test.json").read_text())} <= facts


def test_answers_are_right(made):
    _, folder, _ = made
    for record in json.loads((folder / "sums" / "train.json").read_text()):
        first, second = record["prompt"].removesuffix(" =").split(" + ")
        assert int(record["answer"]) == int(first) + int(second)
    numbers = json.loads((folder / "numbers" / "train.json").read_text())
    assert all(record["answer"][1:].isalpha() for record in numbers)


def test_the_configuration_names_these_tasks_and_reads_them(made):
    data, folder, only = made
    config = yaml.safe_load((ROOT / "configs" / "nano_trace.yaml").read_text())
    tasks = config["data"]["tasks"]
    assert (tasks["order"], tasks["metrics"]) == (list(data.METRICS), data.METRICS)
    (matrix,) = config["trainer"]["callbacks"]
    TaskMatrix(**matrix["init_args"])
    metrics = {name: tasks["metrics"][name] for name in only}
    given = {**tasks, "folder": str(folder), "order": list(only), "metrics": metrics}
    read = TaskDataModule(given, tokenizer=TrainedBPE(1024))
    assert [task.metrics[0] for task in read.tasks] == [data.METRICS[name][0] for name in only]
