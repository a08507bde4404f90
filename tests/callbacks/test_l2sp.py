"""L2SP against plain loops: which anchor, from when on, how strongly."""

from __future__ import annotations

import pytest
import torch
from regularized import TASKS, Ends, Steps, adamw, assert_same, fit, seeded, weights
from torch.nn import functional as F
from toys import classification

from lightning_cl import L2SP

THREE = TASKS | {"c": classification(3)}


def lockstep(module, batches_of_tasks, strength, anchor, apply):
    """``loss + strength / 2 ‖θ − θ*‖²``, its gradient added to that of the loss or taken implicitly after the step."""
    theta, target = dict(module.named_parameters()), None
    if anchor == "start":
        target = weights(module)
    for batches in batches_of_tasks:
        optimizer = module.make_optimizer(theta.values(), lr=module.lr)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            if target and apply == "gradient":
                for n, p in theta.items():
                    p.grad += strength * (p.detach() - target[n])
            optimizer.step()
            if target and apply == "proximal":
                rate = optimizer.param_groups[0]["lr"]
                with torch.no_grad():
                    for n, p in theta.items():
                        p.copy_((p + rate * strength * target[n]) / (1 + rate * strength))
        if anchor == "previous":
            target = weights(module)
    return target


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, adamw])
@pytest.mark.parametrize("apply", ["gradient", "proximal"])
@pytest.mark.parametrize("anchor", ["previous", "start"])
def test_lockstep_with_a_plain_loop_over_three_tasks(tmp_path, anchor, apply, optimizer):
    method, steps = L2SP(strength=3.0, anchor=anchor, apply=apply), Steps()
    module = fit(tmp_path, [method, steps], seeded(optimizer=optimizer), THREE)
    reference = seeded(optimizer=optimizer)
    target = lockstep(reference, steps.batches, 3.0, anchor, apply)
    assert_same(weights(module), weights(reference), rtol=1e-4, atol=1e-5)
    assert_same(method.anchor, target, rtol=1e-4, atol=1e-5)


def test_the_first_task_is_free_where_the_anchor_is_the_task_before(tmp_path):
    ends = [Ends(), Ends()]
    fit(tmp_path / "1", [L2SP(strength=100.0, apply="proximal"), ends[0]])
    fit(tmp_path / "2", [ends[1]])
    assert_same(ends[0].weights[0], ends[1].weights[0], rtol=0, atol=0)
    assert (ends[0].weights[1]["net.4.weight"] - ends[1].weights[1]["net.4.weight"]).abs().max() > 0.01


def test_the_start_stays_the_anchor_in_all_tasks(tmp_path):
    module = seeded()
    start, method, ends = weights(module), L2SP(strength=1e6, anchor="start", apply="proximal"), Ends()
    fit(tmp_path, [method, ends], module, THREE)
    assert_same(method.anchor, start, rtol=0, atol=0)
    for end in ends.weights:
        assert_same(end, start, rtol=0, atol=1e-5)  # held there, in the first task too


def test_the_anchor_is_a_copy(tmp_path):
    method, module = L2SP(anchor="start"), seeded()
    fit(tmp_path, [method], module)
    before = {n: v.clone() for n, v in method.anchor.items()}
    with torch.no_grad():
        module.net[0].weight.add_(1.0)
    assert_same(method.anchor, before, rtol=0, atol=0)


def test_every_weight_is_as_important_as_any_other(tmp_path):
    method, module = L2SP(strength=0.6), seeded()
    fit(tmp_path, [method], module)
    assert_same(dict(method.importance), {n: torch.ones_like(p) for n, p in module.named_parameters()}, 0, 0)
    anchor = weights(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    distance = sum((p.detach() - anchor[n]).square().sum().item() for n, p in module.named_parameters())
    assert method.penalty(module) == pytest.approx(0.5 * 0.6 * distance, rel=1e-5)


def test_more_tasks_do_not_make_it_stronger(tmp_path):
    method = L2SP()
    fit(tmp_path, [method], tasks=THREE, max_epochs=1)
    assert all((i == 1).all() for i in method.importance.values())


def test_state_is_four_bytes_per_parameter_and_one_number_per_tensor(tmp_path):
    method, module = L2SP(), seeded()
    fit(tmp_path, [method], module)
    count, tensors = sum(p.numel() for p in module.parameters()), len(list(module.parameters()))
    assert 4 * count <= method.state_bytes() <= 4 * count + 8 * tensors


@pytest.mark.parametrize("setting", [{"anchor": "base"}, {"strength": float("nan")}, {"apply": "loss"}])
def test_arguments_out_of_range_are_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        L2SP(**setting)
