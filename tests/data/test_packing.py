"""Packing: documents stay apart, every sample comes once, replay keeps its share, ranks and resume see one plan."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.utils.data import Dataset, RandomSampler

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.loader import Mix, TaskLoader
from lightning_cl.data.mixing.packing import evenly, fill, pack, windows_of
from lightning_cl.data.text.collator import TokenCollator


class Documents(Dataset):
    """Instruction-like samples: a prompt without loss, an answer with it; the first token is the sample's number."""

    def __init__(self, count: int, first: int = 0, longest: int = 256, mean: float = 3.8, seed: int = 0):
        rng = random.Random(seed + first)
        self.lengths = [min(longest, max(4, int(rng.lognormvariate(mean, 0.8)))) for _ in range(count)]
        self.prompts = [rng.randint(1, length - 2) for length in self.lengths]
        self.first = first

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        mask = torch.arange(self.lengths[index]) >= self.prompts[index]
        return {"input_ids": torch.full(mask.shape, self.first + index, dtype=torch.int32), "loss_mask": mask}

    def length(self, index):
        return self.lengths[index]

    def loss_tokens(self, index):
        return self.lengths[index] - self.prompts[index]


OLD = 100_000  # numbers of replayed samples


def rows(blocks):
    """A collate function that leaves the blocks apart."""
    return blocks


def numbers(loader) -> list[list[list[int]]]:
    """Sample numbers: batches of blocks of samples."""
    return [[[int(sample["input_ids"][0]) for sample in block] for block in batch] for batch in loader]


def samples_in(batches) -> list[int]:
    return [number for batch in batches for block in batch for number in block]


def replay_of(dataset, ratio: float, mode="replace") -> Mix:
    buffer = ReplayBuffer(len(dataset))
    for index in range(len(dataset)):
        buffer.add(dataset[index], "earlier")
    return Mix.constant(buffer, ratio, mode, seed=5)


def loader_of(data, batch_size=4, block_length=256, **settings) -> TaskLoader:
    return TaskLoader(data, batch_size, rows, block_length=block_length, seed=3, **settings)


DATA = Documents(300)


# ---------------------------------------------------------------------- blocks


def test_best_fit_decreasing_by_hand():
    # 6 takes a block, 5 the next; 4 fits best beside 6, 3 beside 5, and 2 beside both.
    assert pack([[0, 1, 2, 3, 4]], [2, 3, 4, 5, 6], 10) == [(0, 1, 3), (2, 4)]


def test_blocks_hold_every_sample_once_and_are_never_too_long():
    rng = random.Random(0)
    lengths = [rng.randint(1, 100) for _ in range(2000)]
    blocks = pack(windows_of(rng.sample(range(2000), 2000), lengths, 5000), lengths, 100)
    assert sorted(itertools.chain(*blocks)) == list(range(2000))
    assert max(sum(lengths[i] for i in block) for block in blocks) <= 100


def test_windows_keep_the_order_and_hold_about_so_many_tokens():
    windows = windows_of([3, 1, 2, 0], [5, 6, 4, 1], 8)
    assert windows == [[3, 1, 2], [0]]  # 1 + 6 are too few, with 4 they are enough


def test_fill_by_hand():
    assert fill([[0, 1], [(0, 2), (1,)]], [2, 4, 3]) == (2 + 4 + 5 + 4) / (2 * 4 + 2 * 5)
    assert fill([[(0, 2), (1,)]], [2, 4, 3], block_length=8) == 9 / 16


def test_evenly_keeps_every_prefix_near_the_mean():
    rng = random.Random(1)
    blocks = [(i,) for i in range(3000)]
    surplus = {(i,): rng.choice([-1.0, -1.0, -1.0, 3.0]) for i in range(3000)}
    mean = sum(surplus.values()) / 3000
    spread = evenly(blocks, surplus.__getitem__)
    assert sorted(spread) == blocks
    prefixes = list(itertools.accumulate(surplus[block] - mean for block in spread))
    assert max(map(abs, prefixes)) <= 3 + abs(mean) + 1e-9
    assert max(map(abs, itertools.accumulate(surplus[block] - mean for block in blocks))) > 10  # as it came


