"""What notebook 07 tells about the three scenarios is what its stored outputs have, and its network is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

nbformat = pytest.importorskip("nbformat")

NOTEBOOK = nbformat.read(Path(__file__).parents[1] / "notebooks" / "07_scenarios.ipynb", as_version=4)
PRINTED = "".join(
    output.text
    for cell in NOTEBOOK.cells
    if cell.cell_type == "code"
    for output in cell.outputs
    if output.get("name") == "stdout"
)
COLUMNS = ["task, label", "domain", "class", "class, label", "task, no label"]


def number(pattern):
    (found,) = re.findall(pattern + r"\s*(\d+\.\d)%", PRINTED)
    return float(found)


@pytest.fixture(scope="module")
def table():
    rows = re.findall(r"^(naive|EWC|LwF|Replay|joint) +" + r" +".join([r"(\d+\.\d)"] * 5) + "$", PRINTED, re.MULTILINE)
    assert [row[0] for row in rows] == ["naive", "EWC", "LwF", "Replay", "joint"]
    return {name: dict(zip(COLUMNS, map(float, values), strict=True)) for name, *values in rows}


@pytest.fixture(scope="module")
def names():
    """The network and the functions of the notebook, without its data and without a run."""
    space = {"L": L, "nn": nn, "torch": torch, "HELD": None}
    for cell in NOTEBOOK.cells:
        for start in ("PAIR = ", "def seen("):
            if cell.cell_type == "code" and cell.source.startswith(start):
                exec(cell.source.split("\n\n\nMETHODS")[0].split("METHODS = ")[0], space)
    return space


def test_the_scenario_decides_which_methods_help(table):
    naive = {column: table["naive"][column] for column in COLUMNS}
    # With the label each method helps, and all are near the control.
    assert all(naive["task, label"] + 5 < table[m]["task, label"] for m in ("EWC", "LwF", "Replay"))
    assert all(table["joint"]["task, label"] - table[m]["task, label"] < 5 for m in ("EWC", "LwF", "Replay"))
    # Where the task must be found, methods without samples do not; a buffer does.
    assert naive["class"] < 25
    assert max(table[m]["class"] for m in ("EWC", "LwF")) < 40
    assert table["Replay"]["class"] > naive["class"] + 60
    # In between: shared outputs.
    for method in ("EWC", "LwF"):
        assert abs(table[method]["domain"] - naive["domain"]) < 5 < table["Replay"]["domain"] - naive["domain"]


def test_the_label_is_what_was_lost(table):
    for method in ("naive", "EWC", "LwF"):
        assert table[method]["class, label"] > table[method]["class"] + 50
    # Trained with labels, a network is no answer to the question without, not even with all data at once.
    assert all(row["task, no label"] < row["task, label"] - 25 for row in table.values())
    assert re.search(r"answer from +task 1: +0%  task 2: +0%  task 3: +0%  task 4: +0%  task 5: 100%", PRINTED)


def test_finding_the_task_and_answering_in_it_multiply(table):
    found, told = number("the router finds the right task:"), number("the right label")
    assert abs(number("PackNet with the router's label:") - found * told / 100) < 2
    assert number("the label of the next task") == 0
    assert table["Replay"]["class"] < number("PackNet with the router's label:") < table["joint"]["class"]


def test_the_text_quotes_the_stored_numbers():
    """Every percentage with a decimal outside of the exercises was printed."""
    text = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown").split("Exercises")[0]
    quoted = set(re.findall(r"(\d+\.\d) %", text))
    assert len(quoted) > 15
    assert quoted <= set(re.findall(r"\d+\.\d\b", PRINTED))


def test_the_label_only_takes_outputs_away(names):
    torch.manual_seed(0)
    batch = (torch.rand(12, 64), torch.randint(10, (12,)), torch.randint(5, (12,)))
    for scenario in ("task", "domain", "class"):
        module = names["Digits"](scenario)
        free, told = module(batch, label=False), module(batch, label=True)
        if scenario == "domain":
            torch.testing.assert_close(free, told)
            continue
        pair = torch.stack([2 * batch[2], 2 * batch[2] + 1], 1)
        torch.testing.assert_close(told.gather(1, pair), free.gather(1, pair))
        assert told.isfinite().sum(1).tolist() == [2] * 12
    # Under the label, a task's training moves no other task's output.
    module, one = names["Digits"]("task"), (batch[0], torch.full((12,), 6), torch.full((12,), 3))
    module.training_step(one, 0).backward()
    moved = module.net[-1].weight.grad.abs().sum(1)
    assert moved.nonzero().flatten().tolist() == [6, 7]


def test_only_outputs_of_earlier_tasks_are_compared(names):
    batch = (torch.rand(4, 64), torch.full((4,), 6), torch.full((4,), 3))
    shapes = {s: list(names["old"](names["Digits"](s), batch).shape) for s in ("task", "domain", "class")}
    assert shapes == {"task": [4, 3, 2], "domain": [4, 2], "class": [4, 6]}
    logits = names["Digits"]("class").net(batch[0])
    assert names["seen"](names["Digits"]("class"), batch).shape == logits.shape
