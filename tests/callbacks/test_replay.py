"""Replay as a module meets it: what its training_step really receives."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from replaying import TASKS, Recorder, numbers
from torch.utils.data import DataLoader, Dataset, IterableDataset
from toys import Classifier, classification, trainer

from lightning_cl import Replay, TaskDataModule, fit_tasks
from lightning_cl.data import TrainedBPE


def numbers_seen(module) -> list[tuple[int, list[int]]]:
    return [(epoch, batch[0].tolist()) for epoch, batch in module.seen]


def recorded(tmp_path, replay, tasks=TASKS, epochs=3, batch_size=8):
    """For each task the list of its (epoch, batch) pairs."""
    module = Recorder()
    fit_tasks(trainer(tmp_path, [replay], max_epochs=epochs), module, TaskDataModule(tasks, batch_size=batch_size))
    batches, parts, task = numbers_seen(module), [[] for _ in tasks], 0
    for epoch, batch in batches:
        task = max(task, max(batch) // 1000)
        parts[task].append((epoch, batch))
    return parts


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5])
def test_replay_has_its_share_of_the_samples(tmp_path, ratio, mode):
    parts = recorded(tmp_path, Replay(40, ratio, mode=mode))
    for task in (1, 2):
        samples = [x for _, batch in parts[task] for x in batch]
        replayed = sum(x // 1000 < task for x in samples)
        assert abs(replayed - ratio * len(samples)) <= 1


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_every_new_sample_is_seen_once_in_each_epoch(tmp_path, mode):
    parts = recorded(tmp_path, Replay(40, 0.3, mode=mode))
    for task, part in enumerate(parts):
        for epoch in range(3):
            new = sorted(x for e, batch in part if e == epoch for x in batch if x // 1000 == task)
            assert new == list(range(task * 1000, task * 1000 + 60))


def test_replayed_samples_come_from_all_earlier_tasks_and_from_the_buffer(tmp_path):
    # A buffer that is larger than two tasks holds all of them, so that nothing else can be in the batches.
    parts = recorded(tmp_path, Replay(1000, 0.5))
    assert {x // 1000 for _, batch in parts[0] for x in batch} == {0}
    assert {x // 1000 for _, batch in parts[1] for x in batch} == {0, 1}
    assert {x // 1000 for _, batch in parts[2] for x in batch} == {0, 1, 2}


def test_only_what_is_in_the_buffer_is_replayed(tmp_path):
    class Remembering(Replay):
        stored = ()

        def on_task_end(self, trainer, pl_module):
            super().on_task_end(trainer, pl_module)
            self.stored += ({int(x) for (x,) in self.buffer.items},)

    replay = Remembering(10, 0.5)
    parts = recorded(tmp_path, replay)
    for task in (1, 2):
        replayed = {x for _, batch in parts[task] for x in batch if x // 1000 < task}
        assert replayed == replay.stored[task - 1]


def test_replaced_batches_keep_their_size(tmp_path):
    parts = recorded(tmp_path, Replay(40, 0.3), batch_size=8)
    sizes = [len(batch) for _, batch in parts[1]]
    assert sizes.count(8) > len(sizes) / 2
    assert max(sizes) == 8


def test_each_epoch_of_a_task_has_as_many_steps(tmp_path):
    parts = recorded(tmp_path, Replay(40, 0.37))
    for part in parts:
        assert len({sum(e == epoch for e, _ in part) for epoch in range(3)}) == 1


def test_buffer_is_filled_from_every_task_and_never_exceeds_its_size(tmp_path):
    replay = Replay(30, 0.1, policy="task_balanced")
    recorded(tmp_path, replay, epochs=1)
    assert replay.buffer.counts() == {"a": 10, "b": 10, "c": 10}
    assert replay.buffer.seen == 180


def test_same_seed_replays_the_same_samples(tmp_path):
    first, second, third = (recorded(tmp_path, Replay(20, 0.3, seed=seed), epochs=1) for seed in (7, 7, 8))
    assert first == second != third


# ---------------------------------------------------------------------- tokens


def letters(letter: str, count: int, seed: int) -> list[str]:
    """Documents of very different lengths that tell their task by their letter."""
    lengths = torch.randint(1, 120, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [letter * length for length in lengths]


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5])
def test_replay_has_its_share_of_the_loss_tokens(tmp_path, ratio, mode):
    module = Recorder()
    tasks = {"a": letters("a", 300, seed=1), "b": letters("b", 200, seed=2)}
    data = TaskDataModule(tasks, tokenizer=TrainedBPE(257, str(tmp_path)), max_length=64, batch_size=8)
    fit_tasks(trainer(tmp_path, [Replay(1000, ratio, mode=mode)], max_epochs=2), module, data)
    a, b = (data.tokenizer(letter)["input_ids"][0] for letter in "ab")
    tokens = {a: 0, b: 0}
    start = next(i for i, (_, batch) in enumerate(module.seen) if (batch["input_ids"][:, 0] == b).any())
    for _, batch in module.seen[start:]:
        for first, labels in zip(batch["input_ids"][:, 0].tolist(), batch["labels"], strict=True):
            tokens[first] += int((labels[1:] != -100).sum())  # the first token is predicted by nothing
    assert tokens[a] / (tokens[a] + tokens[b]) == pytest.approx(ratio, abs=0.005)


class Masked(Dataset):
    """Somebody's instruction data: loss on the second half only, as labels or as a mask."""

    def __init__(self, start: int, key: str):
        self.start, self.key = start, key

    def __len__(self):
        return 24

    def __getitem__(self, index):
        length = 4 + index % 5
        ids = torch.full((length,), self.start + index)
        bears_loss = torch.arange(length) >= length // 2
        return {
            "input_ids": ids,
            self.key: bears_loss if self.key == "loss_mask" else ids.masked_fill(~bears_loss, -100),
        }


