"""What a policy keeps of a stream, by exact probabilities and counting, and budgets in every unit."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict

import pytest
import torch

from lightning_cl.buffers import DiskStore, ReplayBuffer

POLICIES = ["reservoir", "task_balanced", "class_balanced", "fifo", "surprise", "herding", "k_center"]
UNITS = ["samples", "tokens", "bytes"]
# 99.9 % quantiles of the chi-square distribution: with fixed seeds a right implementation passes or fails for good.
CHI_SQUARE = {5: 20.52, 9: 27.88, 11: 31.26, 19: 43.82}


def document(number: int, length: int = 4, label: int = 0) -> dict:
    """A token sequence with a number of its own."""
    return {
        "input_ids": torch.full((length,), number, dtype=torch.int32),
        "loss_mask": torch.ones(length, dtype=torch.bool),
        "label": label,
    }


def plain(number: int, length: int) -> dict:
    sample = document(number, length)
    del sample["label"]
    return sample


def numbers_in(buffer) -> list[int]:
    return [int(sample["input_ids"][0]) for sample in buffer.items]


def interrupted(buffer: ReplayBuffer) -> ReplayBuffer:
    """A buffer of a new process that goes on from a checkpoint; its own seed must not matter."""
    resumed = ReplayBuffer(buffer.capacity, buffer.policy_name, seed=987, unit=buffer.unit)
    resumed.load_state_dict(buffer.state_dict())
    return resumed


def chi_square(counts, runs: int, p: float) -> float:
    """Distance of inclusion counts from equal ones, of samples that are as likely as each other."""
    counts = list(counts)
    mean = sum(counts) / len(counts)
    assert mean == pytest.approx(runs * p, abs=5 * math.sqrt(runs * p * (1 - p) / len(counts)) + 1e-9)
    return sum((count - mean) ** 2 for count in counts) / (runs * p * (1 - p))


def close(count: int, runs: int, p: float) -> bool:
    """Within 4.5 standard deviations."""
    return abs(count - runs * p) <= 4.5 * math.sqrt(runs * p * (1 - p)) + 1e-9


# ---------------------------------------------------------------------- budgets


def tokens_on_disk(length: int) -> int:
    """Bytes of a token sequence: four per token and a bit, in whole bytes of the mask, and the record."""
    blocks = -(-length // 8)
    return 64 + blocks * (4 * 8 + 1)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_is_never_exceeded_and_hardly_wasted(policy, unit):
    generator = random.Random(policy + unit)
    capacity = {"samples": 17, "tokens": 150, "bytes": 2000}[unit]
    buffer, ranks = ReplayBuffer(capacity, policy, seed=1, unit=unit), Counter()
    lengths, full = {}, False
    cost = {"samples": lambda n: 1, "tokens": lambda n: n, "bytes": lambda n: tokens_on_disk(n)}[unit]
    largest = max(cost(n) for n in range(1, 41))
    for number in range(400):
        lengths[number] = generator.randint(1, 40)
        task = str(number // 100) if number < 350 else generator.choice("0123")
        sample = document(number, lengths[number], label=generator.randint(0, 4))
        if unit == "bytes" and policy != "class_balanced":
            del sample["label"]  # whose bytes would have to be counted too
        if unit == "bytes" and policy == "class_balanced":
            continue
        buffer.add(sample, task, weight=generator.random(), rank=ranks[task])
        ranks[task] += 1
        used = sum(cost(lengths[kept]) for kept in numbers_in(buffer))
        assert used <= capacity
        full = full or used + cost(lengths[number]) > capacity
        if full:
            assert used > capacity - largest
        if unit == "samples":
            assert len(buffer) == min(number + 1, capacity)


def test_a_budget_in_bytes_is_what_lies_on_the_disk(tmp_path):
    lengths = [1, 7, 8, 9, 100, 3, 31, 17] * 4
    store = DiskStore(tmp_path)
    buffer = ReplayBuffer(100_000, unit="bytes", store=store)
    for number, length in enumerate(lengths):
        buffer.add(plain(number, length), "a")
    buffer.add((torch.ones(10), "text"), "a")
    buffer.commit()
    files = {path.name: path.stat().st_size for path in (tmp_path / "0000").glob("*.bin")}
    counted = sum(buffer.cost(sample) for sample in buffer.items)
    assert sum(files.values()) - 64 * len(files) == counted
    assert sum(map(buffer.cost_of_tokens, lengths)) == sum(map(tokens_on_disk, lengths))
    assert [buffer.cost(plain(0, length)) for length in lengths] == list(map(tokens_on_disk, lengths))


@pytest.mark.parametrize("unit", ["tokens", "bytes"])
def test_a_sample_larger_than_the_whole_budget_is_an_error_that_loses_nothing(unit):
    buffer = ReplayBuffer(300, unit=unit)
    for number in range(3):
        buffer.add(plain(number, 5), "a")
    before = numbers_in(buffer), buffer.seen
    with pytest.raises(ValueError, match=rf"buffer_size=300: .*'a' takes \d+ {unit}.*give at least"):
        buffer.add(plain(9, 301), "a")
    assert (numbers_in(buffer), buffer.seen) == before
    assert buffer.add(plain(4, 5), "a") is not None


def test_tokens_of_what_has_no_tokens_cannot_be_counted():
    with pytest.raises(ValueError, match=r"unit='tokens'.*unit='samples' or 'bytes'"):
        ReplayBuffer(300, unit="tokens").add((torch.ones(3), 1), "a")


@pytest.mark.parametrize("unit", ["token", "", None])
def test_an_unknown_unit_is_named(unit):
    with pytest.raises(ValueError, match=f"unit={unit!r}: expected 'samples', 'tokens' or 'bytes'"):
        ReplayBuffer(10, unit=unit)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "class_balanced"])
def test_the_disk_keeps_what_memory_keeps_also_across_an_interruption(tmp_path, policy, unit):
    capacity = {"samples": 9, "tokens": 100, "bytes": 1500}[unit]
    generator = random.Random(3)
    stream = [(number, generator.randint(1, 30), "ab"[number > 40], generator.random()) for number in range(80)]
    memory = ReplayBuffer(capacity, policy, seed=4, unit=unit)
    disk = ReplayBuffer(capacity, policy, seed=4, unit=unit, store=DiskStore(tmp_path))
    for number, length, task, weight in stream:
        if number % 30 == 29:
            state = disk.state_dict()
            disk = ReplayBuffer(capacity, policy, seed=5, unit=unit, store=DiskStore(tmp_path))
            disk.load_state_dict(state)
            memory = interrupted(memory)
        for buffer in (memory, disk):
            buffer.add(plain(number, length), task, weight=weight, rank=number % 41)
        assert numbers_in(memory) == numbers_in(disk)
        assert (memory.tasks, memory.seen) == (disk.tasks, disk.seen)


# ---------------------------------------------------------------------- reservoir

LENGTHS = [1, 2, 2, 3, 1, 5, 2, 1]
BUDGET = 7


def inclusion_in_tokens(lengths, budget) -> list[float]:
    """All orders are equally likely; the first samples of an order are kept, up to the first that does not fit."""
    counts, orders = [0] * len(lengths), 0
    for order in itertools.permutations(range(len(lengths))):
        orders += 1
        used = 0
        for place in order:
            used += lengths[place]
            if used > budget:
                break
            counts[place] += 1
    return [count / orders for count in counts]


@pytest.mark.parametrize("stop", [None, 3, 6])
def test_a_budget_in_tokens_favours_no_place_in_the_stream(stop):
    """Samples of one length have one probability, wherever they stand in the stream, also across an interruption.

    Long samples have a smaller one than short ones, since the last one that does not fit ends the choice: of these,
    the one of five tokens 0.25, where a single token has 0.42. In a budget of many samples nothing of it is
    left.
    """
    expected = inclusion_in_tokens(LENGTHS, BUDGET)
    assert expected[0] == expected[4] == expected[7] > expected[1] > expected[3] > expected[5]
    runs, kept = 700, Counter()
    for seed in range(runs):
        buffer = ReplayBuffer(BUDGET, seed=seed, unit="tokens")
        for number, length in enumerate(LENGTHS):
            if number == stop:
                buffer = interrupted(buffer)
            buffer.add(plain(number, length), "a")
        kept.update(numbers_in(buffer))
    assert all(close(kept[number], runs, p) for number, p in enumerate(expected)), (kept, expected)


def test_in_a_budget_of_many_samples_long_ones_are_as_likely_as_short_ones():
    runs, kept = 300, Counter()
    for seed in range(runs):
        buffer = ReplayBuffer(1000, seed=seed, unit="tokens")
        slots = {}
        for number in range(400):
            slot = buffer.choose_slot("a", 9 if number % 2 else 1)
            if slot is not None:
                slots[slot] = number
        kept.update(slots[slot] % 2 for slot in slots if buffer.is_waiting(slot))
    assert kept[1] / kept[0] == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("stop", [None, 15])
def test_after_removals_places_are_filled_again_without_favour(stop):
    """Half of the first samples are removed; then the stream goes on.

    Of the samples that are left, those before the removal are as likely as each other, and those behind it too. The
    latter are favoured by less than one part in the number of places: what was let go before is not there to come back.
    """
    places, runs = 5, 700
    early, late = Counter(), Counter()
    for seed in range(runs):
        buffer = ReplayBuffer(places, seed=seed)
        for number in range(24):
            if number == 12:
                buffer.remove(lambda stored: stored.sample % 2 == 1)
            if number == stop:
                buffer = interrupted(buffer)
            buffer.add(number, "a")
        assert not any(number % 2 and number < 12 for number in buffer.items)
        assert len(buffer) <= places
        early.update(number for number in buffer.items if number < 12)
        late.update(number for number in buffer.items if number >= 12)
    before, behind = sum(early.values()) / 6 / runs, sum(late.values()) / 12 / runs
    assert sorted(early) == [0, 2, 4, 6, 8, 10]
    assert chi_square(early.values(), runs, before) < CHI_SQUARE[5]
    assert chi_square(late.values(), runs, behind) < CHI_SQUARE[11]
    noise = 3 * math.sqrt((1 - before) / (runs * 6 * before))
    assert 1 - noise < behind / before < 1 + 1 / places + noise
    assert behind <= places / 18 + 3 * math.sqrt(behind / runs / 12)  # and nobody more than an equal share of all


def test_a_buffer_that_was_emptied_by_removal_fills_up_again():
    buffer = ReplayBuffer(6, seed=2)
    for number in range(10):
        buffer.add(number, "a")
    assert buffer.remove(lambda stored: True) == 6
    assert len(buffer) == 0
    for number in range(10, 400):
        buffer.add(number, "b")
    assert len(buffer) == 6
    assert min(buffer.items) >= 10


# ---------------------------------------------------------------------- surprise


def weighted_inclusion(weights, count) -> list[float]:
    """One after another, each in proportion to its weight among those that are left."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), count):
        p, left = 1.0, sum(weights)
        for place in order:
            p *= weights[place] / left
            left -= weights[place]
        for place in order:
            found[place] += p
    return found


