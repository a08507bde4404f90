"""fit_tasks: limits per task, fresh optimizers, other callbacks per task, longer lists, preflight, refusals."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Replay, Task, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.callbacks import TaskProgress
from lightning_cl.tasks import TaskPosition


class Recorder(Callback):
    """What a bystander sees of each task."""

    def __init__(self):
        self.tasks, self.steps = [], []

    def on_train_start(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.tasks.append(
            {
                "state": len(optimizer.state),
                "lr": optimizer.param_groups[0]["lr"],
                "optimizer": id(optimizer),
                "step": trainer.global_step,
            }
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((len(self.tasks) - 1, trainer.current_epoch, trainer.optimizers[0].param_groups[0]["lr"]))


class Scheduled(Classifier):
    """Reads the usual estimate of the number of steps."""

    def __init__(self):
        super().__init__(optimizer=torch.optim.AdamW)
        self.estimates = []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        self.estimates.append(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.estimates[-1])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def steps_per_task(recorder):
    return [sum(task == t for t, *_ in recorder.steps) for task in range(len(recorder.tasks))]


def test_max_epochs_is_per_task(tmp_path):
    recorder, module = Recorder(), Scheduled()
    data = TaskDataModule({"a": classification(0, 40), "b": classification(1, 16)}, batch_size=8)
    fit_tasks(trainer(tmp_path, [recorder], max_epochs=3), module, data)
    assert steps_per_task(recorder) == [15, 6]
    assert module.estimates == [15, 6]
    assert recorder.tasks[1]["step"] == 15  # global_step goes on: the curves of a logger join up


def test_max_steps_is_per_task(tmp_path):
    recorder, module = Recorder(), Scheduled()
    data = TaskDataModule({name: classification(i) for i, name in enumerate("abc")}, batch_size=8)
    fit_tasks(trainer(tmp_path, [recorder], max_steps=7), module, data)
    assert steps_per_task(recorder) == [7, 7, 7]
    assert module.estimates == [7, 7, 7]


def test_a_task_can_override_limits_batch_size_and_learning_rate(tmp_path):
    recorder, module = Recorder(), Scheduled()
    tasks = [
        Task("a", classification(0, 40), max_steps=4),
        Task("b", classification(1, 40), max_epochs=2, batch_size=20, lr=0.5),
        Task("c", classification(2, 40)),
    ]
    fit_tasks(trainer(tmp_path, [recorder], max_epochs=1), module, TaskDataModule(tasks, batch_size=8))
    assert steps_per_task(recorder) == [4, 4, 5]
    assert [task["lr"] for task in recorder.tasks] == pytest.approx([0.05, 0.5, 0.05])
    # The schedule anneals from the task's own peak to zero.
    assert recorder.steps[7][2] == pytest.approx(0.0, abs=1e-12)


def test_each_task_has_a_fresh_optimizer(tmp_path):
    recorder = Recorder()
    fit_tasks(
        trainer(tmp_path, [recorder], max_epochs=1),
        Classifier(optimizer=torch.optim.Adam),
        {"a": DataLoader(classification(0), 8), "b": DataLoader(classification(1), 8)},
    )
    assert [task["state"] for task in recorder.tasks] == [0, 0]


def test_early_stopping_starts_anew_with_each_task(tmp_path):
    """Its patience and best score of one task must not stop the next one early."""

    class Worsening(Classifier):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.trainer.current_epoch) - 100 * (self.trainer.global_step < 20))

    recorder, stopping = Recorder(), EarlyStopping("val_loss", patience=2)
    data = TaskDataModule({"a": classification(0, 40), "b": classification(1, 40)}, batch_size=8)
    fit_tasks(trainer(tmp_path, [recorder, stopping], max_epochs=10, num_sanity_val_steps=0), Worsening(), data)
    # Best in epoch 0, two worse ones: three epochs of five batches. With the score of task a, b would get two.
    assert steps_per_task(recorder) == [15, 15]


def test_model_checkpoint_keeps_the_best_of_each_task_in_its_own_folder(tmp_path):
    checkpoint = ModelCheckpoint(monitor="val_loss", save_top_k=1)
    best = []

    class Note(Callback):
        def on_fit_end(self, trainer, pl_module):
            best.append(checkpoint.best_model_path)

    data = TaskDataModule({"first task": classification(0), "b": classification(1)}, batch_size=8)
    fit_tasks(trainer(tmp_path, [Note(), checkpoint], max_epochs=2), Classifier(), data)
    assert "0-first_task" in best[0]
    assert "1-b" in best[1]
    assert (tmp_path / "tasks" / "0-first_task.ckpt").exists()
    assert (tmp_path / "tasks" / "1-b.ckpt").exists()


def test_no_files_are_written_when_checkpointing_is_off(tmp_path):
    fit_tasks(trainer(tmp_path, max_epochs=1), Classifier(), TaskDataModule({"a": classification(0)}))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_later_list_trains_only_what_is_new(tmp_path):
    def run(folder, names, ckpt_path=None):
        matrix, recorder = TaskMatrix(), Recorder()
        callbacks = [EWC(1.0, samples=8), Replay(20, 0.2), matrix, recorder, ModelCheckpoint(folder / "inside")]
        data = TaskDataModule({name: classification(ord(name)) for name in names}, batch_size=8)
        L.seed_everything(0, verbose=False)
        fit_tasks(trainer(folder, callbacks, max_epochs=1), Classifier(), data, ckpt_path)
        return matrix, recorder, callbacks

    before, _, _ = run(tmp_path / "1", "ab")
    matrix, recorder, callbacks = run(tmp_path / "2", "abc", tmp_path / "1" / "tasks" / "1-b.ckpt")
    assert len(recorder.tasks) == 1
    assert matrix.tasks == ["a", "b", "c"]
    assert torch.equal(matrix.matrix[:3, :2], before.matrix)
    # c before any training, and after a, cannot be known any more; after b it could still be measured.
    assert matrix.matrix[:2, 2].isnan().all()
    assert not matrix.matrix[2:].isnan().any()
    assert set(callbacks[1].buffer.tasks) == {"a", "b", "c"}


def test_watched_tasks_are_columns_without_training(tmp_path):
    tasks = [Task("a", classification(0), classification(0)), Task("general", None, val=classification(9))]
    matrix, recorder = TaskMatrix(), Recorder()
    summary = fit_tasks(trainer(tmp_path, [matrix, recorder], max_epochs=1), Classifier(), TaskDataModule(tasks))
    assert len(recorder.tasks) == 1
    assert matrix.matrix.shape == (2, 2)
    assert not matrix.matrix.isnan().any()
    assert summary["watched"] == ["general"]
    assert summary["average"] == pytest.approx(float(matrix.matrix[1, 0]))  # watched tasks are not in the mean


def test_matrix_entries_are_what_validate_gives(tmp_path):
    module, matrix = Classifier(), TaskMatrix("val_acc", "max")
    data = {name: Task(name, classification(i), classification(i + 10)) for i, name in enumerate("ab")}
    L.seed_everything(3, verbose=False)
    fit_tasks(trainer(tmp_path, [matrix], max_epochs=2), module, TaskDataModule(data, batch_size=16))
    for column, seed in enumerate((10, 11)):
        x, y = classification(seed).tensors
        accuracy = (module.eval()(x).argmax(-1) == y).float().mean()
        assert float(matrix.matrix[2, column]) == pytest.approx(float(accuracy), abs=1e-6)
    assert matrix.on_training_data == []


def test_without_validation_data_the_column_says_that_it_uses_the_training_set(tmp_path):
    matrix = TaskMatrix()
    summary = fit_tasks(
        trainer(tmp_path, [matrix], max_epochs=1), Classifier(), TaskDataModule({"a": classification(0)})
    )
    assert summary["measured_on_training_data"] == ["a"]


def test_other_peoples_data_modules_by_name(tmp_path):
    class Theirs(L.LightningDataModule):
        def __init__(self, seed):
            super().__init__()
            self.seed, self.calls = seed, []

        def prepare_data(self):
            self.calls.append("prepare_data")

        def setup(self, stage):
            self.calls.append("setup")
            self.dataset = classification(self.seed)

        def train_dataloader(self):
            return DataLoader(self.dataset, 8, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.dataset, 8)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.calls.append("transfer")
            return batch

    a, b = Theirs(0), Theirs(1)
    matrix = TaskMatrix()
    replay = Replay(16, 0.25)
    fit_tasks(trainer(tmp_path, [matrix, replay], max_epochs=1), Classifier(), {"a": a, "b": b})
    assert matrix.matrix.shape == (3, 2)
    assert not matrix.matrix.isnan().any()
    assert {"prepare_data", "setup", "transfer"} <= set(a.calls) & set(b.calls)
    assert set(replay.buffer.tasks) == {"a", "b"}


def test_fast_dev_run_goes_through_everything_and_writes_nothing(tmp_path, caplog):
    recorder = Recorder()
    callbacks = [EWC(), SI(), Replay(8, 0.25), TaskMatrix(), recorder]
    data = TaskDataModule({"a": classification(0), "b": classification(1)}, batch_size=8)
    with caplog.at_level("INFO"):
        fit_tasks(trainer(tmp_path, callbacks, fast_dev_run=True), Classifier(), data)
    assert steps_per_task(recorder) == [1, 1]
    assert callbacks[0].importance
    assert len(callbacks[2].buffer) == 8
    assert callbacks[3].matrix.shape == (1, 2)  # that it can be measured, once
    told = [record.getMessage() for record in caplog.records]
    plan, first = (next(i for i, text in enumerate(told) if words in text) for words in ("Preflight", "Task 1/2"))
    assert plan < first
    assert "6 batches an epoch" in told[plan]
    assert told[-1].endswith("2. b with replay: 8 batches an epoch")
    assert not list(tmp_path.rglob("*"))


class Calls(Callback):
    """Counts batches by what is done with them."""

    def __init__(self):
        self.batches = {"train": 0, "val": 0}

    def on_train_batch_end(self, *args):
        self.batches["train"] += 1

    def on_validation_batch_end(self, *args):
        self.batches["val"] += 1


def test_fast_dev_run_evaluates_once_and_shows_no_result(tmp_path, caplog):
    calls, matrix = Calls(), TaskMatrix()
    names = ["a", "b", "c", "d"]
    data = TaskDataModule({name: classification(i) for i, name in enumerate(names)}, batch_size=8)
    with caplog.at_level("INFO"):
        summary = fit_tasks(trainer(tmp_path, [matrix, calls, EWC()], fast_dev_run=True), Classifier(), data)
    # One of each in training, and one of each by the matrix before it; not all tasks after every task.
    assert calls.batches == {"train": 4, "val": 8}
    assert math.isnan(summary["average"])
    for words in ("when learnt", "before training", "forgetting", "average"):
        assert words not in caplog.text


def test_a_preflight_of_somebodys_datamodules_plans_at_the_end(tmp_path, caplog):
    class Theirs(L.LightningDataModule):
        def setup(self, stage):
            assert self.trainer.lightning_module is not None  # as with the Trainer alone

        def train_dataloader(self):
            return DataLoader(classification(0), 8)

    with caplog.at_level("INFO"):
        fit_tasks(trainer(tmp_path, fast_dev_run=True), Classifier(), {"a": Theirs()})
    (plan,) = (record.getMessage() for record in caplog.records if "Preflight" in record.getMessage())
    assert "1. a: 6 batches an epoch" in plan


def test_the_plan_has_the_steps_of_tasks_with_limits_of_their_own(tmp_path, caplog):
    """The Trainer's own are not known here: Lightning overwrites them."""
    own = {"a": {"max_epochs": 3}, "b": {"max_steps": 4}, "c": {"max_epochs": 9, "max_steps": 50}, "d": {}}
    tasks = [Task(name, classification(i), **limits) for i, (name, limits) in enumerate(own.items())]
    with caplog.at_level("INFO"):
        used = trainer(tmp_path, [Replay(8, 0.25)], fast_dev_run=True, accumulate_grad_batches=4)
        fit_tasks(used, Classifier(), TaskDataModule(tasks, batch_size=8))
    (plan,) = (record.getMessage() for record in caplog.records if "Preflight" in record.getMessage())
    # Six batches an epoch are two steps; with replay, so are eight.
    assert "1. a: 6 batches an epoch, 6 steps, max_epochs=3" in plan
    assert "2. b: 6 batches an epoch, 4 steps, max_steps=4" in plan
    assert "3. c: 6 batches an epoch, 18 steps, max_epochs=9, max_steps=50" in plan
    assert plan.endswith("4. d: 6 batches an epoch")
    (replay,) = (text for record in caplog.records if "with replay" in (text := record.getMessage()))
    assert "3. c with replay: 8 batches an epoch, 18 steps" in replay
    assert replay.endswith("4. d with replay: 8 batches an epoch")


