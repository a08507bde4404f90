"""All of Lightning's callbacks through two tasks: each starts a task clean, as a fresh one would, or is refused."""

from __future__ import annotations

import lightning as L
import lightning.pytorch.callbacks as theirs
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

from lightning_cl import EWC, TaskDataModule, TaskMatrix, fit_tasks

pytestmark = pytest.mark.filterwarnings("ignore")
EPOCHS = 4


class Finetuning(theirs.BaseFinetuning):
    """The first layer joins in the third epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Spikes(theirs.SpikeDetection):
    def __init__(self):
        super().__init__(warmup=1, exclude_batches_path=None)


class Writer(theirs.BasePredictionWriter):
    def write_on_epoch_end(self, *args):
        pass


USUAL = {
    "Callback": lambda root: Callback(),
    "Checkpoint": lambda root: theirs.Checkpoint(),
    "BaseFinetuning": lambda root: Finetuning(),
    "BasePredictionWriter": lambda root: Writer(),
    "DeviceStatsMonitor": lambda root: theirs.DeviceStatsMonitor(),
    "EarlyStopping": lambda root: theirs.EarlyStopping("val_loss", min_delta=0.02, patience=1),
    "GradientAccumulationScheduler": lambda root: theirs.GradientAccumulationScheduler({0: 1, 2: 2}),
    "LambdaCallback": lambda root: theirs.LambdaCallback(on_train_start=lambda *_: None),
    "LearningRateMonitor": lambda root: theirs.LearningRateMonitor(),
    "ModelCheckpoint": lambda root: theirs.ModelCheckpoint(monitor="val_loss", save_top_k=2),
    "ModelSummary": lambda root: theirs.ModelSummary(),
    "OnExceptionCheckpoint": lambda root: theirs.OnExceptionCheckpoint(str(root)),
    "RichModelSummary": lambda root: theirs.RichModelSummary(),
    "RichProgressBar": lambda root: theirs.RichProgressBar(),
    "SpikeDetection": lambda root: Spikes(),
    "StochasticWeightAveraging": lambda root: theirs.StochasticWeightAveraging(0.02, swa_epoch_start=2),
    "ThroughputMonitor": lambda root: theirs.ThroughputMonitor(lambda batch: len(batch[0]), window_size=4),
    "TQDMProgressBar": lambda root: theirs.TQDMProgressBar(),
    "Timer": lambda root: theirs.Timer(duration="00:01:00:00"),
}
REFUSED = {
    "BatchSizeFinder": lambda root: theirs.BatchSizeFinder(),
    "LearningRateFinder": lambda root: theirs.LearningRateFinder(),
    "ModelPruning": lambda root: theirs.ModelPruning("l1_unstructured", amount=0.5),
    "WeightAveraging": lambda root: theirs.WeightAveraging(),
    "EMAWeightAveraging": lambda root: theirs.EMAWeightAveraging(),
}
ELSEWHERE = {"BackboneFinetuning", "ProgressBar"}  # a BaseFinetuning for modules with a backbone; a base class


def test_all_of_lightnings_callbacks_are_here():
    assert {*USUAL, *REFUSED, *ELSEWHERE} == set(theirs.__all__)


class Seen(Callback):
    """The weights at each step, and where each task ended."""

    def __init__(self):
        self.steps, self.ends = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))

    def on_train_end(self, trainer, pl_module):
        self.ends.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))


def made(kind=Classifier):
    L.seed_everything(1, verbose=False)
    return kind()


def settings(root, name):
    own = {"max_epochs": EPOCHS, "log_every_n_steps": 2}
    if name in ("DeviceStatsMonitor", "LearningRateMonitor", "ThroughputMonitor"):
        own["logger"] = CSVLogger(root, "logs")
    if name.endswith("ProgressBar"):
        own["enable_progress_bar"] = True
    return own


TASKS = {"a": classification(0, 32), "b": classification(1, 32)}


def sequence(root, callbacks, name, module, ckpt_path=None, **more):
    data = TaskDataModule(TASKS, batch_size=8)
    run = trainer(root, callbacks, **settings(root, name) | more)
    fit_tasks(run, module, data, ckpt_path)
    return module


@pytest.mark.parametrize("name", USUAL)
def test_a_callback_starts_each_task_clean(tmp_path, name):
    seen, module = Seen(), made()
    sequence(tmp_path / "one", [USUAL[name](tmp_path / "one"), seen, TaskMatrix()], name, module)
    # A fresh callback, Trainer and optimizer for each task, on the same batches.
    fresh, other = Seen(), made()
    for index, task in enumerate(TASKS):
        data = TaskDataModule({task: TASKS[task]}, batch_size=8)
        data.train_loader = _as_in_the_sequence(data, index)
        root = tmp_path / f"fresh{index}"
        trainer(root, [USUAL[name](root), fresh], **settings(root, name)).fit(other, datamodule=data)
    assert len(seen.steps) == len(fresh.steps)
    assert all(map(torch.equal, seen.steps, fresh.steps))
    assert all(map(torch.equal, seen.ends, fresh.ends))
    assert all(map(torch.equal, module.parameters(), other.parameters()))


def _as_in_the_sequence(data, index):
    """The order of a task's batches comes from its number in the sequence."""
    original = data.train_loader

    def train_loader(task):
        loader = original(task)
        loader.seed = data.seed * 1_000_003 + index
        return loader

    return train_loader


