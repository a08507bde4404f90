"""Retention scores against matrices worked by hand."""

import pytest
import torch

from lightning_cl.functional import (
    average_over_rows,
    average_score,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    kept_shares,
    largest_drop,
    mean_when_learnt,
    share_kept,
    with_worst,
    worst_task,
)

NAN = float("nan")
SINGLE = torch.tensor([0.85, 0.60, 0.90])


def hand_matrix():
    return torch.tensor(
        [
            [0.10, 0.20, 0.30],  # before training
            [0.80, 0.25, 0.35],
            [0.90, 0.70, 0.40],
            [0.60, 0.75, 0.95],
        ]
    )


def close(value):
    return pytest.approx(value, abs=1e-6)


def all_scores(matrix, mode="max", single=SINGLE):
    scores = [backward_transfer(matrix, mode, preset) for preset in ("gem", "trace", "sapt")]
    scores += [forgetting(matrix, mode), forward_transfer(matrix, mode), forward_transfer(matrix, mode, "trace")]
    return [score.item() for score in [*scores, forward_transfer(matrix, mode, "sapt", single)]]


# the definitions


def test_average_is_the_mean_of_the_last_row():
    assert average_score(hand_matrix()).item() == close((0.60 + 0.75 + 0.95) / 3)


@pytest.mark.parametrize(("preset", "tasks"), [("gem", 2), ("trace", 3), ("sapt", 3)])
def test_backward_transfer_divides_by_the_denominator_of_its_preset(preset, tasks):
    expected = ((0.60 - 0.80) + (0.75 - 0.70)) / tasks
    assert backward_transfer(hand_matrix(), preset=preset).item() == close(expected)


def test_gem_is_the_default_preset():
    assert backward_transfer(hand_matrix()).item() == close(-0.075)
    assert forward_transfer(hand_matrix()).item() == close(0.075)


def test_forgetting_is_the_best_earlier_score_minus_the_last():
    # Task 1 was best after task 2, not after its own training: 0.90 − 0.60. Task 2 improved: 0.70 − 0.75.
    assert forgetting(hand_matrix()).item() == close((0.30 - 0.05) / 2)


def test_forgetting_counts_scores_from_before_the_task_was_trained():
    matrix = hand_matrix()
    matrix[1, 1] = 0.85  # Chaudhry's maximum runs over all rows from 1 on
    assert forgetting(matrix).item() == close((0.30 + 0.10) / 2)


def test_forgetting_ignores_the_row_before_training():
    matrix = hand_matrix()
    matrix[0] = 1.0
    assert forgetting(matrix).item() == close(0.125)


def test_forgetting_is_negative_after_improvement():
    matrix = hand_matrix()
    matrix[3] = 1.0  # the last row is not among the earlier ones
    assert forgetting(matrix).item() == close((-0.10 - 0.30) / 2)


@pytest.mark.parametrize("preset", ["gem", "trace"])
def test_forward_transfer_compares_with_the_row_before_training(preset):
    expected = ((0.25 - 0.20) + (0.40 - 0.30)) / 2
    assert forward_transfer(hand_matrix(), preset=preset).item() == close(expected)


def test_sapt_forward_transfer_compares_with_models_of_one_task():
    expected = ((0.80 - 0.85) + (0.70 - 0.60) + (0.95 - 0.90)) / 3
    assert forward_transfer(hand_matrix(), preset="sapt", single_task=SINGLE).item() == close(expected)


def test_min_mode_of_the_negated_matrix_is_max_mode():
    assert all_scores(-hand_matrix(), "min", -SINGLE) == close(all_scores(hand_matrix()))


def test_forgetting_of_a_loss_is_its_rise_over_the_lowest_so_far():
    losses = torch.tensor([[9.0, 9.0], [2.0, 5.0], [3.5, 1.0]])
    assert forgetting(losses, mode="min").item() == close(1.5)