def test_a_task_sequence_handed_to_plain_fit_is_refused(tmp_path):
    data = TaskDataModule({"a": classification(0), "b": classification(1)})
    with pytest.raises(RuntimeError, match="fit_tasks"):
        trainer(tmp_path, max_epochs=1).fit(Classifier(), datamodule=data)


def test_one_task_can_be_handed_to_plain_fit(tmp_path):
    ewc = EWC(samples=4)
    trainer(tmp_path, [ewc], max_epochs=1).fit(Classifier(), datamodule=TaskDataModule({"a": classification(0)}))
    assert ewc.tasks_done == 1


def test_manual_optimisation_is_refused(tmp_path):
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="automatic_optimization"):
        fit_tasks(trainer(tmp_path, [EWC()], max_epochs=1), module, TaskDataModule({"a": classification(0)}))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_strategies_that_lose_state_are_refused(tmp_path, strategy):
    with pytest.raises(MisconfigurationException, match="strategy='ddp'"):
        fit_tasks(
            trainer(tmp_path, [EWC()], max_epochs=1, strategy=strategy, devices=2),
            Classifier(),
            TaskDataModule({"a": classification(0)}),
        )


def test_an_endless_task_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="never end"):
        fit_tasks(trainer(tmp_path, max_epochs=-1), Classifier(), TaskDataModule({"a": classification(0)}))


