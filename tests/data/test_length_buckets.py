"""Length buckets: much less padding, every sample once, and nothing else changes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.loader import Mix, TaskLoader
from lightning_cl.data.mixing.packing import bucketed_order


class Documents(Dataset):
    """Token sequences of widely spread lengths; the first token is the sample's number."""

    def __init__(self, count: int, first: int = 0):
        rng = random.Random(first)
        self.lengths = [min(1000, max(4, int(rng.lognormvariate(4.5, 1.0)))) for _ in range(count)]
        self.first = first

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        ids = torch.full((self.lengths[index],), self.first + index, dtype=torch.int32)
        return {"input_ids": ids, "loss_mask": torch.ones(len(ids), dtype=torch.bool)}

    def length(self, index):
        return self.lengths[index]

    def loss_tokens(self, index):
        return self.lengths[index] - 1


def rows(samples):
    return samples


def numbers(loader) -> list[list[int]]:
    return [[int(sample["input_ids"][0]) for sample in batch] for batch in loader]


def loader_of(data, batch_size=8, **settings) -> TaskLoader:
    return TaskLoader(data, batch_size, rows, **{"seed": 3, "length_buckets": True} | settings)


def mixed(loader, mode="replace") -> TaskLoader:
    old = Documents(100, first=100_000)
    buffer = ReplayBuffer(100)
    for index in range(100):
        buffer.add(old[index], "earlier")
    loader.mix_in(Mix.constant(buffer, 0.25, mode, seed=5))
    return loader


def test_bucketed_order_by_hand():
    # Two windows of two batches of two: sorted, the samples of one batch have neighbouring lengths; 8 stays last.
    lengths = [50, 10, 40, 20, 5, 80, 6, 70, 1]
    order = bucketed_order(range(9), lengths, 2, seed=0, window=2)
    batches = [tuple(order[i : i + 2]) for i in range(0, 8, 2)]
    assert sorted(batches) == [(1, 3), (2, 0), (4, 6), (7, 5)]
    assert order[8] == 8


@pytest.mark.parametrize("count", [3, 8, 1003])
def test_every_sample_comes_once_in_as_many_batches(count):
    data = Documents(count)
    loader = loader_of(data)
    for epoch in range(3):
        loader.set_epoch(epoch)
        batches = numbers(loader)
        assert sorted(itertools.chain(*batches)) == list(range(count))
        assert len(batches) == len(loader) == len(loader_of(data, length_buckets=False))


def test_padding_shrinks_several_times():
    data = Documents(2003)
    plain, buckets = loader_of(data, length_buckets=False).padding_share(), loader_of(data).padding_share()
    assert plain > 0.5
    assert buckets < plain / 8


def test_padding_shrinks_with_replay_too():
    data = Documents(2003)
    plain = mixed(loader_of(data, length_buckets=False)).padding_share()
    assert mixed(loader_of(data)).padding_share() < plain


def test_epochs_differ_and_are_repeated_by_the_same_seed():
    loader, again = loader_of(Documents(300)), loader_of(Documents(300))
    first = numbers(loader)
    assert numbers(again) == first
    loader.set_epoch(1)
    second = numbers(loader)
    assert second != first
    assert sorted(map(sorted, second)) != sorted(map(sorted, first))  # other batches, not only their order
    assert numbers(loader_of(Documents(300), seed=4)) != first


def test_short_and_long_batches_come_in_random_order():
    data = Documents(4000)
    means = [sum(data.lengths[i] for i in batch) for batch in numbers(loader_of(data))]
    place = torch.linspace(-1, 1, len(means))
    assert abs(float(torch.corrcoef(torch.stack([torch.tensor(means, dtype=torch.float), place]))[0, 1])) < 0.18


def test_long_samples_are_not_dropped_more_often():
    data = Documents(71)  # one sample over
    dropped = []
    for seed in range(200):
        kept = set(itertools.chain(*numbers(loader_of(data, 10, seed=seed, drop_last=True))))
        dropped += [data.lengths[i] for i in range(71) if i not in kept]
    assert len(dropped) == 200
    deviation = float(torch.tensor(data.lengths, dtype=torch.float).std())
    assert abs(sum(dropped) / 200 - sum(data.lengths) / 71) < 4 * deviation / 200**0.5


def test_two_ranks_see_the_batches_of_one():
    data = Documents(320)
    whole = numbers(loader_of(data, 8))
    parts = [numbers(loader_of(data, 4, rank=rank, world_size=2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_replay_changes_the_order_of_new_samples_only_by_what_it_puts_between(mode):
    data = Documents(300)
    plain = list(itertools.chain(*numbers(loader_of(data))))
    together = list(itertools.chain(*numbers(mixed(loader_of(data), mode))))
    assert [i for i in together if i < 100_000] == plain
    assert len(together) > 300


def test_resume_at_each_batch_gives_the_rest_of_the_epoch():
    data = Documents(60)
    whole = numbers(loader_of(data))
    for position in range(1, len(whole)):
        stopped = loader_of(data)
        iterator = iter(stopped)
        for _ in range(position):
            next(iterator)
        resumed = loader_of(data)
        resumed.load_state_dict(stopped.state_dict())
        assert numbers(resumed) == whole[position:]


def test_evaluation_samplers_and_packing_keep_their_order():
    data = Documents(60)
    assert list(itertools.chain(*numbers(loader_of(data, shuffle=False)))) == list(range(60))
    assert list(itertools.chain(*numbers(loader_of(data, sampler=range(59, -1, -1))))) == list(range(59, -1, -1))
    packed = {"block_length": 1000}
    assert loader_of(data, **packed)._batches() == loader_of(data, length_buckets=False, **packed)._batches()


def test_data_sets_without_lengths_are_left_alone():
    data = TensorDataset(torch.arange(40))
    plain, asked = TaskLoader(data, 4, seed=2), TaskLoader(data, 4, seed=2, length_buckets=True)
    assert [batch[0].tolist() for batch in asked] == [batch[0].tolist() for batch in plain]
    assert asked.padding_share() is None


def test_padding_share_does_not_ask_a_users_sampler():
    generator = torch.Generator().manual_seed(1)
    loader = TaskLoader.from_dataloader(
        DataLoader(Documents(40), 4, shuffle=True, generator=generator, collate_fn=rows)
    )
    before = generator.get_state()
    assert loader.padding_share() is None
    assert torch.equal(generator.get_state(), before)
