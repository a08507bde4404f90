"""General data in the batches of all tasks, at its share, from the first task on."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from replaying import TASKS, Recorder, numbers
from torch.utils.data import DataLoader
from toys import trainer

from lightning_cl import GeneralReplay, Replay, TaskDataModule, fit_tasks
from lightning_cl.core.coordinator import TaskCoordinator
from lightning_cl.data import TrainedBPE

GENERAL = numbers(9000, 200)


class ByOwner(L.Callback):
    """Counts what each batch consists of: new samples, and those of each callback's buffer."""

    def __init__(self, methods):
        self.methods, self.batches = methods, []

    def on_before_backward(self, trainer, pl_module, loss):
        parts = [part for row in TaskCoordinator.of(trainer).kinds or [] for part in row]
        owners = [sum(part.owner is method.buffer for part in parts) for method in self.methods]
        self.batches.append((trainer.datamodule.index, sum(not part.replayed for part in parts), *owners))


def shares(batches, task):
    mine = torch.tensor([counts for index, *counts in batches if index == task]).float().sum(0)
    return (mine / mine.sum()).tolist()


def test_general_samples_are_in_all_tasks_and_shares_add_up(tmp_path):
    general, replay = GeneralReplay(GENERAL, 0.2), Replay(500, 0.3)
    count, module = ByOwner([general, replay]), Recorder()
    fit_tasks(trainer(tmp_path, [general, replay, count], max_epochs=2), module, TaskDataModule(TASKS, batch_size=8))
    assert shares(count.batches, 0) == pytest.approx([0.8, 0.2, 0.0], abs=0.01)
    for task in (1, 2):
        assert shares(count.batches, task) == pytest.approx([0.5, 0.2, 0.3], abs=0.01)
    # What the tasks were trained on is theirs, and in no buffer of general data.
    assert {int(x) // 1000 for (x,) in general.buffer.items} == {9}
    assert {int(x) // 1000 for (x,) in replay.buffer.items} == {0, 1, 2}


def test_any_window_of_two_sources_keeps_both_shares(tmp_path):
    general, replay = GeneralReplay(GENERAL, 0.2), Replay(500, 0.3)
    count = ByOwner([general, replay])
    tasks = {"a": numbers(0, 400), "b": numbers(1000, 400)}
    fit_tasks(
        trainer(tmp_path, [general, replay, count], max_epochs=1), Recorder(), TaskDataModule(tasks, batch_size=8)
    )
    rows = torch.tensor([counts for index, *counts in count.batches if index == 1]).double()
    for start in range(len(rows) - 20):
        window = rows[start : start + 20].sum(0)
        assert abs(window[1] - 0.2 * window.sum()) <= 2
        assert abs(window[2] - 0.3 * window.sum()) <= 2


def test_text_is_tokenised_as_the_tasks_and_counted_in_loss_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CL_CACHE", str(tmp_path / "cache"))
    texts = ["abcdefgh " * 30] * 40
    general = GeneralReplay(["z" * (20 + 7 * (i % 17)) for i in range(60)], ratio=0.25)
    data = TaskDataModule({"a": texts}, tokenizer=TrainedBPE(257, str(tmp_path)), max_length=32, batch_size=4)
    module = Recorder()
    fit_tasks(trainer(tmp_path, [general], max_epochs=2), module, data)
    z = data.tokenizer("z")["input_ids"][0]
    rows = [
        (ids, labels)
        for _, batch in module.seen
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    counts = {True: 0, False: 0}
    for ids, labels in rows:
        counts[bool((ids == z).any())] += int((labels[1:] != -100).sum())
    # One sample has at most 32 tokens.
    assert abs(counts[True] - 0.25 * sum(counts.values())) <= 32


def test_a_budget_keeps_a_uniform_part_and_is_never_exceeded(tmp_path):
    general = GeneralReplay(GENERAL, 0.1, buffer_size=50)
    fit_tasks(trainer(tmp_path, [general], max_epochs=1), Recorder(), TaskDataModule(TASKS, batch_size=8))
    assert len(general.buffer) == 50
    kept = sorted(int(x) - 9000 for (x,) in general.buffer.items)
    assert kept[0] < 40
    assert kept[-1] >= 160
    assert general.report()["stored"] == {"general": 50}


def test_ratio_zero_is_plain_training(tmp_path):
    plain, general = Recorder(), Recorder()
    fit_tasks(trainer(tmp_path, max_epochs=1), plain, TaskDataModule(TASKS, batch_size=8))
    callbacks = [GeneralReplay(GENERAL, 0.0)]
    fit_tasks(trainer(tmp_path, callbacks, max_epochs=1), general, TaskDataModule(TASKS, batch_size=8))
    assert [b[0].tolist() for _, b in plain.seen] == [b[0].tolist() for _, b in general.seen]


def test_several_corpora_can_be_replayed_and_their_sum_has_to_leave_room(tmp_path):
    both = [GeneralReplay(GENERAL, 0.3), GeneralReplay(numbers(8000, 50), 0.3)]
    module = Recorder()
    fit_tasks(trainer(tmp_path, both, max_epochs=1), module, TaskDataModule({"a": numbers(0, 200)}, batch_size=10))
    seen = [int(x) // 1000 for _, batch in module.seen for x in batch[0]]
    assert seen.count(9) / len(seen) == pytest.approx(0.3, abs=0.01)
    assert seen.count(8) / len(seen) == pytest.approx(0.3, abs=0.01)
    too_much, module = [GeneralReplay(GENERAL, 0.6), Replay(10, 0.4)], Recorder()
    with pytest.raises(MisconfigurationException, match=r"ratio.*add up to 1.*less than 1"):
        fit_tasks(trainer(tmp_path, too_much, max_epochs=1), module, TaskDataModule(TASKS, batch_size=8))


def test_bad_data_is_found_before_any_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        GeneralReplay(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(TypeError, match=r"data: expected .* got"):
        GeneralReplay(3)
    with pytest.raises(ValueError, match="1/t"):
        GeneralReplay(GENERAL, "1/t")
    module = Recorder()
    with pytest.raises(MisconfigurationException, match="tokenizer"):
        fit_tasks(trainer(tmp_path, [GeneralReplay(["some text"])], max_epochs=1), module, TaskDataModule(TASKS))
    with pytest.raises(MisconfigurationException, match="tokenizer"):
        trainer(tmp_path, [GeneralReplay(["some text"])], max_epochs=1).fit(module, DataLoader(numbers(0), 4))
    assert module.seen == []
