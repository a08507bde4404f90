"""A checkpoint that is written while a task ends, or is evaluated: resumed equals never stopped, bit for bit."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from test_resume import Hard, differences
from toys import classification, trainer

import lightning_cl.evaluation
from lightning_cl import EWC, MAS, SI, LwF, Replay, RWalk, Task, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.callbacks import KFACEWC
from lightning_cl.core.method import ContinualCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(module, batch):
    return module(batch[0])


class Bomb(ContinualCallback):
    """Ends the run while the second task ends, or is evaluated."""

    def __init__(self, error=None, where="end"):
        super().__init__()
        self.error, self.where = error, where

    def on_task_end(self, trainer, pl_module):
        if self.where == "end" and self.task.index == 1 and self.error is not None:
            torch.rand(3)  # a pass that draws, and gives nothing back
            raise self.error


class Evaluated(Hard):
    bomb = None

    def validation_step(self, batch, batch_idx):
        coordinator = next(c for c in self.trainer.callbacks if type(c).__name__ == "TaskCoordinator")
        between = self.trainer.state.fn == "validate"
        if self.bomb is not None and between and coordinator.ended and coordinator.position.index == 1:
            torch.rand(3)
            raise self.bomb
        super().validation_step(batch, batch_idx)


def methods_with(bomb, place):
    methods = [
        EWC(1.0, samples=10, outputs=logits),
        EWC(0.1, mode="separate", apply="proximal", samples=10, estimator="empirical"),
        Replay(20, 0.3),
        SI(0.5),
        RWalk(0.5, every=2),
        MAS(0.1, samples=6, outputs=logits),
        LwF(0.5, outputs=logits),
        KFACEWC(0.1, samples=8, outputs=logits, estimator="empirical"),
        TaskMatrix(),
    ]
    methods.insert(place, bomb)
    return methods


def run(root, bomb=None, place=9, ckpt_path=None, evaluation=None, more=(), **settings):
    L.seed_everything(7, verbose=False)
    module, methods = Evaluated(), methods_with(bomb or Bomb(), place)
    module.bomb = evaluation
    tasks = [Task(name, classification(i, 24), val=classification(i + 5, 16)) for i, name in enumerate("abc")]
    savers = [OnExceptionCheckpoint(root, "stopped"), ModelCheckpoint(save_on_exception=True), *more]
    run = trainer(root, [*methods, *savers], **{"max_epochs": 2, "num_sanity_val_steps": 0} | settings)
    fit_tasks(run, module, TaskDataModule(tasks, batch_size=8), ckpt_path)
    return fingerprint(module, methods)


def fingerprint(module, methods):
    state = dict(module.state_dict())
    for number, method in enumerate(m for m in methods if not isinstance(m, Bomb)):
        state[f"{number}.done"] = torch.tensor(method.tasks_done)
        values = method.continual_state()
        if isinstance(method, Replay):
            items = method.buffer.items
            values = {"items": [torch.cat([part.flatten().double() for part in item]) for item in items]}
            values["seen"] = method.buffer.seen
        if isinstance(method, TaskMatrix):
            values = {"matrix": method.matrix}
        flatten(state, f"{number}.{type(method).__name__}", values)
    return state


def flatten(into, name, value):
    if isinstance(value, torch.Tensor):
        into[name] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            flatten(into, f"{name}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for key, inner in enumerate(value):
            flatten(into, f"{name}.{key}", inner)
    elif isinstance(value, (int, float)):
        into[name] = torch.tensor(value)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_report", "format_report"):
            patch.setattr(lightning_cl.evaluation, name, lambda *args: "")
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(("place", "error"), [(4, KeyboardInterrupt()), (9, RuntimeError("full"))])
def test_an_exception_in_a_task_end_and_a_resume_equal_never_stopped(tmp_path, reference, place, error):
    """Methods before the failing one had done their end, and did it again: importances were doubled."""
    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        run(tmp_path / "1", Bomb(error), place)
    of_lightning = sorted((tmp_path / "1" / "checkpoints" / "1-b").glob("*.ckpt"))
    assert len(of_lightning) == 1  # Lightning's own, of the end of an epoch, is the best so far, and replaced
    for path in (tmp_path / "1" / "stopped.ckpt", *of_lightning):
        resumed = run(tmp_path / path.stem, place=place, ckpt_path=path)
        assert not differences(reference, resumed), path


def test_an_exception_in_the_midst_of_a_methods_own_end(tmp_path, reference, monkeypatch):
    """The importance was added and the anchor not yet set."""
    set_anchor = EWC.set_anchor

    def fail(self, *args, **kwargs):
        if self.task.index == 1:
            raise RuntimeError("out of memory")
        set_anchor(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EWC, "set_anchor", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path / "1")
    assert not differences(reference, run(tmp_path / "2", ckpt_path=tmp_path / "1" / "stopped.ckpt"))


def test_an_exception_in_the_evaluation_between_tasks_and_a_resume_equal_never_stopped(tmp_path, reference):
    with pytest.raises(RuntimeError, match="evaluation"):
        run(tmp_path / "1", evaluation=RuntimeError("in an evaluation"))
    assert not differences(reference, run(tmp_path / "2", ckpt_path=tmp_path / "1" / "stopped.ckpt"))


def test_a_task_that_was_stopped_early_stays_so_on_a_resume(tmp_path):
    """Lightning keeps in no checkpoint that training was told to stop: a resume trained on."""

    def stopping():
        return [EarlyStopping("val_loss", patience=1, min_delta=10.0)]

    reference = run(tmp_path / "0", more=stopping(), max_epochs=9)
    with pytest.raises(RuntimeError):
        run(tmp_path / "1", Bomb(RuntimeError("full")), more=stopping(), max_epochs=9)
    resumed = run(tmp_path / "2", more=stopping(), max_epochs=9, ckpt_path=tmp_path / "1" / "stopped.ckpt")
    assert not differences(reference, resumed)


def test_a_plain_fit_after_a_failed_end_ends_the_task_once(tmp_path):
    """Without a checkpoint, in the same process."""
    bomb, ewc = Bomb(RuntimeError("full")), EWC(1.0, samples=8, outputs=logits)
    bomb.where, fails = "never", []

    def once(trainer, pl_module):
        if not fails:
            fails.append(True)
            raise RuntimeError("full")

    bomb.on_task_end = once
    run, module = trainer(tmp_path, [ewc, bomb], max_epochs=1), Hard()
    loader = torch.utils.data.DataLoader(classification(0, 16), 8)
    with pytest.raises(RuntimeError):
        run.fit(module, loader)
    assert ewc.tasks_done == 1  # the first of two had done its end
    run.fit_loop.max_epochs = 2
    run.fit(module, loader)
    assert ewc.tasks_done == 1
    assert len(ewc.report()["importance"]) == 1
