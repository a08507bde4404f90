"""PackNet on changes: owners by hand, old views to the bit under AdamW, and the books of what is free."""

import math

import numpy as np
import pytest
import torch

from lightning_cl.functional.packnet import claim, free_share, hold_, movable, no_owners, task_view

SHAPES = {"weight": (5, 3), "bias": (4,), "scale": ()}


def normal(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for n, shape in SHAPES.items()}


def clones(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def claim_by_hand(base, now, owner, task, share):
    """One tensor; one entry after the other."""
    base, now, owned = (t.double().numpy().ravel() for t in (base, now, owner))
    free = [i for i in range(len(owned)) if owned[i] == 0]
    number = min(len(free), max(1, math.floor(share * len(free) + 0.5)))
    for i in sorted(free, key=lambda i: (-abs(now[i] - base[i]), i))[:number]:
        owned[i] = task
    return owned


def pack(tasks, share=0.3, dtype=torch.float32):
    """Base, weights and owners after tasks that move everything that is free, and the views when each was learnt."""
    base, owner, views = normal(0, dtype), no_owners(normal(0)), []
    now = clones(base)
    for task in range(1, tasks + 1):
        free, change = movable(owner), normal(100 * task, dtype)
        now = {n: torch.where(free[n], now[n] + change[n], now[n]) for n in now}
        owner = claim(base, now, owner, task, share)
        now = task_view(base, now, owner, 255)
        views.append(clones(task_view(base, now, owner, task)))
    return base, now, owner, views


# who owns what


@pytest.mark.parametrize("share", [0.01, 0.25, 0.3, 0.5, 1.0])
def test_the_largest_changes_are_claimed(share):
    base = {name: torch.round(4 * tensor) for name, tensor in normal(1).items()}
    owner = no_owners(base)
    for task in (1, 2, 3):
        now = {n: base[n] + torch.round(2 * normal(10 + task)[n]) for n in base}  # equal changes are frequent
        found = claim(base, now, owner, task, share)
        for name in SHAPES:
            expected = claim_by_hand(base[name], now[name], owner[name], task, share)
            np.testing.assert_array_equal(found[name].numpy().ravel(), expected)
        owner = found


def test_owners_keep_what_they_have():
    first, more = pack(1)[2], pack(3)[2]
    for name in SHAPES:
        assert torch.equal(first[name] == 1, more[name] == 1)


def test_equal_parts_for_every_task():
    """A share of 1 / (T − t + 1) of what is free."""
    base, now = {"w": torch.zeros(4, 5)}, {"w": torch.randn(4, 5, generator=torch.Generator().manual_seed(2))}
    owner = no_owners(base)
    for task in range(1, 5):
        owner = claim(base, now, owner, task, 1 / (4 - task + 1))
    assert [(owner["w"] == task).sum().item() for task in range(5)] == [0, 5, 5, 5, 5]


def test_a_full_tensor_gives_nothing():
    base = {"w": torch.zeros(3)}
    owner = claim(base, {"w": torch.ones(3)}, no_owners(base), 1, 1.0)
    assert claim(base, {"w": torch.ones(3)}, owner, 2, 0.5)["w"].tolist() == [1, 1, 1]


def test_the_share_that_is_free_counts_all_entries():
    owner = {"a": torch.tensor([0, 1, 2, 0], dtype=torch.uint8), "b": torch.zeros(6, dtype=torch.uint8)}
    assert free_share(owner) == 0.8
    assert free_share(no_owners(normal(3))) == 1.0
    assert free_share({}) == 0.0


def test_changes_in_sixteen_bits_are_compared_in_fp32():
    """1 + 2⁻⁷ and 0.01 in bf16: changes of 0.0078 and 0.01, the second of which bf16 can't see next to 1."""
    base = {"w": torch.tensor([1.0, 0.0], dtype=torch.bfloat16)}
    now = {"w": torch.tensor([1 + 2**-7, 0.01], dtype=torch.bfloat16)}
    assert claim(base, now, no_owners(base), 1, 0.5)["w"].tolist() == [0, 1]


# views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_view_is_the_same_for_ever(dtype):
    base, now, owner, views = pack(4, dtype=dtype)
    torch.testing.assert_close(task_view(base, now, owner, 0), base, rtol=0, atol=0)
    for task, expected in enumerate(views, start=1):
        torch.testing.assert_close(task_view(base, now, owner, task), expected, rtol=0, atol=0)
        assert all(t.dtype == dtype for t in expected.values())


def test_a_view_is_new_memory():
    base, now, owner, _ = pack(1)
    found = task_view(base, now, owner, 1)
    found["bias"] += 1
    assert not torch.equal(found["bias"], task_view(base, now, owner, 1)["bias"])


def test_a_view_takes_bits_and_does_not_compute():
    base = {"w": torch.tensor([-0.0, math.inf, math.nan])}
    now = {"w": torch.tensor([1.0, math.nan, -0.0])}
    owner = {"w": torch.tensor([0, 0, 1], dtype=torch.uint8)}
    found = task_view(base, now, owner, 1)["w"]
    assert torch.equal(found.view(torch.int32), torch.tensor([-0.0, math.inf, -0.0]).view(torch.int32))


# training


def test_two_phases_under_adamw_leave_old_tasks_alone():
    """Momentum and weight decay pull at every entry; after two tasks the view of the first has every bit."""
    generator = torch.Generator().manual_seed(4)
    base = {"w": torch.randn(6, 4, generator=generator)}
    now, owner, views = clones(base), no_owners(base), []
    for task in (1, 2, 3):
        goal = torch.randn(6, 4, generator=generator)
        parameter = torch.nn.Parameter(now["w"].clone())
        optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
        for phase in (1, 2):
            kept, may_move = {"w": parameter.detach().clone()}, movable(owner, None if phase == 1 else task)
            for _ in range(10):
                optimizer.zero_grad()
                (parameter - goal).square().sum().backward()
                optimizer.step()
                hold_({"w": parameter}, kept, may_move)
            moved = parameter.detach() != kept["w"]
            assert torch.equal(moved, may_move["w"])
            if phase == 1:
                owner = claim(base, {"w": parameter.detach()}, owner, task, 0.3)
                with torch.no_grad():
                    parameter.copy_(task_view(base, {"w": parameter.detach()}, owner, 255)["w"])
        now = {"w": parameter.detach().clone()}
        views.append(task_view(base, now, owner, task)["w"])
    for task, expected in enumerate(views, start=1):
        assert torch.equal(task_view(base, now, owner, task)["w"], expected)
        assert (expected != base["w"]).sum() == (owner["w"].gt(0) & owner["w"].le(task)).sum()


def test_the_masks_of_both_phases():
    owner = {"w": torch.tensor([0, 1, 2, 0], dtype=torch.uint8)}
    assert movable(owner)["w"].tolist() == [True, False, False, True]
    assert movable(owner, 2)["w"].tolist() == [False, False, True, False]


def test_the_order_of_names_does_not_matter():
    base, now, owner = normal(5), normal(6), no_owners(normal(5))
    expected = claim(base, now, owner, 1, 0.4)
    turned = claim(dict(reversed(base.items())), dict(reversed(now.items())), dict(reversed(owner.items())), 1, 0.4)
    torch.testing.assert_close(turned, expected, rtol=0, atol=0)


def test_the_owners_given_are_not_changed():
    base, owner = normal(7), no_owners(normal(7))
    claim(base, normal(8), owner, 1, 0.5)
    assert not any(owned.any() for owned in owner.values())


# refusals


def test_what_does_not_fit_is_refused():
    base, now = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    owner = no_owners(base)
    for task in (0, 256, -1):
        with pytest.raises(ValueError, match=f"task: {task}, expected a number from 1 to 255"):
            claim(base, now, owner, task, 0.5)
    with pytest.raises(ValueError, match="task: 256, expected a number from 0 to 255"):
        task_view(base, now, owner, 256)
    with pytest.raises(ValueError, match="task: 0, expected a number from 1"):
        movable(owner, 0)
    with pytest.raises(ValueError, match=r"share: 0\.0, expected a number above 0"):
        claim(base, now, owner, 1, 0.0)
    claimed = claim(base, now, owner, 1, 0.5)
    with pytest.raises(ValueError, match="task: 1 owns entries of 'w' already"):
        claim(base, now, claimed, 1, 0.5)
    with pytest.raises(ValueError, match="base: no tensor 'w'"):
        task_view({}, now, owner, 1)
    with pytest.raises(ValueError, match="owner: no tensor 'w'"):
        task_view(base, now, {}, 1)
    with pytest.raises(ValueError, match=r"base\[w\]: shape \[1\], expected \[3\]"):
        task_view({"w": torch.zeros(1)}, now, owner, 1)
    with pytest.raises(ValueError, match=r"owner\[w\]: torch\.int64 of shape \[3\], expected uint8 of shape \[3\]"):
        task_view(base, now, {"w": torch.zeros(3, dtype=torch.int64)}, 1)
    with pytest.raises(ValueError, match="NaN"):
        claim(base, {"w": torch.tensor([1.0, math.nan, 0.0])}, owner, 1, 0.5)


def test_masks_and_kept_weights_that_do_not_fit_are_refused():
    weights, mask = {"w": torch.zeros(3)}, {"w": torch.ones(3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="kept: no tensor 'w'"):
        hold_(weights, {}, mask)
    with pytest.raises(ValueError, match=r"kept\[w\]: shape \[1\], expected \[3\]"):
        hold_(weights, {"w": torch.zeros(1)}, mask)
    with pytest.raises(ValueError, match=r"may_move\[w\]: torch\.uint8 of shape \[3\], expected bool"):
        hold_(weights, weights, {"w": torch.ones(3, dtype=torch.uint8)})