@pytest.mark.parametrize(
    ("weights", "stop"),
    [([1, 2, 3, 4, 5, 0.5], None), ([5, 0.5, 4, 1, 3, 2], None), ([0.5, 1, 2, 3, 4, 5], 4), ([1e-9, 2e-9, 4e-9], 1)],
)
def test_surprise_is_sequential_weighted_sampling_without_replacement(weights, stop):
    count = 3 if len(weights) > 3 else 2
    expected, runs, kept = weighted_inclusion(weights, count), 1200, Counter()
    assert sum(expected) == pytest.approx(count)
    for seed in range(runs):
        buffer = ReplayBuffer(count, "surprise", seed=seed)
        for number, weight in enumerate(weights):
            if number == stop:
                buffer = interrupted(buffer)
            buffer.add(number, "ab"[number % 2], weight=weight)
        kept.update(buffer.items)
    assert all(close(kept[number], runs, p) for number, p in enumerate(expected)), (kept, expected)


def test_what_does_not_surprise_is_kept_only_where_there_is_room():
    for seed in range(30):
        buffer = ReplayBuffer(3, "surprise", seed=seed)
        for number, weight in enumerate([0, 1, 0, 0, 2, 0.1, 0]):
            buffer.add(number, "a", weight=weight)
        assert {1, 4, 5} == {*buffer.items}
        buffer = ReplayBuffer(3, "surprise", seed=seed)
        for number, weight in enumerate([0, 0, 7]):
            buffer.add(number, "a", weight=weight)
        assert {0, 1, 2} == {*buffer.items}


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_named(weight):
    with pytest.raises(ValueError, match="weight="):
        ReplayBuffer(3, "surprise").add(1, "a", weight=weight)


