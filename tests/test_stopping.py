"""Exceptions, Ctrl-C and SIGTERM at awkward moments: nothing is done twice, nothing is swallowed, all of it resumes."""

from __future__ import annotations

import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from test_resume import Hard, differences, fingerprint
from toys import Classifier, classification, trainer

from lightning_cl import EWC, SI, Replay, TaskDataModule, TaskMatrix, fit_tasks
from lightning_cl.cli import command as cli
from lightning_cl.core.checkpoint_io import find_last_checkpoint
from lightning_cl.core.method import ContinualCallback
from lightning_cl.sequence.evaluate import evaluate_tasks

pytestmark = pytest.mark.filterwarnings("ignore")


class Interrupts(ContinualCallback):
    """Does something once, in an answer to a question, in the second task."""

    def __init__(self, what=None, question="on_task_end"):
        super().__init__()
        self.what, self.question = what, question

    def _act(self, question):
        if question == self.question and self.what is not None and self.task is not None and self.task.index == 1:
            what, self.what = self.what, None
            what()

    def on_task_end(self, trainer, pl_module):
        self._act("on_task_end")

    def observe_gradients(self, trainer, pl_module, optimizer, scale):
        self.seen = getattr(self, "seen", 0) + (self.task.index == 1)
        if self.seen == 3:
            self._act("observe_gradients")

    def after_step(self, trainer, pl_module, optimizer):
        if self.seen == 3:
            self._act("after_step")

    def at_boundary(self, trainer, pl_module, data, trained, ckpt_path=None):
        if trained == 2:
            self._act("at_boundary")


def fail():
    raise ZeroDivisionError("planned")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def run(root, ckpt_path=None, what=None, question="on_task_end", position=0, ewc=None, **settings):
    L.seed_everything(7, verbose=False)
    outputs = {"outputs": lambda module, batch: module(batch[0])}
    methods = {
        "ewc": ewc or EWC(1.0, samples=10, **outputs),
        "separate": EWC(0.1, mode="separate", samples=10, **outputs),
        "si": SI(1.0),
        "replay": Replay(20, 0.3),
        "matrix": TaskMatrix(),
    }
    listed = [*methods.values()]
    listed.insert(position, Interrupts(what, question))
    saving = OnExceptionCheckpoint(str(root), "exception")
    module = Hard()
    data = TaskDataModule({name: classification(i, 40) for i, name in enumerate("abc")}, batch_size=8)
    fit_tasks(trainer(root, [*listed, saving], **{"max_epochs": 1} | settings), module, data, ckpt_path)
    return module, methods


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    return fingerprint(*run(tmp_path_factory.mktemp("reference")))


@pytest.mark.parametrize("position", [0, 1, 5])
def test_an_exception_in_a_methods_end_does_no_end_twice(tmp_path, never_stopped, position):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "a", what=fail, position=position)
    state = torch.load(tmp_path / "a/exception.ckpt", weights_only=True)["lightning_cl"]
    assert {method["tasks_done"] for method in state["methods"].values()} == {1}  # all or nothing
    assert not state["ended"]
    assert not differences(
        never_stopped, fingerprint(*run(tmp_path / "b", tmp_path / "a/exception.ckpt", position=position))
    )


class HalfDone(EWC):
    """An exception after the importance was added and before the anchor was set."""

    fails = True

    def set_anchor(self, pl_module, names=None):
        if self.fails and self.task.index == 1:
            self.fails = False
            raise ZeroDivisionError("planned")
        super().set_anchor(pl_module, names)


def test_a_methods_end_is_all_or_nothing(tmp_path, never_stopped):
    def half(fails):
        method = HalfDone(1.0, samples=10, outputs=lambda module, batch: module(batch[0]))
        method.fails = fails
        method.__class__.__name__ = "EWC"
        return method

    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "a", ewc=half(True))
    resumed = run(tmp_path / "b", tmp_path / "a/exception.ckpt", ewc=half(False))
    assert not differences(never_stopped, fingerprint(*resumed))


@pytest.mark.parametrize("question", ["on_task_end", "observe_gradients", "after_step", "at_boundary"])
def test_sigterm_stops_wherever_it_comes_with_a_code_of_its_own(tmp_path, never_stopped, caplog, question):
    # Inside of a Fisher pass it is heeded between two batches: SI's and EWC's ends come after.
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"), pytest.raises(SystemExit) as caught:
        run(tmp_path / "a", what=terminate, question=question)
    assert caught.value.code == 143
    assert not any("Task 3/3" in record.getMessage() for record in caplog.records)
    assert any("To resume: fit_tasks(…, ckpt_path=" in record.getMessage() for record in caplog.records)
    last = find_last_checkpoint(tmp_path / "a")
    assert not differences(never_stopped, fingerprint(*run(tmp_path / "b", last)))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("question", ["on_task_end", "observe_gradients"])