def test_a_metric_that_is_never_logged_is_named_before_training(tmp_path):
    recorder = Recorder()
    with pytest.raises(MisconfigurationException, match=r"val_f1.*val_acc.*val_loss"):
        fit_tasks(
            trainer(tmp_path, [TaskMatrix("val_f1"), recorder], max_epochs=1),
            Classifier(),
            TaskDataModule({"a": classification(0)}),
        )
    assert not recorder.tasks


def test_a_matrix_without_a_validation_step_is_refused(tmp_path):
    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(MisconfigurationException, match="validation_step"):
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_epochs=1), Plain(), TaskDataModule({"a": classification(0)}))
    # Without the matrix it works, also without any validation.
    assert fit_tasks(trainer(tmp_path, max_epochs=1), Plain(), TaskDataModule({"a": classification(0)})) == {}


def test_the_summary_names_its_definitions(tmp_path):
    summary = fit_tasks(
        trainer(tmp_path, [TaskMatrix()], max_epochs=1),
        Classifier(),
        TaskDataModule({"a": classification(0), "b": classification(1)}),
    )
    assert summary.keys() >= {"average", "backward_transfer", "forgetting", "forward_transfer", "matrix"}
    assert "T - 1" in summary["definitions"]["forgetting"]
    assert all(math.isfinite(summary[name]) for name in ("average", "backward_transfer", "forgetting"))