# ---------------------------------------------------------------------- epochs


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_comes_once_in_each_epoch_of_constant_length(shuffle):
    loader = loader_of(DATA, shuffle=shuffle)
    for epoch in range(4):
        loader.set_epoch(epoch)
        batches = numbers(loader)
        assert sorted(samples_in(batches)) == list(range(300))
        assert len(batches) == len(loader)
        assert {len(batch) for batch in batches[:-1]} == {4}


def test_blocks_are_nearly_full():
    loader = loader_of(Documents(3000))
    assert 0 < loader.padding_share() < 0.03
    unpacked = TaskLoader(Documents(3000), 4, rows)
    assert unpacked.padding_share() > 0.4


def test_padding_share_is_that_of_the_collated_batches():
    loader = loader_of(DATA)
    tokens, places = sum(DATA.lengths), sum(256 * len(batch) for batch in loader)
    assert loader.padding_share() == pytest.approx(1 - tokens / places)
    padded = TaskLoader(DATA, 4, TokenCollator(0), seed=3)
    real = sum(int(batch["attention_mask"].sum()) for batch in padded)
    assert padded.padding_share() == pytest.approx(1 - real / sum(batch["input_ids"].numel() for batch in padded))


def test_epochs_differ_and_are_repeated_by_the_same_seed():
    loader, again = loader_of(DATA), loader_of(DATA)
    first = numbers(loader)
    assert numbers(again) == first
    loader.set_epoch(1)
    assert numbers(loader) != first
    other = TaskLoader(DATA, 4, rows, block_length=256, seed=4)
    assert numbers(other) != first


def test_the_order_of_an_epoch_is_random():
    data = Documents(6000)
    order = samples_in(numbers(loader_of(data)))
    lengths = torch.tensor([float(data.lengths[i]) for i in order])
    place = torch.linspace(-1, 1, len(order))
    for values in (torch.tensor(order, dtype=torch.float), lengths):
        # Blocks hold about five documents: a correlation's deviation is about 1 / sqrt(1200).
        assert abs(float(torch.corrcoef(torch.stack([values, place]))[0, 1])) < 4 / math.sqrt(1200)


def test_without_shuffling_epochs_are_alike_and_nearly_in_order():
    loader = loader_of(DATA, shuffle=False)
    first = numbers(loader)
    loader.set_epoch(1)
    assert numbers(loader) == first
    assert [block[0] for batch in first for block in batch] == sorted(block[0] for batch in first for block in batch)


def test_drop_last_gives_only_full_batches():
    loader = loader_of(DATA, drop_last=True)
    batches = numbers(loader)
    assert len(batches) == len(loader) == len(loader_of(DATA)) - 1
    assert {len(batch) for batch in batches} == {4}


def test_tokens_are_counted():
    loader = loader_of(DATA)
    list(loader)
    assert loader.counts == {
        "new_samples": 300,
        "replayed_samples": 0,
        "new_tokens": sum(DATA.loss_tokens(i) for i in range(300)),
        "replayed_tokens": 0,
    }


