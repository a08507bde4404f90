"""The loader of a task: the user's own batches, resumable at each of them, shared by ranks, mixed with replay."""

from __future__ import annotations

import io

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_cl.buffers import ReplayBuffer
from lightning_cl.data.foreign_loader import why_not_plannable
from lightning_cl.data.loader import Mix, TaskLoader, loss_tokens

DATA = TensorDataset(torch.arange(22))


class Tokens(Dataset):
    """Token sequences of different lengths that tell their lengths; the first token is the sample's number."""

    def __init__(self, count: int, first: int = 0, longest: int = 12):
        generator = torch.Generator().manual_seed(first)
        self.lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
        self.first = first

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        length = self.lengths[index]
        ids = torch.full((length,), self.first + index, dtype=torch.int32)
        return {"input_ids": ids, "loss_mask": torch.ones(length, dtype=torch.bool)}

    def loss_tokens(self, index):
        return self.lengths[index] - 1


def filled(dataset, capacity: int = 50) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity)
    for index in range(len(dataset)):
        buffer.add(dataset[index], "earlier")
    return buffer


def user_loader(kind: str, **settings) -> DataLoader:
    choices = {
        "sequential": lambda: {"sampler": SequentialSampler(DATA)},
        "shuffle": lambda: {"shuffle": True},
        "own generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
        "sampler with generator": lambda: {"sampler": RandomSampler(DATA, generator=torch.Generator().manual_seed(6))},
        "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * 11 + [3.0] * 11, 30)},
    }
    return DataLoader(DATA, batch_size=4, **choices[kind](), **settings)


KINDS = ["sequential", "shuffle", "own generator", "sampler with generator", "weighted"]


def flat(loader) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------- the user's own batches


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_users_loader(kind, drop_last):
    plain, ours = (user_loader(kind, drop_last=drop_last) for _ in range(2))
    torch.manual_seed(11)
    expected = [flat(plain), flat(plain)]
    torch.manual_seed(11)
    loader = TaskLoader.from_dataloader(ours)
    assert [flat(loader), flat(loader)] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_length_is_that_of_the_users_loader(kind):
    for drop_last in (False, True):
        loader = user_loader(kind, drop_last=drop_last)
        assert len(TaskLoader.from_dataloader(loader)) == len(loader) == len(flat(loader))


@pytest.mark.parametrize("kind", KINDS)
def test_random_state_after_an_epoch_is_that_after_the_users_loader(kind):
    # Otherwise dropout in the same run with and without this library is not the same.
    states = []
    for loader in (user_loader(kind), TaskLoader.from_dataloader(user_loader(kind))):
        torch.manual_seed(11)
        flat(loader)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Noisy(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(())


def test_augmentation_in_workers_sees_the_same_random_numbers():
    drawn = []
    for make in (lambda loader: loader, TaskLoader.from_dataloader):
        loader = make(DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=2))
        torch.manual_seed(11)
        drawn.append(torch.cat(list(loader)))
    assert torch.equal(*drawn)


def test_users_collate_function_is_kept():
    loader = DataLoader(DATA, batch_size=4, collate_fn=lambda samples: [int(x) for (x,) in samples])
    assert list(TaskLoader.from_dataloader(loader)) == list(loader)


def test_batch_size_of_the_task_overrides_the_loaders():
    loader = TaskLoader.from_dataloader(user_loader("sequential"), batch_size=10)
    assert [len(batch) for batch in flat(loader)] == [10, 10, 2]


# ---------------------------------------------------------------------- order of its own


