"""Stopped anywhere and resumed equals never stopped, bit for bit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import forked
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Replay, Task, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.core.checkpoint_io import find_last_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")


class Hard(Classifier):
    """Everything that makes resuming hard: dropout, batch norm, momentum, a schedule that reads the loader."""

    def __init__(self):
        super().__init__(dropout=0.3, batch_norm=True, lr=0.01, optimizer=torch.optim.AdamW)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        # Reading this makes Lightning lose the loader's place on a resume.
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def callbacks():
    return {
        "ewc": EWC(1.0, samples=10, outputs=lambda module, batch: module(batch[0])),
        "separate": EWC(0.1, mode="separate", apply="proximal", samples=10),
        "si": SI(1.0),
        "replay": Replay(20, 0.3),
        "matrix": TaskMatrix(),
        "checkpoint": ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, filename="{step}"),
    }


def run(root, ckpt_path=None, kind="data sets", **settings):
    L.seed_everything(7, verbose=False)
    module, methods = Hard(), callbacks()
    tasks = {name: classification(i, 40) for i, name in enumerate("abc")}
    if kind == "loaders":
        data = {name: DataLoader(dataset, 8, shuffle=True) for name, dataset in tasks.items()}
    else:
        data = TaskDataModule(tasks, batch_size=8)
    settings = {"max_epochs": 2} | settings
    fit_tasks(trainer(root, methods.values(), **settings), module, data, ckpt_path)
    return module, methods


def fingerprint(module, methods):
    """Everything that must be equal: weights, importances, anchors, buffer, matrix."""
    state = dict(module.state_dict())
    for name in ("ewc", "separate", "si"):
        state |= {f"{name}.importance.{key}": value for key, value in methods[name].importance.items()}
        state |= {f"{name}.anchor.{key}": value for key, value in methods[name].anchor.items()}
    buffer = methods["replay"].buffer
    for i, (sample, task) in enumerate(zip(buffer.items, buffer.tasks, strict=True)):
        state[f"buffer.{i}.{task}"] = torch.cat([part.flatten().double() for part in sample])
    state["buffer.seen"] = torch.tensor(buffer.seen)
    state["matrix"] = methods["matrix"].matrix
    return state


def differences(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("data sets", {"accumulate_grad_batches": 2}),
        ("loaders", {}),
        ("data sets", {"max_steps": 7, "max_epochs": -1}),
    ],
    ids=["accumulation", "plain loaders", "max_steps"],
)
def test_resume_from_every_checkpoint_equals_never_stopped(tmp_path, kind, settings):
    reference = fingerprint(*run(tmp_path / "reference", kind=kind, **settings))
    checkpoints = sorted((tmp_path / "reference").rglob("*.ckpt"))
    assert len(checkpoints) >= 10
    for number, checkpoint in enumerate(checkpoints):
        resumed = fingerprint(*run(tmp_path / f"resumed{number}", checkpoint, kind=kind, **settings))
        assert not differences(reference, resumed), checkpoint


def test_resume_after_the_last_step_before_the_task_end(tmp_path):
    """Lightning writes its last checkpoint of a task before the Fisher pass; nothing is left to train, all to
    measure."""
    reference = fingerprint(*run(tmp_path / "reference", max_steps=6, max_epochs=-1))
    checkpoint = tmp_path / "reference" / "checkpoints" / "1-b" / "step=12.ckpt"
    state = torch.load(checkpoint, weights_only=True)["lightning_cl"]
    assert state["started"]
    assert not state["ended"]
    resumed = fingerprint(*run(tmp_path / "resumed", checkpoint, max_steps=6, max_epochs=-1))
    assert not differences(reference, resumed)


def test_checkpoints_hold_no_pickle(tmp_path):
    run(tmp_path)
    for path in tmp_path.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["lightning_cl"]
        assert set(state["methods"]) == {"EWC", "EWC-2", "SI", "Replay", "TaskMatrix"}
    boundary = torch.load(tmp_path / "tasks" / "0-a.ckpt", weights_only=True)
    assert boundary["lightning_cl"]["index"] == 1
    assert boundary["optimizer_states"] == []


def test_resume_with_another_strength_is_allowed(tmp_path):
    run(tmp_path / "1")
    methods = callbacks()
    methods["ewc"].strength = 5.0
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("abc")}, batch_size=8)
    checkpoint = tmp_path / "1" / "tasks" / "0-a.ckpt"
    fit_tasks(trainer(tmp_path / "2", methods.values(), max_epochs=2), Hard(), data, checkpoint)
    assert methods["ewc"].tasks_done == 3


def test_a_missing_callback_is_an_error(tmp_path):
    run(tmp_path / "1")
    checkpoint = tmp_path / "1" / "tasks" / "0-a.ckpt"
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("abc")}, batch_size=8)
    without = [method for name, method in callbacks().items() if name != "si"]
    with pytest.raises(MisconfigurationException, match=r"\['SI'\].*would be lost"):
        fit_tasks(trainer(tmp_path / "2", without, max_epochs=2), Hard(), data, checkpoint)


def test_a_callback_that_the_checkpoint_does_not_know_is_an_error(tmp_path):
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("ab")}, batch_size=8)
    fit_tasks(trainer(tmp_path, [ModelCheckpoint(tmp_path)], max_epochs=1), Hard(), data)
    with pytest.raises(MisconfigurationException, match=r"\['EWC'\], about which the checkpoint knows nothing"):
        fit_tasks(trainer(tmp_path, [EWC()], max_epochs=1), Hard(), data, tmp_path / "tasks" / "0-a.ckpt")


def test_other_tasks_than_the_checkpoints_are_an_error(tmp_path):
    run(tmp_path / "1")
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("xb")}, batch_size=8)
    with pytest.raises(MisconfigurationException, match=r"\['a', 'b'\].*\['x', 'b'\]"):
        fit_tasks(
            trainer(tmp_path / "2", callbacks().values(), max_epochs=2),
            Hard(),
            data,
            tmp_path / "1" / "tasks" / "1-b.ckpt",
        )


def test_a_checkpoint_of_plain_lightning_is_refused(tmp_path):
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(Hard(), DataLoader(classification(0), 8))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(MisconfigurationException, match="not written by fit_tasks"):
        fit_tasks(
            trainer(tmp_path, max_epochs=1), Hard(), {"a": DataLoader(classification(0), 8)}, tmp_path / "plain.ckpt"
        )


@pytest.mark.parametrize("cut", [0.0, 0.3, 0.999])
def test_a_cut_off_checkpoint_is_named_and_never_picked_as_the_last(tmp_path, cut):
    run(tmp_path / "1", max_epochs=1)
    whole, broken = tmp_path / "1" / "tasks" / "0-a.ckpt", tmp_path / "1" / "tasks" / "9-z.ckpt"
    content = whole.read_bytes()
    broken.write_bytes(content[: int(cut * len(content))])
    os.utime(broken, (time.time() + 60, time.time() + 60))
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("abc")}, batch_size=8)
    with pytest.raises(ValueError, match=r"9-z\.ckpt.*damaged"):
        fit_tasks(trainer(tmp_path / "2", callbacks().values(), max_epochs=1), Hard(), data, broken)
    assert find_last_checkpoint(tmp_path / "1") != broken


def test_last_without_any_checkpoint_says_where_it_looked(tmp_path):
    data = TaskDataModule({"a": classification(0)})
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        fit_tasks(trainer(tmp_path, max_epochs=1), Classifier(), data, "last")


SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}, {root!r}]
import test_resume
root, mode = sys.argv[1], sys.argv[2]
module, methods = test_resume.run(root, "last" if mode == "resume" else None, max_epochs=4)
torch.save(test_resume.fingerprint(module, methods), sys.argv[3])
"""