@pytest.mark.parametrize("name", USUAL)
def test_a_run_that_is_killed_between_two_tasks_ends_as_one_that_was_not(tmp_path, name):
    def callbacks(root):
        saving = [] if name == "ModelCheckpoint" else [theirs.ModelCheckpoint()]
        return [USUAL[name](root), EWC(0.1, samples=4), *saving, seen]

    seen = Seen()
    reference = sequence(tmp_path / "a", callbacks(tmp_path / "a"), name, made())
    (boundary,) = (tmp_path / "a").rglob("0-a.ckpt")
    resumed = sequence(tmp_path / "b", callbacks(tmp_path / "b"), name, made(), boundary)
    assert all(map(torch.equal, reference.parameters(), resumed.parameters()))


@pytest.mark.parametrize("name", REFUSED)
def test_a_callback_that_cannot_start_anew_is_refused_with_a_reason(tmp_path, name):
    with pytest.raises(
        MisconfigurationException, match=rf"{name}, not with a sequence of tasks: it .*; (use|run|prune)"
    ):
        sequence(tmp_path, [REFUSED[name](tmp_path)], name, made())


class Counts(Callback):
    """Somebody's own, with a memory that it keeps in checkpoints."""

    def __init__(self):
        self.batches, self.all = 0, 0

    def on_train_batch_end(self, *_):
        self.batches += 1
        self.all += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


@pytest.mark.parametrize("over_tasks", [False, True])
def test_somebodys_own_callback_keeps_over_tasks_what_it_says(tmp_path, over_tasks):
    counts = Counts()
    counts.over_tasks = over_tasks
    sequence(tmp_path, [counts], "", made(), max_epochs=1)
    assert (counts.batches, counts.all) == (8 if over_tasks else 4, 8)


def test_a_second_plain_fit_that_trains_nothing_is_said(tmp_path):
    run, module = trainer(tmp_path, [EWC(outputs=lambda m, b: m(b[0]))], max_epochs=1), made()
    loader = DataLoader(TASKS["a"], 8)
    run.fit(module, loader)
    with pytest.warns(UserWarning, match=r"trainer.fit has trained no step.*fit_tasks"):
        run.fit(module, loader)


class Worse(Classifier):
    """A task that is at its best after its first epoch."""

    def on_train_epoch_start(self):
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.05 if self.trainer.current_epoch == 0 else 20.0


def test_a_task_can_end_with_its_best_weights(tmp_path):
    ewc, seen = EWC(1.0, samples=8, outputs=lambda m, b: m(b[0])), Seen()

    def run(root, ckpt_path=None, ewc=ewc):
        saver = theirs.ModelCheckpoint(monitor="val_loss", filename="best")
        module = made(Worse)
        fit_tasks(
            trainer(root, [ewc, saver, seen, TaskMatrix()], max_epochs=3),
            module,
            TaskDataModule(TASKS, batch_size=8),
            ckpt_path,
            load_best=True,
        )
        return module

    module = run(tmp_path / "a")
    best = torch.load(tmp_path / "a/checkpoints/1-b/best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(best[name], value) for name, value in module.state_dict().items())
    assert all(torch.equal(ewc.anchor[name], best[name]) for name in ewc.anchor)
    first = torch.load(tmp_path / "a/checkpoints/0-a/best.ckpt", weights_only=True)["state_dict"]
    start = torch.load(tmp_path / "a/tasks/0-a.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(first[name], start[name]) for name in first)
    resumed = run(tmp_path / "b", tmp_path / "a/tasks/0-a.ckpt", EWC(1.0, samples=8, outputs=lambda m, b: m(b[0])))
    assert all(torch.equal(best[name], value) for name, value in resumed.state_dict().items())


def test_without_a_score_there_is_no_best(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"load_best=True.*ModelCheckpoint"):
        fit_tasks(
            trainer(tmp_path, [theirs.ModelCheckpoint()], max_epochs=1),
            made(),
            TaskDataModule(TASKS, batch_size=8),
            load_best=True,
        )