# ---------------------------------------------------------------------- fifo


@pytest.mark.parametrize("unit", UNITS)
def test_fifo_keeps_the_newest_that_fit(unit):
    generator = random.Random(5)
    capacity = {"samples": 7, "tokens": 60, "bytes": 900}[unit]
    cost = {"samples": lambda n: 1, "tokens": lambda n: n, "bytes": tokens_on_disk}[unit]
    buffer, lengths = ReplayBuffer(capacity, "fifo", unit=unit), []
    for number in range(120):
        lengths.append(generator.randint(1, 30))
        if number == 50:
            buffer = interrupted(buffer)
        buffer.add(plain(number, lengths[-1]), "abc"[number % 3])
        newest, used = [], 0
        for kept in range(number, -1, -1):
            used += cost(lengths[kept])
            if used > capacity:
                break
            newest.append(kept)
        assert sorted(numbers_in(buffer)) == sorted(newest)


# ---------------------------------------------------------------------- equal shares


def water_level(sizes, capacity) -> float:
    """What each may have at most, where what some do not need goes to the others."""
    left, level = capacity, 0.0
    for place, size in enumerate(sorted(sizes)):
        level = left / (len(sizes) - place)
        if size >= level:
            return level
        left -= size
    return math.inf


def streams(sizes, seed):
    """The groups one after another, and mixed."""
    one_by_one = [group for group, size in enumerate(sizes) for _ in range(size)]
    mixed = list(one_by_one)
    random.Random(seed).shuffle(mixed)
    return {"one by one": one_by_one, "mixed": mixed, "backwards": one_by_one[::-1]}


