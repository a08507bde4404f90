"""Trainer settings, modules and data as people have them: per task, left alone, or refused with a reason."""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler
from toys import Classifier, classification, trainer

from lightning_cl import EWC, Replay, Task, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


class Batches(Callback):
    """What each task trains on."""

    def __init__(self):
        self.tasks = []

    def on_train_start(self, trainer, pl_module):
        self.tasks.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.tasks[-1].append(batch[0].clone())


def two_tasks(samples=40):
    return TaskDataModule({"a": classification(0, samples), "b": classification(1, samples)}, batch_size=8)


def test_callbacks_that_the_module_makes_anew_for_every_fit_are_refused(tmp_path):
    class Configured(Classifier):
        def configure_callbacks(self):
            return [EWC()]

    with pytest.raises(MisconfigurationException, match="configure_callbacks"):
        fit_tasks(trainer(tmp_path, max_epochs=1), Configured(), two_tasks())


def test_early_stopping_from_the_module_works(tmp_path):
    class Configured(Classifier):
        def configure_callbacks(self):
            return [EarlyStopping("val_loss")]

    batches = Batches()
    fit_tasks(trainer(tmp_path, [batches, TaskMatrix()], max_epochs=1), Configured(), two_tasks())
    assert [len(task) for task in batches.tasks] == [5, 5]


def test_a_loader_that_makes_its_own_batches_is_left_alone(tmp_path):
    class Sevens(DataLoader):
        def __iter__(self):
            for x, y in super().__iter__():
                yield x * 0 + 7, y

    batches = Batches()
    fit_tasks(trainer(tmp_path, [batches], max_epochs=1), Classifier(), {"a": Sevens(classification(0), 8)})
    assert all((batch == 7).all() for batch in batches.tasks[0])


def test_min_steps_is_per_task(tmp_path):
    class Flat(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0)

    batches = Batches()
    run = trainer(tmp_path, [batches, EarlyStopping("val_loss", patience=1)], max_epochs=9, min_steps=20)
    fit_tasks(run, Flat(), two_tasks())
    assert [len(task) for task in batches.tasks] == [20, 20]


def test_max_time_is_per_task(tmp_path):
    batches = Batches()
    fit_tasks(trainer(tmp_path, [batches], max_epochs=-1, max_time={"seconds": 1}), Classifier(), two_tasks())
    assert len(batches.tasks) == 2
    assert all(batches.tasks)


def test_overfit_batches_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="limit_train_batches"):
        fit_tasks(trainer(tmp_path, max_epochs=1, overfit_batches=2), Classifier(), two_tasks())


def test_the_trainer_is_afterwards_as_it_was(tmp_path):
    ewc = EWC(samples=8)
    run = trainer(tmp_path, [ewc], max_epochs=3)
    tasks = [Task("a", classification(0), max_steps=2), Task("b", classification(1), max_epochs=1)]
    module = Classifier()
    fit_tasks(run, module, TaskDataModule(tasks))
    assert (run.max_epochs, run.max_steps) == (3, -1)
    # A plain fit on it counts as one more task.
    run.fit_loop.epoch_progress.current.reset()
    run.fit(module, DataLoader(classification(2), 8))
    assert ewc.tasks_done == 3


def test_a_checkpoint_of_an_exception_misses_no_batch(tmp_path):
    class Fails(Classifier):
        fail = True

        def training_step(self, batch, batch_idx):
            if self.fail and batch_idx == 3:
                raise RuntimeError("power cut")
            return super().training_step(batch, batch_idx)

    whole, resumed = Batches(), Batches()
    data = {"a": classification(0, 80)}
    fit_tasks(trainer(tmp_path / "1", [whole], max_epochs=1), Classifier(), TaskDataModule(data, batch_size=8))
    module = Fails()
    with pytest.raises(RuntimeError, match="power cut"):
        fit_tasks(
            trainer(tmp_path / "2", [OnExceptionCheckpoint(tmp_path / "2")], max_epochs=1),
            module,
            TaskDataModule(data, batch_size=8),
        )
    (path,) = (tmp_path / "2").glob("*.ckpt")
    fit_tasks(trainer(tmp_path / "3", [resumed], max_epochs=1), Classifier(), TaskDataModule(data, batch_size=8), path)
    for one, other in itertools.zip_longest(whole.tasks[0][3:], resumed.tasks[0]):
        assert torch.equal(one, other)


def test_a_data_module_that_sets_up_by_stage_works_with_the_matrix(tmp_path):
    class ByStage(L.LightningDataModule):
        calls = 0

        def setup(self, stage):
            type(self).calls += 1
            if stage == "fit":
                self.train, self.val = classification(0), classification(5)

        def train_dataloader(self):
            return DataLoader(self.train, 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.val, 8)

    matrix = TaskMatrix()
    fit_tasks(trainer(tmp_path, [matrix], max_epochs=1), Classifier(), {"a": ByStage()})
    assert not matrix.matrix.isnan().any()
    assert ByStage.calls <= 2  # once per stage


