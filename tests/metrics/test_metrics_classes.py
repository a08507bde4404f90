"""The torchmetrics classes: what the functions say, row by row or at once."""

from __future__ import annotations

import re

import pytest
import torch

from lightning_cl import (
    AverageAccuracy,
    AverageOverRows,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LargestDrop,
    MeanWhenLearnt,
    ShareKept,
    WorstTask,
)
from lightning_cl.functional import (
    average_over_rows,
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    largest_drop,
    mean_when_learnt,
    share_kept,
    worst_task,
)

NAN = float("nan")
SINGLE = torch.tensor([0.85, 0.60, 0.90])
HAND = torch.tensor([[0.10, 0.20, 0.30], [0.80, 0.25, 0.35], [0.90, 0.70, 0.40], [0.60, 0.75, 0.95]])

# metric, the function, and the value worked by hand
CASES = {
    "average": (AverageAccuracy(), average_score, (0.60 + 0.75 + 0.95) / 3),
    "when learnt": (MeanWhenLearnt(), mean_when_learnt, (0.80 + 0.70 + 0.95) / 3),
    "over rows": (AverageOverRows(), average_over_rows, (0.80 + 0.80 + 2.30 / 3) / 3),
    "worst": (WorstTask(), worst_task, 0.60),
    "drop": (LargestDrop(), largest_drop, 0.20),
    "kept": (ShareKept(), share_kept, 1.00 / 1.15),
    "intransigence": (Intransigence(SINGLE), lambda m: intransigence(m, SINGLE), -0.10 / 3),
    "bwt gem": (BackwardTransfer(), backward_transfer, (-0.20 + 0.05) / 2),
    "bwt trace": (BackwardTransfer(preset="trace"), lambda m: backward_transfer(m, preset="trace"), -0.15 / 3),
    "bwt sapt": (BackwardTransfer(preset="sapt"), lambda m: backward_transfer(m, preset="sapt"), -0.15 / 3),
    "forgetting": (Forgetting(), forgetting, (0.30 - 0.05) / 2),
    "fwt gem": (ForwardTransfer(), forward_transfer, (0.05 + 0.10) / 2),
    "fwt trace": (ForwardTransfer(preset="trace"), lambda m: forward_transfer(m, preset="trace"), 0.15 / 2),
    "fwt sapt": (
        ForwardTransfer(preset="sapt", single_task=SINGLE),
        lambda m: forward_transfer(m, preset="sapt", single_task=SINGLE),
        (-0.05 + 0.10 + 0.05) / 3,
    ),
}


def same(value):
    return pytest.approx(float(value), abs=1e-6, nan_ok=True)


@pytest.fixture(params=CASES)
def case(request):
    metric, function, value = CASES[request.param]
    return metric.clone(), function, value


def test_the_whole_matrix_at_once(case):
    metric, function, value = case
    metric.update(HAND)
    assert float(metric.compute()) == same(value)
    assert float(metric.compute()) == same(function(HAND))


def test_row_by_row_is_the_same(case):
    metric, _, value = case
    for row in HAND:
        metric.update(row)
    assert float(metric.compute()) == same(value)


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_a_sequence_under_way_is_scored_after_every_row(rows):
    metric = Forgetting()
    for row in HAND[:rows]:
        metric.update(row)
    assert float(metric.compute()) == same(forgetting(HAND[:rows]))


def test_reset_starts_a_new_matrix(case):
    metric, _, value = case
    metric.update(torch.ones(3, 2))
    metric.reset()
    metric.update(HAND)
    assert float(metric.compute()) == same(value)


@pytest.mark.parametrize("name", ["bwt gem", "forgetting", "fwt gem", "drop"])
def test_mode_min_of_the_negated_matrix_is_mode_max(name):
    metric, _, value = CASES[name]
    lower = type(metric)("min")
    lower.update(-HAND)
    assert float(lower.compute()) == same(value)


@pytest.mark.parametrize("hole", [(1, 0), (2, 0), (3, 0), (0, 1)])
def test_unknown_entries_are_left_out_as_in_the_function(case, hole):
    metric, function, _ = case
    matrix = HAND.clone()
    matrix[hole] = NAN
    metric.update(matrix)
    assert float(metric.compute()) == same(function(matrix))
    assert not function(matrix).isnan()  # the others still make a number


def test_a_row_with_more_tasks_leaves_earlier_entries_unknown():
    metric = AverageAccuracy()
    metric.update(torch.tensor([0.1]))
    metric.update(torch.tensor([0.5, 0.2]))
    metric.update(torch.tensor([0.4, 0.8]))
    assert metric.matrix()[0].isnan().tolist() == [False, True]
    assert float(metric.compute()) == same(0.6)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (AverageAccuracy(), "mean over the tasks"),
        (BackwardTransfer(), "over T - 1"),
        (BackwardTransfer(preset="trace"), r"over T\b(?! -).*trace"),
        (BackwardTransfer(preset="sapt"), r"over T\b(?! -).*sapt"),
        (Forgetting(), "mean over T - 1"),
        (ForwardTransfer(), "tasks 2 to T"),
        (BackwardTransfer("min"), r"\(R\[j, j\] − R\[T, j\]\)"),  # the sign is that of the mode
        (WorstTask("min"), "max_j.*lower is better"),
        (Intransigence(SINGLE), r"\(s_j − R\[j, j\]\).*positive is bad"),
        (ForwardTransfer(preset="sapt", single_task=SINGLE), "alone"),
    ],
)
def test_the_definition_says_what_is_divided_by(metric, words):
    assert re.search(words, metric.definition)


@pytest.mark.parametrize("metric", [BackwardTransfer, Forgetting, ForwardTransfer])
def test_the_definition_says_which_sign_is_good(metric):
    assert ("positive is bad" if metric is Forgetting else "positive is good") in metric().definition


@pytest.mark.parametrize("metric", [AverageAccuracy, BackwardTransfer, Forgetting, ForwardTransfer])
def test_unknown_mode_is_refused_at_once(metric):
    with pytest.raises(ValueError, match=r"mode='best'.*'max'.*'min'"):
        metric(mode="best")


@pytest.mark.parametrize("metric", [BackwardTransfer, ForwardTransfer])
def test_unknown_preset_is_refused_at_once(metric):
    """Not at the first `compute`, which is after the first task."""
    with pytest.raises(ValueError, match=r"preset='best'.*'gem'"):
        metric(preset="best")


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"rows: expected .*\[tasks\]"):
        AverageAccuracy().update(torch.zeros(shape))


def test_state_survives_a_change_of_device_and_type():
    metric = Forgetting()
    metric.update(HAND)
    metric.set_dtype(torch.float64).to("cpu")
    assert float(metric.compute()) == same((0.30 - 0.05) / 2)


def test_double_precision_is_kept_where_it_is_asked_for():
    # TaskMatrix keeps float64: what it reports must not be rounded to float32 on the way.
    metric = AverageAccuracy()
    metric.set_dtype(torch.float64)
    metric.update(torch.tensor([[0.0], [1 + 1e-12]], dtype=torch.float64))
    assert float(metric.compute()) == 1 + 1e-12