@pytest.mark.parametrize("key", ["loss_mask", "labels"])
def test_loss_masks_travel_with_replayed_samples(tmp_path, key):
    first, module = Masked(0, key), Recorder()
    data = TaskDataModule({"a": first, "b": Masked(100, key)}, collate_fn=list, batch_size=4)
    fit_tasks(trainer(tmp_path, [Replay(50, 0.5)], max_epochs=1), module, data)
    replayed = [sample for _, batch in module.seen[6:] for sample in batch if sample["input_ids"][0] < 100]
    assert len(replayed) >= 20
    for sample in replayed:
        original = first[int(sample["input_ids"][0])]
        assert torch.equal(sample["input_ids"], original["input_ids"])
        assert torch.equal(sample[key], original[key])


class MaskedAndCounted(Masked):
    def loss_tokens(self, index):
        length = 4 + index % 5
        return length - length // 2


def test_every_batch_of_a_users_token_loader_reaches_the_module(tmp_path):
    # A DataLoader with shuffle=True over data that counts its tokens: the Trainer stops at the announced length.
    def loader(start):
        return DataLoader(MaskedAndCounted(start, "labels"), 4, shuffle=True, collate_fn=list)

    module = Recorder()
    fit_tasks(trainer(tmp_path, [Replay(50, 0.5)], max_epochs=1), module, {"a": loader(0), "b": loader(100)})
    new = sorted(int(s["input_ids"][0]) for _, batch in module.seen for s in batch if s["input_ids"][0] >= 100)
    assert new == list(range(100, 124))


# ---------------------------------------------------------------------- without the driver


def test_plain_fit_mixes_into_the_second_fit(tmp_path):
    replay, modules = Replay(100, 0.25), []
    for start in (0, 1000):
        modules.append(Recorder())
        loader = DataLoader(numbers(start), batch_size=8, shuffle=True)
        trainer(tmp_path, [replay], max_epochs=2).fit(modules[-1], loader)
    assert {x for _, batch in numbers_seen(modules[0]) for x in batch} == set(range(60))
    second = [x for _, batch in numbers_seen(modules[1]) for x in batch]
    assert sorted(x for x in second if x >= 1000) == sorted([*range(1000, 1060)] * 2)
    assert sum(x < 1000 for x in second) == pytest.approx(0.25 * len(second), abs=1)
    assert set(replay.buffer.tasks) == {"task-0", "task-1"}


