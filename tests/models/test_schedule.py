"""WarmupDecay and InfiniteLR against their formulas, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from lightning_cl import InfiniteLR, WarmupDecay
from lightning_cl.core.coordinator import scale_learning_rate

PEAK = 0.4


def rates(total, steps=None, **arguments):
    """The learning rate before step 0, 1, … and after the last one."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = WarmupDecay(optimizer, total, **arguments)
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps or total):
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_cosine_by_hand():
    # Two of ten steps warm up; half-way through the other eight the cosine is at the middle of 1 and 0.1.
    seen = rates(10, warmup=0.2, decay="cosine", final=0.1)
    assert seen[:3] == pytest.approx([0.5 * PEAK, PEAK, PEAK])
    assert seen[4] == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert seen[6] == pytest.approx(0.55 * PEAK)
    assert seen[10] == pytest.approx(0.1 * PEAK)


def test_linear_by_hand():
    assert rates(4, warmup=0, decay="linear", final=0.2) == pytest.approx([PEAK * f for f in (1, 0.8, 0.6, 0.4, 0.2)])


def test_constant_warms_up_and_stays():
    assert rates(4, warmup=0.5, decay="constant") == pytest.approx([0.5 * PEAK, PEAK, PEAK, PEAK, PEAK])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_final_zero_ends_at_zero(decay):
    assert rates(5, decay=decay, final=0)[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_steps_beyond_the_end_stay_at_the_end(decay):
    # A cosine that went on would rise again.
    assert rates(4, steps=7, decay=decay, final=0.1)[4:] == pytest.approx([0.1 * PEAK] * 4)


def test_the_first_step_is_never_wasted_on_a_rate_of_zero():
    assert rates(100, warmup=0.1)[0] == pytest.approx(PEAK / 10)


def test_a_share_of_a_step_warms_up_one_whole_step():
    assert rates(10, warmup=0.01, decay="constant") == rates(10, warmup=0.1, decay="constant")


def test_each_parameter_group_keeps_its_own_peak():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    WarmupDecay(optimizer, 10, warmup=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.02])


@pytest.mark.parametrize("argument", ["warmup", "final"])
@pytest.mark.parametrize("value", [-0.1, 1.1, 20, float("nan")])
def test_share_outside_zero_and_one_is_named(argument, value):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with pytest.raises(ValueError, match=f"{argument}={value!r}.*between 0 and 1"):
        WarmupDecay(optimizer, 10, **{argument: value})


def test_unknown_decay_is_named_with_the_known_ones():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    with pytest.raises(ValueError, match=r"decay='exponential'.*cosine.*linear.*constant"):
        WarmupDecay(optimizer, 10, decay="exponential")


# ---------------------------------------------------------------------- InfiniteLR


def infinite(total, index=0, **arguments):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = InfiniteLR(optimizer, total, **arguments)
    schedule.begin_task(index)
    return optimizer, schedule


def walk(optimizer, schedule, steps):
    """The learning rate before each of the next steps, and after the last one."""
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


SHARES = {"warmup": 0.2, "cooldown": 0.4, "constant": 0.5, "anneal": 0.2, "final": 0.125}


def test_first_task_by_hand():
    # Ten steps: two warm up, four cool down from 1 to 1/2, two are constant, two anneal from 1/2 to 1/8.
    cooling = [0.5 + 0.25 * (1 + math.cos(math.pi * part)) for part in (0, 0.25, 0.5, 0.75)]
    by_hand = [0.5, 1, *cooling, 0.5, 0.5, 0.5, 0.25, 0.125]
    assert walk(*infinite(10, **SHARES), 10) == pytest.approx([PEAK * f for f in by_hand])


@pytest.mark.parametrize("index", [1, 7])
def test_later_tasks_start_at_the_constant_rate_and_are_not_warmed_up(index):
    by_hand = [0.5] * 8 + [0.5, 0.25, 0.125]
    assert walk(*infinite(10, index, **SHARES), 10) == pytest.approx([PEAK * f for f in by_hand])


def test_without_annealing_tasks_are_one_unbroken_line():
    arguments = {"warmup": 0.1, "cooldown": 0.3, "constant": 0.4}
    first = walk(*infinite(20, **arguments), 19)
    later = [rate for index in (1, 2) for rate in walk(*infinite(13, index, **arguments), 12)]
    assert [*first, *later][8:] == pytest.approx([0.4 * PEAK] * (12 + 26))


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 333])
@pytest.mark.parametrize("shares", [(0.05, 0.25, 0.1), (0, 0.5, 0.5), (0.5, 0, 0), (0.333, 0.333, 0.334), (0, 0, 0)])
def test_phases_join_without_a_jump(total, shares):
    """After the warm-up the rate never rises, and no step is larger than the shapes of the phases allow."""
    warmup, cooldown, anneal = shares
    seen = walk(*infinite(total, warmup=warmup, cooldown=cooldown, constant=0.5, anneal=anneal, final=0.1), total)
    peak = seen.index(max(seen))
    assert seen[: peak + 1] == sorted(seen[: peak + 1])
    assert seen[peak:] == sorted(seen[peak:], reverse=True)
    assert min(seen) > 0
    if total >= 50 and cooldown:
        shortest = min(share * total for share in (cooldown, anneal) if share)
        # Steepest: a cosine's middle, (1 − ½) π/2 per phase; an exponential's beginning, ½ log 5 per phase.
        assert max(a - b for a, b in zip(seen[peak:], seen[peak + 1 :], strict=False)) <= 0.82 * PEAK / (shortest - 1)


