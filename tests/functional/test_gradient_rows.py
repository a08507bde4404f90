"""MIGU's masks on gradient rows against a few lines of numpy."""

import math

import numpy as np
import pytest
import torch

from lightning_cl.functional.migu import mask_rows_, output_magnitudes, row_mask


def outputs(seed, shape=(3, 4, 6), dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def magnitudes_by_hand(h):
    h = np.abs(h.double().numpy().reshape(-1, h.shape[-1]))
    return sum(row / row.sum() for row in h if row.sum() > 0)


# magnitudes


def test_magnitudes_are_normalised_at_each_position():
    h = outputs(0)
    np.testing.assert_allclose(output_magnitudes(h), magnitudes_by_hand(h))
    assert output_magnitudes(h).sum().item() == pytest.approx(12)  # the positions


def test_a_position_of_a_huge_norm_counts_as_one():
    h = outputs(1)
    larger = h.clone()
    larger[0, 0] *= 2.0**20
    torch.testing.assert_close(output_magnitudes(larger), output_magnitudes(h), rtol=1e-12, atol=0)


def test_parts_of_a_batch_add_up():
    h = outputs(2)
    torch.testing.assert_close(output_magnitudes(h[:1]) + output_magnitudes(h[1:]), output_magnitudes(h))


def test_padding_is_left_out():
    h = outputs(3)
    counted = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    torch.testing.assert_close(output_magnitudes(h, counted), output_magnitudes(h[counted]))
    torch.testing.assert_close(output_magnitudes(h, counted.int()), output_magnitudes(h[counted]))
    assert not output_magnitudes(h, torch.zeros(3, 4, dtype=torch.bool)).any()


def test_a_position_of_zeros_has_no_part():
    h = outputs(4)
    h[1, 2] = 0
    np.testing.assert_allclose(output_magnitudes(h), magnitudes_by_hand(h))
    assert not output_magnitudes(torch.zeros(2, 3)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_outputs_are_summed_in_fp32(dtype):
    """In fp16 the norm of one position would overflow, in bf16 the sum would stop at 256."""
    h = torch.full((5000, 2), 4e4, dtype=dtype)
    found = output_magnitudes(h)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([2500, 2500])


def test_no_graph_is_built():
    assert not output_magnitudes(torch.ones(2, 3, requires_grad=True)).requires_grad


# masks


@pytest.mark.parametrize("masked", [0.0, 0.05, 0.3, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("rows", [1, 2, 7, 10])
def test_the_largest_rows_are_updated(rows, masked):
    for seed in range(5):
        # Whole numbers: equal magnitudes are frequent.
        n = torch.randint(0, 4, (rows,), generator=torch.Generator().manual_seed(seed)).double()
        hidden = 0 if masked == 0 else min(rows - 1, max(1, math.floor(masked * rows + 0.5)))
        chosen = sorted(range(rows), key=lambda i, n=n: (-n[i].item(), i))[: rows - hidden]
        assert row_mask(n, masked).nonzero().flatten().tolist() == sorted(chosen)


def test_seven_of_ten_rows_are_masked():
    assert row_mask(torch.arange(10.0)).tolist() == [False] * 7 + [True] * 3


def test_the_mask_does_not_depend_on_the_number_of_positions():
    n = output_magnitudes(outputs(5))
    assert torch.equal(row_mask(8 * n), row_mask(n))


def test_a_masked_weight_does_not_change_the_small_outputs():
    """The point of it: a step of plain SGD on the masked gradient moves only outputs of the updated rows."""
    layer = torch.nn.Linear(5, 8)
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(6))
    before = layer(x)
    updated = row_mask(output_magnitudes(before), 0.5)
    before.square().sum().backward()
    for parameter in layer.parameters():
        mask_rows_(parameter.grad, updated)
    torch.optim.SGD(layer.parameters(), lr=0.01).step()
    moved = (layer(x) != before).any(0)
    assert torch.equal(moved, updated)


@pytest.mark.parametrize("shape", [(6, 4), (6,), (6, 2, 3)])
def test_other_rows_keep_every_bit(shape):
    gradient = outputs(7, shape, torch.float32)
    updated = torch.tensor([True, False, True, False, False, True])
    before = gradient.clone()
    mask_rows_(gradient, updated)
    assert torch.equal(gradient[updated], before[updated])
    assert not gradient[~updated].any()


def test_an_infinite_gradient_is_masked_too():
    gradient = torch.full((2, 2), math.inf)
    mask_rows_(gradient, torch.tensor([False, True]))
    assert gradient.tolist() == [[0.0, 0.0], [math.inf, math.inf]]


def test_nothing_masked_is_no_change():
    gradient = outputs(8, (6, 4), torch.float32)
    before = gradient.clone()
    mask_rows_(gradient, row_mask(output_magnitudes(outputs(9)), 0.0))
    assert torch.equal(gradient, before)


# refusals


def test_what_does_not_fit_is_refused():
    n = torch.ones(4)
    for masked in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"masked: .*expected a number from 0 to 1"):
            row_mask(n, masked)
    with pytest.raises(ValueError, match=r"masked: 1\.0, expected below 1, since no row would be updated"):
        row_mask(n, 1.0)
    with pytest.raises(ValueError, match=r"magnitudes: shape \[2, 2\], expected \[out\]"):
        row_mask(n.reshape(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        row_mask(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match=r"counted: shape \[4\], expected \[2\]"):
        output_magnitudes(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"updated: shape \[4\], expected \[3\]: one for each row"):
        mask_rows_(torch.ones(3, 4), torch.ones(4, dtype=torch.bool))