def test_plain_fits_with_one_callback_are_tasks_in_sequence(tmp_path):
    """No driver: whoever loops over Trainers herself gets the same protection."""
    ewc, si = EWC(1.0, samples=8), SI(1.0)
    module = Classifier()
    for seed in range(2):
        trainer(tmp_path, [ewc, si], max_epochs=1).fit(module, DataLoader(classification(seed), 8))
        assert ewc.tasks_done == si.tasks_done == seed + 1
    assert ewc.task.index == 1
    assert float(sum(t.sum() for t in ewc.importance.values())) > 0


def test_a_second_sequence_on_the_same_trainer_starts_anew_and_keeps_what_was_learnt(tmp_path):
    ewc, matrix, recorder, module = EWC(1.0, samples=8), TaskMatrix(), Recorder(), Classifier()
    run = trainer(tmp_path, [ewc, matrix, recorder], max_epochs=1)
    fit_tasks(run, module, {"a": DataLoader(classification(0), 8)})
    first = {name: importance.clone() for name, importance in ewc.importance.items()}
    fit_tasks(run, module, {"b": DataLoader(classification(1), 8), "c": DataLoader(classification(2), 8)})
    assert steps_per_task(recorder) == [6, 6, 6]
    assert matrix.tasks == ["b", "c"]
    assert not matrix.matrix.isnan().any()
    assert ewc.tasks_done == 3
    assert all((ewc.importance[name] >= first[name]).all() for name in first)


def test_names_of_tasks_are_written_as_they_are(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_cl.callbacks.monitoring.progress.is_terminal", lambda: True)
    assert TaskPosition(1, "Deutsch NEU", 3).title == "Task 2/3 'Deutsch NEU'"
    progress = TaskProgress()
    with caplog.at_level("INFO"):
        used = trainer(tmp_path, [progress], max_steps=1, enable_progress_bar=True)
        fit_tasks(used, Classifier(), {"Deutsch NEU": DataLoader(classification(0), 8)})
    assert "Task 1/1 'Deutsch NEU': 1 steps" in caplog.text
    assert progress.train_progress_bar.desc.startswith("Task 1/1 'Deutsch NEU' · epoch")