def weights_after(run, callbacks):
    torch.manual_seed(0)
    module = Classifier(dropout=0.3)
    torch.manual_seed(1)
    run(module, callbacks)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("shuffle", [True, False])
def test_ratio_zero_is_plain_training_bit_for_bit(tmp_path, shuffle):
    def plain(module, callbacks):
        loader = DataLoader(classification(0), batch_size=8, shuffle=shuffle)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader)

    replay = Replay(20, 0.0)
    assert torch.equal(weights_after(plain, []), weights_after(plain, [replay]))
    assert len(replay.buffer) == 20


def test_ratio_zero_in_a_sequence_is_the_sequence_without_replay(tmp_path):
    def sequence(module, callbacks):
        data = TaskDataModule({"a": classification(0), "b": classification(1)})
        fit_tasks(trainer(tmp_path, callbacks, max_epochs=2), module, data)

    replay = Replay(20, 0.0)
    assert torch.equal(weights_after(sequence, []), weights_after(sequence, [replay]))
    assert set(replay.buffer.tasks) == {"a", "b"}


@pytest.mark.parametrize("shuffle", [True, False])
def test_sequence_of_one_loader_with_ratio_zero_is_plain_training_bit_for_bit(tmp_path, shuffle):
    def loader():
        return DataLoader(classification(0), batch_size=8, shuffle=shuffle)

    def plain(module, callbacks):
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader())

    def sequence(module, callbacks):
        fit_tasks(trainer(tmp_path, callbacks, max_epochs=2), module, {"a": loader()})

    assert torch.equal(weights_after(plain, []), weights_after(sequence, [Replay(20, 0.0)]))


# ---------------------------------------------------------------------- errors before any training


class Stream(IterableDataset):
    def __iter__(self):
        for i in range(8):
            yield torch.tensor(i), 0


class Thing:
    pass


class Things(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.zeros(2), "thing": Thing()}


def fit_in_a_sequence(tmp_path, module, loader):
    data = {"a": DataLoader(numbers(0), batch_size=4), "b": loader}
    fit_tasks(trainer(tmp_path, [Replay()], max_epochs=1), module, data)


def fit_plainly(tmp_path, module, loader):
    trainer(tmp_path, [Replay()], max_epochs=1).fit(module, loader)


@pytest.mark.parametrize("fit", [fit_in_a_sequence, fit_plainly])
def test_stream_is_refused_before_any_step(tmp_path, fit):
    module = Recorder()
    with pytest.raises(MisconfigurationException, match=r"Replay cannot mix .*stream"):
        fit(tmp_path, module, DataLoader(Stream(), batch_size=4))
    assert module.seen == []


@pytest.mark.parametrize("fit", [fit_in_a_sequence, fit_plainly])
def test_samples_that_cannot_be_stored_are_refused_before_any_step(tmp_path, fit):
    module = Recorder()
    with pytest.raises(TypeError, match=r"Replay cannot store .*Thing"):
        fit(tmp_path, module, DataLoader(Things(), batch_size=4, collate_fn=list))
    assert module.seen == []


@pytest.mark.parametrize("fit", [lambda t, m, d: fit_tasks(t, m, {"a": d}), lambda t, m, d: t.fit(m, d)])
def test_two_replays_in_one_trainer_are_refused(tmp_path, fit):
    module, both = Recorder(), trainer(tmp_path, [Replay(), Replay()], max_epochs=1)
    with pytest.raises(MisconfigurationException, match="Replay and Replay-2"):
        fit(both, module, DataLoader(numbers(0), batch_size=4))
    assert module.seen == []


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), float("inf"), True, "5%", None])
def test_ratio_out_of_range_is_named(ratio):
    with pytest.raises(ValueError, match="ratio="):
        Replay(ratio=ratio)


@pytest.mark.parametrize(("argument", "value"), [("buffer_size", 0), ("policy", "lifo"), ("mode", "append")])
def test_wrong_argument_is_named_with_its_value(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        Replay(**{argument: value})
