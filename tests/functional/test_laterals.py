"""What a new column takes from the earlier ones."""

import pytest
import torch

from lightning_cl.functional.progressive import fold_gated_adapters, lateral_sum


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(columns, width=6, rank=2):
    hidden = [normal(2, 5, width, seed=i) for i in range(columns)]
    downs = [normal(rank, width, seed=i + 10) for i in range(columns)]
    ups = [normal(width, rank, seed=i + 20) for i in range(columns)]
    gates = [normal(seed=i + 30) for i in range(columns)]
    return hidden, downs, ups, gates


@pytest.mark.parametrize("columns", [1, 3])
def test_lateral_connections_by_hand(columns):
    hidden, downs, ups, gates = parts(columns)
    found = lateral_sum(hidden, downs, ups, gates)
    for row in range(2):
        for position in range(5):
            expected = torch.zeros(6, dtype=torch.float64)
            for h, v, u, g in zip(hidden, downs, ups, gates, strict=True):
                expected += u @ torch.relu(g * (v @ h[row, position]))
            torch.testing.assert_close(found[row, position], expected)


def test_up_projections_of_zero_add_nothing_and_still_learn():
    hidden, downs, ups, _ = parts(2)
    ups = [torch.zeros_like(u, requires_grad=True) for u in ups]
    found = lateral_sum(hidden, downs, ups, [torch.ones(())] * 2)
    assert torch.equal(hidden[0] + found, hidden[0])
    found.sum().backward()
    assert all(u.grad.abs().max() > 0 for u in ups)


def test_folded_adapters_compute_the_gated_sum():
    downs, ups = [normal(r, 6, seed=r) for r in (1, 2, 3)], [normal(5, r, seed=r + 10) for r in (1, 2, 3)]
    gates, x = [0.3, -0.7, 1.0], normal(6, seed=20)
    down, up = fold_gated_adapters(downs, ups, gates)
    assert (down.shape, up.shape) == ((6, 6), (5, 6))
    expected = sum(g * (b @ (a @ x)) for a, b, g in zip(downs, ups, gates, strict=True))
    torch.testing.assert_close(up @ (down @ x), expected)


def test_one_adapter_with_a_gate_of_one_is_itself():
    down, up = fold_gated_adapters([normal(2, 6)], [normal(5, 2, seed=1)], [1.0])
    assert torch.equal(down, normal(2, 6))
    assert torch.equal(up, normal(5, 2, seed=1))


def test_what_does_not_fit_is_an_error():
    hidden, downs, ups, gates = parts(2)
    with pytest.raises(ValueError, match="hidden: no entry"):
        lateral_sum([], [], [], [])
    with pytest.raises(ValueError, match="ups: 1 entries, expected 2 as in `hidden`"):
        lateral_sum(hidden, downs, ups[:1], gates)
    with pytest.raises(
        ValueError, match=r"ups\[1\], downs\[1\]: \[6, 2\] and \[3, 6\], expected \[6, r\] and \[r, 6\]"
    ):
        fold_gated_adapters([downs[0], normal(3, 6)], ups, [1.0, 1.0])