# ---------------------------------------------------------------------- replay


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5])
def test_replayed_epochs_hold_every_new_sample_once_and_have_constant_length(ratio, mode):
    loader = loader_of(DATA)
    loader.mix_in(replay_of(Documents(150, first=OLD), ratio, mode))
    for epoch in range(6):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert sorted(i for i in samples_in(numbers(loader)) if i < OLD) == list(range(300))
        assert len(batches) == len(loader)
        assert max(sum(len(sample["input_ids"]) for sample in block) for batch in batches for block in batch) <= 256


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize(
    ("ratio", "old_mean", "batch_size"), [(0.05, 3.8, 8), (0.05, 5.0, 8), (0.25, 5.0, 4), (0.5, 3.0, 4)]
)
def test_share_of_loss_bearing_tokens_holds_over_any_hundred_batches(ratio, old_mean, batch_size, mode):
    new, old = Documents(6000), Documents(400, first=OLD, mean=old_mean)
    loader = loader_of(new, batch_size)
    loader.mix_in(replay_of(old, ratio, mode))
    prefix = [(0, 0)]
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader._batches():
            replayed = sum(old.loss_tokens(i - 6000) for block in batch for i in block if i >= 6000)
            fresh = sum(new.loss_tokens(i) for block in batch for i in block if i < 6000)
            prefix.append((prefix[-1][0] + replayed, prefix[-1][1] + replayed + fresh))
    assert len(prefix) > 150
    for (begin, begin_all), (end, end_all) in zip(prefix, prefix[100:], strict=False):
        share = (end - begin) / (end_all - begin_all)
        assert abs(share - ratio) < 0.005


def test_new_and_replayed_samples_share_blocks():
    loader = loader_of(DATA)
    loader.mix_in(replay_of(Documents(150, first=OLD), 0.5))
    blocks = [block for batch in numbers(loader) for block in batch]
    both = sum(min(block) < OLD <= max(block) for block in blocks)
    assert both > len(blocks) / 2


def test_replacing_keeps_the_blocks_of_a_batch_and_adding_the_number_of_batches():
    alone, new = loader_of(Documents(1500)), sum(Documents(1500).lengths)
    old = Documents(300, first=OLD)
    sizes = {}
    for mode in ("replace", "add"):
        loader = loader_of(Documents(1500))
        loader.mix_in(replay_of(old, 0.5, mode))
        sizes[mode] = [len(batch) for batch in loader]
    assert set(sizes["replace"][:-2]) == {4}
    assert len(sizes["replace"]) == pytest.approx(2 * len(alone), rel=0.05)
    assert len(sizes["add"]) == len(alone)
    assert sum(sizes["add"]) / len(alone) == pytest.approx(8, rel=0.05)
    assert max(sizes["add"]) - min(sizes["add"]) <= 1
    assert sum(sizes["add"]) * 256 < 2.1 * new


def test_epochs_replay_different_samples():
    loader = loader_of(DATA)
    loader.mix_in(replay_of(Documents(2000, first=OLD), 0.1))
    replayed = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        replayed.append({i for i in samples_in(numbers(loader)) if i >= OLD})
    assert replayed[0]
    assert replayed[0] != replayed[1]


def test_tokens_of_new_and_replayed_samples_are_counted():
    loader = loader_of(DATA)
    loader.mix_in(replay_of(Documents(150, first=OLD), 0.3))
    seen = {"new_tokens": 0, "replayed_tokens": 0, "new_samples": 0, "replayed_samples": 0}
    for batch in loader:
        for sample in itertools.chain(*batch):
            kind = "new" if sample["input_ids"][0] < OLD else "replayed"
            seen[f"{kind}_tokens"] += int(sample["loss_mask"][1:].sum())
            seen[f"{kind}_samples"] += 1
    assert loader.counts == seen


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("count", "ratio"), [(1, 0.5), (7, 0.05), (40, 0.5)])
def test_small_tasks_give_as_many_batches_as_they_announce(count, ratio, batch_size, mode, drop_last):
    # Samples as long as a block, too: then blocks cannot be divided where an epoch needs fewer.
    for longest, mean in ((256, 3.8), (256, 9.0)):
        loader = loader_of(Documents(count, longest=longest, mean=mean), batch_size, drop_last=drop_last)
        loader.mix_in(replay_of(Documents(30, first=OLD, mean=mean), ratio, mode))
        for epoch in range(6):
            loader.set_epoch(epoch)
            batches = numbers(loader)
            assert len(batches) == len(loader)
            assert all(batches)
            if not drop_last:
                assert sorted(i for i in samples_in(batches) if i < OLD) == list(range(count))