def test_epochs_are_different_orders_of_all_samples():
    loader = TaskLoader(DATA, 4)
    orders = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        orders.append([x for batch in flat(loader) for x in batch])
    assert all(sorted(order) == list(range(22)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_own_order_does_not_depend_on_the_global_random_state():
    torch.manual_seed(1)
    first = flat(TaskLoader(DATA, 4, seed=3))
    torch.manual_seed(2)
    assert flat(TaskLoader(DATA, 4, seed=3)) == first


def test_own_order_depends_on_the_seed():
    assert flat(TaskLoader(DATA, 4, seed=3)) != flat(TaskLoader(DATA, 4, seed=4))


@pytest.mark.parametrize("drop_last", [False, True])
def test_two_ranks_together_see_each_batch_of_one_process(drop_last):
    whole = flat(TaskLoader(DATA, 4, seed=9, drop_last=drop_last))
    ranks = [flat(TaskLoader(DATA, 2, seed=9, drop_last=drop_last, rank=r, world_size=2)) for r in range(2)]
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in whole]


def test_two_ranks_together_see_each_mixed_batch_of_one_process():
    def loader(batch_size, **ranks):
        loader = TaskLoader(DATA, batch_size, seed=9, **ranks)
        loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), 0.3, "replace", seed=1))
        return loader

    whole = flat(loader(4))
    ranks = [flat(loader(2, rank=r, world_size=2)) for r in range(2)]
    assert [set(a) | set(b) for a, b in zip(*ranks, strict=True)] == [set(batch) for batch in whole]


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_mixed_batches_repeat_samples_on_two_ranks_at_most_once_per_epoch(mode):
    # Ranks need parts of one size. Filling up every batch of an odd size would train on many samples twice.
    new = TensorDataset(torch.arange(66))
    seen = []
    for rank in range(2):
        loader = TaskLoader(new, 4, seed=9, rank=rank, world_size=2)
        loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), 0.3, mode, seed=1))
        seen += [x for batch in flat(loader) for x in batch if x < 100]
    assert len(seen) - len(set(seen)) <= 1


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_what_ranks_add_comes_in_their_multiples(world, ratio):
    """``add`` on several ranks: the samples of one process in its order, equally many on each, nearly in its steps."""

    def steps(world):
        ranks = []
        for rank in range(world):
            loader = TaskLoader(TensorDataset(torch.arange(80)), 8 // world, seed=9, rank=rank, world_size=world)
            loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), ratio, "add", seed=1))
            ranks.append(flat(loader))
        return list(zip(*ranks, strict=True))

    one, several = [step for (step,) in steps(1)], steps(world)
    added, alone, before = [], [], 0
    for number, (whole, parts) in enumerate(zip(one, several, strict=True), 1):
        assert {len(part) for part in parts} == {len(parts[0])}  # so the mean of means is the mean of all
        together = [sample for place in zip(*parts, strict=True) for sample in place]  # in the order of the plan
        assert [x for x in together if x < 100] == [x for x in whole if x < 100]
        alone += [x for x in whole if x >= 100]
        added += [x for x in together if x >= 100]
        assert (len(added) - before) % world == 0
        before = len(added)
        assert abs(len(added) - 8 * number * ratio / (1 - ratio)) <= world / 2
    shared = min(len(alone), len(added))
    assert added[:shared] == alone[:shared]
    assert abs(len(added) - len(alone)) <= world / 2 + 1


# ---------------------------------------------------------------------- resume


def resumed(make, epoch: int, batches: int, seed: int = 21):
    """What comes after `batches` batches of an epoch, without and with an interruption."""
    loader = make()
    torch.manual_seed(seed)
    for earlier in range(epoch):
        loader.set_epoch(earlier)
        list(loader)
    loader.set_epoch(epoch)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    state = through_a_file(loader.state_dict())
    rest = list(iterator)
    torch.manual_seed(4321)  # another process
    other = make()
    other.load_state_dict(state)
    other.set_epoch(epoch)
    return rest, list(other), loader, other


def as_lists(batches):
    return [batch[0].tolist() for batch in batches]


MAKERS = {
    "own order": lambda: TaskLoader(DATA, 4, seed=2),
    "shuffle": lambda: TaskLoader.from_dataloader(user_loader("shuffle")),
    "sampler with generator": lambda: TaskLoader.from_dataloader(user_loader("sampler with generator")),
    "weighted": lambda: TaskLoader.from_dataloader(user_loader("weighted")),
    "drop_last": lambda: TaskLoader(DATA, 4, seed=2, drop_last=True),
}


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("kind", MAKERS)
def test_resume_at_every_batch_gives_the_remaining_batches(kind, epoch):
    for batches in range(1, len(MAKERS[kind]()) + 1):
        rest, again, _, _ = resumed(MAKERS[kind], epoch, batches)
        assert as_lists(again) == as_lists(rest)