def test_ctrl_c_is_one_again_and_can_be_given_again(tmp_path, question):
    """Lightning exits with code 1, and ignores Ctrl-C from then on: a notebook could not be stopped any more."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, what=interrupt, question=question)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_line_ends_with_130_after_ctrl_c(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "ContinualCLI", interrupted)
    with pytest.raises(SystemExit) as caught:
        cli.main(["fit"])
    assert caught.value.code == 130


def test_a_fresh_run_moves_no_file_of_its_own_aside(tmp_path):
    """What was written before the first task's end was taken for an earlier run's, and left there."""
    data = TaskDataModule({"a": classification(0)}, batch_size=8)
    for _ in range(2):
        methods = [EWC(samples=4, outputs=lambda module, batch: module(batch[0])), ModelCheckpoint()]
        fit_tasks(trainer(tmp_path, methods, max_epochs=1), Classifier(), data)
    assert [path.name for path in (tmp_path / "tasks").iterdir()] == ["0-a.ckpt"]
    assert [path.name for path in (tmp_path / "tasks-v1").iterdir()] == ["0-a.ckpt"]
    assert not (tmp_path / "tasks-v2").exists()


def test_training_is_kept_before_a_long_end_and_only_until_the_boundary(tmp_path, never_stopped):
    seen = []

    def kill():
        seen.extend(sorted(path.name for path in (tmp_path / "a/tasks").iterdir()))
        raise SystemExit(9)

    with pytest.raises(SystemExit):
        run(tmp_path / "a", what=kill, position=5)
    assert seen == ["0-a.ckpt", "1-b.trained.ckpt"]
    (tmp_path / "a/exception.ckpt").unlink()  # as if it had been a SIGKILL
    last = find_last_checkpoint(tmp_path / "a")
    assert last.name == "1-b.trained.ckpt"
    assert not differences(never_stopped, fingerprint(*run(tmp_path / "b", last, position=5)))
    assert sorted(path.name for path in (tmp_path / "b/tasks").iterdir()) == ["1-b.ckpt", "2-c.ckpt"]


@pytest.mark.parametrize(
    ("question", "accumulate", "reason"),
    [
        ("observe_gradients", 1, None),
        ("after_step", 1, "when the weights had moved already"),
        ("observe_gradients", 2, "accumulation window"),
    ],
)
def test_an_exception_inside_a_step_resumes_bit_for_bit_or_says_that_it_cannot(tmp_path, question, accumulate, reason):
    settings = {"accumulate_grad_batches": accumulate, "max_epochs": 2}
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "a", what=fail, question=question, **settings)
    path = tmp_path / "a/exception.ckpt"
    if reason is None:
        resumed = fingerprint(*run(tmp_path / "b", path, **settings))
        assert not differences(fingerprint(*run(tmp_path / "c", **settings)), resumed)
        return
    with pytest.warns(UserWarning, match=rf"{reason}.*not bit for\s+bit"):
        run(tmp_path / "b", path, **settings)


class Broken(Classifier):
    broken = False

    def validation_step(self, batch, batch_idx):
        if self.broken:
            raise ZeroDivisionError("planned")
        super().validation_step(batch, batch_idx)


def test_an_evaluation_that_raises_leaves_no_trace(tmp_path):
    module = Broken()
    data = TaskDataModule({"a": classification(0), "b": classification(1)}, batch_size=8)
    run = trainer(tmp_path, [ModelCheckpoint()])
    module.broken = True
    with pytest.raises(ZeroDivisionError):
        evaluate_tasks(run, module, data)
    assert (data.watch, data.driven) == (None, False)
    module.broken = False
    assert set(evaluate_tasks(trainer(tmp_path), module, data)) == {"a", "b"}


def test_no_validation_batches_are_named_as_the_cause(tmp_path):
    data = TaskDataModule({"a": classification(0)}, batch_size=8)
    with pytest.raises(Exception, match=r"TaskMatrix.*Trainer\(limit_val_batches=0\)"):
        fit_tasks(trainer(tmp_path, [TaskMatrix()], max_epochs=1, limit_val_batches=0), Classifier(), data)
