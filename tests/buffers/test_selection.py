"""Which samples of a stream a buffer keeps: every one with the same probability, also across an interruption."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch

from lightning_cl.buffers import ReplayBuffer

# 99.9 % quantiles of the chi-square distribution: with fixed seeds a right implementation passes or fails for good.
CHI_SQUARE = {5: 20.52, 11: 31.26, 19: 43.82}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def interrupted(buffer: ReplayBuffer, file=through_a_file) -> ReplayBuffer:
    """A buffer of a new process that goes on from a checkpoint; its own seed must not matter."""
    resumed = ReplayBuffer(buffer.capacity, buffer.policy_name, seed=987)
    resumed.load_state_dict(file(buffer.state_dict()))
    return resumed


def chi_square(kept: Counter, stream: int, size: int, runs: int) -> float:
    """Distance of inclusion counts from uniform; their sum is fixed, hence stream − 1 degrees of freedom."""
    p = size / stream
    variance = runs * p * (1 - p) * stream / (stream - 1)
    return sum((kept[item] - runs * p) ** 2 for item in range(stream)) / variance


def test_reservoir_keeps_every_sample_with_the_same_probability():
    kept = Counter()
    for seed in range(1200):
        buffer = ReplayBuffer(5, seed=seed)
        for item in range(20):
            buffer.add(item, "a")
        kept.update(buffer.items)
    assert chi_square(kept, 20, 5, 1200) < CHI_SQUARE[19]


def test_tiny_reservoir_is_not_off_by_one():
    # Drawing from [0, seen) without the new sample, as one library did, keeps the first with 0.2 instead of 0.33.
    kept = Counter()
    for seed in range(1200):
        buffer = ReplayBuffer(2, seed=seed)
        for item in range(6):
            buffer.add(item, "a")
        kept.update(buffer.items)
    assert chi_square(kept, 6, 2, 1200) < CHI_SQUARE[5]


def test_reservoir_of_one_is_uniform():
    kept = Counter()
    for seed in range(1200):
        buffer = ReplayBuffer(1, seed=seed)
        for item in range(6):
            buffer.add(item, "a")
        kept.update(buffer.items)
    assert chi_square(kept, 6, 1, 1200) < CHI_SQUARE[5]


def test_reservoir_stays_uniform_over_an_interruption():
    kept = Counter()
    for seed in range(1000):
        buffer = ReplayBuffer(4, seed=seed)
        for item in range(12):
            if item == 7:
                # Only the first goes through a file, which takes longer than all the rest.
                buffer = interrupted(buffer, dict if seed else through_a_file)
            buffer.add(item, "a")
        kept.update(buffer.items)
    assert chi_square(kept, 12, 4, 1000) < CHI_SQUARE[11]


@pytest.mark.parametrize("policy", ["reservoir", "task_balanced"])
@pytest.mark.parametrize("stop", [2, 5, 9, 15, 29])
def test_interrupted_stream_goes_on_sample_by_sample(policy, stop):
    straight, stopped = ReplayBuffer(5, policy, seed=3), ReplayBuffer(5, policy, seed=3)
    for item in range(40):
        if item == stop:
            stopped = interrupted(stopped)
        for buffer in (straight, stopped):
            buffer.add(item, "abc"[item // 14])
        assert (straight.items, straight.tasks, straight.seen) == (stopped.items, stopped.tasks, stopped.seen)


@pytest.mark.parametrize("policy", ["reservoir", "task_balanced"])
def test_choosing_before_loading_keeps_what_adding_keeps(policy):
    # The callback asks for slots first and loads only the samples that survive the whole task.
    added, chosen = ReplayBuffer(6, policy, seed=1), ReplayBuffer(6, policy, seed=1)
    for task in "abc":
        slots = {}
        for item in range(25):
            added.add((task, item), task)
            slot = chosen.choose_slot(task)
            if slot is not None:
                slots[slot] = item
        for slot in sorted(slots):
            chosen.put(slot, (task, slots[slot]), task)
    assert (chosen.items, chosen.tasks) == (added.items, added.tasks)


@pytest.mark.parametrize("policy", ["reservoir", "task_balanced"])
def test_same_seed_same_content_and_other_seed_other_content(policy):
    def content(seed):
        buffer = ReplayBuffer(10, policy, seed=seed)
        for item in range(200):
            buffer.add(item, str(item // 100))
        return buffer.items

    assert content(4) == content(4)
    assert content(4) != content(5)


def test_selection_leaves_the_global_random_state_alone():
    import random

    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    buffer = ReplayBuffer(2)
    for item in range(20):
        buffer.add(item, "a")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_balanced_tasks_have_equal_shares_whatever_their_sizes():
    buffer = ReplayBuffer(30, "task_balanced")
    for task, size in (("large", 500), ("medium", 60), ("small", 20)):
        for item in range(size):
            buffer.add((task, item), task)
    assert buffer.counts() == {"large": 10, "medium": 10, "small": 10}


@pytest.mark.parametrize("order", ["small first", "small last"])
def test_what_a_small_task_does_not_need_the_others_keep(order):
    sizes = {"a": 100, "small": 4, "b": 100} if order == "small first" else {"a": 100, "b": 100, "small": 4}
    buffer = ReplayBuffer(24, "task_balanced")
    for task, size in sizes.items():
        for item in range(size):
            buffer.add((task, item), task)
    assert buffer.counts() == {"a": 10, "b": 10, "small": 4}
    assert {item for task, item in buffer.items if task == "small"} == {0, 1, 2, 3}


def test_shares_that_do_not_divide_differ_by_one_at_most():
    buffer = ReplayBuffer(11, "task_balanced")
    for task in "abcd":
        for item in range(50):
            buffer.add(item, task)
    shares = buffer.counts().values()
    assert sum(shares) == 11
    assert max(shares) - min(shares) == 1


def test_balanced_buffer_is_uniform_within_each_task():
    kept = {"a": Counter(), "b": Counter()}
    for seed in range(1000):
        buffer = ReplayBuffer(8, "task_balanced", seed=seed)
        for name in "ab":
            for item in range(12):
                buffer.add(item, name)
        for name, item in zip(buffer.tasks, buffer.items, strict=True):
            kept[name][item] += 1
    assert all(chi_square(counts, 12, 4, 1000) < CHI_SQUARE[11] for counts in kept.values())


def test_balanced_buffer_is_uniform_within_tasks_that_take_turns():
    # A task that has lost samples must not get a slot for certain, only because another one is larger by one.
    kept = Counter()
    for seed in range(1000):
        buffer = ReplayBuffer(5, "task_balanced", seed=seed)
        for item in range(12):
            for name in "ab":
                buffer.add(item, name)
        kept.update(buffer.items)
    expected = sum(kept.values()) / 12
    assert all(abs(kept[item] - expected) < 0.2 * expected for item in range(12))


def test_balanced_buffer_of_one_holds_one_sample():
    buffer = ReplayBuffer(1, "task_balanced")
    for task in "abc":
        for item in range(10):
            buffer.add(item, task)
    assert len(buffer) == 1
    assert buffer.seen == 30


@pytest.mark.parametrize("capacity", [0, -1, 2.5, True, "10", None])
def test_wrong_capacity_is_named_as_buffer_size(capacity):
    with pytest.raises(ValueError, match="buffer_size="):
        ReplayBuffer(capacity)


def test_unknown_policy_is_named_with_the_right_ones():
    with pytest.raises(ValueError, match=r"policy='lifo'.*reservoir.*task_balanced"):
        ReplayBuffer(4, "lifo")


def test_state_of_another_capacity_is_refused():
    with pytest.raises(ValueError, match=r"buffer_size=5 .*4"):
        ReplayBuffer(5).load_state_dict(ReplayBuffer(4).state_dict())


def test_state_of_another_policy_is_refused():
    with pytest.raises(ValueError, match=r"policy='task_balanced' .*'reservoir'"):
        ReplayBuffer(5, "task_balanced").load_state_dict(ReplayBuffer(5).state_dict())