def test_resume_with_workers_gives_the_remaining_batches():
    # Workers fetch ahead of what was trained on: the place is counted where batches are given out.
    def make():
        return TaskLoader.from_dataloader(user_loader("weighted", num_workers=2))

    rest, again, _, _ = resumed(make, 1, 3)
    assert as_lists(again) == as_lists(rest)


def test_resume_before_the_first_batch_of_a_later_epoch_gives_the_whole_epoch():
    # Whoever saves in on_train_epoch_start must not lose the epoch.
    loader = TaskLoader(DATA, 4, seed=2)
    list(loader)
    loader.set_epoch(1)
    state = through_a_file(loader.state_dict())
    other = TaskLoader(DATA, 4, seed=2)
    other.load_state_dict(state)
    other.set_epoch(1)
    assert flat(other) == flat(loader)


def test_epoch_after_a_finished_one_starts_at_its_beginning():
    loader = TaskLoader(DATA, 4, seed=2)
    list(loader)
    other = TaskLoader(DATA, 4, seed=2)
    other.load_state_dict(through_a_file(loader.state_dict()))
    loader.set_epoch(1)
    other.set_epoch(1)
    assert flat(other) == flat(loader)
    assert len(flat(other)) == 6


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_resume_of_mixed_batches_gives_the_remaining_batches_and_counts(mode):
    buffer = filled(TensorDataset(torch.arange(100, 120)))

    def make():
        loader = TaskLoader(DATA, 4, seed=2)
        loader.mix_in(Mix.constant(buffer, 0.3, mode, seed=5))
        return loader

    for batches in range(1, 6):
        rest, again, straight, stopped = resumed(make, 1, batches)
        assert as_lists(again) == as_lists(rest)
        assert straight.counts == stopped.counts


def test_random_states_are_restored_when_the_order_is_laid_out_and_no_sample_fetched():
    loader = TaskLoader.from_dataloader(user_loader("shuffle"))
    iterator = iter(loader)
    next(iterator)
    fetched, at_restore = [], []

    class Spy(TensorDataset):
        def __getitem__(self, index):
            fetched.append(index)
            return super().__getitem__(index)

    other = TaskLoader.from_dataloader(DataLoader(Spy(torch.arange(22)), batch_size=4, shuffle=True))
    other.load_state_dict(through_a_file(loader.state_dict()), on_resumed=lambda: at_restore.append(len(fetched)))
    list(other)
    assert at_restore == [0]


# ---------------------------------------------------------------------- mixing


def test_ratio_zero_is_no_mix():
    plain, mixed = TaskLoader(DATA, 4, seed=2), TaskLoader(DATA, 4, seed=2)
    mixed.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), 0.0, "replace", seed=5))
    assert flat(mixed) == flat(plain)


def test_empty_buffer_is_no_mix():
    plain, mixed = TaskLoader(DATA, 4, seed=2), TaskLoader(DATA, 4, seed=2)
    mixed.mix_in(Mix.constant(ReplayBuffer(10), 0.5, "replace", seed=5))
    assert flat(mixed) == flat(plain)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_new_samples_keep_the_users_order(mode, kind):
    torch.manual_seed(11)
    expected = [x for batch in flat(TaskLoader.from_dataloader(user_loader(kind))) for x in batch]
    loader = TaskLoader.from_dataloader(user_loader(kind))
    loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), 0.4, mode, seed=5))
    torch.manual_seed(11)
    assert [x for batch in flat(loader) for x in batch if x < 100] == expected


def test_each_pass_over_the_buffer_replays_every_sample_once():
    loader = TaskLoader(TensorDataset(torch.arange(40)), 4)
    loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 110))), 0.5, "add", seed=5))
    replayed = [x for batch in flat(loader) for x in batch if x >= 100]
    assert [sorted(replayed[i : i + 10]) for i in range(0, 40, 10)] == [list(range(100, 110))] * 4


def test_mixed_samples_are_counted():
    loader = TaskLoader(DATA, 4)
    loader.mix_in(Mix.constant(filled(TensorDataset(torch.arange(100, 120))), 0.5, "replace", seed=5))
    numbers = [x for batch in flat(loader) for x in batch]
    assert loader.counts["new_samples"] == 22
    assert loader.counts["replayed_samples"] == sum(x >= 100 for x in numbers) > 0
    assert loader.counts["new_tokens"] == loader.counts["replayed_tokens"] == 0