def test_killed_at_any_moment_and_resumed_equals_never_killed(tmp_path):
    """SIGKILL from outside, several times in one run: in a step, in a Fisher pass, in a write, at a boundary."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), root=str(Path(__file__).parents[1])))

    def start(root, mode, out):
        return forked.start(script, root, mode, out)

    with start(tmp_path / "whole", "new", tmp_path / "whole.pt") as process:
        assert process.wait(120) == 0, process.stderr
    root, kills = tmp_path / "killed", 0
    process = start(root, "new", tmp_path / "killed.pt")
    for checkpoints in (1, 9, 17, 26):
        # Not at a set time, which says nothing on a busy machine: after so many checkpoints, somewhere behind them.
        while process.poll() is None and len(list(root.rglob("*.ckpt"))) < checkpoints:
            time.sleep(0.005)
        time.sleep(0.007 * kills)
        if process.poll() is None:
            process.close()
            kills += 1
            process = start(root, "resume", tmp_path / "killed.pt")
    with process:
        assert process.wait(120) == 0, process.stderr
    assert kills >= 3
    one = torch.load(tmp_path / "whole.pt", weights_only=True)
    other = torch.load(tmp_path / "killed.pt", weights_only=True)
    assert not differences(one, other)


@pytest.mark.parametrize(("batches", "steps"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (2, 5)])
def test_from_a_boundary_into_a_short_task_with_validation(tmp_path, batches, steps):
    """Where a pass is short and steps are counted, Lightning took the first pass of the new task for finished."""

    def run(root, ckpt_path=None):
        torch.manual_seed(0)
        module = Classifier()
        tasks = [Task(name, classification(i, 4 * batches), val=classification(i + 5)) for i, name in enumerate("ab")]
        run = trainer(root, [ModelCheckpoint(root)], max_steps=steps, num_sanity_val_steps=0)
        fit_tasks(run, module, TaskDataModule(tasks, batch_size=2), ckpt_path)
        return module.state_dict()

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", tmp_path / "whole" / "tasks" / "0-a.ckpt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
