"""WarmupDecay against its formula, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl import WarmupDecay

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