def rows(samples):
    """A collate function that leaves the samples apart."""
    return samples


def test_tokens_of_new_and_replayed_samples_are_counted():
    loader = TaskLoader(Tokens(60), 4, rows)
    loader.mix_in(Mix.constant(filled(Tokens(30, first=1000)), 0.3, "replace", seed=5))
    seen = {"new_tokens": 0, "replayed_tokens": 0}
    for batch in loader:
        for sample in batch:
            kind = "new_tokens" if sample["input_ids"][0] < 1000 else "replayed_tokens"
            seen[kind] += len(sample["input_ids"]) - 1
    assert {key: loader.counts[key] for key in seen} == seen
    assert seen["replayed_tokens"] / sum(seen.values()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", ["own order", "shuffle", "subset", "weighted"])
def test_mixed_loader_gives_as_many_batches_as_it_announces(kind):
    # Lightning stops at len(loader): what is missing in it is never trained on.
    tokens = Tokens(60, longest=40)
    sampler = {
        "subset": torch.utils.data.SubsetRandomSampler(range(20)),
        "weighted": WeightedRandomSampler([1.0] * 30 + [5.0] * 30, 60),
    }
    if kind == "own order":
        loader = TaskLoader(tokens, 4, rows)
    elif kind == "shuffle":
        loader = TaskLoader.from_dataloader(DataLoader(tokens, 4, shuffle=True, collate_fn=rows))
    else:
        loader = TaskLoader.from_dataloader(DataLoader(tokens, 4, sampler=sampler[kind], collate_fn=rows))
    loader.mix_in(Mix.constant(filled(Tokens(30, first=1000)), 0.3, "replace", seed=5))
    torch.manual_seed(3)
    for epoch in range(3):
        loader.set_epoch(epoch)
        assert len(list(loader)) == len(loader)


class TokenPairs(Tokens):
    """Counts its tokens, and gives tuples, in which nobody else can count them."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample["input_ids"], sample["loss_mask"]


def test_replayed_samples_without_a_known_number_of_tokens_do_not_blow_up_the_epoch():
    loader = TaskLoader(TokenPairs(60), 4, rows)
    loader.mix_in(Mix.constant(filled(TokenPairs(30, first=1000)), 0.25, "replace", seed=5))
    assert 15 <= len(loader) <= 60


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ({"input_ids": torch.tensor([5, 6, 7]), "loss_mask": torch.tensor([True, False, True])}, 1),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, 2),
        ({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, 2),
        ({"input_ids": [5, 6, 7], "labels": 3}, None),
        ({"pixels": torch.zeros(3), "labels": torch.zeros(3, dtype=torch.int64)}, None),
        ((torch.zeros(3), torch.tensor(1)), None),
    ],
)
def test_loss_tokens_of_a_sample(sample, expected):
    assert loss_tokens(sample) == expected


# ---------------------------------------------------------------------- what cannot be planned


class Stream(IterableDataset):
    def __iter__(self):
        yield from range(4)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=2), "stream"),
        (DataLoader(DATA, batch_size=None), "batch_size=None"),
        (DataLoader(DATA, batch_sampler=[[0, 1], [2]]), "custom batch sampler"),
        ([torch.zeros(2)], "list"),
    ],
    ids=["iterable", "no batching", "batch sampler", "list of batches"],
)
def test_what_cannot_be_planned_says_why(loader, reason):
    assert reason in why_not_plannable(loader)


def test_batch_sampler_of_torchs_own_kind_can_be_planned():
    batch_sampler = torch.utils.data.BatchSampler(RandomSampler(DATA), 4, drop_last=False)
    assert why_not_plannable(DataLoader(DATA, batch_sampler=batch_sampler)) is None


def test_batch_sampler_of_torchs_own_kind_keeps_its_batches():
    def make():
        return DataLoader(DATA, batch_sampler=torch.utils.data.BatchSampler(RandomSampler(DATA), 4, drop_last=True))

    torch.manual_seed(1)
    expected = flat(make())
    torch.manual_seed(1)
    assert flat(TaskLoader.from_dataloader(make())) == expected


def test_planning_a_stream_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="stream"):
        TaskLoader.from_dataloader(DataLoader(Stream(), batch_size=2))