@pytest.mark.parametrize("order", ["one by one", "mixed", "backwards"])
@pytest.mark.parametrize("policy", ["task_balanced", "class_balanced", "herding", "k_center"])
@pytest.mark.parametrize(
    ("sizes", "capacity"),
    [([50, 50, 50], 30), ([3, 70, 9, 40], 32), ([1, 1, 100], 10), ([5, 6, 7, 8, 90], 31), ([4, 4], 20), ([9] * 8, 5)],
)
def test_shares_are_those_of_water_filling(policy, order, sizes, capacity):
    buffer, seen = ReplayBuffer(capacity, policy, seed=3), Counter()
    for group in streams(sizes, 1)[order]:
        in_tasks = policy != "class_balanced"
        sample = (torch.tensor([group]), group)
        buffer.add(sample, str(group) if in_tasks else "all", rank=seen[group])
        seen[group] += 1
    counts = Counter(group for _, group in buffer.items)
    level = water_level(sizes, capacity)
    assert sum(counts.values()) == min(capacity, sum(sizes))
    for group, size in enumerate(sizes):
        assert math.floor(min(size, level)) <= counts[group] <= math.ceil(min(size, level))


@pytest.mark.parametrize("policy", ["task_balanced", "class_balanced"])
@pytest.mark.parametrize("order", ["one by one", "mixed", "backwards"])
def test_shares_in_tokens_differ_by_less_than_a_sample_from_water_filling(policy, order):
    sizes, capacity, generator = [5, 60, 80, 20], 400, random.Random(8)
    totals, buffer = Counter(), ReplayBuffer(capacity, policy, seed=3, unit="tokens")
    for number, group in enumerate(streams(sizes, 2)[order]):
        length = generator.randint(1, 12) * (1 + group % 2)
        totals[group] += length
        buffer.add(document(number, length, label=group), str(group) if policy == "task_balanced" else "all")
    counts = Counter()
    for sample, task in zip(buffer.items, buffer.tasks, strict=True):
        counts[sample["label"]] += len(sample["input_ids"])
        assert policy == "class_balanced" or task == str(sample["label"])
    level = water_level(list(totals.values()), capacity)
    for group, total in totals.items():
        assert abs(counts[group] - min(total, level)) < 24 * (1 if total > level else 0) + 1e-9


