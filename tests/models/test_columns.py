"""Progressive networks against a loop over single rows, and what never changes in them."""

from __future__ import annotations

import doctest

import pytest
import torch

from lightning_cl.functional import progressive
from lightning_cl.functional.progressive import count_parameters, lateral_sum
from lightning_cl.models.columns import ProgressiveColumns

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def network(tasks=3, **settings):
    net = ProgressiveColumns(5, [6, 4], lateral_width=3)
    for task in range(tasks):
        net.add_column(2 + task, seed=task, **settings)
    return net


def shaken(net):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return net


def by_hand(net, x, task):
    """Equation 2 for one row, layer by layer and column by column, in float64."""
    values = [[x.double()] * (task + 1)]
    for i in range(len(net.widths)):
        values.append([])
        for k in range(task + 1):
            layer = net.columns[k][i]
            h = layer.weight.double() @ values[i][k] + layer.bias.double()
            if i > 0:
                for j in range(k):
                    lateral = net.laterals[k][i - 1][j]
                    squeezed = (lateral.scale.double() * (lateral.down.double() @ values[i][j])).clamp(min=0)
                    h = h + (lateral.up.double() @ squeezed if k == task or i < len(net.widths) - 1 else 0)
            values[-1].append(h if i == len(net.widths) - 1 else h.clamp(min=0))
    return values[-1][task]


@pytest.mark.parametrize("task", [0, 1, 2])
def test_the_forward_pass_is_equation_2(task):
    net = shaken(network())
    with torch.no_grad():
        made = net(X, task)
        expected = torch.stack([by_hand(net, row, task) for row in X]).float()
    assert made.shape == (7, 2 + task)
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-4)


def test_gradients_agree_with_finite_differences():
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    hidden, down, up = [draw(3, 4), draw(3, 2)], [draw(3, 4), draw(3, 2)], [draw(5, 3), draw(5, 3)]
    scales = [draw(), draw()]

    def f(*tensors):
        return lateral_sum(tensors[:2], tensors[2:4], tensors[4:6], tensors[6:], torch.tanh)

    assert torch.autograd.gradcheck(f, (*hidden, *down, *up, *scales))


def test_old_tasks_stay_to_the_bit_and_only_the_new_column_learns():
    net = network(tasks=0)
    ends = []
    for task in range(3):
        net.add_column(2, seed=task)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        own = [*net.columns[task].parameters(), *net.laterals[task].parameters()]
        assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in own}
        start = [parameter.detach().clone() for parameter in trained]
        optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            net(X, task).pow(2).sum().backward()
            optimizer.step()
        assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
        ends.append(net(X, task).detach())
        assert all(torch.equal(net(X, t), end) for t, end in enumerate(ends))


def test_a_new_column_starts_as_one_without_laterals():
    net = shaken(network(tasks=2))
    task = net.add_column(3, seed=5)
    alone = ProgressiveColumns(5, [6, 4], lateral_width=3)
    alone.add_column(3, seed=5)
    assert torch.equal(net(X, task), alone(X, 0))


def test_a_column_can_start_from_the_previous_one():
    net = shaken(network(tasks=1))
    net.add_column(2, init="previous", seed=3)
    for layer, source in zip(list(net.columns[1])[:-1], net.columns[0], strict=False):
        assert torch.equal(layer.weight, source.weight)
        assert layer.weight is not source.weight
        assert layer.weight.requires_grad
    assert not torch.equal(net.columns[1][-1].weight, net.columns[0][-1].weight)


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_the_formula_counts_the_parameters(columns):
    net = ProgressiveColumns(5, [6, 4], lateral_width=3)
    for task in range(columns):
        net.add_column(2, seed=task)
    assert sum(parameter.numel() for parameter in net.parameters()) == count_parameters([5, 6, 4, 2], columns, 3)


def test_columns_take_no_global_random_number():
    state = torch.get_rng_state()
    network()
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_is_named():
    net = network(tasks=1)
    for task in (1, -1):
        with pytest.raises(ValueError, match=f"task={task}: expected one of the 1 tasks"):
            net(X, task)
    with pytest.raises(ValueError, match="outputs=0"):
        net.add_column(0)
    with pytest.raises(ValueError, match="init='base': expected one of"):
        net.add_column(2, init="base")
    with pytest.raises(ValueError, match=r"hidden=\[\]"):
        ProgressiveColumns(5, [])
    with pytest.raises(ValueError, match="ups: 0 entries"):
        lateral_sum([X], [X], [], [X])
    with pytest.raises(ValueError, match=r"widths=\[5\]"):
        count_parameters([5], 1, 1)


def test_the_examples_run():
    assert doctest.testmod(progressive).failed == 0
