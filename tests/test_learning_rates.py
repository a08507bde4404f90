"""A factor of the learning rate holds under every schedule: it equals a run that has had it from the start."""

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_cl.core.precision import multiply_learning_rate

SCHEDULES = {
    "cosine": lambda o, f: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.05 * f),
    "restarts": lambda o, f: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.05 * f),
    "cyclic": lambda o, f: lr_scheduler.CyclicLR(o, 0.1 * f, 0.4 * f, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda o, f: lr_scheduler.OneCycleLR(o, 0.4 * f, total_steps=12),
    "step": lambda o, f: lr_scheduler.StepLR(o, 3, 0.5),
    "lambda": lambda o, f: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}


def rates(name, factor, at):
    """Learning rates of 11 steps; `factor` comes at step `at`, or from the start where that is None."""
    begin = factor if at is None else 1.0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2 * begin, momentum=0.9)
    schedule, found = SCHEDULES[name](optimizer, begin), []
    for step in range(11):
        if step == at:
            multiply_learning_rate(optimizer, [schedule], factor)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_half_from_a_step_on_is_half_of_all_that_comes(name):
    plain, halved, from_the_start = rates(name, 1.0, None), rates(name, 0.5, 4), rates(name, 0.5, None)
    assert halved[:4] == plain[:4]
    assert halved[4:] == pytest.approx(from_the_start[4:], rel=1e-9)
    assert halved[4:] == pytest.approx([rate / 2 for rate in plain[4:]], rel=1e-9)