# ---------------------------------------------------------------------- ranks and resume


@pytest.mark.parametrize("mix", [None, "replace", "add"])
def test_two_ranks_see_the_batches_of_one(mix):
    def loader(batch_size, **ranks):
        made = loader_of(DATA, batch_size, **ranks)
        if mix:
            made.mix_in(replay_of(Documents(150, first=OLD), 0.25, mix))
        return made

    whole = numbers(loader(4))
    parts = [numbers(loader(2, rank=rank, world_size=2)) for rank in range(2)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first) == len(second)
        assert {tuple(block) for block in batch} == {tuple(block) for block in first + second} or mix == "add"
    if mix == "add":  # batches are cut so that ranks can share them: the same blocks, in the same order
        together = [block for a, b in zip(*parts, strict=True) for pair in zip(a, b, strict=True) for block in pair]
        flat = [block for batch in whole for block in batch]
        assert together[: len(flat)] == flat
        assert len(together) - len(flat) in (0, 1)  # the last batch wraps around


@pytest.mark.parametrize("mix", [None, "replace", "add"])
def test_resume_at_each_batch_gives_the_rest_of_the_epoch(mix):
    def loader():
        made = loader_of(Documents(100))
        if mix:
            made.mix_in(replay_of(Documents(60, first=OLD), 0.25, mix))
        made.set_epoch(1)
        return made

    whole = numbers(loader())
    for position in range(1, len(whole)):
        stopped = loader()
        iterator = iter(stopped)
        for _ in range(position):
            next(iterator)
        resumed = loader()
        resumed.load_state_dict(stopped.state_dict())
        assert numbers(resumed) == whole[position:]
        assert resumed.counts == {**resumed.counts, "new_samples": 100}


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("count", range(1, 40, 3))
def test_no_rank_is_left_without_a_block(count, mode):
    parts = []
    for rank in range(3):
        loader = loader_of(Documents(count, mean=9.0), 1, rank=rank, world_size=3)
        loader.mix_in(replay_of(Documents(30, first=OLD), 0.05, mode))
        parts.append(numbers(loader))
        assert len(parts[-1]) == len(loader)
    for batches in zip(*parts, strict=True):
        assert len({len(batch) for batch in batches}) == 1
        assert all(batches)


# ---------------------------------------------------------------------- errors


def test_a_sample_longer_than_a_block_is_named():
    data = Documents(20, longest=50)
    data.lengths[13] = 65
    with pytest.raises(ValueError, match="sample 13 has 65 tokens, more than block_length=64"):
        TaskLoader(data, 2, block_length=64)


def test_a_replayed_sample_longer_than_a_block_is_named():
    loader = TaskLoader(Documents(20, longest=32), 2, block_length=32)
    with pytest.raises(ValueError, match="replayed sample 0 has 40 tokens, more than block_length=32"):
        loader.mix_in(replay_of(Documents(1, first=OLD, longest=40, mean=9.0), 0.5))


def test_a_data_set_without_lengths_cannot_be_packed():
    with pytest.raises(TypeError, match=r"length\(index\).*TensorDataset does not"):
        TaskLoader(torch.utils.data.TensorDataset(torch.arange(4)), 2, block_length=8)


def test_replayed_samples_that_are_no_token_sequences_cannot_be_packed():
    loader = loader_of(DATA)
    with pytest.raises(TypeError, match="replayed sample is none"):
        loader.mix_in(replay_of(torch.utils.data.TensorDataset(torch.arange(4)), 0.5))


@pytest.mark.parametrize("block_length", [0, 1, True, 2.5])
def test_block_length_out_of_range(block_length):
    with pytest.raises(ValueError, match=f"block_length={block_length}"):
        TaskLoader(DATA, 2, block_length=block_length)


def test_a_samplers_order_is_not_packed():
    with pytest.raises(ValueError, match="sampler"):
        TaskLoader(DATA, 2, sampler=RandomSampler(DATA), block_length=256)