def test_a_data_module_without_validation_trains_and_cannot_be_measured(tmp_path):
    class TrainOnly(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(classification(0), 8)

    batches = Batches()
    fit_tasks(trainer(tmp_path, [batches], max_epochs=1), Classifier(), {"a": TrainOnly()})
    assert len(batches.tasks[0]) == 6
    with pytest.raises(MisconfigurationException, match=r"'a'.*Task\(val=…\)"):
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_epochs=1), Classifier(), {"a": TrainOnly()})


class Endless(IterableDataset):
    """A stream."""

    def __iter__(self):
        while True:
            yield torch.randn(8), 0


def test_a_stream_without_end_trains_and_asks_for_validation_data(tmp_path):
    batches = Batches()
    fit_tasks(trainer(tmp_path, [batches], max_steps=3), Classifier(), TaskDataModule({"a": Endless()}))
    assert len(batches.tasks[0]) == 3
    with pytest.raises(MisconfigurationException, match="nothing to measure"):
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_steps=3), Classifier(), TaskDataModule({"a": Endless()}))


def test_a_sampler_without_end_is_left_to_lightning(tmp_path):
    class Forever:
        def __iter__(self):
            return itertools.cycle(range(48))

    batches = Batches()
    loader = DataLoader(classification(0), 8, sampler=Forever())
    fit_tasks(trainer(tmp_path, [batches], max_steps=3), Classifier(), {"a": loader})
    assert len(batches.tasks[0]) == 3


def test_a_module_that_writes_to_its_logger_in_validation_works_with_the_matrix(tmp_path):
    class Writes(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.logger.experiment.anything("goes")

    run = trainer(tmp_path, [TaskMatrix()], max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0)
    run.loggers = [L.pytorch.loggers.CSVLogger(tmp_path)]
    run.check_val_every_n_epoch = 100
    fit_tasks(run, Writes(), two_tasks())
    assert (tmp_path / "lightning_logs" / "version_0" / "matrix.csv").exists()


def test_an_empty_task_is_found_before_the_first_is_trained(tmp_path):
    batches = Batches()
    data = {"a": DataLoader(classification(0), 8), "b": DataLoader(classification(1, 4), 8, drop_last=True)}
    with pytest.raises(MisconfigurationException, match=r"'b'.*no batch"):
        fit_tasks(trainer(tmp_path, [batches], max_epochs=1), Classifier(), data)
    assert not batches.tasks


def test_last_is_the_newest_checkpoint_that_holds_the_whole_state(tmp_path):
    callbacks = [ModelCheckpoint(tmp_path / "weights", save_weights_only=True)]
    fit_tasks(trainer(tmp_path, callbacks, max_epochs=1), Classifier(), two_tasks())
    batches = Batches()
    (tmp_path / "tasks" / "1-b.ckpt").unlink()
    run = trainer(tmp_path, [batches, ModelCheckpoint(tmp_path / "weights", save_weights_only=True)], max_epochs=1)
    fit_tasks(run, Classifier(), two_tasks(), "last")
    assert len(batches.tasks) == 1


def test_checkpoints_of_an_earlier_run_in_the_same_folder_are_kept(tmp_path):
    for _ in range(2):
        fit_tasks(trainer(tmp_path, [ModelCheckpoint()], max_epochs=1), Classifier(), two_tasks())
    assert len(list((tmp_path / "tasks").iterdir())) == len(list((tmp_path / "tasks-v1").iterdir())) == 2


def test_what_a_sampler_leaves_out_is_neither_replayed_nor_measured(tmp_path):
    """One data set, one sampler per task: what belongs to another task, or to validation, must not leak."""
    dataset = classification(0, 60)
    replay, batches, seen = Replay(100, 0.3), Batches(), []

    def outputs(module, batch):
        seen.extend(batch[0][:, 0].tolist())
        return module(batch[0])

    data = {
        "a": DataLoader(dataset, 8, sampler=SubsetRandomSampler(range(20))),
        "b": DataLoader(dataset, 8, sampler=SubsetRandomSampler(range(20, 40))),
    }
    fit_tasks(trainer(tmp_path, [replay, batches, EWC(samples=50, outputs=outputs)], max_epochs=1), Classifier(), data)
    first = dataset.tensors[0][:, 0].tolist()
    assert sorted(sample[0][0].item() for sample in replay.buffer.items) == sorted(first[:40])
    # One sample before the first task; of each task three in a batch and one by one, and then all of them.
    assert seen[0] in first[:20]
    for task, start in ((first[:20], 1), (first[20:40], 27)):
        assert set(seen[start : start + 6]) <= set(task)
        assert seen[start + 6 : start + 26] != task
        assert sorted(seen[start + 6 : start + 26]) == sorted(task)
    assert len(seen) == 53
    assert set(torch.cat(batches.tasks[1])[:, 0].tolist()) <= set(first[:40])


def test_lists_that_a_module_fills_are_not_filled_by_the_fisher_pass(tmp_path):
    class Collects(Classifier):
        def __init__(self):
            super().__init__()
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    module = Collects()
    fit_tasks(trainer(tmp_path, [EWC(samples=10)], max_epochs=1), module, two_tasks())
    assert len(module.losses) == 10
