"""The plan of mixed batches: the ratio in every window, every new sample once, epochs of constant length."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_cl.data.mixing.plan import (
    Source,
    Span,
    balanced_order,
    mixed_length,
    plan_batches,
    plan_mixed_batches,
    share_of_rank,
)
from lightning_cl.data.mixing.ratio import Curve

RATIOS = [0.01, 0.05, 0.25, 0.5, 0.9]
NEW, OLD = 400, 150
START = 10_000  # indices of replayed samples


def weights_of(kind: str) -> dict[int, int]:
    """New samples have the indices 0 …, replayed ones START …"""
    rng = random.Random(5)
    draw = {
        "ones": lambda: 1,
        "even": lambda: rng.randint(20, 60),
        "skewed": lambda: max(1, int(rng.lognormvariate(3, 1.2))),
    }[kind]
    return {index: draw() for index in [*range(NEW), *range(START, START + OLD)]}


def epoch_of(weights, ratio, *, mode="replace", batch_size=8, epoch=0, drop_last=False, new=NEW):
    """A plan as a loader asks for it: random order, passes over the buffer in random order."""
    rng = random.Random(1000 + epoch)
    order = rng.sample(range(new), new)

    cycle = balanced_order(rng.sample(range(START, START + OLD), OLD), weights.__getitem__)
    start = rng.randrange(OLD)

    def draws():
        while True:
            yield from cycle[start:] + cycle[:start]

    mean = sum(weights[i] for i in range(START, START + OLD)) / OLD
    sources = [Source(draws(), mean, Curve.constant(ratio))]
    return plan_mixed_batches(
        order, sources, weights.__getitem__, batch_size, mode, Span(epoch, epoch + 1), drop_last=drop_last
    )


def source(mean: float, ratio: float) -> Source:
    """One that is only asked for its share."""
    return Source(iter(()), mean, Curve.constant(ratio))


def worst_window(batches, weights, ratio) -> float:
    """How far, in weight, the replayed part of any window of samples is from its share."""
    error = list(
        itertools.accumulate((weights[i] * ((i >= START) - ratio) for i in itertools.chain(*batches)), initial=0.0)
    )
    return max(error) - min(error)  # the largest difference of two prefixes


@pytest.mark.parametrize("kind", ["ones", "even", "skewed"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_ratio_holds_within_one_sample_in_every_window(mode, ratio, kind):
    # Derivation: after each sample owed lies in [−w/2, w/2 + odds·new], so (1−r)·w + r·new bounds a difference. In
    # `add` mode new samples come batch by batch, which adds the share owed to one batch.
    weights = weights_of(kind)
    bound = max(weights.values()) * (1 if mode == "replace" else 1 + 8 * ratio)
    for epoch in range(8):
        assert worst_window(epoch_of(weights, ratio, mode=mode, epoch=epoch), weights, ratio) <= bound + 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_ratio_holds_in_an_epoch_that_sees_a_part_of_a_large_buffer(seed):
    # 100 draws of 1 or 19 tokens can weigh a tenth more or less than expected, if they are taken as they come.
    weights = dict.fromkeys(range(100), 10) | {START + i: 1 if i % 2 else 19 for i in range(500)}
    order = balanced_order(random.Random(seed).sample(range(START, START + 500), 500), weights.__getitem__)
    batches = plan_mixed_batches(
        range(100), [Source(itertools.cycle(order), 10.0, Curve.constant(0.5))], weights.__getitem__, 8, "replace"
    )
    assert worst_window(batches, weights, 0.5) <= 19


@pytest.mark.parametrize("kind", ["ones", "even", "skewed"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_holds_over_many_epochs(ratio, kind):
    weights = weights_of(kind)
    slots = [i for epoch in range(20) for batch in epoch_of(weights, ratio, epoch=epoch) for i in batch]
    replayed = sum(weights[i] for i in slots if i >= START)
    assert replayed / sum(weights[i] for i in slots) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("kind", ["ones", "even", "skewed"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_every_new_sample_comes_once_in_each_epoch(mode, ratio, kind):
    weights = weights_of(kind)
    for epoch in range(4):
        slots = itertools.chain(*epoch_of(weights, ratio, mode=mode, epoch=epoch))
        assert sorted(i for i in slots if i < START) == list(range(NEW))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", ["ones", "even", "skewed"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_epoch_has_the_announced_number_of_batches(ratio, kind, drop_last):
    # Lightning asks for the length once; schedules are made for it.
    weights = weights_of(kind)
    mean = sum(weights[i] for i in range(START, START + OLD)) / OLD
    length = mixed_length(NEW, sum(weights[i] for i in range(NEW)), [source(mean, ratio)], 8, drop_last)
    lengths = {len(epoch_of(weights, ratio, epoch=epoch, drop_last=drop_last)) for epoch in range(12)}
    assert lengths == {length}


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_epoch_takes_one_over_one_minus_ratio_times_the_batches(ratio):
    assert mixed_length(8000, 8000, [source(1.0, ratio)], 8) == pytest.approx(1000 / (1 - ratio), abs=1)


@pytest.mark.parametrize("kind", ["ones", "skewed"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_replaced_batches_never_grow(ratio, kind):
    weights = weights_of(kind)
    assert all(1 <= len(batch) <= 8 for epoch in range(6) for batch in epoch_of(weights, ratio, epoch=epoch))


@pytest.mark.parametrize("ratio", RATIOS)
def test_added_samples_come_on_top_of_full_batches(ratio):
    batches = epoch_of(weights_of("skewed"), ratio, mode="add", batch_size=9)
    assert [sum(i < START for i in batch) for batch in batches] == [9] * (NEW // 9) + [NEW % 9]


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_ratio_below_one_sample_per_epoch_is_kept_over_epochs(mode):
    weights = weights_of("ones")
    counts = [
        sum(i >= START for i in itertools.chain(*epoch_of(weights, 0.01, mode=mode, epoch=epoch, new=30)))
        for epoch in range(100)
    ]
    assert set(counts) == {0, 1}
    assert sum(counts) == pytest.approx(100 * 30 * 0.01 / 0.99, abs=1)


@pytest.mark.parametrize("ratio", RATIOS)
def test_replay_is_spread_over_the_epoch(ratio):
    batches = epoch_of(weights_of("ones"), ratio, batch_size=8)
    assert all(abs(sum(i >= START for i in batch) - ratio * len(batch)) <= 1 for batch in batches)


@pytest.mark.parametrize("ratio", RATIOS)
def test_replaced_batches_are_full_but_for_the_last_two(ratio):
    # A last batch with a single sample would stop a module with batch norm.
    sizes = [len(batch) for batch in epoch_of(weights_of("skewed"), ratio)]
    assert set(sizes[:-2]) == {8}
    assert all(4 <= size <= 8 for size in sizes)


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_drop_last_gives_only_full_batches(mode, ratio):
    batches = epoch_of(weights_of("skewed"), ratio, mode=mode, batch_size=9, drop_last=True)
    sizes = [len(batch) if mode == "replace" else sum(i < START for i in batch) for batch in batches]
    assert set(sizes) == {9}


def test_plain_batches_are_those_of_a_batch_sampler():
    from torch.utils.data import BatchSampler

    for drop_last in (False, True):
        assert plan_batches(range(23), 4, drop_last) == list(BatchSampler(range(23), 4, drop_last))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [12, 7, 1])
def test_ranks_together_have_the_global_batch(size, world_size):
    parts = [share_of_rank(range(size), rank, world_size) for rank in range(world_size)]
    assert set(itertools.chain(*parts)) == set(range(size))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("size", [12, 7, 1])
def test_ranks_have_parts_of_one_size(size, world_size):
    # A rank with one sample or batch fewer would wait forever in the next reduction.
    assert len({len(share_of_rank(range(size), rank, world_size)) for rank in range(world_size)}) == 1


def test_ranks_share_without_repetition_where_the_batch_divides():
    parts = [share_of_rank(range(12), rank, 3) for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(12))


def test_a_balanced_order_is_a_permutation_of_even_stretches():
    weights = {i: 1 if i % 3 else 40 for i in range(600)}
    order = balanced_order(random.Random(0).sample(range(600), 600), weights.__getitem__)
    assert sorted(order) == list(range(600))
    surplus = list(itertools.accumulate(weights[i] - 14 for i in order))
    assert max(map(abs, surplus)) <= 80  # two of the long ones; in random order it walks to some hundreds


def test_every_length_is_replayed_alike_at_a_small_share():
    # 300 stored samples of 20, 74 and 128 tokens: the ones of mean length must not push the others out.
    weights = dict.fromkeys(range(400), 74) | {START + i: (20, 74, 128)[i % 3] for i in range(300)}
    drawn = dict.fromkeys((20, 74, 128), 0)
    for seed in range(60):
        rng = random.Random(seed)
        cycle = balanced_order(rng.sample(range(START, START + 300), 300), weights.__getitem__)
        start = rng.randrange(300)
        draws = itertools.cycle(cycle[start:] + cycle[:start])
        batches = plan_mixed_batches(
            range(400), [Source(draws, 74.0, Curve.constant(0.02))], weights.__getitem__, 8, "replace", Span(seed)
        )
        for i in itertools.chain(*batches):
            if i >= START:
                drawn[weights[i]] += 1
    total = sum(drawn.values())
    assert total > 300
    assert all(abs(count / total - 1 / 3) < 0.06 for count in drawn.values())