@pytest.mark.parametrize("kind", ["pair", "pair of tensors", "label", "labels"])
def test_a_class_is_found_where_data_sets_have_it(kind):
    buffer = ReplayBuffer(6, "class_balanced")
    for number in range(60):
        group = 0 if number < 40 else 1 + number % 2
        buffer.add(
            {
                "pair": (torch.ones(2), group),
                "pair of tensors": (torch.ones(2), torch.tensor(group)),
                "label": {"x": torch.ones(2), "label": group},
                "labels": {"x": torch.ones(2), "labels": torch.tensor([group])},
            }[kind],
            "a",
        )
    assert Counter(buffer.info(number).label for number in buffer.numbers) == {0: 2, 1: 2, 2: 2}


def test_a_sample_without_a_class_is_refused_by_name():
    with pytest.raises(ValueError, match=r"policy='class_balanced'.*'a' has no class"):
        ReplayBuffer(6, "class_balanced").add({"x": torch.ones(2)}, "a")


def test_class_balanced_is_uniform_within_each_class():
    runs, kept = 1000, defaultdict(Counter)
    for seed in range(runs):
        buffer = ReplayBuffer(6, "class_balanced", seed=seed)
        for number in range(26):
            group = int(number % 13 < 3)  # 6 of one class, 20 of the other, mixed
            buffer.add((number, group), "a")
        for number, group in buffer.items:
            kept[group][number] += 1
    assert chi_square(kept[1].values(), runs, 3 / 6) < CHI_SQUARE[5]
    assert chi_square(kept[0].values(), runs, 3 / 20) < CHI_SQUARE[19]


# ---------------------------------------------------------------------- ranked


@pytest.mark.parametrize("policy", ["herding", "k_center"])
def test_the_best_of_each_tasks_ranking_stay_in_whatever_order_they_come(policy):
    for seed in range(5):
        offers = [(task, rank) for task, size in (("a", 30), ("b", 4), ("c", 20)) for rank in range(size)]
        random.Random(seed).shuffle(offers)
        buffer = ReplayBuffer(18, policy, seed=seed)
        for task, rank in offers:
            buffer.add((task, rank), task, rank=rank)
        kept = defaultdict(list)
        for task, rank in buffer.items:
            kept[task].append(rank)
        assert {task: sorted(ranks) for task, ranks in kept.items()} == {
            "a": list(range(7)),
            "b": list(range(4)),
            "c": list(range(7)),
        }


def test_a_later_task_takes_the_worst_of_the_earlier_ones_ranking():
    buffer = ReplayBuffer(12, "herding")
    for task, most in (("a", 12), ("b", 6), ("c", 4)):
        for rank in range(12):
            buffer.add((task, rank), task, rank=rank)
        assert max(rank for name, rank in buffer.items if name == "a") == most - 1


def test_a_rank_is_asked_for():
    with pytest.raises(ValueError, match="rank=None"):
        ReplayBuffer(3, "herding").add(1, "a")