def test_scores_leave_the_matrix_alone():
    matrix = hand_matrix()
    all_scores(matrix)
    all_scores(matrix, "min")
    average_score(matrix)
    assert torch.equal(matrix, hand_matrix())


# unknown entries


def test_average_skips_unknown_entries():
    matrix = hand_matrix()
    matrix[3, 0] = NAN
    assert average_score(matrix).item() == close((0.75 + 0.95) / 2)


@pytest.mark.parametrize("preset", ["gem", "trace", "sapt"])
def test_backward_transfer_counts_the_tasks_that_were_measured(preset):
    """Three tasks; one has another metric than the two others, and so no entries here."""
    nan = float("nan")
    first_two = torch.tensor([[0.1, 0.2, nan], [0.8, 0.1, nan], [0.5, 0.9, nan], [0.4, 0.7, nan]])
    assert backward_transfer(first_two, preset=preset).item() == close((-0.4 - 0.2) / 2)
    first_and_last = torch.tensor([[0.1, nan, 0.2], [0.8, nan, 0.1], [0.5, nan, 0.1], [0.4, nan, 0.7]])
    assert backward_transfer(first_and_last, preset=preset).item() == close(-0.4 if preset == "gem" else -0.4 / 2)
    last = torch.tensor([[nan, nan, 0.2], [nan, nan, 0.1], [nan, nan, 0.1], [nan, nan, 0.7]])
    assert backward_transfer(last, preset=preset).isnan()


def test_backward_transfer_skips_a_task_with_an_unknown_end():
    matrix = hand_matrix()
    matrix[1, 0] = NAN  # R[1, 1]
    assert backward_transfer(matrix).item() == close(0.05)


def test_forgetting_takes_the_best_of_the_known_rows():
    matrix = hand_matrix()
    matrix[2, 0] = NAN
    assert forgetting(matrix).item() == close((0.20 - 0.05) / 2)
    assert forgetting(-matrix, mode="min").item() == close((0.20 - 0.05) / 2)


def test_forgetting_skips_a_task_that_was_never_scored():
    matrix = hand_matrix()
    matrix[1:3, 0] = NAN
    assert forgetting(matrix).item() == close(-0.05)


def test_forward_transfer_skips_unknown_baselines():
    matrix, single = hand_matrix(), SINGLE.clone()
    matrix[0, 1], single[1] = NAN, NAN
    assert forward_transfer(matrix).item() == close(0.10)
    assert forward_transfer(matrix, preset="sapt", single_task=single).item() == close(0.0)


def test_without_the_row_before_training_only_gem_forward_transfer_is_unknown():
    matrix = hand_matrix()
    matrix[0] = NAN
    assert forward_transfer(matrix).isnan()
    assert average_score(matrix).item() == close(2.3 / 3)
    assert backward_transfer(matrix).item() == close(-0.075)
    assert forgetting(matrix).item() == close(0.125)
    assert forward_transfer(matrix, preset="sapt", single_task=SINGLE).item() == close(0.1 / 3)


# what was measured and is not finite

INF = float("inf")


def test_mean_when_learnt_is_the_mean_of_the_diagonal():
    assert mean_when_learnt(hand_matrix()).item() == close((0.80 + 0.70 + 0.95) / 3)
    assert mean_when_learnt(hand_matrix()[:3]).item() == close((0.80 + 0.70) / 2)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize(("mode", "worst"), [("min", INF), ("max", -INF)])
def test_a_measured_score_that_is_not_finite_is_the_worst(broken, mode, worst):
    assert with_worst(torch.tensor([1.0, broken]), mode).tolist() == [1.0, worst]


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_a_task_that_diverged_at_the_end_makes_everything_the_worst(mode, sign):
    """An average of 1.072 must not become 0.143 because a task is broken."""
    matrix = sign * torch.tensor([[3.0, 3.0], [2.0, 3.0], [INF, 0.143]])
    assert average_score(matrix).item() == sign * INF
    assert backward_transfer(matrix, mode).item() == -INF
    assert forgetting(matrix, mode).item() == INF
    assert mean_when_learnt(matrix).item() == close(sign * (2.0 + 0.143) / 2)


