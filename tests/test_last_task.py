"""The cost of a task's end: in the plan, and saved at the last task where the user says so."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from test_resume import Hard, differences
from toys import classification, trainer

from lightning_cl import EWC, MAS, Replay, Task, TaskDataModule, fit_tasks
from lightning_cl.callbacks import KFACEWC
from lightning_cl.passes.task_samples import TaskSamples

pytestmark = pytest.mark.filterwarnings("ignore")


def logits(module, batch):
    return module(batch[0])


def methods(last_task):
    return [
        EWC(1.0, samples=10, outputs=logits, last_task=last_task),
        EWC(0.1, mode="separate", samples=10, estimator="empirical", last_task=last_task),
        MAS(0.1, samples=6, outputs=logits, last_task=last_task),
        KFACEWC(0.1, samples=8, outputs=logits, estimator="sample", last_task=last_task),
    ]


def run(root, tasks, last_task, ckpt_path=None, extra=(), used=None):
    L.seed_everything(7, verbose=False)
    module, used = Hard(), methods(last_task) if used is None else used
    data = TaskDataModule({name: classification("abc".index(name), 24) for name in tasks}, batch_size=8)
    fit_tasks(trainer(root, [*used, ModelCheckpoint(), *extra], max_epochs=1), module, data, ckpt_path)
    state = dict(module.state_dict())
    for number, method in enumerate(used):
        state |= {f"{number}.{name}": value for name, value in method.importance.items()}
        state |= {f"{number}.anchor.{name}": value for name, value in method.anchor.items()}
        for name, pair in getattr(method, "factors", {}).items():
            state |= {f"{number}.{name}.{side}": value for side, value in enumerate(pair)}
        state[f"{number}.done"] = torch.tensor([method.tasks_done, len(method.report()["importance"])])
    return state


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The first two tasks are measured at their ends, the third not."""
    return run(tmp_path_factory.mktemp("reference"), "abc", False)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The second task is the last, and not measured."""
    root = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        passed, probe = [], TaskSamples.probe
        patch.setattr(TaskSamples, "probe", lambda self, count: passed.append(self.label) or probe(self, count))
        state = run(root, "ab", False)
    return root / "tasks" / "1-b.ckpt", state, passed


def test_the_last_task_is_measured_when_another_is_added_with_the_same_result(tmp_path, never_stopped, short):
    boundary, state, passed = short
    assert len(passed) == 4
    assert all("'a'" in label for label in passed)
    assert state["0.done"].tolist() == [2, 1]
    longer = run(tmp_path, "abc", False, boundary)
    assert longer["0.done"].tolist() == [3, 2]
    assert not differences(never_stopped, longer)


def test_an_exception_while_it_is_made_up_for_and_a_resume_equal_never_stopped(tmp_path, never_stopped, short):
    """What is measured at a task's start is a part of the start: all or nothing, as an end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MAS, "consolidate", lambda *args: fail())
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "1", "abc", False, short[0], [OnExceptionCheckpoint(tmp_path / "1", "stopped")])
    resumed = run(tmp_path / "2", "abc", False, tmp_path / "1" / "stopped.ckpt")
    assert not differences(never_stopped, resumed)


def fail():
    torch.rand(3)
    raise ZeroDivisionError("planned")


def test_a_plain_fit_cannot_know_which_task_is_the_last(tmp_path):
    ewc = EWC(1.0, samples=8, outputs=logits, last_task=False)
    trainer(tmp_path, [ewc], max_epochs=1).fit(Hard(), torch.utils.data.DataLoader(classification(0, 16), 8))
    assert ewc.importance


def test_another_sequence_says_what_was_never_measured(tmp_path):
    used = methods(False)
    run(tmp_path / "1", "a", False, used=used)
    with pytest.warns(UserWarning, match=r"EWC\(last_task=False\).*'a', was not measured"):
        run(tmp_path / "2", "bc", False, used=used)


def test_what_a_task_end_takes_stands_in_the_plan(tmp_path, caplog):
    """400 samples in batches of 8 against 6 steps of 8: 1.2 · 400 / 48 = 10 times."""
    ewc = EWC(samples=400, outputs=logits, last_task=False)
    mas = MAS(samples=16, batch_size=4, outputs=logits)
    tasks = [Task("a", classification(0, 400), max_steps=6), Task("b", classification(1, 400), max_steps=50)]
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit_tasks(trainer(tmp_path, [ewc, mas], fast_dev_run=True), Hard(), TaskDataModule(tasks, batch_size=8))
    plan = next(record.getMessage() for record in caplog.records if "Preflight" in record.getMessage())
    first, last = plan.split("  2. b:")
    assert "at its end: 50 Fisher batches, 4 importance batches, about 10 times its training" in first
    assert "at its end: 4 importance batches, about 5% of its training" in last


@pytest.mark.parametrize(("policy", "long"), [("reservoir", False), ("surprise", True)])
def test_a_buffer_whose_policy_looks_at_all_samples_has_a_long_end(tmp_path, caplog, policy, long):
    """40 samples forward only, a third of a training pass each, after 5 steps of 8: a third of the training."""
    replay = Replay(10, policy=policy)
    data = TaskDataModule({"a": classification(0, 40), "b": classification(1, 40)}, batch_size=8)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit_tasks(trainer(tmp_path, [replay], fast_dev_run=True, max_epochs=1), Hard(), data)
    assert replay.ends_long is long
    assert ("at its end: 5 ranking batches" in caplog.text) is long


@pytest.mark.parametrize("value", [None, "no", 1])
def test_last_task_is_true_or_false(value):
    with pytest.raises(ValueError, match=r"last_task=.*expected True or False"):
        EWC(last_task=value)