def test_steps_beyond_the_end_stay_where_the_end_is():
    assert walk(*infinite(10, **SHARES), 14)[10:] == pytest.approx([0.125 * PEAK] * 5)
    assert walk(*infinite(10), 14)[10:] == pytest.approx([0.5 * PEAK] * 5)


@pytest.mark.parametrize("index", [0, 2])
def test_state_goes_on_in_the_middle_of_a_task(index):
    reference = walk(*infinite(20, index, **SHARES), 20)
    optimizer, schedule = infinite(20, index, **SHARES)
    begin = walk(optimizer, schedule, 7)
    saved = schedule.state_dict(), optimizer.state_dict()
    assert all(isinstance(value, (int, float, bool, list, type(None))) for value in saved[0].values())
    optimizer, schedule = infinite(20, index, **SHARES)
    schedule.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert begin[:-1] + walk(optimizer, schedule, 13) == reference


@pytest.mark.parametrize("index", [0, 1])
def test_a_tasks_own_learning_rate_is_its_peak(index):
    reference = walk(*infinite(10, index, **SHARES), 10)
    optimizer, schedule = infinite(10, index, **SHARES)
    scale_learning_rate(optimizer, [schedule], 3 * PEAK)
    assert walk(optimizer, schedule, 10) == pytest.approx([3 * rate for rate in reference])


def test_each_parameter_group_has_its_own_constant_rate():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    InfiniteLR(optimizer, 10, constant=0.5).begin_task(1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.05])


@pytest.mark.parametrize("argument", ["warmup", "cooldown", "constant", "anneal", "final"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_infinite_share_outside_zero_and_one_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}.*between 0 and 1"):
        infinite(10, **{argument: value})


def test_shares_of_more_than_all_steps_are_named():
    with pytest.raises(ValueError, match=r"warmup=0.5, cooldown=0.4, anneal=0.2.*at most 1 together, got 1.1"):
        infinite(10, warmup=0.5, cooldown=0.4, anneal=0.2)
    infinite(10, warmup=0.1, cooldown=0.7, anneal=0.2)  # 1.0 up to rounding


@pytest.mark.parametrize("final", [0.0, 0.6])
def test_annealing_ends_above_zero_and_not_above_the_constant_rate(final):
    with pytest.raises(ValueError, match=f"final={final}.*at most constant"):
        infinite(10, constant=0.5, anneal=0.1, final=final)
    infinite(10, constant=0.5, final=final)  # says nothing without annealing


def test_a_constant_rate_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"constant=0.*learn nothing"):
        infinite(10, constant=0)


@pytest.mark.parametrize("index", [-1, 1.0, True, None])
def test_a_task_that_is_no_number_is_named(index):
    with pytest.raises(ValueError, match="begin_task"):
        infinite(10, index)


def test_a_task_cannot_begin_after_its_first_step():
    optimizer, schedule = infinite(10)
    walk(optimizer, schedule, 3)
    with pytest.raises(RuntimeError, match=r"begin_task\(index=1\): 3 steps are taken"):
        schedule.begin_task(1)


# ---------------------------------------------------------------------- configurations

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "schedules").glob("*.yaml")), ids=lambda path: path.stem)
def test_overlay_replaces_the_quickstarts_schedule_and_leaves_nothing_of_it(path, capsys):
    from lightning_cl.cli.command import main

    arguments = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(path), "--print_config"]
    with pytest.raises(SystemExit):
        main(["fit", *arguments])
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert printed["schedule"] == yaml.safe_load(path.read_text())["model"]["init_args"]["schedule"]
    assert printed["optimizer"]["init_args"]["lr"] == 2e-3  # the rest of the quickstart is still there
    kind = {"rewarm": "WarmupDecay", "constant": "WarmupDecay", "infinite": "InfiniteLR"}[path.stem]
    assert printed["schedule"]["class_path"] == f"lightning_cl.{kind}"
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    {"WarmupDecay": WarmupDecay, "InfiniteLR": InfiniteLR}[kind](optimizer, 100, **printed["schedule"]["init_args"])