def test_a_task_that_diverged_when_learnt_is_no_transfer_and_nothing_was_forgotten_less():
    """A loss of infinity when learnt and at the end, or only when learnt: never NaN, never good."""
    for last in (INF, 2.5):
        matrix = torch.tensor([[3.0, 3.0], [INF, 3.0], [last, 1.0]])
        assert backward_transfer(matrix, "min").item() == -INF
        assert forgetting(matrix, "min").item() == INF
        assert mean_when_learnt(matrix).item() == INF


def test_forgetting_is_since_the_best_finite_score():
    matrix = torch.tensor([[3.0, 3.0, 3.0], [INF, 3.0, 3.0], [2.0, 1.0, 3.0], [2.5, 1.0, 1.0]])
    assert forgetting(matrix, "min").item() == close(0.25)


def test_a_baseline_that_is_not_finite_is_nothing_to_compare_with():
    matrix = torch.tensor([[INF, INF, 4.0], [2.0, 3.0, 3.5], [2.0, 1.0, 3.0], [2.0, 1.0, 1.0]])
    assert forward_transfer(matrix, "min").item() == close(1.0)
    matrix[1, 1] = INF  # the second task, before its own training
    matrix[0, 1] = 3.0
    assert forward_transfer(matrix, "min").item() == -INF


# short sequences


@pytest.mark.parametrize("score", [backward_transfer, forgetting, forward_transfer])
def test_one_task_can_neither_forget_nor_transfer(score):
    assert score(torch.tensor([[0.1], [0.9]])).isnan()


def test_the_average_of_one_task_is_its_score():
    assert average_score(torch.tensor([[0.1], [0.9]])).item() == close(0.9)


def test_a_sequence_under_way_counts_the_tasks_trained_so_far():
    matrix = hand_matrix()[:3]
    assert average_score(matrix).item() == close((0.90 + 0.70) / 2)
    assert backward_transfer(matrix).item() == close(0.90 - 0.80)
    assert backward_transfer(matrix, preset="trace").item() == close((0.90 - 0.80) / 2)
    assert forgetting(matrix).item() == close(0.80 - 0.90)
    assert forward_transfer(matrix).item() == close(0.25 - 0.20)
    assert forward_transfer(matrix, preset="sapt", single_task=SINGLE).item() == close((-0.05 + 0.10) / 2)


def test_after_the_first_of_three_tasks_nothing_can_be_forgotten():
    matrix = hand_matrix()[:2]
    assert backward_transfer(matrix).isnan()
    assert forgetting(matrix).isnan()
    assert forward_transfer(matrix).isnan()


# errors


@pytest.mark.parametrize("score", [average_score, backward_transfer, forgetting, forward_transfer])
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 3, 3)], ids=["vector", "too many rows", "three axes"])
def test_a_matrix_of_the_wrong_shape_is_named(score, shape):
    with pytest.raises(ValueError, match="matrix"):
        score(torch.zeros(shape))


@pytest.mark.parametrize("score", [backward_transfer, forgetting, forward_transfer])
@pytest.mark.parametrize("rows", [2, 4], ids=["first task", "all tasks"])
def test_an_unknown_mode_is_named(score, rows):
    # After the first task already, not hours later.
    with pytest.raises(ValueError, match="mode"):
        score(hand_matrix()[:rows], mode="best")


@pytest.mark.parametrize("score", [backward_transfer, forward_transfer])
def test_an_unknown_preset_is_named(score):
    with pytest.raises(ValueError, match="preset"):
        score(hand_matrix(), preset="best")


def test_sapt_forward_transfer_needs_the_scores_of_single_tasks():
    with pytest.raises(ValueError, match="single_task"):
        forward_transfer(hand_matrix(), preset="sapt")


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_single_task_scores_of_the_wrong_shape_are_named(tasks):
    # One score would broadcast, and a fourth be cut off, without a word.
    with pytest.raises(ValueError, match="single_task"):
        forward_transfer(hand_matrix(), preset="sapt", single_task=torch.zeros(tasks))


# ------------------------------------------------- averages over rows, the worst task, the share kept, a reference


def test_the_average_over_rows_counts_each_row_once():
    rows = [0.80, (0.90 + 0.70) / 2, (0.60 + 0.75 + 0.95) / 3]
    assert average_over_rows(hand_matrix()).item() == close(sum(rows) / 3)
    matrix = hand_matrix()
    matrix[1, 0] = NAN  # a row of which nothing is known does not count
    assert average_over_rows(matrix).item() == close(sum(rows[1:]) / 2)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_worst_task_and_the_largest_drop(mode, sign):
    matrix = sign * hand_matrix()
    assert worst_task(matrix, mode).item() == close(sign * 0.60)
    assert largest_drop(matrix, mode).item() == close(0.80 - 0.60)
    assert largest_drop(sign * hand_matrix()[:2], mode).isnan()  # one task has nothing earlier
    matrix[3, 0] = NAN
    assert worst_task(matrix, mode).item() == close(sign * 0.75)
    assert largest_drop(matrix, mode).item() == close(0.70 - 0.75)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_share_kept_is_a_sum_over_a_sum(mode, sign):
    """Task 1: 0.50 of 0.70 is left; task 2: 0.50 of 0.45. The last task has nothing after it."""
    matrix = sign * hand_matrix()
    assert kept_shares(matrix, mode).tolist() == pytest.approx([0.50 / 0.70, 0.50 / 0.45, NAN], nan_ok=True)
    assert share_kept(matrix, mode).item() == close((0.50 + 0.50) / (0.70 + 0.45))


def test_a_task_that_was_not_learnt_has_no_share():
    matrix = hand_matrix()
    matrix[2, 1] = 0.25 * 1.004  # a gain of less than half a percent
    assert kept_shares(matrix).isnan().tolist() == [False, True, True]
    assert share_kept(matrix).item() == close(0.50 / 0.70)
    matrix = hand_matrix()
    matrix[1, 1] = NAN  # what was never measured is taken from before all training
    assert kept_shares(matrix)[1].item() == close((0.75 - 0.20) / (0.70 - 0.20))
    assert share_kept(hand_matrix()[:2]).isnan()


@pytest.mark.parametrize("hole", [(3, 0), (1, 0)], ids=["at the end", "when learnt"])
def test_a_diverged_task_is_the_worst_in_every_new_score(hole):
    for mode, sign in (("max", 1), ("min", -1)):
        matrix = sign * hand_matrix()
        matrix[hole] = -sign * torch.inf
        assert average_over_rows(matrix).item() == -sign * torch.inf
        assert largest_drop(matrix, mode).item() == torch.inf
        assert share_kept(matrix, mode).item() == -torch.inf
        assert kept_shares(matrix, mode)[0].item() == -torch.inf
        assert worst_task(matrix, mode).item() == (-sign * torch.inf if hole[0] == 3 else close(sign * 0.60))
        if hole[0] == 1:
            assert intransigence(matrix, sign * SINGLE, mode).item() == torch.inf


def test_what_diverged_before_any_training_is_not_known():
    matrix = hand_matrix()
    matrix[0, 0] = -torch.inf
    assert kept_shares(matrix).isnan().tolist() == [True, False, True]
    assert share_kept(matrix).item() == close(0.50 / 0.45)


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_intransigence_is_the_transfer_of_sapt_with_the_other_sign(mode, sign):
    matrix, single = sign * hand_matrix(), sign * SINGLE
    by_hand = ((0.85 - 0.80) + (0.60 - 0.70) + (0.90 - 0.95)) / 3
    assert intransigence(matrix, single, mode).item() == close(by_hand)
    assert forward_transfer(matrix, mode, "sapt", single).item() == close(-by_hand)
    with pytest.raises(ValueError, match="one score for each of the 3 tasks"):
        intransigence(matrix, single[:2], mode)
